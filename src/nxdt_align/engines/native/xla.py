"""The native engine on torch_xla's CPU device, in one process: what runs on a NeuronCore as a graph, where
there is none.

Operations are recorded and run as one compiled graph a step (``mark_step``).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Objective, StepOutput, WeightSource
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.loading import filling

Shapes = tuple[tuple[int, ...], ...]
"""Rows, tokens, response tokens and responses a row: of each micro-batch."""


def is_available() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


@cache
def _torch_xla() -> Any:
    import torch_xla

    return torch_xla


def versions() -> dict[str, str]:
    """Of what a graph's key depends on."""
    return {"torch": torch.__version__, "torch_xla": str(_torch_xla().__version__)}


def device() -> torch.device:
    """torch_xla's device of this process."""
    found: torch.device = _torch_xla().device()
    return found


def compilations() -> int:
    """Graphs compiled so far in this process."""
    from torch_xla.debug import metrics

    return int(metrics.counter_value("UncachedCompile") or 0)


def recompute(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A Recompute: torch's own knows no XLA, and without this one's barrier the compiler would merge what
    is recomputed with what was computed before."""
    from torch_xla.utils.checkpoint import checkpoint

    result: Tensor = checkpoint(function, *args, preserve_rng_state=False)
    return result


@dataclass(frozen=True)
class Graph:
    """A compiled graph. ``key``: the same for the same graph in every process."""

    key: str
    name: str
    """What was computed."""
    shapes: Shapes
    """Of the micro-batches that it was computed of."""


class GraphLog:
    """The graphs that this process compiles, by their keys in torch_xla's persistent compilation cache.

    The cache's files serve for nothing else: this backend cannot read them back. They go with the process.
    """

    def __init__(self) -> None:
        from torch_xla import runtime

        self._folder = tempfile.TemporaryDirectory(prefix="nxdt-align-graphs-")
        runtime.initialize_cache(self._folder.name, readonly=False)
        self.graphs: dict[str, Graph] = {}

    def note(self, name: str, shapes: Shapes) -> None:
        """Put what was compiled since the last call under this name."""
        for file in sorted(os.listdir(self._folder.name)):
            self.graphs.setdefault(file, Graph(file, name, shapes))


@cache
def graph_log() -> GraphLog:
    """This process's. Must be asked for before the first graph is compiled."""
    return GraphLog()


def shapes_of(micro_batches: Sequence[Batch]) -> Shapes:
    return tuple((*b.input_ids.shape, b.labels.shape[1], b.slot_valid.shape[1]) for b in micro_batches)


@contextmanager
def _state_as_computed(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have the state that is loaded within be what a step leaves behind: data on the device, each tensor
    its own.

    torch_xla makes a constant of a copied scalar that is 0 or 1, and one input of all that are equal: the
    step behind a checkpoint would be another graph than one behind a step.
    """
    saved: dict[int, dict[str, Any]] = {}
    hook = optimizer.register_load_state_dict_pre_hook(lambda _, given: saved.update(given["state"]))
    try:
        yield
    finally:
        hook.remove()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved.items():
        state = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(state[key], Tensor) and state[key].device.type == "xla":
                state[key] = _as_data(value.to(state[key].dtype))


def _as_data(value: Tensor) -> Tensor:
    """A tensor on the CPU as one on the device, without a graph."""
    found: list[Tensor] = _torch_xla()._XLAC._xla_tensors_from_aten([value], [str(device())], None)
    return found[0]


class XlaEngine(NativeEngine):
    """Takes what NativeEngine takes; ``device`` is ``xla.device()``."""

    lazy = True
    graphs: GraphLog | None = None
    """Where compiled graphs are noted."""
    _present: tuple[str, Shapes] = ("weights", ())

    def load_weights(self, source: WeightSource) -> None:
        super().load_weights(source)
        self._run()

    def load_reference(self, source: WeightSource | None) -> None:
        super().load_reference(source)
        self._run()

    def step(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        output = super().step(micro_batches, objective)
        self._name("training step", micro_batches)
        return output

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        output = super().evaluate(micro_batches, objective)
        self._name("validation step", micro_batches)
        return output

    def response_logps(self, batch: Batch, *, reference: bool = False) -> Tensor:
        logps = super().response_logps(batch, reference=reference)
        self._name("log-probabilities without gradients", [batch])
        return logps

    def mark_step(self) -> None:
        # Here and not when they are needed next, so that all steps are one graph.
        self._publish()
        self._run()

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Without a graph of its own, where ``mark_step`` came before."""
        found = _torch_xla()._XLAC._xla_get_cpu_tensors([value.detach() for value in values])
        return [float(value) for value in found]

    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        with nullcontext() if optimizer is None else _state_as_computed(optimizer):
            extra = super().load(directory, optimizer)
        self._run()
        return extra

    @torch.no_grad()
    def _weights_changed(self) -> None:
        """Loaded masters are rounded on the CPU, and the weights that are computed with are data as well."""
        self._policy.weights_changed()
        if self._masters is not None:
            weights: dict[str, Tensor] = dict(self._policy.named_parameters())
            with filling(weights) as parts:
                for name, master in self._masters.named_parameters():
                    parts[name].local.copy_(master)
        self._is_behind = False

    def _run(self) -> None:
        _torch_xla().sync()
        self.note_graphs()

    def _name(self, name: str, micro_batches: Sequence[Batch]) -> None:
        """What is compiled from now on; what was compiled before goes under the earlier name."""
        self.note_graphs()
        self._present = (name, shapes_of(micro_batches))

    def note_graphs(self) -> None:
        """Bring ``graphs`` up to date."""
        if self.graphs is not None:
            self.graphs.note(*self._present)
