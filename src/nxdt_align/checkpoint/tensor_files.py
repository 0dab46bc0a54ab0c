"""One file of tensors, safetensors or PyTorch's, opened without reading the tensors."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nxdt_align.errors import UserError


class WeightsError(UserError):
    """Weights that cannot be read or written; the message names the file and what is wrong with it."""


class TensorFile(Protocol):
    path: Path

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


def open_tensor_file(path: Path) -> TensorFile:
    """Raises WeightsError for a file that is damaged."""
    return _SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFile(path)


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, "safetensors", error) from error

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _TorchFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise _damaged(path, "PyTorch", error) from error
        if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
            raise WeightsError(f"{path} must hold a dictionary of tensors, as save_pretrained writes it")
        self._tensors: dict[str, Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def _damaged(path: Path, kind: str, error: Exception) -> WeightsError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return WeightsError(f"{path} is damaged or not a {kind} file ({reason}): copy or download it again")
