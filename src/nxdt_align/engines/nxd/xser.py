"""NxD's shards with a file a tensor (xser), read on the host.

NxD reads them onto the device, beside the model's own, and sums there over the data-parallel ranks what one
of them has read: in graphs that no other part of a run has, and wrongly in CPU mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch_xla.utils.serialization import TensorReference

_TENSORS = ".tensors"


def is_in(folder: Path) -> bool:
    """Whether the shards of ``folder`` have a file a tensor."""
    return any(folder.glob(f"*{_TENSORS}"))


def read(path: Path) -> dict[str, Any]:
    """A shard's content, its tensors on the CPU. Call it inside of ``only_plain_values``.

    Raises what torch.load does for files that are damaged or missing.
    """
    content: dict[str, Any] = _filled(_load(path), path.with_name(path.name + _TENSORS))
    return content


def _filled(value: Any, tensors: Path) -> Any:
    if isinstance(value, TensorReference):
        return _load(tensors / f"tensor_{value.tid}.pt")
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(item, tensors) for item in value)
    return value


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
