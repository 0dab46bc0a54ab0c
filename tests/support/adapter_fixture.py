"""Adapters spread over processes, and what PEFT computes of the same on the plain model in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from oracle import ModuleWeights
from parallel_fixture import (
    ATTENTIONS,
    CLIP,
    LOSSES,
    SHAPE,
    Case,
    Outcome,
    adamw,
    oracle_loss,
    run_parallel,
    train,
)
from torch import Tensor, nn

from nxdt_align.engines.native.compiled import Compiling
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.models import nf4
from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.adapters import AdapterSpec, adapter_shapes, quantized_layers, row_norms
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import ModelShape
from nxdt_align.models.sharding import MAGNITUDE, START, TRAINED
from nxdt_align.named_tensors import WeightSource

NOISE = 0.05
"""Standard deviation of the factors."""


def lora(shape: ModelShape = SHAPE, **settings: Any) -> AdapterSpec:
    given = {"target_modules": ["all-linear"], "rank": 4, "alpha": 8.0} | settings
    return adapter_spec(shape, **given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class AdapterCase(Case):
    """A way to spread a model with adapters."""

    spec: AdapterSpec = field(default_factory=lora)

    def engine(self, rank: int) -> NativeEngine:
        def configure(decoder: Decoder) -> None:
            if self.checkpointing is not None:
                decoder.set_checkpointing(*self.checkpointing)  # type: ignore[arg-type]

        engine = NativeEngine(
            self.shape,
            ATTENTIONS[self.attention],
            precision=self.precision,
            topology=self.topology(rank),
            parallel=self.parallel,
            device=self.device,
            configure_model=configure,
            adapters=self.spec,
            seed=3,
            compiling=None if self.compiled is None else Compiling(self.compiled),
        )
        engine.load_weights(started(self.model(0), self.spec))
        if LOSSES[self.loss].needs_reference:
            engine.load_reference(None)
        return engine


def started(model: Decoder, spec: AdapterSpec) -> StartedAdapters:
    """Of the plain model."""
    return StartedAdapters(ModuleWeights(model), model.config, spec)


class StartedAdapters(WeightSource):
    """A plain model, and adapters that have been trained a while: no factor is 0."""

    def __init__(self, base: WeightSource, config: ModelShape, spec: AdapterSpec) -> None:
        self._base, self._transposed = base, spec.transposed
        self.shapes = adapter_shapes(config, spec)

    def names(self) -> list[str]:
        return [*self._base.names(), *self.shapes]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name] if name in self.shapes else self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        if name not in self.shapes:
            return self._base.read(name)
        path, _, part = name.rpartition(".")
        if part.startswith(TRAINED):
            return self._base.read(f"{path}.{part.removeprefix(TRAINED)}")
        generator = torch.Generator().manual_seed(sum(name.encode()))
        noise = torch.randn(self.shapes[name], generator=generator)
        if part.removeprefix(START) == MAGNITUDE:
            norms = row_norms(self._base.read(f"{path}.weight"), transposed=path in self._transposed)
            return norms * (1 + 0.1 * noise)
        return noise * NOISE

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        return self.read(name)[tuple(region)]


# A base in 4 bits


def qlora(shape: ModelShape = SHAPE, **settings: Any) -> AdapterSpec:
    return lora(shape, quantize="nf4", **settings)


@cache
def dequantized(case: AdapterCase, seed: int) -> dict[str, Tensor]:
    """Of each quantised layer's weight, the values that its 4 bits stand for: those of the case's device."""
    held = dict(case.model(seed).named_parameters())
    paths = quantized_layers(case.shape, case.spec)
    weights = {path: held[f"{path}.weight"].detach().to(case.device) for path in paths}
    parts = {path: nf4.weight_of(nf4.quantized(weight)) for path, weight in weights.items()}
    return {path: part.dequantized(torch.float32).cpu() for path, part in parts.items()}


@dataclass(frozen=True)
class Dequantized(AdapterCase):
    """The plain model with these values."""

    def model(self, seed: int) -> Decoder:
        model = super().model(seed)
        held = dict(model.named_parameters())
        plain = AdapterCase(spec=self.spec, shape=self.shape, device=self.device)
        with torch.no_grad():
            for path, weight in dequantized(plain, seed).items():
                held[f"{path}.weight"].copy_(weight)
        return model


# What PEFT makes of it


def peft_model(case: AdapterCase) -> tuple[Decoder, dict[str, nn.Parameter]]:
    """The plain model with PEFT's own layers in it, filled with the same values, and its trained parameters
    by our names."""
    model = case.model(0)
    return model, with_pefts_layers(model, started(model, case.spec), case.spec)


def with_pefts_layers(
    model: nn.Module, source: StartedAdapters, spec: AdapterSpec
) -> dict[str, nn.Parameter]:
    """Put PEFT's own layers into ``model``; its trained parameters by our names."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=[f"model.{path}" for path in spec.targets],
        fan_in_fan_out=bool(spec.transposed),
    )
    # In a module without a config, by which PEFT would take some names for those of a model's experts.
    inject_adapter_in_model(settings, nn.ModuleDict({"model": model}))
    modules, found = dict(model.named_modules()), {}
    with torch.no_grad():
        for path in spec.targets:
            layer: Any = modules[path]
            own = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
            if spec.dora:
                own[MAGNITUDE] = layer.lora_magnitude_vector["default"].weight
            for part, parameter in own.items():
                parameter.copy_(source.read(f"{path}.{part}"))
                found[f"{path}.{part}"] = parameter
        for path in spec.saved:
            for name, parameter in modules[path].named_parameters(recurse=False):
                parameter.requires_grad_(True)
                found[f"{path}.{TRAINED}{name}"] = parameter
    return found


