"""Adapters on models that transformers computes, and what PEFT computes of the same on transformers' own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from adapter_fixture import StartedAdapters, in_float64, lora, with_pefts_layers
from backend_fixture import StateDict, dpo_loss, drawn
from layouts import ATTENTIONS
from parallel_fixture import BETA, CLIP, LOSSES, Outcome, adamw, examples_of, train
from torch import Tensor, nn

from nxdt_align.batch import Batch, Topology
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.backend.model import StockAttention

PAIRS = 6
FLOAT64 = Precision(compute=torch.float64)


@dataclass(frozen=True)
class BackendCase:
    """A model of ``backend_fixture`` with adapters."""

    config: TransformersConfig
    settings: tuple[tuple[str, Any], ...] = ()
    """Of the adapters, beside ``lora``'s."""
    data: int = 1
    kind: str = "none"
    """zero1 or fsdp."""
    steps: int = 1
    checkpointing: str | None = None
    precision: Precision = field(default_factory=Precision)

    @property
    def spec(self) -> AdapterSpec:
        return lora(self.config, **dict(self.settings))

    def started(self, model: Any) -> StartedAdapters:
        return StartedAdapters(StateDict(self.config, model), self.config, self.spec)

    def engine(self, rank: int = 0, start: Any = None) -> NativeEngine:
        takes_rows = self.config.findings.refusal is None

        def configure(model: Any) -> None:
            if self.checkpointing is not None:
                model.set_checkpointing(self.checkpointing)

        made = NativeEngine(
            self.config,
            ATTENTIONS["blocks"] if takes_rows else StockAttention(),
            precision=self.precision,
            parallel=Parallel(zero1=self.kind == "zero1", fsdp=self.kind == "fsdp"),
            topology=Topology.of_rank(rank, self.data),
            configure_model=configure,
            adapters=self.spec,
            seed=3,
        )
        made.load_weights(self.started(drawn(self.config) if start is None else start))
        made.load_reference(None)
        return made

    def micro_batches(self, rank: int = 0) -> list[Batch]:
        config, examples = self.config, examples_of(PAIRS, 4)
        layout: Layout = "shared_prompt" if config.findings.refusal is None else "none"
        planner = RowPlanner(
            examples,
            layout,
            examples_per_step=PAIRS,
            seq_length=96,
            ranks=self.data,
            micro_batch_size=1,
            min_micro_batches=2,
            window=config.sliding_window,
            only_local=config.layer_types is None,
        )
        return StepDataset(examples, planner, layout, Topology.of_rank(rank, self.data))[list(range(PAIRS))]

    def run(self, rank: int = 0) -> Outcome:
        # Also because transformers' code is imported with it, which must not keep what float32 is inside.
        start = drawn(self.config)
        with in_float64() if self.precision == FLOAT64 else nullcontext():
            return train(self.engine(rank, start), self.micro_batches(rank), LOSSES["dpo"], self.steps)


def run_cases(rank: int, world: int, cases: list[BackendCase]) -> list[Outcome]:
    """For ``run_parallel``."""
    return [case.run(rank) for case in cases]


def peft_model(case: BackendCase) -> tuple[Any, dict[str, nn.Parameter]]:
    """transformers' own model with PEFT's layers in it, and its trained parameters by our names."""
    model = drawn(case.config)
    source = case.started(model)
    model.requires_grad_(False)
    return model, with_pefts_layers(model, source, case.spec)


@cache
def peft_oracle(case: BackendCase) -> Outcome:
    """The same training by PEFT's layers, one response at a time; the reference is the plain model."""
    (model, trained), reference, examples = peft_model(case), drawn(case.config), examples_of(PAIRS, 4)
    parameters = list(trained.values())
    optimizer = adamw(parameters)
    outcome: Outcome | None = None
    for _ in range(case.steps):
        loss = dpo_loss(model, reference, examples, BETA)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        outcome = outcome or Outcome(float(loss.detach()), float(norm), gradients)
        optimizer.step()
    assert outcome is not None
    outcome.weights = {name: p.detach().clone() for name, p in trained.items()}
    with torch.no_grad():
        outcome.final = float(dpo_loss(model, reference, examples, BETA))
    return outcome


@cache
def exact_gradients(case: BackendCase) -> dict[str, Tensor]:
    """PEFT's in float64."""
    model, trained = peft_model(case)
    model.double()
    with mock.patch.object(Tensor, "float", Tensor.double):
        reference = drawn(case.config).double()
        loss = dpo_loss(model, reference, examples_of(PAIRS, 4), BETA)
        found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True))
