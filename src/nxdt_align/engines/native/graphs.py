"""What torch.compile makes of a run's steps: counted, and told apart by keys that hold in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Graph, Shapes, shapes_of


class GraphRecorder:
    """A Compiler: the graphs that torch.compile hands to its backend in this process.

    A graph is one of a single micro-batch. Forward and backward count as one; so does a graph that the
    backend finds in its cache on disk.
    """

    name = "torch.compile"
    by_micro_batch = True

    def __init__(self) -> None:
        self._graphs: dict[str, Graph] = {}
        self._count = 0
        self._present: tuple[str, Shapes] = ("weights", ())
        self._begun: dict[tuple[str, Shapes], None] = {}

    def begin(self, name: str, micro_batches: Sequence[Batch]) -> None:
        shapes = tuple(dict.fromkeys(shapes_of(micro_batches)))
        self._present = name, shapes
        self._begun |= dict.fromkeys((name, (shape,)) for shape in shapes)

    def begun(self) -> Sequence[tuple[str, Shapes]]:
        return list(self._begun)

    def count(self) -> int:
        return self._count

    def graphs(self) -> dict[str, Graph]:
        return dict(self._graphs)

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def noting(self, part: str, backend: str | Callable[..., Any]) -> Callable[..., Any]:
        """``backend``, as a function that notes each graph of the model's ``part`` that it is given."""
        compiler: Callable[..., Any] = lookup_backend(backend)

        def compiled(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
            self._count += 1
            key = _key(part, module, inputs)  # before the backend changes the graph
            made = compiler(module, inputs, **options)
            again = sum(known.partition("-")[0] == key for known in self._graphs)
            # The same operations with other guards: layers that differ in a number that no operation shows.
            key = f"{key}-{again + 1}" if again else key
            name, shapes = self._present
            self._graphs[key] = Graph(key, f"{name}: {part}", shapes)
            return made

        return compiled


def _key(part: str, module: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Of all that the compiled code depends on: operations, what they are given, and whether it has a
    backward pass."""
    graphs = [child.code for child in module.modules() if isinstance(child, fx.GraphModule)]
    given = [_described(value) for value in inputs]
    text = repr((part, torch.is_grad_enabled(), graphs, given))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _described(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Tensor):
        return (type(value).__name__, str(value))
    placements = str(getattr(value, "placements", ""))  # a DTensor's
    sizes = tuple(value.shape), tuple(value.stride())
    return (*sizes, str(value.dtype), value.device.type, value.requires_grad, placements)
