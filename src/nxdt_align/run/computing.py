"""How engine native computes a step on a device: attention, compiled graphs, number formats."""

from __future__ import annotations

import logging

import torch

from nxdt_align.config.engines import Engine as EngineName
from nxdt_align.config.engines import buckets_fault, may_compile
from nxdt_align.config.faults import ConfigError
from nxdt_align.config.schema import Config
from nxdt_align.engines.native import compiled
from nxdt_align.engines.native.compiled import KEY, Compiling
from nxdt_align.engines.native.graphs import GraphRecorder
from nxdt_align.engines.native.settings import Precision
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.ops.attention import Attention, CausalAttention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.ops.attention_nki import NkiAttention, misfit
from nxdt_align.planning.devices import DEFAULT_LNC
from nxdt_align.planning.kernels import (
    ATTENTION_OF_DEVICE,
    FLASH_MULTIPLE,
    attention_kind,
    why_not_causal,
    why_not_flash,
)
from nxdt_align.run.assemble import refusal_of_layouts

log = logging.getLogger(__name__)

COMPILED_DEVICES = {"cuda": "inductor", "neuron": "neuron"}
"""Types of devices where ``distributed_strategy.compile: auto`` compiles, and by which backend."""


# Compiled steps


def compiling(config: Config, where: torch.device, model: ModelShape) -> Compiling | None:
    """How steps are compiled on device ``where``; None op by op. Raises UserError where they cannot be."""
    chosen = config.distributed_strategy.compile
    if chosen == "none" or (chosen == "auto" and where.type not in COMPILED_DEVICES):
        return None
    if where.type == "xla":  # of a dry run, whose steps are graphs there
        return None
    if chosen == "auto" and why_auto_is_none(config, model) is not None:
        return None
    compiled.require_own_decoder(model)
    fault = _checkpointing_fault(config)
    if fault is not None:
        raise UserError(f"{KEY}: {fault}, or {KEY}=none")
    # The check of the YAML did not know the device that trainer.accelerator=auto is.
    too_many = buckets_fault(config)
    if too_many is not None:
        raise ConfigError([too_many], config.source)
    compiled.require_torch()
    if where.type == "cpu":
        compiled.require_compiler()
    return Compiling(COMPILED_DEVICES.get(where.type, "inductor"), recorder=GraphRecorder())


def why_auto_is_none(config: Config, model: ModelShape) -> str | None:
    """Why ``distributed_strategy.compile: auto`` compiles nothing on a device where it could; None where it
    compiles."""
    if not isinstance(model, DecoderConfig):
        return f"transformers computes this {model.model_type}"
    peft = config.model_alignment_strategy.peft
    if peft is not None and peft.quantize_base is not None:
        return f"no card has run a base in 4 bits compiled yet; {KEY}=blocks compiles it"
    fault = _checkpointing_fault(config)
    if fault is not None:
        return fault
    return f"torch {torch.__version__} is too old" if compiled.is_too_old() else None


def why_op_by_op(config: Config, where: torch.device, model: ModelShape) -> str:
    """Why ``compiling`` is None on a device of PyTorch's own."""
    chosen = config.distributed_strategy.compile
    if chosen == "none":
        return f"{KEY} is none"
    if where.type not in COMPILED_DEVICES:
        return f"{KEY}: auto is none on {where.type}"
    return f"{KEY}: auto is none, as {why_auto_is_none(config, model)}"


def _checkpointing_fault(config: Config) -> str | None:
    return compiled.checkpointing_fault(
        config.distributed_strategy.tensor_model_parallel_size, recomputed_alone(config)
    )


def recomputed_alone(config: Config) -> tuple[str, ...]:
    """Names of the modules that are recomputed by themselves in the backward pass."""
    model = config.model
    is_selective = model.activations_checkpoint_granularity == "selective"
    return tuple(model.activations_checkpoint_recompute or ()) if is_selective else ()


# Attention


def attention(config: Config, where: torch.device, model: ModelShape) -> Attention:
    """The attention for device ``where``. Raises UserError for one that it or the layout does not support."""
    if refusal_of_layouts(model) is not None:
        from nxdt_align.models.backend.model import StockAttention

        return StockAttention()
    kind = attention_kind(config, where.type, model)
    for device_type, only in ATTENTION_OF_DEVICE.items():
        if kind == only and where.type != device_type:
            fitting = ["auto", "dense", *filter(None, [ATTENTION_OF_DEVICE.get(where.type)])]
            raise UserError(
                f"data.attention: {kind} needs trainer.accelerator {device_type}, but this run's device is "
                f"{where.type}; {', '.join(fitting)} would work there"
            )
    if kind == "nki":
        return _nki_attention(config, where, model)
    if kind == "blocks":
        return BlockAttention()
    if kind == "causal":
        check_attention(config, model, where.type)
        return CausalAttention(FLASH_MULTIPLE.get(where.type, 1))
    if kind == "flex":
        return FlexAttention(
            compiled=compiling(config, where, model) is None
        )  # else it is in the layer's graph
    return DenseAttention()


def _nki_attention(config: Config, where: torch.device, model: ModelShape) -> Attention:
    if where.type != "neuron":
        raise UserError(
            f"data.attention: nki needs trainer.accelerator neuron, but this run's device is {where.type}; "
            "auto or dense would work there"
        )
    check_attention(config, model, where.type)
    return NkiAttention(cores=config.trainer.lnc or DEFAULT_LNC)


