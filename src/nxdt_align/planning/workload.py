"""The sizes of one optimizer step on one device, from which its memory is estimated.

Legend: ``B`` rows and ``S`` tokens of a micro-batch, ``T`` response positions per row, ``D`` hidden, ``N``
query heads, ``K`` key-value heads, ``H`` head size, ``F`` MLP width, ``V`` vocabulary; heads, widths and
vocabulary are a tensor-parallel rank's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch

from nxdt_align.config.engines import resolve_engine
from nxdt_align.config.schema import Config, PrecisionConfig
from nxdt_align.data.packing import Bucket, Layout
from nxdt_align.models.adapter_targets import ALL_LINEAR, adapter_spec
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.config import DecoderConfig, ModelShape
from nxdt_align.models.partition import even_stages
from nxdt_align.ops.logprobs import CACHED_BYTES, KEPT_BYTES, chunk_size
from nxdt_align.planning.kernels import attention_kind

FLOAT = 4
"""Bytes of a float32."""
AttentionKind = Literal["flash", "intervals", "masked", "scores"]
"""flash: causal, no (S, S) tensor; intervals: nki-library's kernels with bounds, which compute all scores
of a row; masked: a fused kernel with an (S, S) mask; scores: an (S, S) softmax in float32."""

_STATES = {
    **dict.fromkeys(("adamw", "adamw_fp32OptState", "adam", "adadelta", "adamax", "rprop"), 2),
    "sgd": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "novograd": 1,
    "adafactor": 0,
    "adan": 3,
}
"""Optimizer -> state values per weight."""


@dataclass(frozen=True)
class Formats:
    """Bytes per value."""

    weight: int
    """Of the compute weights."""
    gradient: int
    master: int
    """Of master weights, or of the optimizer's copy of its shard; 0 for none."""
    state: int
    """Of all optimizer states of one weight together."""
    activation: int
    autocast: bool = False
    """torch.autocast: a float32 residual; weights and inputs of each product are cast to ``activation`` and
    kept."""
    float32_copy: int = 0
    """Of the float32 copies of all gradients at the start of the optimizer's step, where gradients were
    accumulated in a lower precision."""
    shard_gradient: int = 0
    """Of the gradients of the optimizer's shard where they are separate tensors."""

    @property
    def residual(self) -> int:
        return FLOAT if self.autocast else self.activation


