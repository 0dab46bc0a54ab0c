"""The section ``model_alignment_strategy``: what the model is trained for. Part of the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nxdt_align.config.fields import PATH

Objective = Literal["dpo", "orpo", "sft"]
TruncationMode = Literal["keep_start", "keep_end"]

DPOLossType = Literal["sigmoid"]
"""The values that model_alignment_strategy.dpo.loss_type may have; nothing else lists them."""

MAX_PROMPT_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (https://arxiv.org/abs/2305.18290)."""

    kl_beta: float = 0.01
    """Weight of the KL divergence from the reference: beta of the paper's equation 7."""
    loss_type: DPOLossType = "sigmoid"
    """Form of the loss."""
    label_smoothing: float = 0.0
    """(ours) Share of the labels taken for wrong: conservative DPO. From 0 to below 0.5."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """Tokens of a prompt that are kept, BOS and the last ones. Where it is not given: 2048, or half of
    data.seq_length where that is less."""
    precompute_ref_log_probs: bool = True
    """Compute the reference log-probabilities once before training, and keep them on disk; False:
    compute them at each step, with the reference in memory."""
    truncation_mode: TruncationMode = "keep_start"
    """What gives way where prompt and response exceed data.seq_length. keep_start: the response's end;
    keep_end: the prompt's start after BOS."""


@dataclass(frozen=True, kw_only=True)
class ORPOConfig:
    """Odds ratio preference optimization (https://arxiv.org/abs/2403.07691)."""

    beta: float = 0.1
    """Weight of the odds-ratio term: lambda of the paper's equation 6. NxDT's tutorial has 0.1 in its
    sample and 0.01 in its table."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """As for dpo."""
    truncation_mode: TruncationMode = "keep_start"
    """As for dpo."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning on responses; prompts are not trained on."""

    packing: bool = False
    """Lay several records into a row, each attending to itself alone; False pads every row."""
    max_prompt_length: int = MAX_PROMPT_LENGTH
    """(ours) As for dpo."""
    truncation_mode: TruncationMode = "keep_start"
    """(ours) As for dpo."""


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
    """The objective: exactly one of dpo, orpo and sft."""

    dpo: DPOConfig | None = None
    orpo: ORPOConfig | None = None
    sft: SFTConfig | None = None
    peft: PEFTConfig | None = None
    loss: str | None = None
    """(ours) Loss of one's own as a dotted path, module.name, called as (policy, reference)."""
    reference_model: str | None = field(default=None, metadata=PATH)
    """(ours) Folder of the reference's weights; null: the weights that training starts from."""
    reference_dtype: Literal["fp32", "bf16"] | None = None
    """(ours) Number format that the reference computes in; null: that of the policy."""

    @property
    def objective(self) -> Objective:
        """The one that is set. Raises ValueError where none or several are (check() reports that)."""
        objectives: tuple[Objective, ...] = ("dpo", "orpo", "sft")
        chosen = [name for name in objectives if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ValueError(f"exactly one of dpo, orpo and sft must be set, but {chosen or 'none'} are")
        return chosen[0]

    @property
    def active(self) -> DPOConfig | ORPOConfig | SFTConfig:
        """The settings of ``objective``."""
        settings: DPOConfig | ORPOConfig | SFTConfig = getattr(self, self.objective)
        return settings

    @property
    def max_prompt_length(self) -> int:
        return self.active.max_prompt_length

    @property
    def truncation_mode(self) -> TruncationMode:
        return self.active.truncation_mode
