"""Named tensors that are read one by one: the common interface, check and fingerprint of all weights.

Every kind of weights implements it: Hugging Face folders and single files, NxD's shards, Meta's downloads,
the native engine's checkpoints, random initial weights. Engines fill parameters from it and conversions copy
it; neither knows the file format.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nxdt_align.errors import UserError

Spec = tuple[tuple[int, ...], torch.dtype | None]
"""A tensor's shape, and its dtype where that matters."""

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_MOST_FAULTS = 20


class NamedTensors(ABC):
    """Tensors under their names; several threads may read at once."""

    path: Path | None = None
    """The folder or file; None for tensors without one."""

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype: ...

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, in the dtype it is stored in."""

    @abstractmethod
    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        """The part of the tensor within ``region``, a start and a stop per dimension; holds at most one whole
        tensor in memory."""

    def specs(self) -> dict[str, Spec]:
        return {name: (self.shape(name), self.dtype(name)) for name in self.names()}


class WeightSource(NamedTensors):
    """A model's weights: whole tensors under the plain model's names. Its text names it in messages."""

    _content: str | None = None

    def fingerprint(self) -> str:
        """``content_fingerprint`` of all weights: the same for the same weights in any format. Reads all of
        them, once."""
        if self._content is None:
            self._content = content_fingerprint((name, self.read(name)) for name in sorted(self.names()))
        return self._content


def content_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest, 32 hex digits, of names, dtypes, shapes and bytes; ``tensors`` come sorted by name.

    Reference stores and run identities are keyed by it, so its values must never change.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # view(uint8): numpy has no bfloat16, and the bytes are what is compared.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_fit(
    what: object,
    found: Mapping[str, Spec],
    wanted: Mapping[str, Spec],
    *,
    to: str = "the model",
    error: type[UserError],
    hint: str,
) -> None:
    """Raises ``error`` naming every tensor that is missing, surplus, of another shape or another dtype.

    Args:
        what: what holds ``found``, for the message.
        wanted: the specs of ``to``; a dtype of None accepts any.
        hint: the message's last line: what to check.
    """
    # One line for all layers with the same fault: a model has up to a hundred.
    alike: dict[str, list[str]] = {}
    for name in sorted(found.keys() & wanted.keys()):
        (shape, dtype), (right_shape, right_dtype) = found[name], wanted[name]
        if shape != right_shape:
            rule = f"must have shape {list(right_shape)}, but has {list(shape)}"
            alike.setdefault(rule, []).append(name)
        elif right_dtype not in (None, dtype):
            alike.setdefault(f"must be {right_dtype}, but is {dtype}", []).append(name)
    missing, surplus = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    count = len(missing) + len(surplus) + sum(map(len, alike.values()))
    if not count:
        return
    faults = [f"missing: {names}" for names in summary(missing)]
    faults += [f"surplus: {names}" for names in summary(surplus)]
    faults += sorted(f"{names} {rule}" for rule, each in alike.items() for names in summary(each))
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"and {len(faults) - _MOST_FAULTS} more"]
    shown = "\n  ".join(faults)
    tensors = "1 tensor" if count == 1 else f"{count} tensors"
    raise error(f"{what} does not fit {to} ({tensors}):\n  {shown}\n{hint}")


def summary(names: Iterable[str]) -> list[str]:
    """The names, sorted, with those of several layers as one: ``model.layers.{0-3,7}.mlp...``."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = _LAYER.match(name)
        layers.setdefault(_LAYER.sub("model.layers.*.", name), []).extend([int(match[1])] if match else [])
    return sorted(
        name.replace("*", _ranges(sorted(found)), 1) if found else name for name, found in layers.items()
    )


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return text if len(numbers) == 1 else f"{{{text}}}"
