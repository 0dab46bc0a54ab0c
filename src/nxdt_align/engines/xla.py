"""What the engines have of torch_xla: its device, the graphs that are compiled for it, and values brought
there and back without a graph of their own."""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn on the device within follows from ``seed``; what is drawn later does not.

    A seed is an input of the graphs, so that another one is no other graph.
    """
    from torch_xla.core import xla_model

    before = xla_model.get_rng_state()
    xla_model.set_rng_state(seed)
    try:
        yield
    finally:
        xla_model.set_rng_state(before)


# Graphs


class XlaCompiler:
    """A Compiler: what this process compiles, by the keys of torch_xla's persistent compilation cache.

    The cache's files serve for nothing else: the CPU's backend cannot read them back. They go with the
    process.

    Args:
        tells_keys: whether the device's backend writes such files. Must then be made before the first graph
            is compiled.
    """

    by_micro_batch = False

    def __init__(self, *, tells_keys: bool) -> None:
        # What was compiled on a CPU says nothing of Neuron's cache.
        self.name = "torch_xla" if tells_keys else "neuronx-cc"
        self._graphs: dict[str, Graph] = {}
        self._present: tuple[str, Shapes] = ("weights", ())
        self._begun: dict[tuple[str, Shapes], None] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if tells_keys:
            from torch_xla import runtime

            self._folder = tempfile.TemporaryDirectory(prefix="nxdt-align-graphs-")
            runtime.initialize_cache(self._folder.name, readonly=False)

    def begin(self, name: str, micro_batches: Sequence[Batch]) -> None:
        self._note()
        self._present = (name, shapes_of(micro_batches))
        self._begun[self._present] = None

    def begun(self) -> Sequence[tuple[str, Shapes]]:
        return list(self._begun)

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


# Graphs that are recorded and never run


@dataclass(frozen=True)
class TracedGraph(Graph):
    """A graph that was recorded instead of run; its ``key`` holds in this version of torch_xla alone."""

    hlo: str
    """Its text, as XLA prints an HloModule."""


class Tracer:
    """A Compiler that compiles nothing: it keeps each graph's text where it would be run, and puts
    placeholders without memory in the place of its results.

    So a process can record what one rank of many computes, of a model whose weights it could not hold.
    """

    name = "torch_xla"
    by_micro_batch = False

    def __init__(self) -> None:
        self.traced: list[TracedGraph] = []
        """In the order in which they would be run; a graph that is run again stands there again."""
        self._present: tuple[str, Shapes] = ("groups and weights", ())

    def begin(self, name: str, micro_batches: Sequence[Batch]) -> None:
        self._present = (name, shapes_of(micro_batches))

    def begun(self) -> Sequence[tuple[str, Shapes]]:
        return list(dict.fromkeys((graph.name, graph.shapes) for graph in self.traced))

    def count(self) -> int:
        return 0

    def graphs(self) -> dict[str, Graph] | None:
        return {graph.key: graph for graph in reversed(self.traced)}

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "torch_xla": str(_torch_xla().__version__)}

    def sync(self, *_: object, **__: object) -> None:
        """What ``torch_xla.sync`` would run, as a graph of ``traced``."""
        library = _torch_xla()._XLAC
        by_number: dict[int, list[Tensor]] = {}
        for tensor in _on_device():
            by_number.setdefault(library._xla_get_tensor_id(tensor), []).append(tensor)
        # In the order in which they were made, as a graph has its results; else its hash would be another
        # one each time.
        names = [by_number[number] for number in sorted(by_number)]
        needed = library._check_tensor_need_materialization([tensors[0] for tensors in names])
        results = [tensors for tensors, is_needed in zip(names, needed, strict=True) if is_needed]
        if results:
            self._record(results)
        # As torch_xla.sync does; else the next graph would hold this one's collectives.
        library._set_all_reduce_token(library._xla_get_default_device(), None)

    def read(self, tensor: Tensor) -> None:
        """What reading a tensor's values would run, as a graph of ``traced``."""
        if _torch_xla()._XLAC._check_tensor_need_materialization([tensor])[0]:
            self._record([[tensor]])

    def _record(self, results: Sequence[Sequence[Tensor]]) -> None:
        """The graph of these results, each by every tensor that stands for it. They have no values
        afterwards, but can be computed with."""
        library = _torch_xla()._XLAC
        tensors = [names[0] for names in results]
        key = str(int.from_bytes(library._get_graph_hash(tensors), "little"))
        self.traced.append(TracedGraph(key, *self._present, library._get_xla_tensors_hlo(tensors)))
        for names in results:
            _replace(names)


