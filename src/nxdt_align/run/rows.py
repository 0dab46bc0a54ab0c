"""What the row plan has to know of model and device, and what ``data.packing: auto`` chooses from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict

from nxdt_align.config.data import PACKING
from nxdt_align.config.engines import Engine as EngineName
from nxdt_align.config.schema import Config
from nxdt_align.data.layouts import LayoutOptions, RowOption
from nxdt_align.data.packing import Bucket, Layout
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.planning.device_memory import memory_fault
from nxdt_align.planning.devices import DEFAULT_LNC
from nxdt_align.planning.kernels import flash_multiple, why_not_causal
from nxdt_align.planning.step_time import RowSeconds
from nxdt_align.run import computing, nxd
from nxdt_align.run.assemble import refusal_of_layouts

log = logging.getLogger(__name__)

LAYOUTS: tuple[Layout, ...] = ("shared_prompt", "packed", "none")
"""In the order in which they are preferred where they cost the same."""


class RowNeeds(TypedDict):
    """What the row plan has to know of the model, as arguments of the data module."""

    window: int | None
    only_local: bool
    layouts: LayoutOptions


def row_needs(
    config: Config, engine: EngineName, model: ModelShape, device_type: str, *, needs_reference: bool
) -> RowNeeds:
    """The model's windows, and the layouts that rows may have; on Trainium with what rows cost there. On a
    CPU and on CUDA padding is what costs.

    Args:
        device_type: neuron also for engine nxd there.
        needs_reference: whether a reference may stand beside the policy in the device's memory.
    """
    faults = layout_faults(config, model) if PACKING in config.auto else {}
    possible = [layout for layout in LAYOUTS if layout not in faults]

    def options_of(config: Config, layouts: Sequence[Layout]) -> list[RowOption]:
        priced = _on_trainium(config, engine) if device_type == "neuron" else None
        return [
            _option(config.with_layout(layout), priced, engine, model, device_type, needs_reference)
            for layout in layouts
        ]

    options = options_of(config, possible if PACKING in config.auto else [config.layout])
    unchosen: list[RowOption] = []
    is_open = PACKING in config.auto and config.data.attention == "auto"
    if is_open and engine == "native" and device_type == "neuron" and isinstance(model, DecoderConfig):
        by_kernels = replace(config, data=replace(config.data, attention="nki"))
        if computing.why_not_nki(by_kernels, model) is None:
            unchosen = options_of(by_kernels, possible)
    device = next((o.row_cost.device for o in options if isinstance(o.row_cost, RowSeconds)), "")
    return {
        "window": model.sliding_window,
        "only_local": model.layer_types is None,
        "layouts": LayoutOptions(options, faults, device, unchosen, "data.attention=nki"),
    }


def _on_trainium(config: Config, engine: EngineName) -> Config:
    """With engine and device as they are, where the configuration leaves them open: on engine native a
    logical core of trn2 is two, unless trainer.lnc says another number."""
    lnc = config.trainer.lnc or (DEFAULT_LNC if engine == "native" else None)
    return replace(
        config,
        trainer=replace(config.trainer, accelerator="neuron", lnc=lnc),
        distributed_strategy=replace(config.distributed_strategy, engine=engine),
    )


def _option(
    config: Config,
    priced: Config | None,
    engine: EngineName,
    model: ModelShape,
    device_type: str,
    needs_reference: bool,
) -> RowOption:
    multiple = row_multiple(config, engine, model, device_type)
    if priced is None or not isinstance(model, DecoderConfig):
        return RowOption(config.layout, multiple)
    priced = priced.with_layout(config.layout)
    return RowOption(
        config.layout,
        multiple,
        RowSeconds(priced, model),
        _memory_fault(priced, model, needs_reference),
    )


def _memory_fault(
    config: Config, model: DecoderConfig, needs_reference: bool
) -> Callable[[Bucket], str | None]:
    responses = 1 if config.model_alignment_strategy.sft is not None else 2
    return lambda bucket: memory_fault(config, model, responses, bucket, needs_reference=needs_reference)


def row_multiple(config: Config, engine: EngineName, model: ModelShape, device_type: str) -> int:
    """Tokens that rows have to be a multiple of."""
    if engine == "native":
        return flash_multiple(config, device_type, model)
    on_trainium = device_type == "neuron" and isinstance(model, DecoderConfig)
    return nxd.row_multiple(config, model) if on_trainium and isinstance(model, DecoderConfig) else 1


# data.packing: auto


def layout_faults(config: Config, model: ModelShape) -> dict[Layout, str]:
    """Layouts that the model, ``data.attention`` or the batch size rule out -> why. Raises UserError where
    that are all."""
    refusal = refusal_of_layouts(model)
    faults: dict[Layout, str] = {}
    for layout in LAYOUTS:
        fault = None if layout == "none" else refusal
        if fault is None and config.data.attention == "causal":
            fault = why_not_causal(config.with_layout(layout), model)
            fault = None if fault is None else f"data.attention: causal takes no bounds, {fault}"
        if fault is None and layout == "none":
            fault = _uneven_batch(config)
        if fault is None and layout == "shared_prompt" and config.model_alignment_strategy.sft is not None:
            fault = "which is packed where an example has one response"
        if fault is not None:
            faults[layout] = fault
    if len(faults) == len(LAYOUTS):
        told = "; ".join(f"not {layout}: {fault}" for layout, fault in faults.items())
        raise UserError(f"{PACKING}: auto finds no layout that this run can have; {told}")
    return faults


def _uneven_batch(config: Config) -> str | None:
    data, copies = config.data, config.data_parallel_size
    if not data.global_batch_size % (data.micro_batch_size * copies):
        return None
    return (
        f"data.global_batch_size ({data.global_batch_size}) is no multiple of data.micro_batch_size "
        f"({data.micro_batch_size}) x data-parallel size ({copies})"
    )


def with_possible_layout(config: Config, model: ModelShape) -> Config:
    """``config`` with the layout that it must have, as a notice says: none where the model takes no other,
    and where ``data.packing`` is auto, the only one that is left."""
    if PACKING in config.auto:
        faults = layout_faults(config, model)
        left = [layout for layout in LAYOUTS if layout not in faults]
        if len(left) > 1:
            return config
        told = "; ".join(f"not {layout}: {fault}" for layout, fault in faults.items())
        log.log(NOTICE, "%s: auto is %s, the only layout that this run can have; %s", PACKING, left[0], told)
        return config.with_layout(left[0])
    refusal = refusal_of_layouts(model)
    if refusal is None or config.layout == "none":
        return config
    log.log(
        NOTICE,
        "data.packing: none, a row for each response, instead of %s, which %s does not take: %s; results are "
        "the same, steps are slower",
        *(config.layout, model.model_type, refusal),
    )
    return config.with_layout("none")
