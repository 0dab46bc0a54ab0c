"""The graphs of a run for one of its ranks, recorded without running them: no device, no weights, no other
rank. What a step does here is what ``training.module`` does, in the same order."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nxdt_align.batch import Batch
from nxdt_align.config import custom
from nxdt_align.config.schema import Config
from nxdt_align.data.layouts import LayoutChoice
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.data.steps import step_of_each_bucket
from nxdt_align.engines import xla
from nxdt_align.engines.base import Engine, Shapes
from nxdt_align.engines.nxd import compat
from nxdt_align.engines.nxd.flash import BiasedKernels, Kernel, TracedKernels, traced_kernel
from nxdt_align.errors import UserError
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.planning.devices import Device, device_of
from nxdt_align.planning.graph_cost import Cost, StepCost
from nxdt_align.planning.graph_report import Finding, GraphReport, ranked, report, to_dict, to_text
from nxdt_align.run import assemble, computing, native_graphs
from nxdt_align.run.adapters import spec_of
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.dry_run import DryRun
from nxdt_align.run.nxd import NxDParts
from nxdt_align.run.rows import row_needs, with_possible_layout
from nxdt_align.run.settle import settle_sizes
from nxdt_align.run.standing import require_lengths, standing_for_data
from nxdt_align.run.tracing_memory import require_memory
from nxdt_align.training import optim

__all__ = ["compare", "device_of", "of_ranks", "reports", "to_dict", "to_text", "trace"]

MICRO_BATCHES = 1
"""Of a step that are recorded, beyond as many as the pipeline has stages: each stage then meets a micro-batch
whose gradients are the first, and one that adds to what is there, as all after it do."""
_STEP = "training step"


@dataclass(frozen=True)
class Traced:
    """A rank's graphs."""

    graphs: list[xla.TracedGraph]
    """Each once, in the order in which they are first met."""
    executed: list[xla.TracedGraph]
    """In the order in which they would be run."""
    steps: list[tuple[int, int]]
    """Micro-batches and examples of a whole step, in each bucket."""


def trace(config: Config, model: DecoderConfig, rank: int, lengths: Sequence[int] | None) -> Traced:
    """Every graph of the run on ``rank``.

    Args:
        config: settled for ``model``.
        lengths: tokens of a prompt and of its responses, for examples that stand for the data; None for the
            data of the configuration.

    Raises UserError where memory is missing, and for what training would refuse.
    """
    require_memory(config, model, "nxd")
    config = with_possible_layout(config, model)
    env = RunEnv(rank=rank, world_size=config.world_size, compile_only=True)
    parts = _TracedParts(config, env, model, DryRun())
    tracer = xla.start_tracing()
    objective = GlobalMeanObjective(
        assemble.loss(config, "nxd"), token_statistics=config.exp_manager.log_token_statistics
    )
    data, choice = _steps(config, model, parts, objective, lengths)
    if choice is not None:
        parts.settle(config := config.with_layout(choice.layout))
    engine = parts.engine(spec_of(config, model))
    engine.compiler = tracer
    most = config.distributed_strategy.pipeline_model_parallel_size + MICRO_BATCHES
    _Steps(config, engine, objective, tracer).take([batches[:most] for _, batches in data])
    distinct: dict[str, xla.TracedGraph] = {}
    for graph in tracer.traced:
        distinct.setdefault(graph.key, graph)
    return Traced(list(distinct.values()), tracer.traced, [(len(b), len(e)) for e, b in data])


def refuse_own_parts(config: Config, *, with_data: bool) -> None:
    """Raise UserError where the graphs depend on a part of the user's own that only training may import."""
    keys = ("model_alignment_strategy.loss", "model.optim.name", *(("data.format",) if with_data else ()))
    custom.refuse_own_parts(config, keys)


def reports(
    config: Config, rank: int, lengths: Sequence[int] | None, device: Device
) -> tuple[list[GraphReport], list[StepCost]]:
    """What is in each of ``trace``'s graphs, and what a step in each bucket takes on ``device``, on paper. On
    engine native: of its compiled parts, as torch.compile traces them.

    Raises UserError where torch_xla, neuronx-distributed or memory is missing, for a rank that the run does
    not have, and for what training would refuse.
    """
    if config.distributed_strategy.engine == "native":
        _require_rank(config, rank)
        return native_graphs.reports(config, rank, lengths, device)
    _require(config, rank, lengths)
    settled, model = settle_sizes(config, "nxd", device="neuron", reads_data=lengths is None)
    found = trace(settled.config, assemble.decoder_for_nxd(model), rank, lengths)
    low = computing.precision(settled.config).compute == torch.bfloat16
    made = {graph.key: report(graph, device, low_precision=low) for graph in found.graphs}
    stages = config.distributed_strategy.pipeline_model_parallel_size
    return list(made.values()), _steps_on_paper(found, made, stages)


