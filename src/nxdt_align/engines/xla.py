"""What the engines have of torch_xla: its device, the graphs that are compiled for it, and values brought
there and back without a graph of their own."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Graph, Shapes, shapes_of


def is_available() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


@cache
def _torch_xla() -> Any:
    import torch_xla

    return torch_xla


def device() -> torch.device:
    """torch_xla's device of this process."""
    found: torch.device = _torch_xla().device()
    return found


def sync() -> None:
    """End the graph that is being recorded, and run it."""
    _torch_xla().sync()


def recompute(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A Recompute: torch's own knows no XLA, and without this one's barrier the compiler would merge what
    is recomputed with what was computed before."""
    from torch_xla.utils.checkpoint import checkpoint

    result: Tensor = checkpoint(function, *args, preserve_rng_state=False)
    return result


# Graphs


class XlaCompiler:
    """A Compiler: what this process compiles, by the keys of torch_xla's persistent compilation cache.

    The cache's files serve for nothing else: the CPU's backend cannot read them back. They go with the
    process.

    Args:
        tells_keys: whether the device's backend writes such files. Must then be made before the first graph
            is compiled.
    """

    def __init__(self, *, tells_keys: bool) -> None:
        self._graphs: dict[str, Graph] = {}
        self._present: tuple[str, Shapes] = ("weights", ())
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if tells_keys:
            from torch_xla import runtime

            self._folder = tempfile.TemporaryDirectory(prefix="nxdt-align-graphs-")
            runtime.initialize_cache(self._folder.name, readonly=False)

    def begin(self, name: str, micro_batches: Sequence[Batch]) -> None:
        self._note()
        self._present = (name, shapes_of(micro_batches))

    def count(self) -> int:
        from torch_xla.debug import metrics

        return int(metrics.counter_value("UncachedCompile") or 0)

    def graphs(self) -> dict[str, Graph] | None:
        if self._folder is None:
            return None
        self._note()
        return dict(self._graphs)

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "torch_xla": str(_torch_xla().__version__)}

    def _note(self) -> None:
        """Put what was compiled since the last time under the present name."""
        for key in sorted(os.listdir(self._folder.name)) if self._folder is not None else ():
            self._graphs.setdefault(key, Graph(key, *self._present))


@cache
def compiler(*, tells_keys: bool = True) -> XlaCompiler:
    """This process's."""
    return XlaCompiler(tells_keys=tells_keys)


# Values


def fetch(values: Sequence[Tensor]) -> list[float]:
    """Scalars as numbers, in one transfer; without a graph, where they were computed before."""
    found = _torch_xla()._XLAC._xla_get_cpu_tensors([value.detach() for value in values])
    return [float(value) for value in found]


@contextmanager
def filling(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors to fill before the end: the same ones, but for those on a lazy device memory on the CPU, which
    is handed over at the end, in their order.

    There a copy into a tensor is an operation, so a graph to compile; a whole tensor from the CPU is none.
    """
    lazy = [name for name, tensor in tensors.items() if tensor.device.type == "xla"]
    on_cpu = {name: torch.empty_like(tensors[name], device="cpu") for name in lazy}
    yield {**tensors, **on_cpu}
    for name in lazy:
        tensors[name].data = on_cpu[name].to(tensors[name].device)


def make_data(tensors: Mapping[str, Tensor]) -> None:
    """Have tensors without values be data. On a lazy device they are an operation's result, so a graph."""
    with filling(tensors):
        pass


@contextmanager
def state_as_computed(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have the state that is loaded within be what a step leaves behind: data on the device, each tensor
    its own. Nothing changes off XLA devices.

    torch_xla makes a constant of a copied scalar that is 0 or 1, and one input of all that are equal: the
    step after a checkpoint would be another graph than one after a step.
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
