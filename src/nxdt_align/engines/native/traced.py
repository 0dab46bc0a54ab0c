"""Compiled steps that are recorded instead of run: the ATen graphs of each part, on a machine without the
device, at any size.

``torch.compile`` traces as ever, over fake tensors of a device that is called ``neuron``, so that what asks
for the device's type gets its answer, and the backend keeps what it is handed. One rank of many is traced
over torch's fake process group. There is no way back: the process is then good for nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._C._distributed_c10d import _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensorMode

from nxdt_align.batch import Batch
from nxdt_align.engines.base import EngineError, Graph, Shapes, shapes_of
from nxdt_align.engines.native.compiled import Compiling, require_torch
from nxdt_align.ops.attention import CausalAttention
from nxdt_align.ops.attention_nki import NkiAttention, PlainKernels, operator

DEVICE = "neuron"
Form = tuple[str, tuple[int, ...]]
"""A tensor's dtype, as torch names it, and its sizes."""


@dataclass(frozen=True)
class TracedOp:
    """One operator of a graph."""

    target: str
    """As torch prints it: aten.mm.default."""
    results: tuple[Form, ...]
    operands: tuple[Form, ...]
    is_strided: bool = False
    """Of a slice: whether it takes every n-th entry."""
    ranks: tuple[int, ...] = ()
    """Of a collective."""


@dataclass(frozen=True)
class TracedOps(Graph):
    """A graph as the device's backend would get it."""

    ops: tuple[TracedOp, ...]
    inputs: tuple[Form, ...]
    outputs: tuple[Form, ...]
    executions: dict[str, int] = field(default_factory=dict)
    """Step -> how often it was run in it."""


class _Fake(FakeTensorMode):  # type: ignore[no-untyped-call]
    @property
    def avoid_device_init(self) -> bool:
        """Yes, as there is none: numbers that are brought to the device are fake there, too."""
        return True


class Recorder:
    """A Compiler that keeps each graph and runs its operators on fake tensors."""

    name = "torch.compile"
    by_micro_batch = True

    def __init__(self) -> None:
        self.traced: list[TracedOps] = []
        self.fake = _Fake(allow_non_fake_inputs=True)
        """Tensors that are made within have no memory."""
        self._present: tuple[str, Shapes] = ("weights", ())
        self._parts: dict[str, Callable[..., Any]] = {}

    def begin(self, name: str, micro_batches: Sequence[Batch]) -> None:
        self._present = (name, shapes_of(micro_batches))

    def begun(self) -> Sequence[tuple[str, Shapes]]:
        return list(dict.fromkeys((graph.name, graph.shapes) for graph in self.traced))

    def count(self) -> int:
        return len(self.traced)

    def graphs(self) -> dict[str, Graph] | None:
        return {graph.key: graph for graph in self.traced}

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def backend_of(self, part: str) -> Callable[..., Any]:
        """For torch.compile: records the forward and backward graphs of a part of the model."""
        from torch._dynamo.backends.common import aot_autograd

        def compiler(direction: str) -> Callable[..., Any]:
            return lambda module, _: self._record(part, direction, module)

        made: Callable[..., Any] = aot_autograd(
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            inference_compiler=compiler("without gradients"),
        )
        return made

    def _record(self, part: str, direction: str, module: fx.GraphModule) -> Callable[..., Any]:
        from torch._functorch._aot_autograd.utils import make_boxed_func

        ops, inputs, outputs = _read(module)
        written = "\n".join([repr((ops, inputs, outputs)), *_calls(module)])
        key = hashlib.blake2b(written.encode(), digest_size=8).hexdigest()
        step, shapes = self._present
        graph = TracedOps(key, f"{part}, {direction} (first in: {step})", shapes, ops, inputs, outputs)
        self.traced.append(graph)

        def run(*args: Any) -> Any:
            name = self._present[0]
            graph.executions[name] = graph.executions.get(name, 0) + 1
            return module(*args)

        return make_boxed_func(run)


@dataclass(frozen=True)
class RecordedCompiling(Compiling):
    """Parts of a model by a ``Recorder``."""

    tracer: Recorder = field(default_factory=Recorder)

    def backend_of(self, part: str) -> Callable[..., Any]:
        return self.tracer.backend_of(part)

    def storage(self) -> AbstractContextManager[object]:
        return self.tracer.fake


# What is recorded


