"""Stops a run whose numbers are not finite, before they replace a good checkpoint or reach an export."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from nxdt_align.engines.base import Engine, EngineError
from nxdt_align.errors import UserError

log = logging.getLogger(__name__)

ADVICE = "Lower model.optim.lr, or set trainer.gradient_clip_val or precision.type=fp32"


class FiniteCheck:
    """Checks a step's scalars where they are fetched anyway, and weights and optimizer state before a save.

    All ranks make the same calls, and all raise the same UserError: it names the step, the first tensor that
    is not finite, and the last good checkpoint.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unchecked: list[tuple[int, str, Tensor]] = []
        self._checkpoints: list[Path] = []

    # A step's scalars

    def add(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        """Keep a step's scalars, () each and the same on every rank, until ``take`` or ``check_steps``.

        They stay on their device, so that a step waits for no transfer.
        """
        self._unchecked += [(step, name, value.detach()) for name, value in scalars.items()]

    def take(self) -> list[tuple[int, str, Tensor]]:
        """(step, name, value) of those not checked yet, oldest first, for a fetch together with others."""
        taken, self._unchecked = self._unchecked, []
        return taken

    def judge(self, step: int, name: str, value: float, optimizer: torch.optim.Optimizer | None) -> None:
        """Raise UserError where ``value`` is not finite."""
        if not math.isfinite(value):
            found = self._first_fault(optimizer, None)
            self._stop(f"{name} is {value} at step {step}", found)

    def check_steps(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Fetch and judge the scalars that no logged step has brought to the host yet."""
        taken = self.take()
        if not taken:
            return
        numbers = self._engine.fetch([value for _, _, value in taken])
        for (step, name, _), number in zip(taken, numbers, strict=True):
            self.judge(step, name, number, optimizer)

    # Weights and optimizer state

    def check_weights(
        self,
        what: str,
        step: int,
        optimizer: torch.optim.Optimizer | None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raise UserError where a weight or optimizer state of any rank is not finite.

        Args:
            what: is not written then, for the message.
            dtype: that weights are cast to when written; theirs where None.
        """
        found = self._first_fault(optimizer, dtype)
        if found is not None:
            self._stop(f"{what} is not written: the model is not finite at step {step}", found)

    def check_loaded(self, folder: Path, optimizer: torch.optim.Optimizer | None) -> None:
        """Raise UserError where the checkpoint that was just loaded is not finite."""
        found = self._first_fault(optimizer, None)
        if found is not None:
            raise UserError(
                f"checkpoint {folder} holds values that are not finite, first {found}: training cannot "
                "continue from it. Remove it to resume from an earlier one or start again, with a lower "
                "model.optim.lr"
            )
        self.note_checkpoint(folder)

    def note_checkpoint(self, folder: Path) -> None:
        """``folder`` is a complete checkpoint with finite values."""
        self._checkpoints.append(folder)

    def _first_fault(self, optimizer: torch.optim.Optimizer | None, dtype: torch.dtype | None) -> str | None:
        """The first tensor that is not finite, on the lowest rank that has one; the same on every rank."""
        found = self._engine.gather_objects(self._own_fault(optimizer, dtype))
        faults = [f"{name} (on rank {rank})" for rank, name in enumerate(found) if name is not None]
        return faults[0] if faults else None

    @torch.no_grad()
    def _own_fault(self, optimizer: torch.optim.Optimizer | None, dtype: torch.dtype | None) -> str | None:
        weights = self._engine.named_parameters()
        bounds = {name: _bounds(_local(p), dtype) for name, p in weights}
        if optimizer is not None:
            names = {id(parameter): name for name, parameter in weights}
            bounds |= {name: _bounds(_local(t), None) for name, t in _state(optimizer, names)}
        known = {name: value for name, value in bounds.items() if value is not None}
        if not known:
            return None
        # On one device after the other: some optimizers keep counts on the host.
        finite: dict[str, bool] = {}
        for device in {value.device for value in known.values()}:
            here = {name: value for name, value in known.items() if value.device == device}
            flags = torch.stack(list(here.values())).isfinite().all(1).tolist()
            finite |= dict(zip(here, flags, strict=True))
        return next((name for name in known if not finite[name]), None)

    def _stop(self, fault: str, tensor: str | None) -> NoReturn:
        try:
            self._engine.finish_saving()
        except EngineError as error:
            log.error("%s", error)
        last = next((folder for folder in reversed(self._checkpoints) if folder.is_dir()), None)
        first = "" if tensor is None else f"; the first tensor that is not finite is {tensor}"
        if last is None:
            kept = f"There is no checkpoint yet. {ADVICE}, and check the start weights"
        else:
            kept = (
                f"The last good checkpoint is kept: {last}. {ADVICE}, and start again: it resumes from there"
            )
        raise UserError(f"{fault}{first}. Training cannot recover from this. {kept}")


def _local(tensor: Tensor) -> Tensor:
    """This rank's part; on the host if it is on a lazy device, where every operation would be a graph."""
    part: Any = tensor.detach()
    if hasattr(part, "to_local"):
        part = part.to_local()
    return part.cpu() if part.device.type == "xla" else part  # type: ignore[no-any-return]


def _bounds(tensor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Least and greatest value, (2,) float32 on the tensor's device; NaN if any value is. None where
    there are no floats.

    Reductions need no copy of the tensor, as ``isfinite`` would.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    bounds = torch.stack((tensor.amin(), tensor.amax()))
    return (bounds if dtype is None else bounds.to(dtype)).float()


def _state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an optimizer's state, those that an engine keeps beside it included."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    labels = {index: names.get(id(parameter), str(index)) for index, parameter in enumerate(parameters)}
    for key, value in optimizer.state_dict().items():
        if key != "param_groups":
            yield from _tensors(value, "optimizer", labels)


def _tensors(value: Any, path: str, labels: Mapping[Any, str]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{labels.get(key, key)}", {})
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{labels.get(index, index)}", {})
