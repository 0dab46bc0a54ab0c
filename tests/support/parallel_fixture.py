"""A small four-layer Llama spread over several processes, and what one process gets of it without any of
the code that spreads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from oracle import (
    ExampleSet,
    ModuleWeights,
    causal_attention,
    dpo_loss,
    gradients,
    orpo_loss,
    random_examples,
)
from rank_processes import run_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nxdt_align.batch import Batch, Topology
from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.data.tokenize import Example
from nxdt_align.engines.native.compiled import Compiling
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.losses.types import Loss
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention

SHAPE = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
BETA = 0.1
LOSSES: dict[str, Loss] = {
    "dpo": DPOLoss(DPOConfig(kl_beta=BETA)),
    "orpo": ORPOLoss(ORPOConfig(beta=BETA)),
    "aot": DPOLoss(DPOConfig(kl_beta=BETA, loss_type=("aot",))),
}
ATTENTIONS: dict[str, Attention] = {
    "dense": DenseAttention(),
    "blocks": BlockAttention(),
    "flex": FlexAttention(),
    "flex, in the layer's graph": FlexAttention(compiled=False),
}


# Model and data


def make_model(seed: int, shape: DecoderConfig = SHAPE, std: float = 0.02) -> Decoder:
    """The plain model, fp32, of the same values on every call."""
    model = Decoder(shape, causal_attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + (1.0 - shape.norm_offset if name.endswith("norm.weight") else 0.0))
    return model


@functools.cache
def examples_of(count: int, seed: int) -> ExampleSet:
    """Short ones, so that fp32's own rounding of a sum over tokens stays well below 1e-6."""
    return random_examples(count, seed, prompt=(1, 12), response=(1, 8))


STEPS, CLIP, RATE = 5, 0.1, 1e-3
"""Optimizer steps; a norm that is exceeded at each; AdamW's learning rate."""


@dataclass(frozen=True)
class Case:
    """One way to spread the model, and what it is trained on."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    zero1: bool = False
    fsdp: bool = False
    virtual_pipeline: int = 1
    pipeline_cuts: tuple[int, ...] | None = None
    loss: str = "dpo"
    layout: Layout = "shared_prompt"
    attention: str = "dense"
    precision: Precision = field(default_factory=Precision)
    checkpointing: tuple[str, tuple[str, ...]] | None = None
    """Granularity, and the modules of ``selective``."""
    min_micro_batches: int = 2
    pairs: int = 8
    seed: int = 4
    shape: DecoderConfig = SHAPE
    std: float = 0.02
    """Of the weights."""
    copies_reference: bool = False
    """The reference is a copy of the policy at its start, not another model."""
    steps: int = STEPS
    buckets: tuple[int, ...] | None = None
    given: ExampleSet | None = None
    """Instead of random tokens."""
    compiled: str | Callable[..., Any] | None = None
    """torch.compile's backend."""
    device: str = "cpu"
    """Of the engine and its batches; what comes out is on the CPU."""

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def parallel(self) -> Parallel:
        return Parallel(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            pipeline_cuts=self.pipeline_cuts,
            sequence_parallel=self.sequence_parallel,
            zero1=self.zero1,
            fsdp=self.fsdp,
        )

    def topology(self, rank: int) -> Topology:
        return Topology.of_rank(
            rank,
            self.world,
            tensor_parallel_size=self.tensor,
            pipeline_parallel_size=self.pipeline,
        )

    def model(self, seed: int) -> Decoder:
        return make_model(seed, self.shape, self.std)

    def examples(self) -> ExampleSet:
        return self.given or examples_of(self.pairs, self.seed)

    @property
    def alone(self) -> Case:
        """The same in one process."""
        flags = {"sequence_parallel": False, "zero1": False, "fsdp": False}
        return replace(self, tensor=1, pipeline=1, virtual_pipeline=1, data=1, **flags)

    def micro_batches(self, rank: int, examples: ExampleSet) -> list[Batch]:
        """This rank's of one global batch of all examples."""
        planner = RowPlanner(
            examples,
            self.layout,
            examples_per_step=len(examples),
            seq_length=max(96, int(examples.prompt_lengths.max() + examples.response_lengths.max())),
            buckets=self.buckets,
            ranks=self.data,
            micro_batch_size=1,
            min_micro_batches=self.min_micro_batches,
            window=self.shape.sliding_window,
            only_local=self.shape.layer_types is None,
        )
        dataset = StepDataset(examples, planner, self.layout, self.topology(rank))  # type: ignore[arg-type]
        batches = dataset[tuple(range(len(examples)))]
        return batches if self.device == "cpu" else [batch.to(torch.device(self.device)) for batch in batches]

    def engine(self, rank: int) -> NativeEngine:
        """With policy 0 and, where the loss wants it, reference 1."""

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
            compiling=None if self.compiled is None else Compiling(self.compiled),
        )
        engine.load_weights(ModuleWeights(self.model(0)))
        if LOSSES[self.loss].needs_reference:
            given = None if self.copies_reference else ModuleWeights(self.model(1))
            engine.load_reference(given)
        return engine


# What comes out


@dataclass
class Outcome:
    """What training says, every tensor whole."""

    loss: float
    norm: float
    """Of the first step's gradients."""
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After all steps."""
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated: float = 0.0
    """The loss again, without gradients, before the first step."""
    parameter_norm: float = 0.0
    final: float = 0.0
    """The loss without gradients after all steps."""
    restarted: float = 0.0
    """The same once the first weights have been loaded again."""
    logps: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Record, policy's and reference's log-probs of this rank's slots, before the first step."""


def adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    # A larger eps: Adam's first step is a sign, which says nothing of entries whose gradient is rounding.
    return torch.optim.AdamW(parameters, lr=RATE, eps=1e-5, weight_decay=0.01)


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().cpu()


def train(
    engine: NativeEngine,
    batches: Sequence[Batch],
    loss: Loss,
    steps: int = STEPS,
    start: Decoder | None = None,
) -> Outcome:
    """Evaluate, ``steps`` AdamW steps with clipping, evaluate; with ``start``, load its weights and evaluate
    once more. All ranks call this."""
    objective = GlobalMeanObjective(loss, token_statistics=True)
    evaluated = engine.evaluate(batches, objective)
    logps = []
    for batch in batches:
        policy = engine.response_logps(batch)
        base = engine.response_logps(batch, reference=True) if loss.needs_reference else policy
        logps.append((batch.record_index.cpu(), policy.cpu(), base.cpu()))
    parameter_norm = engine.parameter_norm()
    optimizer = adamw([p for _, p in engine.named_parameters()])
    outcome: Outcome | None = None
    for _ in range(steps):
        output = engine.step(batches, objective)
        found = (
            {} if outcome else {n: whole(p.grad) for n, p in engine.named_parameters() if p.grad is not None}
        )
        norm = engine.clip_gradients(CLIP)
        outcome = outcome or Outcome(
            float(output.loss),
            float(norm),
            found,
            metrics={name: float(value) for name, value in output.metrics.items()},
            evaluated=float(evaluated.loss),
            parameter_norm=float(parameter_norm),
            logps=logps,
        )
        assert not engine.skips_step
        optimizer.step()
    assert outcome is not None
    outcome.weights = {name: whole(p) for name, p in engine.named_parameters()}
    outcome.final = float(engine.evaluate(batches, objective).loss)
    if start is not None:
        engine.load_weights(ModuleWeights(start))
        outcome.restarted = float(engine.evaluate(batches, objective).loss)
    return outcome


def run_cases(rank: int, world: int, cases: Sequence[Case]) -> list[Outcome]:
    """For ``run_parallel``: every case in turn."""
    return [run_case(rank, case) for case in cases]


def run_case(rank: int, case: Case) -> Outcome:
    batches = case.micro_batches(rank, case.examples())
    return train(case.engine(rank), batches, LOSSES[case.loss], case.steps, case.model(0))


def outcomes(cases: dict[str, Case]) -> dict[str, list[Outcome]]:
    """Name -> the ranks' outcomes; cases of one world size share their processes."""
    found: dict[str, list[Outcome]] = {}
    for world in sorted({case.world for case in cases.values()}):
        names = [name for name, case in cases.items() if case.world == world]
        ranks = run_parallel(world, run_cases, [cases[name] for name in names])
        found |= {name: [rank[i] for rank in ranks] for i, name in enumerate(names)}
    return found


def oracle_loss(loss: str, model: Decoder, reference: Decoder, examples: Sequence[Example]) -> Tensor:
    return orpo_loss(model, examples, BETA) if loss == "orpo" else dpo_loss(model, reference, examples, BETA)


def oracle(case: Case) -> Outcome:
    """The same training by the plain model, one response at a time, with torch's own clipping."""
    chosen = case.examples().examples
    model, reference = case.model(0), case.model(1)
    parameters = list(model.parameters())
    optimizer = adamw(parameters)
    outcome: Outcome | None = None
    size = torch.nn.utils.get_total_norm(parameters)
    for _ in range(case.steps):
        loss = oracle_loss(case.loss, model, reference, chosen)
        found = gradients(loss, model)
        for name, parameter in model.named_parameters():
            parameter.grad = found[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        outcome = outcome or Outcome(float(loss.detach()), float(norm), found, parameter_norm=float(size))
        optimizer.step()
    assert outcome is not None
    outcome.weights = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        outcome.final = float(oracle_loss(case.loss, model, reference, chosen))
    return outcome


def exact_gradients(case: Case) -> dict[str, Tensor]:
    """The plain model's gradients in float64, also where a Llama computes in float32 whatever its dtype."""
    model, reference = (case.model(seed).double() for seed in (0, 1))
    with mock.patch.object(Tensor, "float", Tensor.double):
        loss = oracle_loss(case.loss, model, reference, case.examples().examples)
        found = gradients(loss, model)
    assert all(gradient.dtype == torch.float64 for gradient in found.values())
    return found


def merged(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors of all pipeline stages; ranks that have the same one must agree to the last bit."""
    found: dict[str, Tensor] = {}
    for tensors in ranks:
        for name, tensor in tensors.items():
            assert name not in found or found[name].equal(tensor), f"ranks differ in {name}"
            found[name] = tensor
    return found


def worst(got: dict[str, Tensor], want: dict[str, Tensor], *, relative: bool) -> tuple[float, str]:
    """The largest difference, relative to its tensor's largest entry if ``relative``, and whose it is."""
    assert set(got) == set(want)
    found = []
    for name, wanted in want.items():
        scale = float(wanted.abs().max()) if relative else 1.0
        found.append((float((got[name] - wanted).abs().max()) / scale, name))
    return max(found)
