"""Compiled steps: one graph for a decoder layer, which all layers share, one for the embedding, one for final
norm, head and log-probabilities, and one for the loss.

``torch.compile`` with ``fullgraph`` and without dynamic shapes, so nothing falls back to eager unseen, and
the number of graphs follows from the row lengths and the modes (with gradients, without, the reference's),
not from the number of layers. What lies around them stays eager: FSDP's gathers, a pipeline's transfers,
checkpointing of whole layers, the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo import exc

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.base import EngineError, Objective
from nxdt_align.engines.native.graphs import GraphRecorder
from nxdt_align.engines.scoring import Scorer
from nxdt_align.engines.steps import TokenLogps
from nxdt_align.models.decoder import Decoder, Recomputable
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.ops.ragged import Rows

LEAST_TORCH = (2, 13)
MOST_GRAPHS = 256
"""Of one part of the model. torch's own limit is 8 shapes; here it is known which there are."""
KEY = "distributed_strategy.compile"


@dataclass(frozen=True)
class Compiling:
    """How parts of a model are compiled.

    ``options`` are the backend's. All parts get this one object: TorchNeuron writes into it, and takes parts
    with other objects for parts with other options. ``recorder`` notes each graph that is compiled.
    """

    backend: str | Callable[..., Any] = "inductor"
    options: Mapping[str, Any] | None = None
    recorder: GraphRecorder | None = None
    _made: dict[str, Callable[..., Any]] = field(default_factory=dict, compare=False, repr=False)

    def model(self, scorer: Scorer) -> None:
        """Have ``scorer``, of our decoder with its parallelism applied, compute in compiled parts."""
        assert isinstance(scorer.decoder, Decoder)
        stack = scorer.decoder.model
        for layer in stack.layers.children():
            assert isinstance(layer, Recomputable)
            # Inside of forward, so that hooks (FSDP's) and the recomputing of a whole layer stay outside.
            layer.compute = partial(self._part("layer", _layer), layer)  # type: ignore[method-assign]
        stack.enter = partial(self._part("embedding", _enter), stack)  # type: ignore[method-assign]
        stack.leaves_norm = True
        scorer.finish = partial(self._part("head", _finish), scorer)  # type: ignore[method-assign]

    def objective(self, objective: Objective) -> Objective:
        """``objective`` as a graph, unless it calls a user's function, which may do what no graph can."""
        if objective.calls_own_code:
            return objective
        return cast(Objective, _CompiledObjective(objective, self._part("loss", _loss)))

    def backend_of(self, part: str) -> str | Callable[..., Any]:
        """torch.compile's, for the part of this name."""
        return self.backend if self.recorder is None else self.recorder.noting(part, self.backend)

    def storage(self) -> AbstractContextManager[object]:
        """Entered where the weights get their memory."""
        return nullcontext()

    def _part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """One compiled function for all callers: each gets graphs that another has had compiled."""
        if name not in self._made:
            make: Any = torch.compile  # typed without the limit
            compiled = make(
                function,
                fullgraph=True,
                dynamic=False,
                backend=self.backend_of(name),
                options=self.options,
                recompile_limit=MOST_GRAPHS,
                isolate_recompiles=True,
            )
            self._made[name] = partial(_guarded, name, compiled)
        return self._made[name]


def is_too_old(version: str = torch.__version__) -> bool:
    """Whether torch is older than what compiled steps are tested with."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) < LEAST_TORCH


def require_torch(version: str = torch.__version__) -> None:
    """Raise EngineError where torch ``is_too_old``."""
    if is_too_old(version):
        raise EngineError(
            f"{KEY}: blocks needs torch 2.13 or newer, but torch is {version}; install torch 2.13, or set "
            f"{KEY}=none"
        )


def require_own_decoder(config: ModelShape) -> None:
    """Raise EngineError for a model that transformers computes: what its class does may be no graph."""
    if not isinstance(config, DecoderConfig):
        raise EngineError(
            f"{KEY}: blocks compiles the layers of this package's decoder, but transformers computes this "
            f"{config.model_type}; set {KEY}=none"
        )


def checkpointing_fault(tensor: int, recomputed: Sequence[str]) -> str | None:
    """Why modules that are recomputed by themselves cannot be in a layer's graph; None where they can.

    torch 2.13 keeps the mesh of a layer's DTensors among what backward needs, and then takes it for a tensor.
    """
    if tensor == 1 or not recomputed:
        return None
    return (
        f"with tensor parallel ranks a layer's graph cannot recompute {', '.join(recomputed)} by itself in "
        "torch 2.13; set model.activations_checkpoint_granularity=full or null"
    )


def require_compiler() -> None:
    """Raise EngineError where inductor finds no C++ compiler for this CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise EngineError(
            f"{KEY}: blocks compiles C++ on a CPU, but there is no compiler (g++ or clang++, or the one that "
            f"the variable CXX names); install one, or set {KEY}=none"
        ) from error


def _guarded(name: str, compiled: Callable[..., Any], *args: Any) -> Any:
    try:
        return compiled(*args)
    except exc.FailOnRecompileLimitHit as error:
        raise EngineError(
            f"{KEY}: the {name} has been compiled {MOST_GRAPHS} times, and this step would need one graph "
            f"more: shapes or modes keep changing. Give data.buckets fewer row lengths, or set {KEY}=none"
        ) from error
    except exc.Unsupported as error:
        raise EngineError(
            f"{KEY}: the {name} cannot be one graph ({str(error).splitlines()[0]}); set {KEY}=none"
        ) from error


# What is compiled: functions of the modules, so that all layers run one piece of code.


def _layer(layer: Recomputable, *args: Any) -> Tensor:
    return type(layer).compute(layer, *args)


def _enter(stack: Any, *args: Any) -> Any:
    return type(stack).enter(stack, *args)


def _finish(
    scorer: Scorer, hidden: Tensor, rows: Rows, first: int | Tensor, wanted: Sequence[TokenStatistic]
) -> TokenLogps:
    return type(scorer).finish(scorer, hidden, rows, first, wanted)


def _loss(objective: Objective, batch: Batch, *told: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return objective(batch, *told)


class _CompiledObjective:
    """An Objective whose value is a graph; what couples a batch's examples stays eager, once a step."""

    def __init__(self, objective: Objective, compiled: Callable[..., Any]) -> None:
        self._objective, self._compiled = objective, compiled

    def __call__(self, batch: Batch, *told: Any) -> tuple[Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, dict[str, Tensor]] = self._compiled(self._objective, batch, *told)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)