def _steps_on_paper(found: Traced, made: Mapping[str, GraphReport], stages: int) -> list[StepCost]:
    """Of the last step that was recorded in each bucket: its optimizer has states already."""
    steps: list[StepCost] = []
    for shapes in dict.fromkeys(graph.shapes for graph in found.executed if graph.name == _STEP):
        count, examples = found.steps[len(steps)]
        run = _last_step(found.executed, shapes)
        optimizer = [made[g.key] for g in found.executed if g.name == "optimizer" and g.shapes == shapes][-1]
        first, later = _parts_of_step([made[g.key] for g in run], len(shapes), stages)
        steps.append(
            StepCost(
                shape=tuple(shapes[0]),
                micro_batches=count,
                examples=examples,
                first=sum((each.cost for each in first), Cost()),
                later=sum((each.cost for each in later), Cost()),
                optimizer=optimizer.cost,
                flops=sum(each.flops for each in first) + sum(each.flops for each in later) * (count - 1),
                stages=stages,
            )
        )
    return steps


def _last_step(executed: Sequence[xla.TracedGraph], shapes: Shapes) -> list[xla.TracedGraph]:
    """The graphs of forward and backward passes in the last step of these shapes."""
    found: list[xla.TracedGraph] = []
    for graph in (each for each in executed if each.shapes == shapes):
        if graph.name == _STEP:
            found.append(graph)
        elif found and graph.name == "optimizer":
            last, found = found, []
    return last


