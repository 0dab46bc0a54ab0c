"""The section ``model``: architecture, activation checkpointing, optimizer. Part of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nxdt_align.config.fields import OPEN, PATH, number
from nxdt_align.config.optim import OPTIMIZERS, SCHEDULERS, accepted_settings


@dataclass(frozen=True, kw_only=True)
class FusionsConfig:
    """Fused kernels of the Neuron compiler."""

    softmax: bool = False
    """Fused softmax."""
    flash_attention: bool = False
    """NKI flash attention."""
    flash_attention_packed: bool = False
    """(ours) NKI flash attention also for rows of several sequences and for windows, by a bias in the graph
    (engine nxd). Needs flash_attention. Off until it has run on a chip."""
    ring_attention: bool = False
    """Ring attention; required with context_parallel_size above 1."""


@dataclass(frozen=True, kw_only=True)
class SchedConfig:
    """The learning-rate schedule."""

    name: str = "LinearAnnealingWithWarmUp"
    """A schedule of NeMo (CosineAnnealing, WarmupPolicy, ...) or LinearAnnealingWithWarmUp."""
    max_steps: int | None = None
    """Steps that the schedule spans; null or -1: the run's steps."""
    params: Mapping[str, Any] = field(default_factory=dict, metadata=OPEN)
    """Every other key of sched is an argument of the schedule: warmup_steps, constant_steps, min_lr, ..."""

    def settings(self) -> dict[str, Any]:
        """Arguments of the schedule ``name``; keys that only other schedules take are left out."""
        return accepted_settings(SCHEDULERS, self.name, {"max_steps": self.max_steps, **self.params})


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer."""

    name: str = "adamw"
    """An optimizer of NeMo (adamw, sgd, adam, adadelta, adamax, adagrad, rmsprop, rprop, novograd,
    adafactor, adan), adamw_fp32OptState (AdamW with its state in fp32), or a custom class as a dotted path,
    module.name."""
    lr: float = number(5.0e-7, at_least=0)
    """Learning rate, at the schedule's peak."""
    sched: SchedConfig | None = None
    params: Mapping[str, Any] = field(default_factory=dict, metadata=OPEN)
    """Every other key of optim is an argument of the optimizer: weight_decay, betas, eps, ..."""

    def settings(self) -> dict[str, Any]:
        """Arguments of the optimizer ``name``, ``lr`` included; keys that only other optimizers take
        are left out (check() names them in a notice)."""
        return {"lr": self.lr, **accepted_settings(OPTIMIZERS, self.name, self.params)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model."""

    model_config: str | None = field(default=None, metadata=PATH)
    """Hugging Face config.json, or a folder that has one; null: that of
    exp_manager.resume_from_checkpoint."""
    implementation: Literal["auto", "ours", "transformers"] = "auto"
    """(ours) Who computes the model. ours: this package's decoder, for the families that it covers (Llama,
    Mistral, Qwen2, Qwen3, Phi-3, OLMo 2, Gemma 2 and 3), on every engine and parallelism; transformers: any
    causal model, by transformers' own class, on engine native with data parallelism; auto: ours where it
    covers the family, else transformers. docs/models.md."""
    trust_remote_code: bool = False
    """(ours) Run the Python code that the folder of a model brings along, for a model that transformers
    itself does not have."""
    router_aux_loss_coef: float = number(0.0, at_least=0)
    """(ours) Weight of the router's load-balancing loss that is added to the objective, for a mixture of
    experts that transformers computes; 0: none. docs/models.md."""
    encoder_seq_length: int | None = number(None, at_least=2)
    """Longest sequence of the model, at least data.seq_length (NxDT's tutorial spells it
    encoder_seq_len, also accepted); null: data.seq_length."""
    max_position_embeddings: int | None = number(None, at_least=1)
    """Overrides that of config.json."""
    num_layers: int | None = number(None, at_least=1)
    """Overrides num_hidden_layers of config.json."""
    hidden_size: int | None = number(None, at_least=1)
    """Overrides that of config.json."""
    rope_theta: float | None = number(None, above=0)
    """Overrides the rotary embedding's base of config.json."""
    weight_init_only: bool = True
    """Load only the weights from exp_manager.resume_from_checkpoint, not the optimizer's state."""
    qkv_linear: bool = False
    """One GQAQKVColumnParallelLinear layer for queries, keys and values, with replicated key-value heads."""
    fuse_qkv: bool = True
    """Store its three weights as one."""
    transpose_nki_inputs: bool = True
    """Transpose the inputs of NKI flash attention before the kernel instead of inside it (engine nxd)."""
    pipeline_cuts: tuple[str, ...] | None = None
    """Layers after which the pipeline is cut, e.g. [model.layers.10]; null: even shares, with
    leftover layers in the last stages."""
    use_cpu_initialization: bool = False
    """Initialise the weights on the CPU and move them to the device; this is always done, whatever the
    value."""
    activations_checkpoint_granularity: Literal["full", "selective"] | None = None
    """What the backward pass recomputes. full: each layer; selective: the modules in
    activations_checkpoint_recompute; null: nothing."""
    activations_checkpoint_recompute: tuple[str, ...] | None = None
    """Modules to recompute with selective, e.g. [CoreAttention, LlamaMLP]."""
    do_layer_norm_weight_decay: bool = False
    """Apply weight decay to the norms too."""
    fusions: FusionsConfig = field(default_factory=FusionsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