@dataclass(frozen=True)
class Workload:
    """One optimizer step on one device."""

    model: DecoderConfig
    formats: Formats
    rows: int
    """B."""
    tokens: int
    """S."""
    responses: int
    """T."""
    attention: AttentionKind
    recompute: tuple[str, ...] = ()
    """``("full",)``, or names as in ``models.decoder.RECOMPUTABLE``."""
    tensor_parallel: int = 1
    kv_heads: int | None = None
    """Key-value heads in a rank's weights, copies included; None: its share, at least one."""
    sequence_parallel: bool = False
    keeps_gathered: bool = False
    """Whether sequence parallel keeps a projection's input gathered (DTensor) or gathers it again in the
    backward pass (neuronx-distributed)."""
    context_parallel: int = 1
    stages: tuple[int, ...] | None = None
    """Layers of each pipeline stage; None: one stage."""
    micro_batches: int = 1
    """Per optimizer step and rank; a stage holds as many as the 1F1B schedule has in flight."""
    data_parallel: int = 1
    zero1: bool = False
    """Optimizer states and master weights are sharded over the data-parallel ranks."""
    fsdp: bool = False
    """Gradients are sharded too, and weights are gathered from the masters layer by layer."""
    tile: int = 0
    """Bytes of the float32 logits that exist at a time (ops.logprobs)."""
    kept: int = 0
    """Limit in bytes on the probabilities that ops.logprobs keeps for the backward pass."""
    reference: int = 0
    """Bytes per weight of a frozen reference held beside the policy; 0 for none."""
    adapters: AdapterSpec | None = None
    """What is trained instead of the weights, which are frozen then."""

    @property
    def layers_of_stages(self) -> tuple[int, ...]:
        return self.stages or (self.model.num_hidden_layers,)

    @property
    def positions(self) -> int:
        """Tokens of a micro-batch on this rank: B x S."""
        return self.rows * self.tokens // self.context_parallel

    @property
    def residual_positions(self) -> int:
        return self.positions // (self.tensor_parallel if self.sequence_parallel else 1)

    @property
    def heads(self) -> int:
        return self.model.num_attention_heads // self.tensor_parallel

    @property
    def own_kv_heads(self) -> int:
        """Key-value heads that a rank computes."""
        return max(1, self.model.num_key_value_heads // self.tensor_parallel)

    @property
    def width(self) -> int:
        """F of this rank."""
        return self.model.intermediate_size // self.tensor_parallel


# From the configuration


def device_kind(config: Config) -> str:
    """The target of the configuration: neuron, cuda or cpu. If it does not say, neuron: runs are planned on
    other machines."""
    chosen = config.trainer.accelerator
    if chosen in ("cpu", "cuda"):
        return chosen
    if chosen == "neuron" or is_for_nxd(config):
        return "neuron"
    return "cuda" if torch.cuda.is_available() and chosen == "auto" else "cpu"


def is_for_nxd(config: Config) -> bool:
    """Whether engine nxd runs the configuration on its target; ``neuron`` alone does not say so, as native
    runs there, too."""
    return resolve_engine(config, neuron_available=True) == "nxd"


def is_for_trn1(config: Config) -> bool:
    """Whether its NeuronCores are trn1's. Where ``trainer.lnc`` says how many are one device they are trn2's
    or trn3's, and for engine native, which does not run on trn1."""
    return config.trainer.lnc is None and config.distributed_strategy.engine != "native"


def workload(
    config: Config,
    model: DecoderConfig,
    layout: Layout,
    responses: int,
    bucket: Bucket,
    *,
    needs_reference: bool,
) -> Workload:
    """The optimizer step of ``config`` in rows of ``bucket``; see ``memory_report``."""
    strategy, where, is_nxd = config.distributed_strategy, device_kind(config), is_for_nxd(config)
    tensor, stages = strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size
    copies = max(1, config.data_parallel_size)
    formats = formats_of(config)
    if strategy.zero1 and is_nxd:
        formats = _sharded_by_nxd(formats, config.precision)
    # ops.logprobs never makes a row's whole logits: CPUs tile to the cache, others by a fixed chunk.
    vocabulary = -(-model.vocab_size // tensor)
    tile = CACHED_BYTES if where == "cpu" else chunk_size(vocabulary) * vocabulary * FLOAT
    return Workload(
        model=model,
        formats=formats,
        rows=config.data.micro_batch_size * (responses if layout == "none" else 1),
        tokens=bucket.tokens,
        responses=bucket.responses,
        attention=_attention(config, model, where, layout),
        recompute=_recompute(config),
        tensor_parallel=tensor,
        kv_heads=_kv_heads(config, model),
        sequence_parallel=strategy.sequence_parallel and tensor > 1,
        # Factors keep the input that they are multiplied with.
        keeps_gathered=not is_nxd or config.model_alignment_strategy.peft is not None,
        context_parallel=strategy.context_parallel_size,
        stages=_stages(config, model, stages),
        # At least 2: from the second micro-batch on, gradients of the first are held too (the peak).
        micro_batches=max(2, stages),
        data_parallel=copies,
        zero1=strategy.zero1,
        fsdp=strategy.fsdp is not False,
        tile=tile,
        kept=KEPT_BYTES,
        reference=reference_bytes(config, formats) if needs_reference else 0,
        adapters=adapters_of(config, model),
    )


TARGETS = "model_alignment_strategy.peft.target_modules"


def adapters_of(config: Config, model: ModelShape) -> AdapterSpec | None:
    """Those of the configuration. Raises UserError for those that do not fit the model."""
    peft = config.model_alignment_strategy.peft
    if peft is None:
        return None
    settings = peft.settings()
    if not isinstance(model, DecoderConfig) and TARGETS not in config.given:
        settings["target_modules"] = (ALL_LINEAR,)  # NxDT's default names layers of this package's families
    return adapter_spec(model, **settings)


def formats_of(config: Config) -> Formats:
    """What each weight takes in this configuration."""
    strategy, formats = config.distributed_strategy, _formats(config)
    shards = (strategy.zero1 or strategy.fsdp is not False) and config.data_parallel_size > 1
    if shards and not is_for_nxd(config) and not formats.master:
        # FSDP's shards are float32 masters; the compute weights are gathered from them.
        return replace(formats, master=FLOAT)
    return formats


def reference_bytes(config: Config, formats: Formats) -> int:
    """Bytes per weight of the reference that is held during training; 0 for none."""
    settings = config.model_alignment_strategy
    if settings.precompute_ref_log_probs:
        return 0
    if settings.peft is not None and settings.reference_model is None:
        return 0  # the policy with its adapters off
    return {None: formats.weight, "fp32": FLOAT, "bf16": 2}[settings.reference_dtype]


def _formats(config: Config) -> Formats:
    """``precision`` in bytes: engine nxd follows NxDT; native always has float32 masters for 16-bit
    weights."""
    precision, optim = config.precision, config.model.optim
    states = _STATES.get(optim.name, 2) + bool(optim.params.get("amsgrad"))
    # torch allocates a momentum buffer only where momentum is not 0.
    if optim.name in ("sgd", "rmsprop") and optim.params.get("momentum"):
        states += 1
    kind = precision.type
    is_low = precision.xla_use_bf16 == "1" or precision.xla_downcast_bf16 == "1"
    if kind == "fp32" or (kind == "manual" and not is_low):
        return Formats(weight=4, gradient=4, master=0, state=4 * states, activation=4)
    if kind == "autocast":
        return Formats(weight=4, gradient=4, master=0, state=4 * states, activation=2, autocast=True)
    if not is_for_nxd(config) or kind == "fp16" or kind.startswith("mixed_precision"):
        return Formats(weight=2, gradient=4, master=4, state=4 * states, activation=2)
    masters = 4 if kind == "manual" and precision.master_weights else 0
    gradient = 4 if kind == "manual" and precision.fp32_grad_acc else 2
    state = 4 if masters or optim.name == "adamw_fp32OptState" else 2
    copy = 4 if masters and gradient == 2 else 0
    return Formats(
        weight=2,
        gradient=gradient,
        master=masters,
        state=state * states,
        activation=2,
        float32_copy=copy,
    )


def _sharded_by_nxd(formats: Formats, precision: PrecisionConfig) -> Formats:
    """ZeRO-1 of engine nxd: each rank copies its rows, in the optimizer's format, and has separate gradients
    for them. Only ``fp32_grads_cc`` makes float32 copies of the whole gradients."""
    rows = formats.master or formats.weight
    copy = formats.float32_copy if precision.fp32_grads_cc else 0
    return replace(formats, master=rows, shard_gradient=rows, float32_copy=copy)


def _attention(config: Config, model: DecoderConfig, where: str, layout: Layout) -> AttentionKind:
    if model.attention_softcap is not None and (where != "cuda" or config.data.attention == "dense"):
        return "scores"  # FlexAttention alone has a kernel that caps
    if where == "neuron" and not is_for_nxd(config):
        kinds: dict[str, AttentionKind] = {"causal": "flash", "nki": "intervals"}
        return kinds.get(attention_kind(config.with_layout(layout), where, model), "scores")
    if where == "neuron":
        fusions = config.model.fusions
        if not fusions.flash_attention or (layout != "none" and not fusions.flash_attention_packed):
            return "scores"
        # With a bias of (S, S) for rows of several sequences.
        return "flash" if layout == "none" else "masked"
    return "masked" if config.data.attention == "dense" else "flash"


def _recompute(config: Config) -> tuple[str, ...]:
    granularity = config.model.activations_checkpoint_granularity
    if granularity == "full":
        return ("full",)
    return tuple(config.model.activations_checkpoint_recompute or ()) if granularity else ()


def _kv_heads(config: Config, model: DecoderConfig) -> int:
    """Per rank: engine nxd replicates heads; native keeps all of them if there are fewer than ranks."""
    tensor, heads = config.distributed_strategy.tensor_model_parallel_size, model.num_key_value_heads
    if is_for_nxd(config):
        return max(1, heads * config.distributed_strategy.kv_replicator // tensor)
    return heads // tensor if tensor <= heads else heads


def _stages(config: Config, model: DecoderConfig, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage: after model.pipeline_cuts, or even shares."""
    layers, cuts = model.num_hidden_layers, config.model.pipeline_cuts
    if cuts is None or len(cuts) != stages - 1:
        return even_stages(layers, stages)
    ends = [int(cut.rpartition(".")[2]) + 1 for cut in cuts if cut.rpartition(".")[2].isdecimal()]
    bounds = [0, *ends, layers]
    return tuple(after - before for before, after in pairwise(bounds))
