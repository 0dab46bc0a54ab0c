"""The engine's contract: what training and the reference pass may ask of the code that runs a model.

An engine owns the policy (and, where asked, a frozen reference), its gradients and its optimizer's
view of the parameters, and spreads them over devices. It knows no loss, no data set, no Lightning:
an objective is handed in with each call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nxdt_align.batch import Batch, TokenStatistic, Topology
from nxdt_align.errors import UserError
from nxdt_align.named_tensors import WeightSource as WeightSource  # a part of the engine's contract


class EngineError(UserError):
    """The engine cannot do what the configuration or a file asks; the message says what would work."""


@contextmanager
def together(
    gather: Callable[[str | None], list[str | None]], error_type: type[UserError] = EngineError
) -> Iterator[None]:
    """Every rank's block succeeds, or every rank raises: its own error, or else an ``error_type`` with the
    words of the first rank that failed. The block itself must not talk to other ranks.

    Args:
        gather: every rank's value, on every rank, in the order of the ranks; over the host.
    """
    try:
        yield
    except Exception as error:
        # The others are told before it is raised; else they would wait for this rank for ever.
        gather(str(error) or type(error).__name__)
        raise
    fault = next((fault for fault in gather(None) if fault is not None), None)
    if fault is not None:
        raise error_type(fault)


class Objective(Protocol):
    """A loss with its metrics, as an engine sees it.

    Called with a micro-batch and its per-position log-probabilities, (B, T) float32 with 0 where
    there is no label. Returns the micro-batch's share of the global-batch loss (a scalar already
    divided by the global count, so that shares add up), and its shares of the metrics, each a
    scalar without gradient that adds up in the same way.

    An objective that couples the examples of a global batch is called otherwise: ``statistics`` of every
    micro-batch, computed without gradients, are gathered from all micro-batches and data-parallel
    ranks; ``couple`` of all gives loss, metrics and the gradients of the slots' log-probabilities, on
    every rank; ``surrogate`` of a micro-batch and its rows of those gradients is what backward starts
    from.
    """

    needs_reference: bool
    wanted: Sequence[TokenStatistic]
    """What it reads off the head beside the log-probabilities."""
    couples_examples: bool
    calls_own_code: bool
    """Whether a user's function is called, which may do what a compiled graph cannot."""

    def __call__(
        self,
        batch: Batch,
        token_logps: Tensor,
        token_statistics: Sequence[Tensor] = (),
        logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def statistics(
        self,
        batch: Batch,
        token_logps: Tensor,
        token_statistics: Sequence[Tensor] = (),
        logits: Tensor | None = None,
    ) -> Tensor:
        """(B * R, K) float32, rows in the order of the micro-batch's slots."""
        ...

    def couple(
        self, table: Tensor, batch: Batch, *, training: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """(N, K) -> loss, metrics, and while training (N, 2) gradients in the order of ``table``."""
        ...

    def surrogate(self, batch: Batch, token_logps: Tensor, gradients: Tensor) -> Tensor:
        """A scalar with the coupled loss's gradient; ``gradients``: (B * R, 2)."""
        ...


@dataclass(frozen=True)
class StepOutput:
    """A step's loss and metrics over the global batch, () float32 each, the same on every rank."""

    loss: Tensor
    metrics: dict[str, Tensor]


Shapes = tuple[tuple[int, ...], ...]
"""Rows, tokens, response tokens and responses per row: of each micro-batch."""


def shapes_of(micro_batches: Sequence[Batch]) -> Shapes:
    return tuple((*b.input_ids.shape, b.labels.shape[1], b.slot_valid.shape[1]) for b in micro_batches)


@dataclass(frozen=True)
class Graph:
    """A compiled graph. ``key``: the same for the same graph in every process."""

    key: str
    name: str
    """What was computed."""
    shapes: Shapes
    """Of the micro-batches that it was computed of."""


class Compiler(Protocol):
    """What compiles a run's graphs, as far as this process sees it."""

    name: str
    """What it is known by."""
    by_micro_batch: bool
    """Whether a graph is one of a single micro-batch, however many a step has."""

    def begin(self, name: str, micro_batches: Sequence[Batch]) -> None:
        """What is compiled from now on belongs to this."""
        ...

    def count(self) -> int:
        """Graphs compiled so far, those that failed included."""
        ...

    def graphs(self) -> dict[str, Graph] | None:
        """Those compiled so far by their keys; None where the device does not tell their keys."""
        ...

    def begun(self) -> Sequence[tuple[str, Shapes]]:
        """What ``begin`` was called with, each once, also where nothing new had to be compiled for it; a
        micro-batch at a time where graphs are ``by_micro_batch``."""
        ...

    def versions(self) -> dict[str, str]:
        """Of what a graph's key depends on."""
        ...


class Engine(ABC):
    """A model spread over devices. All ranks make the same calls in the same order."""

    topology: Topology
    device: torch.device
    lazy: bool = False
    """Whether operations are recorded and run as one compiled graph at ``mark_step``. What a step
    computes must then be the same at every step, or it is another graph."""
    keeps_start: bool = False
    """Whether the weights that training starts from stay in it, as with adapters: ``load_reference(None)`` is
    then the start at any time, without a second model."""
    compiler: Compiler | None = None
    """Of the graphs of a lazy device, or of compiled steps. Whoever builds an engine for a run hands it in,
    before anything is computed."""

    @abstractmethod
    def load_weights(self, source: WeightSource) -> None:
        """Fill the policy. Raises EngineError naming every missing, surplus or misshapen tensor."""

    @abstractmethod
    def load_reference(self, source: WeightSource | None) -> None:
        """Keep a frozen reference: a copy of the present policy for None, or the start where that is kept."""

    @abstractmethod
    def drop_reference(self) -> None:
        """Free the frozen reference."""

    @abstractmethod
    def step(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        """Forward and backward of this rank's share of one global batch; gradients end up in the
        parameters, summed over micro-batches and data-parallel ranks. Replaces earlier gradients."""

    @abstractmethod
    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        """As ``step``, without gradients."""

    @abstractmethod
    def response_logps(self, batch: Batch, *, reference: bool = False) -> Tensor:
        """Each slot's sum of token log-probabilities without gradients: (B, R) float32, this rank's
        rows. ``reference`` asks the frozen reference instead of the policy."""

    @abstractmethod
    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        length: int,
        max_tokens: int,
        ends: Collection[int],
        draw: Callable[[Tensor], Tensor] | None = None,
        reference: bool = False,
    ) -> list[list[int]]:
        """The likeliest token behind each prompt, the policy's or with ``reference`` the frozen reference's,
        again and again, up to one of ``ends`` (included) or ``max_tokens``; on every rank, all of which have
        the same prompts. For evaluation: a forward pass per token over rows of one static shape, (prompts,
        ``length``), which longest prompt and completion fit into; or where an engine can, one over the
        prompts and then one per token over a token per row, with a key-value cache.

        ``draw`` chooses from logits, (prompts, V) float32 on the CPU, instead; rank 0's choice counts. Raises
        EngineError for it where no rank has them whole.
        """

    @abstractmethod
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This rank's trainable parameters under the plain model's names."""

    @property
    def skips_step(self) -> bool:
        """Whether the last ``step`` gave gradients that overflowed (fp16): the optimizer must not move for
        them, and the engine has done what makes the next step better. The same on every rank."""
        return False

    def status(self) -> dict[str, float]:
        """Numbers of the engine's own for the log, on the host; the same names at every step."""
        return {}

    def adopt_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """What trains in place of ``optimizer``, which was built on ``named_parameters``: itself, or one of
        the same class and settings that the engine has spread over ranks."""
        return optimizer

    @abstractmethod
    def whole_parameters(self, *, trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by name, sorted, one after the other, whole and on the CPU, or those that are
        trained alone; yields on rank 0 alone. Every rank iterates to the end."""

    @abstractmethod
    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """The gradients' global L2 norm before clipping, () float32; clips where max_norm is set."""

    @abstractmethod
    def parameter_norm(self) -> Tensor:
        """The parameters' global L2 norm, () float32."""

    def mark_step(self) -> None:  # noqa: B027 (most devices have nothing to do here)
        """The end of what makes up one graph: a training step with its optimizer, a validation step."""

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Scalars as numbers, brought from the device in one transfer instead of one each."""
        return torch.stack([value.detach().float() for value in values]).tolist() if values else []

    @abstractmethod
    def all_gather(self, value: Tensor) -> Tensor:
        """Values of all data-parallel ranks, stacked on a new first dimension, on every rank."""

    @abstractmethod
    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in the order of the ranks, on every rank; over the host."""

    @abstractmethod
    def barrier(self) -> None: ...

    @abstractmethod
    def save(
        self,
        directory: Path,
        optimizer: torch.optim.Optimizer | None,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        """Write a checkpoint folder atomically: it exists under ``directory`` whole or not at all.

        ``extra`` holds tensors, numbers, strings and containers of them. With ``background`` an engine may
        return before the folder is there, with the values as they are now; it writes at most one at a
        time.
        """

    def finish_saving(self) -> None:  # noqa: B027 (nothing to wait for where saves are done at once)
        """Wait for a save in the background. Raises EngineError where it failed, as the next ``save``
        does."""

    def once_saved(self, action: Callable[[], None]) -> None:
        """Do ``action`` when the save in the background is whole, now if there is none; not if it fails."""
        action()

    @abstractmethod
    def read_extra(self, directory: Path) -> dict[str, Any]:
        """``extra`` of ``save``'s folder, without its weights. Raises CheckpointError, on every rank."""

    @abstractmethod
    def load(self, directory: Path, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """Fill policy and optimizer from ``save``'s folder and return ``extra``."""

    def _computes(self, what: str, micro_batches: Sequence[Batch]) -> None:
        """Have graphs that are compiled from now on go by this name."""
        if self.compiler is not None:
            self.compiler.begin(what, micro_batches)