def peft_oracle(case: AdapterCase, dtype: torch.dtype = torch.float32) -> Outcome:
    """``parallel_fixture.oracle`` with PEFT's model; the reference is the plain one."""
    examples, reference = case.examples().examples, case.model(0).to(dtype)
    model, trained = peft_model(case)
    model.to(dtype)
    names, parameters = list(trained), list(trained.values())
    optimizer = adamw(parameters)
    outcome: Outcome | None = None
    size = torch.nn.utils.get_total_norm(parameters)
    for _ in range(case.steps):
        loss = oracle_loss(case.loss, model, reference, examples)
        found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for name, parameter in trained.items():
            parameter.grad = found[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        outcome = outcome or Outcome(float(loss.detach()), float(norm), found, parameter_norm=float(size))
        optimizer.step()
    assert outcome is not None
    outcome.weights = {name: p.detach().clone() for name, p in trained.items()}
    with torch.no_grad():
        outcome.final = float(oracle_loss(case.loss, model, reference, examples))
    return outcome


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what computes in float32 whatever its dtype is does so in float64."""
    with (
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(torch, "float32", torch.float64),
    ):
        yield


def exact_oracle(case: AdapterCase) -> Outcome:
    """``peft_oracle`` in float64."""
    with in_float64():
        return peft_oracle(case, torch.float64)


def exact_gradients(case: AdapterCase) -> dict[str, Tensor]:
    """The first step's, of ``exact_oracle``."""
    return exact_oracle(replace(case, steps=1)).gradients


def run_cases(rank: int, world: int, cases: Sequence[AdapterCase]) -> list[Outcome]:
    """For ``run_parallel``."""
    return [run_case(rank, case) for case in cases]


def run_case(rank: int, case: AdapterCase) -> Outcome:
    engine = case.engine(rank)
    return train(engine, case.micro_batches(rank, case.examples()), LOSSES[case.loss], case.steps)


def outcomes(cases: dict[str, AdapterCase]) -> dict[str, list[Outcome]]:
    """Name -> the ranks' outcomes; cases of one world size share their processes."""
    found: dict[str, list[Outcome]] = {}
    for world in sorted({case.world for case in cases.values()}):
        names = [name for name, case in cases.items() if case.world == world]
        ranks = run_parallel(world, run_cases, [cases[name] for name in names])
        found |= {name: [rank[i] for rank in ranks] for i, name in enumerate(names)}
    return found
