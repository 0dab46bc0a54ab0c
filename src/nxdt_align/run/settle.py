"""What a configuration leaves open and a run settles before it builds anything: where a model of the Hub
lies, and the keys that are ``auto``, by the model and the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nxdt_align.config.alignment import OBJECTIVES
from nxdt_align.config.check import ConfigError, find_faults
from nxdt_align.config.data import PACKING
from nxdt_align.config.engines import Engine
from nxdt_align.config.load import prompt_limit
from nxdt_align.config.rules import lookup
from nxdt_align.config.schema import Config, PrecisionType
from nxdt_align.config.start import HubModel, hub_model
from nxdt_align.errors import UserError
from nxdt_align.models.presets import KNOWN_MODELS, ModelShape
from nxdt_align.run import assemble
from nxdt_align.run.hub import fetch_model
from nxdt_align.run.locate import with_located_start

_START = "exp_manager.resume_from_checkpoint"
_LENGTH, _PRECISION = "data.seq_length", "precision.type"


@dataclass(frozen=True)
class Settled:
    """A configuration that leaves nothing open but ``data.packing``, which needs the data."""

    config: Config
    notes: tuple[str, ...] = ()
    """What was chosen, for the user."""


def settle(
    config: Config,
    engine: Engine,
    *,
    device: str | None = None,
    weights: bool = True,
    shape: ModelShape | None = None,
) -> Settled:
    """Fetch and locate the start, and choose what is auto: the same on every rank, and when a run resumes.

    Args:
        device: type of the device; None for the one on which this process would train.
        weights: fetch a hub model's weights too, not only its config.json and tokenizer.
        shape: the model's, where nothing of it is to be looked for.

    Raises UserError where the start cannot be found or fetched, and ConfigError for what its files
    contradict.
    """
    found = config if shape is not None else _with_start(config, engine, weights)
    if not config.auto - {PACKING}:
        return Settled(found)
    kind, model = device or _device_kind(config, engine), shape or assemble.model_config(found)
    chosen = _with_lengths(_with_precision(found, kind), model)
    faults = [fault for fault in find_faults(chosen, engine=engine) if not fault.is_missing_path]
    if faults:
        raise ConfigError(faults, config.source)
    values = [f"{key} {lookup(chosen, key)}" for key in sorted(config.auto - {PACKING})]
    return Settled(
        dataclasses.replace(chosen, auto=chosen.auto & {PACKING}),
        (f"chosen for {kind} and this model: {', '.join(values)}",),
    )


def settle_sizes(
    config: Config, engine: Engine, *, device: str, reads_data: bool
) -> tuple[Settled, ModelShape]:
    """``settle`` for what needs the model's sizes and no weights, and the model.

    Of a model of the Hub whose sizes are known nothing is fetched, unless data are read: they want its
    tokenizer.
    """
    known = None if reads_data else _known_shape(config)
    settled = settle(config, engine, device=device, weights=False, shape=known)
    return settled, known or assemble.model_config(settled.config)


def _known_shape(config: Config) -> ModelShape | None:
    """Of a model of the Hub, if the families list its sizes."""
    start = config.exp_manager.resume_from_checkpoint
    model = None if start is None or config.model.model_config is not None else hub_model(start)
    shape = None if model is None else KNOWN_MODELS.get(model.name)
    return None if shape is None else assemble.overridden(config, shape)


def _with_start(config: Config, engine: Engine, weights: bool) -> Config:
    """With the folder of the start. A hub model's config.json and tokenizer are checked before its weights
    are fetched."""
    given = config.exp_manager.resume_from_checkpoint
    model = None if given is None else hub_model(given)
    if model is None:
        return with_located_start(config) if weights else config
    shaped = _with_hub_shape(config, model)
    faults = find_faults(shaped, engine=engine)
    if faults:
        raise ConfigError(faults, config.source)
    assemble.model_config(shaped)
    return with_located_start(config) if weights else shaped


def _with_hub_shape(config: Config, model: HubModel) -> Config:
    try:
        folder = fetch_model(model, weights=False)
    except UserError as error:
        raise UserError(f"{_START}: {error}") from error
    exp_manager = dataclasses.replace(config.exp_manager, resume_from_checkpoint=str(folder))
    return dataclasses.replace(config, exp_manager=exp_manager)


def _device_kind(config: Config, engine: Engine) -> str:
    """neuron, cuda, cpu, ...: the type of the device that ``processes.device`` takes, or engine nxd."""
    if engine == "nxd":
        return "neuron"
    if config.trainer.accelerator != "auto":
        return config.trainer.accelerator
    present = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if present is None else present.type


def _with_precision(config: Config, kind: str) -> Config:
    if _PRECISION not in config.auto:
        return config
    chosen: PrecisionType = "mixed_precision" if kind in ("neuron", "cuda") else "fp32"
    # Older GPUs emulate bf16, slower than float32. A plan for CUDA is also made where there is none.
    emulates = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cuda" and emulates:
        chosen = "fp16"
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, type=chosen))


def _with_lengths(config: Config, model: ModelShape) -> Config:
    if _LENGTH not in config.auto:
        return config
    length = min([config.data.seq_length, *_limits(model)])
    strategy = config.model_alignment_strategy
    for name in OBJECTIVES:
        if f"model_alignment_strategy.{name}.max_prompt_length" in config.auto:
            limit = prompt_limit(length, is_auto=True)
            limited = dataclasses.replace(getattr(strategy, name), max_prompt_length=limit)
            strategy = dataclasses.replace(strategy, **{name: limited})
    data = dataclasses.replace(config.data, seq_length=length)
    return dataclasses.replace(config, data=data, model_alignment_strategy=strategy)


def _limits(model: ModelShape) -> Iterator[int]:
    """Tokens that the model was made for."""
    yield model.max_position_embeddings
    if model.sliding_window is not None and model.layer_types is None:
        yield model.sliding_window  # what every layer sees