def _parts_of_step(
    run: Sequence[GraphReport], micro_batches: int, stages: int
) -> tuple[list[GraphReport], list[GraphReport]]:
    """What a step runs for its first micro-batch, with what it runs once, and for each later one."""
    if stages == 1:
        # Each pass, as of a reference that is asked at each step, has a graph per micro-batch.
        of_passes = run[-(len(run) // micro_batches * micro_batches) :]
        return list(of_passes[::micro_batches]), list(of_passes[1::micro_batches])
    # Of a pipeline each pass, send and receipt is a graph of its own, run again for each micro-batch; but for
    # the backward pass of the first, and what sums up the step.
    times, graphs = Counter(each.key for each in run), {each.key: each for each in run}
    again = {key: round(count / micro_batches) for key, count in times.items()}
    once = {key: count - again[key] * (micro_batches - 1) for key, count in times.items()}
    first, later = ([graphs[key] for key, n in each.items() for _ in range(n)] for each in (once, again))
    return first, later


def of_ranks(arguments: Sequence[str], ranks: Sequence[int]) -> list[dict[str, Any]]:
    """``to_dict`` of several ranks, each recorded by this command in a process of its own, as NxD keeps one
    rank's groups per process. Raises UserError where one fails, with its words."""
    tables: list[dict[str, Any]] = []
    for rank in ranks:
        command = [sys.executable, "-m", "nxdt_align", "graphs", "--ranks", str(rank), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            words = done.stderr.strip().rpartition("error: ")[2] or f"status {done.returncode}"
            raise UserError(
                words.splitlines()[0] if words.startswith("graphs") else f"graphs: rank {rank}: {words}"
            )
        tables += json.loads(done.stdout)
    return tables


def compare(tables: Sequence[Mapping[str, Any]]) -> str:
    """Which ranks have which graphs, whose step is the longest on paper, and each finding once, in lines."""
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for table in tables:
        for graph in table["graphs"]:
            ranks_of.setdefault((graph["key"], graph["name"]), []).append(table["rank"])
    everyone = [table["rank"] for table in tables]
    lines = [
        f"ranks {', '.join(map(str, everyone))}: {len(ranks_of)} distinct graphs; a rank has "
        f"{max(len(table['graphs']) for table in tables)}"
    ]
    for (key, name), ranks in ranks_of.items():
        whose = "all" if ranks == everyone else "rank " + ", ".join(map(str, ranks))
        lines.append(f"  {name}: {whose} (hash {key})")
    for same in zip(*(table["steps"] for table in tables), strict=True):
        rank, slowest = max(zip(everyone, same, strict=True), key=lambda of_rank: of_rank[1]["seconds"])
        lines.append(
            f"a step on paper, rows of {slowest['shape'][0]} x {slowest['shape'][1]}: "
            f"{slowest['seconds']:.3f} s for {slowest['examples']} examples, "
            f"{slowest['examples_per_second']:.2f} per second, by the slowest of these ranks ({rank})"
        )
    found = dict.fromkeys(Finding(**f) for t in tables for g in t["graphs"] for f in g["findings"])
    return "\n".join([*lines, *(f"finding: {f.rule}: {f.what}; {f.advice}" for f in ranked(found))])


def _require_rank(config: Config, rank: int) -> None:
    if not 0 <= rank < config.world_size:
        raise UserError(
            f"graphs: --ranks must be from 0 to {config.world_size - 1}, as the run has {config.world_size} "
            f"processes (trainer.devices x trainer.num_nodes), but is {rank}"
        )


def _require(config: Config, rank: int, lengths: Sequence[int] | None) -> None:
    _require_rank(config, rank)
    if lengths is not None:
        require_lengths(config, lengths)
    for package, advice in _NEEDED.items():
        if not is_importable(package):
            raise UserError(f"graphs: {package} is missing, {advice}; {_WITHOUT}")


_WITHOUT = "distributed_strategy.engine=native, the engine of trn2 and trn3, is recorded without it"
_NEEDED = {
    "torch_xla": "which records the graphs; make test-xla makes an environment that has it (.venv-xla)",
    "neuronx_distributed": (
        "whose layers the graphs are made of; put the src folder of its source on PYTHONPATH, and beside it "
        "tests/support/nxd_stubs of this package's source where there is no Neuron compiler"
    ),
}


def is_importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class _TracedParts(NxDParts):
    """One rank's, in a process that has no other."""

    def _backend(self) -> compat.Backend:
        return "neuron"

    def _start(self, backend: compat.Backend) -> compat.Platform:
        return compat.start_tracing(self._env.rank, self._env.world_size)

    def _kernel(self) -> Kernel:
        return traced_kernel

    def _kernels(self) -> BiasedKernels:
        return TracedKernels()


def _steps(
    config: Config,
    model: DecoderConfig,
    parts: NxDParts,
    objective: GlobalMeanObjective,
    lengths: Sequence[int] | None,
) -> tuple[list[tuple[Sequence[int], list[Batch]]], LayoutChoice | None]:
    """A step's examples, and its micro-batches on this rank, in each bucket of the run; and the choice of the
    layout, where that is auto."""
    rows = row_needs(config, "nxd", model, "neuron", needs_reference=objective.needs_reference)
    if lengths is None:
        module = ModelAlignmentDataModule(
            config,
            assemble.tokenization(config, model),
            parts.topology,
            cache_dir=None,
            with_prompts=objective.needs_prompts,
            fixed_micro_batches=True,
            **rows,
        )
        dataset, choice = module.splits["train"], module.choice
    else:
        dataset, choice = standing_for_data(
            *(config, parts.topology, lengths),
            with_prompts=objective.needs_prompts,
            fixed_micro_batches=True,
            **rows,
        )
    first = range(min(config.data.global_batch_size, len(dataset.examples)))
    visited = step_of_each_bucket(dataset.planner, first)
    return [(s.examples, dataset.lay_out(s.examples, bucket)) for bucket, s in visited.items()], choice


class _Steps:
    """The reference pass, two training steps and a validation step in each bucket."""

    def __init__(
        self, config: Config, engine: Engine, objective: GlobalMeanObjective, tracer: xla.Tracer
    ) -> None:
        self._config, self._engine, self._objective, self._tracer = config, engine, objective, tracer

    def take(self, data: Sequence[list[Batch]]) -> None:
        engine, config = self._engine, self._config
        stored = config.model_alignment_strategy.precompute_ref_log_probs
        reference = self._objective.needs_reference
        if reference:
            # A reference of its own precision, or one that is asked at each step.
            engine.load_reference(None)
        optimizer = self._optimizer()
        for micro_batches in data:
            if reference and stored:
                logps = engine.response_logps(micro_batches[0].to(engine.device), reference=True)
                self._tracer.read(logps)
        if stored:
            engine.drop_reference()
        for micro_batches in data:
            if reference and stored:
                slots = [torch.zeros(batch.slot_valid.shape) for batch in micro_batches]
                micro_batches = [b.with_reference(s) for b, s in zip(micro_batches, slots, strict=True)]
            for _ in range(2):
                self._train([batch.to(engine.device) for batch in micro_batches], optimizer)
            if config.validates and config.data.val_dir is not None:
                engine.evaluate([batch.to(engine.device) for batch in micro_batches], self._objective)
                engine.mark_step()

    def _optimizer(self) -> torch.optim.Optimizer:
        model = self._config.model
        built = optim.build_optimizer(
            self._engine.named_parameters(),
            model.optim.name,
            model.optim.settings(),
            layer_norm_weight_decay=model.do_layer_norm_weight_decay,
        )
        return self._engine.adopt_optimizer(built)

    def _train(self, micro_batches: list[Batch], optimizer: torch.optim.Optimizer) -> None:
        engine, config = self._engine, self._config
        output = engine.step(micro_batches, self._objective)
        engine.compiler.begin("optimizer", micro_batches)  # type: ignore[union-attr]
        norm = engine.clip_gradients(config.trainer.gradient_clip_val)
        optimizer.step()
        norms = [norm]
        if config.exp_manager.log_parameter_norm:
            norms.append(engine.parameter_norm())
        engine.mark_step()
        engine.fetch([output.loss, *output.metrics.values(), *norms])
