"""The section ``model_alignment_strategy``: the objective. Part of the schema."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.config.faults import Fault
from nxdt_align.config.fields import AUTO, PATH, is_dotted, number

TruncationMode = Literal["keep_start", "keep_end"]
Examples = Literal["pair", "response", "unpaired"]
"""An objective's examples: a chosen and a rejected response, one response, or a labelled one."""

if TYPE_CHECKING:
    DPOLossType = str
else:
    DPOLossType = Literal[tuple(FORMS)]
    """The values that model_alignment_strategy.dpo.loss_type may have."""

MAX_PROMPT_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class PromptLimits:
    """Truncation of prompts and responses, common to all objectives."""

    max_prompt_length: int = number(MAX_PROMPT_LENGTH, AUTO, at_least=1)
    """Tokens kept of a prompt: BOS and the last ones. Default: 2048, or half of data.seq_length if that is
    less; three quarters of it where that is auto."""
    truncation_mode: TruncationMode = "keep_start"
    """What is cut if prompt and response exceed data.seq_length. keep_start: the response's end; keep_end:
    the prompt's start after BOS."""


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PromptLimits):
    """Direct preference optimization (https://arxiv.org/abs/2305.18290)."""

    kl_beta: float = number(0.01, above=0)
    """Weight of the KL divergence from the reference: beta of the paper's equation 7."""
    loss_type: DPOLossType | tuple[DPOLossType, ...] = "sigmoid"
    """Form of the loss, see docs/objectives.md; a list is a sum of several, weighted by loss_weights."""
    loss_weights: tuple[float, ...] | None = None
    """(ours) Weight of each form where loss_type is a list; null: 1 each."""
    label_smoothing: float | None = number(None, at_least=0, below=0.5)
    """(ours) Assumed fraction of flipped labels, from 0 to below 0.5: conservative DPO with sigmoid; also
    read by robust, exo_pair, aot and sigmoid_norm; null: 0, or 0.001 for exo_pair."""
    gamma: float | None = number(None, above=0)
    """(ours) Scale of the margin in loss_type hinge (RSO); null: kl_beta."""
    discopop_tau: float = number(0.05, above=0)
    """(ours) Temperature of loss_type discopop."""
    bco_reward_shift: Literal["running_mean", "none"] = "running_mean"
    """(ours) Shift that loss_type bco_pair subtracts from the rewards. running_mean: their mean so far (the
    paper); none: 0 (TRL 1.16)."""
    reference_free: bool = False
    """(ours) Use no reference, as if it were uniform."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """(ours) Divergence from the reference that the objective penalises."""
    f_alpha_divergence_coef: float = 0.5
    """(ours) alpha of alpha_divergence."""
    length_normalization: bool | None = None
    """(ours) Divide log-ratios by the response's tokens; null: as loss_type does (ipo and sigmoid_norm
    divide)."""
    ld_alpha: float | None = number(None, at_least=0, at_most=1)
    """(ours) Weight of tokens beyond the length of a pair's shorter response (LD-DPO), from 0 to 1; null:
    1."""
    use_weighting: bool = False
    """(ours) Weigh each pair by how likely the policy finds it (WPO)."""
    nll_scale: float = number(0.0, at_least=0)
    """(ours) Weight of the chosen response's negative log-likelihood per token, added to the loss."""
    precompute_ref_log_probs: bool = True
    """Compute the reference log-probabilities once before training and store them on disk; False:
    compute them at each step, with the reference in memory."""

    @property
    def loss_types(self) -> tuple[DPOLossType, ...]:
        """``loss_type`` as a list of one or several."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    def faults(self) -> Iterator[Fault]:
        """Meaningless combinations, and unknown forms."""
        if not self.loss_types:
            yield Fault("loss_type", "must name at least one loss", [])
        for name in self.loss_types:
            if name in FORMS:
                yield from self._combinations(name)
            elif not isinstance(self.loss_type, str):  # a single one is checked like any other key's choices
                yield Fault("loss_type", f"must be one of {', '.join(FORMS)}", name)
        if self.reference_free and self.f_divergence_type != "reverse_kl":
            kind = self.f_divergence_type
            rule = f"must be False with f_divergence_type {kind}, a divergence from a reference"
            yield Fault("reference_free", rule, True, involves=("f_divergence_type",))
        if self.loss_weights is not None:
            yield from self._weights(self.loss_weights)

    def _combinations(self, name: DPOLossType) -> Iterator[Fault]:
        form, involves = FORMS[name], ("loss_type",)
        if not form.of_difference and self.reference_free:
            without = ", ".join(other for other in FORMS if FORMS[other].of_difference)
            rule = f"must be False with loss_type {name}, which needs a reference"
            yield Fault("reference_free", rule, True, f"these need none: {without}", involves)
        if not form.of_difference and self.f_divergence_type != "reverse_kl":
            rule = f"must be reverse_kl with loss_type {name}"
            yield Fault("f_divergence_type", rule, self.f_divergence_type, involves=involves)
        if form.sorts and self.use_weighting:
            rule = f"must be False with loss_type {name}, which sorts, so pairs have no separate losses"
            yield Fault("use_weighting", rule, True, involves=involves)
        if form.smoothing and self.label_smoothing == 0:
            rule = f"must be above 0 with loss_type {name}, whose target it is"
            advice = f"leave it out for the paper's {form.smoothing:g}"
            yield Fault("label_smoothing", rule, 0.0, advice, involves)
        if form.normalised and form.function and self.length_normalization is False:
            rule = f"must not be False with loss_type {name}"
            advice = f"loss_type {form.function} is the form without it"
            yield Fault("length_normalization", rule, advice=advice, involves=involves)

    def _weights(self, weights: tuple[float, ...]) -> Iterator[Fault]:
        count = len(self.loss_types)
        if len(weights) != count:
            rule = f"must have one weight for each loss_type ({count}: {', '.join(self.loss_types)})"
            yield Fault("loss_weights", rule, weights, involves=("loss_type",))
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            yield Fault("loss_weights", "must be at least 0, and not all 0", weights)


@dataclass(frozen=True, kw_only=True)
class ORPOConfig(PromptLimits):
    """Odds ratio preference optimization (https://arxiv.org/abs/2403.07691)."""

    beta: float = number(0.1, above=0)
    """Weight of the odds-ratio term: lambda of the paper's equation 6. NxDT's tutorial has 0.1 in its
    sample and 0.01 in its table."""
    nll_scale: float = number(1.0, at_least=0)
    """(ours) Weight of the chosen response's negative log-likelihood per token."""
    nll_tokens: Literal["response", "prompt_and_response"] = "response"
    """(ours) Tokens of that likelihood: the response's (NxDT), or also the prompt's from the second on (TRL
    and the paper's code)."""


@dataclass(frozen=True, kw_only=True)
class CPOConfig(PromptLimits):
    """Contrastive preference optimization (https://arxiv.org/abs/2401.08417). All keys are ours."""

    beta: float = number(0.1, above=0)
    """Scale of the difference of the responses' log-probabilities."""
    nll_scale: float = number(1.0, at_least=0)
    """Weight of the chosen response's negative log-likelihood per token: TRL's cpo_alpha."""
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    """Assumed fraction of flipped labels, from 0 to below 0.5."""


@dataclass(frozen=True, kw_only=True)
class SimPOConfig(PromptLimits):
    """Simple preference optimization (https://arxiv.org/abs/2405.14734). All keys are ours."""

    beta: float = number(2.0, above=0)
    """Scale of the difference of the responses' mean log-probabilities per token."""
    gamma: float = number(0.5, at_least=0)
    """Target margin between the rewards (TRL's simpo_gamma): the paper's gamma / beta ratio times beta."""
    nll_scale: float = number(0.0, at_least=0)
    """Weight of the chosen response's negative log-likelihood per token (fairseq2)."""
    label_smoothing: float = number(0.0, at_least=0, below=0.5)
    """Assumed fraction of flipped labels, from 0 to below 0.5."""


@dataclass(frozen=True, kw_only=True)
class KTOConfig(PromptLimits):
    """Kahneman-Tversky optimization (https://arxiv.org/abs/2402.01306). All keys are ours."""

    beta: float = number(0.1, above=0)
    """Strength of the penalty for leaving the reference."""
    desirable_weight: float = number(1.0, at_least=0)
    """Weight of completions whose label is true."""
    undesirable_weight: float = number(1.0, at_least=0)
    """Weight of completions whose label is false."""
    precompute_ref_log_probs: bool = True
    """As for dpo."""

    def faults(self) -> Iterator[Fault]:
        if self.desirable_weight == self.undesirable_weight == 0:
            rule = "must be above 0 where undesirable_weight is 0: nothing would be trained"
            yield Fault("desirable_weight", rule, 0.0, involves=("undesirable_weight",))


@dataclass(frozen=True, kw_only=True)
class SFTConfig(PromptLimits):
    """Supervised fine-tuning, by default on responses only."""

    packing: bool = False
    """Pack several records into a row, each attending only to itself; False pads every row."""
    train_on_prompt: bool = False
    """(ours) Train on the prompt's tokens too, from the second on (torchtune's train_on_input)."""


ObjectiveConfig = DPOConfig | ORPOConfig | CPOConfig | SimPOConfig | KTOConfig | SFTConfig


@dataclass(frozen=True, kw_only=True)
class PEFTConfig:
    """LoRA adapters (https://arxiv.org/abs/2106.09685) instead of training every weight; docs/adapters.md."""

    lora_rank: int = number(16, at_least=1)
    """Rank of the adapters; also spelled rank."""
    lora_alpha: float = number(32, above=0)
    """Adapters are scaled by lora_alpha / lora_rank; also spelled alpha."""
    lora_dropout: float = number(0.05, at_least=0, below=1)
    """Dropout probability of an adapter's input; also spelled dropout. Other layouts and data-parallel sizes
    draw other masks."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Must be none: biases of the base stay frozen."""
    lora_verbose: bool = False
    """Log which layers get an adapter."""
    target_modules: tuple[str, ...] = ("qkv_proj",)
    """Linear layers that get an adapter: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; ends
    of their paths, or patterns for whole paths (model.layers.[0-7].*.q_proj); NxDT's qkv_proj and
    gate_up_proj; (ours) all-linear: those of all layers."""
    rslora: bool = False
    """(ours) Scale adapters by lora_alpha / sqrt(lora_rank): rank-stabilised LoRA
    (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """(ours) Train the norm of each row of a weight too: DoRA (https://arxiv.org/abs/2402.09353)."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """(ours) Start values of the first factor, as PEFT draws them; the second starts at 0, so that nothing
    changes."""
    quantize_base: Literal["nf4"] | None = None
    """(ours) Hold the frozen linear layers in 4 bits, NF4 with double quantisation: QLoRA
    (https://arxiv.org/abs/2305.14314). Engine native without tensor or pipeline parallel; needs
    bitsandbytes, pip install 'nxdt-align[qlora]'."""
    modules_to_save: tuple[str, ...] = ()
    """(ours) Modules that are trained whole, as embed_tokens or lm_head; their originals stay for the
    reference."""
    load_lora_from_ckpt: bool = False
    """Load adapters from the start checkpoint. Those in exp_manager.resume_from_checkpoint are recognised."""
    save_lora_base: bool = False
    """Save the base model's weights too. Checkpoints here hold adapters alone."""
    merge_lora: bool = False
    """Export the model with the adapters added in: as exp_manager.export_hf: merged."""
    save_lora_config_adapter: bool = False
    """Save the adapters' settings beside them. An exported adapter always has them."""
    merge_sharded_lora: bool = False
    """Save the adapters' shards as one. An exported adapter always is one."""

    def settings(self) -> dict[str, Any]:
        """As ``models.adapter_targets.adapter_spec`` takes them."""
        return {
            "target_modules": self.target_modules,
            "modules_to_save": self.modules_to_save,
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "rslora": self.rslora,
            "dora": self.dora,
            "init": self.init,
            "quantize": self.quantize_base,
        }

    def faults(self) -> Iterator[Fault]:
        if self.lora_bias != "none":
            rule = "must be none: the reference is the model with its adapters off, so its biases stay frozen"
            yield Fault("lora_bias", rule, self.lora_bias)
        if not self.target_modules and not self.modules_to_save:
            yield Fault("target_modules", "must name a layer, e.g. all-linear", [])


def _row(loss: str, examples: Examples = "pair") -> dict[str, Any]:
    """Metadata of an objective: its loss, as module.class of the package ``losses``, and its examples."""
    return {"loss": loss, "examples": examples}


@dataclass(frozen=True, kw_only=True)
class ModelAlignmentStrategyConfig:
    """The objective: exactly one of dpo, orpo, cpo, simpo, kto and sft."""

    dpo: DPOConfig | None = field(default=None, metadata=_row("dpo.DPOLoss"))
    orpo: ORPOConfig | None = field(default=None, metadata=_row("orpo.ORPOLoss"))
    cpo: CPOConfig | None = field(default=None, metadata=_row("cpo.CPOLoss"))
    simpo: SimPOConfig | None = field(default=None, metadata=_row("cpo.SimPOLoss"))
    kto: KTOConfig | None = field(default=None, metadata=_row("kto.KTOLoss", "unpaired"))
    sft: SFTConfig | None = field(default=None, metadata=_row("sft.SFTLoss", "response"))
    peft: PEFTConfig | None = None
    loss: str | None = None
    """(ours) Custom loss as a dotted path, module.name, called as (policy, reference) instead of the
    built-in one; the objective still determines the data."""
    loss_settings: Mapping[str, Any] | None = None
    """(ours) Keyword arguments of ``loss``."""
    reference_model: str | None = field(default=None, metadata=PATH)
    """(ours) Folder of the reference's weights; null: the weights that training starts from."""
    reference_dtype: Literal["fp32", "bf16"] | None = None
    """(ours) Number format that the reference computes in; null: that of the policy."""

    @property
    def objective(self) -> str:
        """The one that is set. Raises ValueError if none or several are (check() reports that)."""
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
    def examples(self) -> Examples:
        """The kind of examples of ``objective``."""
        found: Examples = OBJECTIVES[self.objective]["examples"]
        return found

    @property
    def precompute_ref_log_probs(self) -> bool:
        """Whether the reference runs before training; True if the objective has no such key."""
        return getattr(self.active, "precompute_ref_log_probs", True)

    @property
    def max_prompt_length(self) -> int:
        return self.active.max_prompt_length

    @property
    def truncation_mode(self) -> TruncationMode:
        return self.active.truncation_mode

    def faults(self) -> Iterator[Fault]:
        """Faults of a custom loss that can be found without importing it."""
        if self.loss is None and self.loss_settings:
            rule = "must not be set without model_alignment_strategy.loss"
            yield Fault("loss_settings", rule, dict(self.loss_settings))
        elif self.loss is not None and not is_dotted(self.loss):
            yield Fault("loss", "must be a dotted path, module.name", self.loss)


OBJECTIVES: dict[str, Mapping[str, Any]] = {
    f.name: f.metadata for f in dataclasses.fields(ModelAlignmentStrategyConfig) if "loss" in f.metadata
}
"""Objective -> its row."""