def _replace(names: Sequence[Tensor]) -> None:
    """Have tensors that stand for one value be a placeholder."""
    value = placeholder(names[0].shape, names[0].dtype)
    for tensor in names:
        # With its storage, which would still hold the operations of all that was written to it.
        tensor.data = value


def _on_device() -> list[Tensor]:
    """Every tensor on the device that Python can reach."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    # Gradients are autograd's own, without a Python object before they are asked for.
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return [tensor for tensor in tensors if tensor.device.type == "xla"]


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An input of the graphs to come, on the device, without memory."""
    from torch_xla.core.xla_builder import create_placeholder_tensor

    made: Tensor = create_placeholder_tensor(tuple(shape), dtype)
    return made


_PLACEHOLDER_BYTES = 2**20
"""What is brought to the device while graphs are recorded is no data from here on."""


class _Transfers(TorchFunctionMode):
    """While graphs are recorded: what is read from the device ends a graph, as ever, and is zeros."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (Tensor.to, Tensor.cpu) or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        given, settings = args[0], {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype = torch.device("cpu"), given.dtype
        if func is Tensor.to:
            wanted = torch._C._nn._parse_to(*args[1:], **settings)
            device, dtype = wanted[0] or given.device, wanted[1] or dtype
        if given.device.type == device.type:
            return func(*args, **kwargs)
        if given.device.type == "xla" and device.type == "cpu":
            self._tracer.read(given)
            return torch.zeros((), dtype=dtype).expand(given.shape)
        if device.type == "xla" and given.nbytes >= _PLACEHOLDER_BYTES:
            return placeholder(given.shape, dtype)
        return func(*args, **kwargs)


def _kept(tensor: Tensor) -> Tensor:
    """What autograd keeps for the backward pass, in Python's hands: a pipeline's forward pass ends with a
    graph, whose results these are. Not a result itself, which would keep itself alive."""
    return tensor if tensor.is_leaf else tensor.data


_tracer: Tracer | None = None


def start_tracing() -> Tracer:
    """From now on this process records graphs and runs none. There is no way back: values are gone."""
    global _tracer
    import torch_xla
    from torch_xla.core import xla_model

    if _tracer is None:
        _tracer = Tracer()
        _Transfers(_tracer).__enter__()  # type: ignore[no-untyped-call]
        torch.autograd.graph.saved_tensors_hooks(_kept, lambda tensor: tensor).__enter__()
        # NxD and torch_xla's ZeRO-1 end graphs by either name.
        torch_xla.sync = xla_model.mark_step = _tracer.sync
    return _tracer


# Values


def fetch(values: Sequence[Tensor]) -> list[float]:
    """Scalars as numbers, in one transfer; without a graph, where they were computed before."""
    if _tracer is not None:
        return [0.0] * len(values)
    found = _torch_xla()._XLAC._xla_get_cpu_tensors([value.detach() for value in values])
    return [float(value) for value in found]


@contextmanager
def filling(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors to fill before the end: the same ones, but for those on a lazy device memory on the CPU, which
    is handed over at the end, in their order.

    There a copy into a tensor is an operation, so a graph to compile; a whole tensor from the CPU is none.
    """
    lazy = [name for name, tensor in tensors.items() if tensor.device.type == "xla"]
    if _tracer is not None:
        # Nothing to hand over, and no memory for it.
        yield {**tensors, **{name: torch.empty_like(tensors[name], device="meta") for name in lazy}}
        for name in lazy:
            _replace([tensors[name]])
        return
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
