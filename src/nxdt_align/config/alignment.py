"""The section ``model_alignment_strategy``: what the model is trained for. Part of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nxdt_align.config.fields import PATH

Objective = Literal["dpo", "orpo", "cpo", "simpo", "kto", "sft"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
TruncationMode = Literal["keep_start", "keep_end"]

DPOLossType = Literal[
    "sigmoid",
    "robust",
    "ipo",
    "hinge",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
"""The values that model_alignment_strategy.dpo.loss_type may have."""

ABSOLUTE_LOSSES = frozenset(
    {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
)
"""Those that are no function of the difference of the two rewards: they need a reference, and DPO's
reverse KL."""
SORTING_LOSSES = frozenset({"aot", "aot_unpaired"})
"""Those that compare ranks in the global batch."""
SMOOTHED_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"})
"""Those that label_smoothing counts for."""

MAX_PROMPT_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (https://arxiv.org/abs/2305.18290)."""

    kl_beta: float = 0.01
    """Weight of the KL divergence from the reference: beta of the paper's equation 7."""
    loss_type: DPOLossType | tuple[DPOLossType, ...] = "sigmoid"
    """Form of the loss, see docs/objectives.md; a list is a sum of several, weighted by loss_weights."""
    loss_weights: tuple[float, ...] | None = None
    """(ours) Weight of each form where loss_type is a list; null: 1 each."""
    label_smoothing: float | None = None
    """(ours) Share of the labels taken for wrong, from 0 to below 0.5: with sigmoid conservative DPO;
    counts for robust, exo_pair, aot and sigmoid_norm too; null: 0, and 0.001 for exo_pair."""
    gamma: float | None = None
    """(ours) Scale of the margin in loss_type hinge (RSO); null: kl_beta."""
    discopop_tau: float = 0.05
    """(ours) Temperature of loss_type discopop."""
    bco_reward_shift: Literal["running_mean", "none"] = "running_mean"
    """(ours) What loss_type bco_pair takes off the rewards: running_mean: their mean so far (the paper);
    none: nothing (TRL 1.16)."""
    reference_free: bool = False
    """(ours) Leave the reference out, as if it were uniform."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """(ours) Divergence from the reference that is held small."""
    f_alpha_divergence_coef: float = 0.5
    """(ours) alpha of alpha_divergence."""
    length_normalization: bool | None = None
    """(ours) Divide log-ratios by the response's tokens; null: as loss_type has it (ipo and sigmoid_norm
    do)."""
    ld_alpha: float | None = None
    """(ours) What tokens beyond the shorter response of a pair count (LD-DPO), from 0 to 1; null: 1."""
    use_weighting: bool = False
    """(ours) Weigh each pair by how likely the policy finds it (WPO)."""
    nll_scale: float = 0.0
    """(ours) Weight of the chosen response's negative log-likelihood a token, added to the loss."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """Tokens of a prompt that are kept, BOS and the last ones. Where it is not given: 2048, or half of
    data.seq_length where that is less."""
    precompute_ref_log_probs: bool = True
    """Compute the reference log-probabilities once before training, and keep them on disk; False:
    compute them at each step, with the reference in memory."""
    truncation_mode: TruncationMode = "keep_start"
    """What gives way where prompt and response exceed data.seq_length. keep_start: the response's end;
    keep_end: the prompt's start after BOS."""

    @property
    def loss_types(self) -> tuple[DPOLossType, ...]:
        """``loss_type`` as a list of one or several."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type


@dataclass(frozen=True, kw_only=True)
class ORPOConfig:
    """Odds ratio preference optimization (https://arxiv.org/abs/2403.07691)."""

    beta: float = 0.1
    """Weight of the odds-ratio term: lambda of the paper's equation 6. NxDT's tutorial has 0.1 in its
    sample and 0.01 in its table."""
    nll_scale: float = 1.0
    """(ours) Weight of the chosen response's negative log-likelihood a token."""
    nll_tokens: Literal["response", "prompt_and_response"] = "response"
    """(ours) Which tokens that likelihood is of: the response's, as NxDT has it, or the prompt's from the
    second on as well, as TRL and the paper's code have it."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """As for dpo."""
    truncation_mode: TruncationMode = "keep_start"
    """As for dpo."""


@dataclass(frozen=True, kw_only=True)
class CPOConfig:
    """Contrastive preference optimization (https://arxiv.org/abs/2401.08417). All keys are ours."""

    beta: float = 0.1
    """Scale of the difference of the responses' log-probabilities."""
    nll_scale: float = 1.0
    """Weight of the chosen response's negative log-likelihood a token: TRL's cpo_alpha."""
    label_smoothing: float = 0.0
    """Share of the labels taken for wrong, from 0 to below 0.5."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """As for dpo."""
    truncation_mode: TruncationMode = "keep_start"
    """As for dpo."""


@dataclass(frozen=True, kw_only=True)
class SimPOConfig:
    """Simple preference optimization (https://arxiv.org/abs/2405.14734). All keys are ours."""

    beta: float = 2.0
    """Scale of the difference of the responses' mean log-probabilities a token."""
    gamma: float = 0.5
    """Target margin between the rewards (TRL's simpo_gamma): the paper's gamma / beta ratio times beta."""
    nll_scale: float = 0.0
    """Weight of the chosen response's negative log-likelihood a token (fairseq2)."""
    label_smoothing: float = 0.0
    """Share of the labels taken for wrong, from 0 to below 0.5."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """As for dpo."""
    truncation_mode: TruncationMode = "keep_start"
    """As for dpo."""


@dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """Kahneman-Tversky optimization (https://arxiv.org/abs/2402.01306). All keys are ours."""

    beta: float = 0.1
    """Strength of the pull to the reference."""
    desirable_weight: float = 1.0
    """Weight of completions whose label is true."""
    undesirable_weight: float = 1.0
    """Weight of completions whose label is false."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """As for dpo."""
    precompute_ref_log_probs: bool = True
    """As for dpo."""
    truncation_mode: TruncationMode = "keep_start"
    """As for dpo."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning, on responses alone unless told otherwise."""

    packing: bool = False
    """Lay several records into a row, each attending to itself alone; False pads every row."""
    train_on_prompt: bool = False
    """(ours) Train on the prompt's tokens too, from the second on (torchtune's train_on_input)."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """(ours) As for dpo."""
    truncation_mode: TruncationMode = "keep_start"
    """(ours) As for dpo."""


ObjectiveConfig = DPOConfig | ORPOConfig | CPOConfig | SimPOConfig | KTOConfig | SFTConfig


@dataclass(frozen=True, kw_only=True)
class PEFTConfig:
    """LoRA adapters (https://arxiv.org/abs/2106.09685) instead of training every weight."""

    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """Dropout probability before each adapter."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained."""
    lora_verbose: bool = False
    """Log what gets an adapter."""
    target_modules: tuple[str, ...] = ("qkv_proj",)
    """Layers that get an adapter: qkv_proj, o_proj, gate_up_proj, down_proj."""
    load_lora_from_ckpt: bool = False
    """Take adapters from the start checkpoint."""
    save_lora_base: bool = False
    """Save the base model's weights too."""
    merge_lora: bool = False
    """Save the model with the adapters added in."""
    save_lora_config_adapter: bool = False
    """Save the adapters' settings beside them."""
    merge_sharded_lora: bool = False
    """Save the adapters' shards as one."""


@dataclass(frozen=True, kw_only=True)
class ModelAlignmentStrategyConfig:
    """The objective: exactly one of dpo, orpo, cpo, simpo, kto and sft."""

    dpo: DPOConfig | None = None
    orpo: ORPOConfig | None = None
    cpo: CPOConfig | None = None
    simpo: SimPOConfig | None = None
    kto: KTOConfig | None = None
    sft: SFTConfig | None = None
    peft: PEFTConfig | None = None
    loss: str | None = None
    """(ours) Loss of one's own as a dotted path, module.name, called as (policy, reference), in the place
    of the objective's own; the objective still says what the data are."""
    loss_settings: Mapping[str, Any] | None = None
    """(ours) Keyword settings that ``loss`` is made with."""
    reference_model: str | None = field(default=None, metadata=PATH)
    """(ours) Folder of the reference's weights; null: the weights that training starts from."""
    reference_dtype: Literal["fp32", "bf16"] | None = None
    """(ours) Number format that the reference computes in; null: that of the policy."""

    @property
    def objective(self) -> Objective:
        """The one that is set. Raises ValueError where none or several are (check() reports that)."""
        chosen = [name for name in OBJECTIVES if getattr(self, name) is not None]
        if len(chosen) != 1:
            names = ", ".join(OBJECTIVES)
            raise ValueError(f"exactly one of {names} must be set, but {chosen or 'none'} are")
        return chosen[0]

    @property
    def active(self) -> ObjectiveConfig:
        """The settings of ``objective``."""
        settings: ObjectiveConfig = getattr(self, self.objective)
        return settings

    @property
    def precompute_ref_log_probs(self) -> bool:
        """Whether a reference is asked before training; so where the objective's own loss has none."""
        settings = self.active
        return not isinstance(settings, DPOConfig | KTOConfig) or settings.precompute_ref_log_probs

    @property
    def max_prompt_length(self) -> int:
        return self.active.max_prompt_length

    @property
    def truncation_mode(self) -> TruncationMode:
        return self.active.truncation_mode
