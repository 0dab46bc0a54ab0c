"""Trainer state as plain values: what ``torch.load(weights_only=True)`` reads back, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_plain(value: Any, path: str = "") -> Any:
    """A copy of ``value`` in None, bool, int, float, str, bytes, tensors on the CPU, dtypes, and dicts,
    lists, tuples and sets of them.

    Subclasses and NumPy scalars become the plain type of the same value, paths become text.

    Raises TypeError, naming the key, for anything else: reading it back would need code to be run.
    """
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, torch.dtype):
        return value
    if isinstance(value, Tensor):
        # A view would drag its whole storage into the file.
        return value.detach().cpu().clone()
    if isinstance(value, np.generic) and not isinstance(value, (np.void, np.datetime64, np.timedelta64)):
        return value.item()
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(k, path): to_plain(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
    for container in (list, tuple, set):
        if isinstance(value, container):
            return container(to_plain(item, f"{path}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"{path or 'the value'} is a {type(value).__module__}.{type(value).__qualname__}, but a checkpoint "
        "keeps numbers, text, tensors, and dicts, lists, tuples and sets of them only; convert it in "
        "state_dict()"
    )


def _key(key: Any, path: str) -> Any:
    plain = to_plain(key, f"{path}: the key {key!r}")
    if isinstance(plain, Tensor):
        raise TypeError(f"{path}: a tensor cannot be a key of a checkpoint's dict")
    return plain
