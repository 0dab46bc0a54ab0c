"""Gradients as the optimizer wants them: summed over the ranks, measured and clipped, each number counted
once; and fp16's loss scale.

The scale: what backward starts from is scaled so that no gradient vanishes, and a step with one that left
the range is skipped. torch.amp.GradScaler's rule and its two functions. The class itself unscales the
gradients of an optimizer and steps that; an engine has shards of gradients and no optimizer, and all its
ranks must decide alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.mesh import Group, Groups
from nxdt_align.engines.steps import Runner, Share, TokenLogps
from nxdt_align.models.partition import EMBEDDING

log = logging.getLogger(__name__)
Named = Sequence[tuple[str, nn.Parameter]]


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def finish_gradients(named_parameters: Named, groups: Groups) -> None:
    """Sum what a step has added up over the ranks that hold parts of it; zeros where there is nothing.

    A weight that all tensor-parallel ranks hold gets from each a part of its gradient (``Partial``), where
    each sees some of the tokens or uses some of its rows. Data-parallel sums are FSDP's, where it is on.
    A tied embedding gets one part as the first stage's embedding, the other as the last stage's head. What
    is not trained has none.
    """
    parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    partial = [p for p in parameters if _is_partial(p.grad)]
    groups.tensor.sum([local(p.grad) for p in partial if p.grad is not None])
    for parameter in partial:
        assert isinstance(parameter, DTensor) and parameter.grad is not None
        parameter.grad = DTensor.from_local(
            local(parameter.grad), parameter.device_mesh, parameter.placements, run_check=False
        )
    if not groups.shards_data:
        groups.data.sum([local(p.grad) for p in parameters if p.grad is not None])
    groups.ends.sum([local(p.grad) for n, p in named_parameters if n == EMBEDDING and p.grad is not None])


def _is_partial(gradient: Tensor | None) -> bool:
    return isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements)


@torch.no_grad()
def total_norm(named: Sequence[tuple[str, Tensor]], groups: Groups) -> Tensor:
    """The L2 norm of all ranks' tensors, () float32, the same on every rank. One reduction.

    Args:
        named: parameters, or their gradients, under the parameters' names.
    """
    square = torch.stack([n.square() for n in torch._foreach_norm([local(t).float() for _, t in named])])
    share = torch.tensor([1 / _copies(name, tensor, groups) for name, tensor in named], device=square.device)
    return groups.world.summed((square * share).sum()).sqrt()


def _copies(name: str, tensor: Tensor, groups: Groups) -> int:
    """How many ranks hold the same numbers."""
    ranks = groups.data.size * groups.tensor.size * (groups.ends.size if name == EMBEDDING else 1)
    if not isinstance(tensor, DTensor):
        return ranks
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return ranks // prod(size for placement, size in sizes if not placement.is_replicate())


@torch.no_grad()
def clip_gradients(named_parameters: Named, max_norm: float | None, groups: Groups) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; returns what it was.

    As torch.nn.utils.clip_grad_norm_ computes it.
    """
    gradients = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
    norm = total_norm(gradients, groups)
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([local(gradient) for _, gradient in gradients], scale)
    return norm


# fp16


INITIAL, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""GradScaler's own: the first scale; what it is multiplied by after so many good steps in a row, or after a
skipped one."""
SMALLEST = 2.0**-10
"""A scale below which a run has no hope: gradients of 6e7 have overflowed by then."""


class LossScale:
    """The scale of this run, the same on every rank.

    Args:
        device: where gradients are.
        world: all ranks, which skip a step together.
    """

    def __init__(self, device: torch.device, world: Group) -> None:
        self._world = world
        self._scale = torch.full((), INITIAL, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.value = INITIAL
        """That the next step starts with."""
        self.skips_step = False
        """Whether the last step is to be skipped."""
        self.skipped_steps = 0

    def over(self, runner: Runner) -> Runner:
        """``runner`` with every share of the loss scaled."""
        return _ScaledRunner(runner, self._scale)

    @torch.no_grad()
    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Bring float32 gradients back to the loss's own scale, and the scale up to date with them.

        Raises EngineError, on all ranks, once the scale has fallen below SMALLEST.
        """
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        found = torch.zeros_like(self._scale)
        # The scale is a power of 2, so its reciprocal is exact.
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self._scale.reciprocal())
        found = self._world.largest(found)
        torch._amp_update_scale_(self._scale, self._good_steps, found, GROWTH, BACKOFF, GROWTH_INTERVAL)
        before = self.value
        overflowed, self.value = torch.stack([found, self._scale]).tolist()
        self.skips_step = overflowed > 0
        if self.skips_step:
            self._note_skipped(before)

    def _note_skipped(self, scale: float) -> None:
        self.skipped_steps += 1
        if self._world.rank == 0:
            log.info(
                "step skipped: gradients overflowed fp16 at a loss scale of %g; now %g", scale, self.value
            )
        if self.value < SMALLEST:
            raise EngineError(
                f"precision.type: with fp16 gradients are not finite even at a loss scale of {scale:g}, "
                "which no scale can mend; check the weights that the run starts from, lower model.optim.lr, "
                "or set precision.type=mixed_precision (bf16)"
            )

    # Checkpoints

    def state(self) -> dict[str, float]:
        return {
            "scale": self.value,
            "good_steps": int(self._good_steps),
            "skipped_steps": self.skipped_steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``."""
        self.value = float(state["scale"])
        self._scale.fill_(self.value)
        self._good_steps.fill_(int(state["good_steps"]))
        self.skipped_steps = int(state["skipped_steps"])


class _ScaledRunner:
    """A Runner whose backward passes start from scaled shares; what it returns is as ever."""

    def __init__(self, runner: Runner, scale: Tensor) -> None:
        self._runner = runner
        self._scale = scale

    def forward(
        self, micro_batches: Sequence[Batch], *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        return self._runner.forward(micro_batches, wanted=wanted)

    def backward(
        self, micro_batches: Sequence[Batch], share: Share, *, wanted: Sequence[TokenStatistic]
    ) -> list[TokenLogps]:
        def scaled(index: int, result: TokenLogps) -> Tensor:
            return share(index, result) * self._scale

        return self._runner.backward(micro_batches, scaled, wanted=wanted)