def _read(module: fx.GraphModule) -> tuple[tuple[TracedOp, ...], tuple[Form, ...], tuple[Form, ...]]:
    ops: list[TracedOp] = []
    inputs: list[Form] = []
    outputs: list[Form] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs += _forms(node)
        elif node.op == "output":
            outputs += [form for source in node.all_input_nodes for form in _forms(source)]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            ops.append(_op(node))
        elif node.op == "call_function" and getattr(node.target, "__name__", "") != "getitem":
            ops.append(TracedOp(str(node.target), _forms(node), _operands(node)))
    return tuple(ops), tuple(inputs), tuple(outputs)


def _calls(module: fx.GraphModule) -> Iterator[str]:
    """Each node with all that it is given, numbers too: a graph may differ from another rank's by nothing but
    the first token of its share. Without names and addresses, so that every process writes the same."""
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        # A group's name counts the groups of its process; its ranks are in the TracedOp.
        given = (
            {name: each for name, each in _arguments(node).items() if name != "group_name"}
            if isinstance(node.target, torch._ops.OpOverload)
            else {"args": node.args, **node.kwargs}
        )
        target = "" if node.op == "placeholder" else _written(node.target, numbers)
        yield f"{node.op} {target} {_written(given, numbers)}"


def _written(value: Any, numbers: Mapping[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}={_written(each, numbers)}' for name, each in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_written(each, numbers) for each in value)})"
    if isinstance(value, slice):
        return f"slice{_written((value.start, value.stop, value.step), numbers)}"
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    return str(getattr(value, "__name__", type(value).__qualname__))


_PLAIN = (
    *(bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload),
)
"""What prints the same in every process."""


def _op(node: fx.Node) -> TracedOp:
    target, arguments = str(node.target), _arguments(node)
    ranks: tuple[int, ...] = ()
    if "group_name" in arguments:
        group = arguments["group_name"]
        ranks = tuple(dist.get_process_group_ranks(_resolve_process_group(group)))
    is_strided = "slice" in target and arguments.get("step", 1) != 1
    return TracedOp(target, _forms(node), _operands(node), is_strided, ranks)


def _arguments(node: fx.Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _operands(node: fx.Node) -> tuple[Form, ...]:
    return tuple(form for source in node.all_input_nodes for form in _forms(source))


def _forms(node: fx.Node) -> tuple[Form, ...]:
    value = node.meta.get("val")
    every = value if isinstance(value, (tuple, list)) else [value]
    return tuple(
        (str(each.dtype).removeprefix("torch."), tuple(int(size) for size in each.shape))
        for each in every
        if isinstance(each, Tensor)
    )


# The device


def start_tracing(rank: int, world: int) -> None:
    """Make this process the ``rank``-th of ``world`` that talk to nobody, and ``neuron`` a device for fake
    tensors. Raises EngineError where torch is too old, or a device is there in earnest."""
    require_torch()
    if torch._C._get_privateuse1_backend_name() not in (DEVICE, "privateuseone"):
        raise EngineError("graphs: this process has a device of its own; record in one without")
    if not hasattr(torch, DEVICE):
        from torch.utils import backend_registration

        class Module(backend_registration._DummyBackendModule):
            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16, torch.float16]

            def get_rng_state(self, device: object = None) -> Tensor:
                return torch.zeros(16, dtype=torch.uint8)

            def set_rng_state(self, state: Tensor, device: object = None) -> None:
                """Nothing is drawn."""

        backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=Module())
    if world > 1 and not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


# Kernels, which stand in the graphs as operators of their own


def flash_operator() -> Callable[..., Tensor]:
    """Stands for ``scaled_dot_product_attention`` without a mask, which TorchNeuron has as one operator: q
    (B, N, S, H), k and v (B, K, S, H) -> (B, N, S, H)."""

    @torch.library.custom_op(FLASH, mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("is recorded, never run")

    @torch.library.custom_op(f"{FLASH}_backward", mutates_args=())
    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("is recorded, never run")

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    @backward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)

    def gradient(ctx: Any, grad: Tensor, _sums: Tensor | None) -> tuple[Tensor, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        found: tuple[Tensor, ...] = backward(q, k, v, out, grad, sums)
        return found

    forward.register_autograd(gradient, setup_context=keep)
    return lambda *given: forward(*given)[0]


FLASH, INTERVALS = "nxdt_align::traced_flash", "nxdt_align::traced_intervals"


class TracedFlash(CausalAttention):
    """The device's flash kernel, recorded."""

    def __init__(self, multiple: int) -> None:
        super().__init__(multiple)
        self._operator = flash_operator()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, context: None, softcap: float | None = None
    ) -> Tensor:
        self.refuse_softcap(softcap)
        return self._operator(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def traced_intervals() -> NkiAttention:
    """nki-library's kernels, recorded."""
    return NkiAttention(operator(PlainKernels(), INTERVALS))