def kernel(model: ModelShape, where: torch.device) -> Attention:
    """The attention that a model takes on ``where``, a CPU or a CUDA device, whatever rows it is given."""
    if refusal_of_layouts(model) is not None:
        from nxdt_align.models.backend.model import StockAttention

        return StockAttention()
    return FlexAttention() if where.type == "cuda" else BlockAttention()


def check_attention(config: Config, model: ModelShape, device_type: str | None = None) -> None:
    """Raises UserError where ``data.attention`` cannot compute the layout, whatever the device; and where
    the kernel of ``device_type``, with engine native, does not take model, rows or number format."""
    kind, fault = config.data.attention, None
    if kind == "causal":
        fault = why_not_causal(config, model)
        if fault is not None:
            raise UserError(f"data.attention: causal takes no bounds of what a token sees, {fault}")
        fault = None if device_type is None else why_not_flash(config, device_type, model)
    elif kind == "nki" and device_type == "neuron":
        fault = why_not_nki(config, model)
    if fault is not None:
        raise UserError(f"data.attention: {kind} {fault}; set data.attention=dense")


def why_not_nki(config: Config, model: ModelShape) -> str | None:
    """What of the model or its number formats nki-library's kernels do not take; None where they take it."""
    head_size = model.head_dim if isinstance(model, DecoderConfig) else 0  # else seen at the first batch
    return misfit(head_size, model.attention_softcap) or _format_misfit(config)


def _format_misfit(config: Config) -> str | None:
    """The number format that nki-library's kernels do not compute in: attention_cte's products are bf16
    whatever its inputs, attention_bwd's are in theirs, so that its scores would not be the forward's."""
    for precise, key, value in (
        (precision(config), "precision.type", config.precision.type),
        (reference_precision(config), REFERENCE_DTYPE, config.model_alignment_strategy.reference_dtype),
    ):
        if precise.coarsest != torch.bfloat16:
            return f"computes in bf16, but {key} is {value}"
    return None


# Number formats

REFERENCE_DTYPE = "model_alignment_strategy.reference_dtype"


def precision(config: Config) -> Precision:
    """The closest equivalent of ``precision.type`` in PyTorch."""
    kind = config.precision.type
    if kind == "fp32" or (kind == "manual" and not _is_low(config)):
        return Precision()
    if kind == "autocast":
        return Precision(autocast=True)
    return Precision(compute=torch.float16 if kind == "fp16" else torch.bfloat16)


def _is_low(config: Config) -> bool:
    settings = config.precision
    return settings.xla_use_bf16 == "1" or settings.xla_downcast_bf16 == "1"


def _say_precision(config: Config, where: torch.device) -> None:
    kind, settings = config.precision.type, config.precision
    found = precision(config)
    if found.autocast:
        log.info("precision.type autocast: fp32 weights, operations as torch.autocast chooses for bf16")
    if found.compute != torch.bfloat16:
        return
    log.info("precision.type %s: bf16 weights and activations, fp32 master weights and gradients", kind)
    rounds = "SR" in kind or (kind == "manual" and settings.neuron_rt_stochastic_rounding_en == "1")
    if where.type == "neuron":
        if rounds:
            log.log(
                NOTICE,
                "precision: the runtime is asked for stochastic rounding "
                "(NEURON_RT_STOCHASTIC_ROUNDING_EN=1); AWS does not say whether TorchNeuron heeds it, so "
                "fp32 master weights are kept besides",
            )
    elif rounds or (kind == "manual" and not settings.master_weights):
        log.log(NOTICE, "stochastic rounding needs Neuron hardware; fp32 master weights are used instead")


def reference_precision(config: Config) -> Precision:
    """The frozen reference's precision: ``reference_dtype``, or the policy's."""
    chosen = config.model_alignment_strategy.reference_dtype
    if chosen is None:
        return precision(config)
    return Precision(compute=torch.bfloat16 if chosen == "bf16" else torch.float32)


def precision_of_reference(config: Config, engine: EngineName) -> str:
    """What ``join``'s parts call ``reference_precision``, in words, without joining any process."""
    if engine == "nxd":
        from nxdt_align.run.nxd import reference_precision_ahead

        return str(reference_precision_ahead(config))
    return str(reference_precision(config))


def say_choices(config: Config, where: torch.device, model: ModelShape) -> None:
    """Log, once per run, what is computed otherwise than the YAML may lead to expect."""
    is_auto = config.distributed_strategy.compile == "auto"
    if is_auto and where.type != "xla" and compiling(config, where, model) is None:
        why = why_op_by_op(config, where, model)
        if where.type in COMPILED_DEVICES:
            log.log(NOTICE, "%s", why)
        # Where the YAML alone shows it, the notice on keys without effect has said so.
        if config.exp_manager.fail_on_recompile and may_compile(config):
            log.warning("exp_manager.fail_on_recompile: guards nothing, as no step is compiled (%s)", why)
    _say_precision(config, where)


def say_attention(config: Config, where: torch.device, model: ModelShape) -> None:
    """Log, once per run whose layout is known, why rows that need no mask are not the flash kernel's."""
    if config.data.attention != "auto" or where.type not in FLASH_MULTIPLE:
        return
    fault = None if why_not_causal(config, model) is not None else why_not_flash(config, where.type, model)
    if fault is not None:
        log.log(NOTICE, "data.attention: auto is dense, with a mask, as the flash kernel %s", fault)
