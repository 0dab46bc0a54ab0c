"""Steps of many kinds, one after the other, through one engine whose layers are on several ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from oracle import ExampleSet, ModuleWeights, random_examples
from parallel_fixture import LOSSES, Case, make_model, run_parallel, whole
from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.base import StepOutput
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective

OBJECTIVES = {
    name: GlobalMeanObjective(loss)
    for name, loss in (LOSSES | {"wpo": DPOLoss(DPOConfig(kl_beta=0.3, use_weighting=True))}).items()
}


@dataclass(frozen=True)
class Step:
    """``count`` pairs with prompts of up to ``longest`` tokens, and what is done with them."""

    objective: str = "dpo"
    count: int = 7
    longest: int = 30
    layout: Layout = "shared_prompt"
    kind: Literal["train", "validate", "score"] = "train"
    micro: int = 1

    def examples(self) -> ExampleSet:
        return random_examples(self.count, self.longest, prompt=(1, self.longest), response=(1, 20))

    def micro_batches(self, case: Case, rank: int) -> list[Batch]:
        """A rank's; as many as its schedule needs where they are trained on."""
        examples, trains = self.examples(), self.kind == "train"
        is_interleaved = case.virtual_pipeline > 1
        planner = RowPlanner(
            examples,
            self.layout,
            examples_per_step=self.count,
            seq_length=96,
            ranks=case.data,
            micro_batch_size=self.micro,
            min_micro_batches=case.pipeline if trains and not is_interleaved else 1,
            round_size=case.pipeline if trains and is_interleaved else 1,
        )
        dataset = StepDataset(examples, planner, self.layout, case.topology(rank))  # type: ignore[arg-type]
        return dataset[tuple(range(self.count))]


@dataclass
class Outcome:
    """What a step says, and the gradients that it leaves on this rank."""

    loss: float
    metrics: dict[str, float]
    norm: float
    gradients: dict[str, Tensor]
    logps: list[Tensor]


@dataclass(frozen=True)
class Sequence:
    """A way to spread the model, and the steps that one engine takes."""

    case: Case
    steps: tuple[Step, ...]


def take(engine: NativeEngine, step: Step, batches: list[Batch]) -> Outcome:
    outcome = Outcome(0.0, {}, 0.0, {}, [])
    output: StepOutput | None = None
    if step.kind == "score":
        for batch in batches:
            both = [engine.response_logps(batch, reference=reference) for reference in (False, True)]
            outcome.logps.append(torch.where(batch.slot_valid, torch.stack(both), 0.0))
        return outcome
    if step.kind == "train":
        output = engine.step(batches, OBJECTIVES[step.objective])
        outcome.gradients = {n: whole(p.grad) for n, p in engine.named_parameters() if p.grad is not None}
        outcome.norm = float(engine.clip_gradients(None))
    else:
        output = engine.evaluate(batches, OBJECTIVES[step.objective])
    outcome.loss = float(output.loss)
    outcome.metrics = {name: float(value) for name, value in output.metrics.items()}
    return outcome


def take_all(rank: int, world: int, sequences: list[Sequence]) -> list[list[Outcome]]:
    """For ``run_parallel``: every sequence with an engine of its own."""
    found = []
    for sequence in sequences:
        engine = built(sequence.case, rank)
        batches = [step.micro_batches(sequence.case, rank) for step in sequence.steps]
        found.append([take(engine, s, b) for s, b in zip(sequence.steps, batches, strict=True)])
    return found


def built(case: Case, rank: int) -> NativeEngine:
    """Weights whose log-probs are far from uniform, so that no error hides."""
    engine = case.engine(rank)
    engine.load_weights(ModuleWeights(make_model(0, case.shape, std=0.15)))
    engine.load_reference(ModuleWeights(make_model(1, case.shape, std=0.15)))
    return engine


def over_ranks(sequences: dict[str, Sequence]) -> dict[str, list[list[Outcome]]]:
    """Name -> rank -> outcomes; sequences of one world size share their processes."""
    found: dict[str, list[list[Outcome]]] = {}
    for world in sorted({s.case.world for s in sequences.values()}):
        names = [name for name, s in sequences.items() if s.case.world == world]
        ranks = run_parallel(world, take_all, [sequences[name] for name in names])
        found |= {name: [rank[i] for rank in ranks] for i, name in enumerate(names)}
    return found


def in_one_process(sequence: Sequence) -> list[Outcome]:
    """The rows of all data-parallel ranks through one whole model, one micro-batch after the other."""
    spread = sequence.case
    alone = built(replace(spread, tensor=1, pipeline=1, data=1, virtual_pipeline=1, pipeline_cuts=None), 0)
    outcomes = []
    for step in sequence.steps:
        first_of_each = range(0, spread.data * spread.tensor, spread.tensor)
        batches = [b for rank in first_of_each for b in step.micro_batches(spread, rank)]
        outcomes.append(take(alone, step, batches))
    return outcomes
