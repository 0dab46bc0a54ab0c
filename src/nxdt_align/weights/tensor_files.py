"""One file of tensors, safetensors or PyTorch's, opened without reading the tensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nxdt_align.named_tensors import NamedTensors
from nxdt_align.weights.extents import Extent, WeightsError, read_region, read_tensor
from nxdt_align.weights.torch_files import damaged, is_archive, read_index, tensors_of

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def open_tensor_file(path: Path) -> NamedTensors:
    """The tensors under the file's own names. Raises WeightsError for a file that is damaged."""
    if path.suffix == ".safetensors":
        return _ExtentsFile(path, _safetensors_extents(path))
    if is_archive(path):
        tensors = tensors_of(path, read_index(path))
        extents = {name: found for name, found in tensors.items() if isinstance(found, Extent)}
        if len(extents) < len(tensors):
            raise WeightsError(f"{path} is one file of a sharded checkpoint: give the checkpoint's folder")
        return _ExtentsFile(path, extents)
    return _OldTorchFile(path)


class _ExtentsFile(NamedTensors):
    def __init__(self, path: Path, extents: dict[str, Extent]) -> None:
        self.path = path
        self._extents = extents

    def names(self) -> list[str]:
        return list(self._extents)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._extents[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._extents[name].dtype

    def read(self, name: str) -> Tensor:
        return read_tensor(self._extents[name])

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        return read_region(self._extents[name], region)


class _OldTorchFile(NamedTensors):
    """A file of torch before 1.6: no zip archive, read as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise damaged(path, "PyTorch", error) from error
        if not isinstance(content, dict) or not all(
            isinstance(key, str) and isinstance(x, Tensor) for key, x in content.items()
        ):
            raise WeightsError(f"{path} must hold a dictionary of tensors, as save_pretrained writes it")
        self._tensors: dict[str, Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        return self._tensors[name].detach()[tuple(region)]


def _safetensors_extents(path: Path) -> dict[str, Extent]:
    """Where the tensors are, by the header that safetensors' own reader has found sound."""
    try:
        checked: Any = safe_open(path, framework="pt", device="cpu")
        with checked, open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, "safetensors", error) from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(f"{path}: {name} has the dtype {entry['dtype']}, which is not supported")
        start = 8 + length + entry["data_offsets"][0]
        found[name] = Extent(path, start, dtype, tuple(entry["shape"]))
    return found
