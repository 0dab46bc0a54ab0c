"""The index of a ``torch.save`` file: which tensors it holds and where their bytes are.

The file's pickle is read by an unpickler that knows tensors, their containers and torch_xla's
TensorReference, gives nothing else a meaning, and calls nothing that the file names.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nxdt_align.weights.extents import Extent, WeightsError, is_row_major

REFERENCE_MODULE, REFERENCE_NAME = "torch_xla.utils.serialization", "TensorReference"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DTYPES: dict[str, torch.dtype] = {
    str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)
}
_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class TensorReference:
    """Stands for torch_xla's class of this name: a tensor that lies in a file of its own, number ``tid``."""

    tid: int


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


def read_index(path: Path) -> Any:
    """What was saved, with an Extent in the place of each tensor.

    Raises WeightsError for a file that is damaged, or holds other objects than tensors, numbers, text
    and containers of them; and for one of torch before 1.6, see ``is_archive``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _records(path, archive)
            pickled = next((name for name in records if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise ValueError("it has no data.pkl")
            prefix = pickled.removesuffix("data.pkl")
            return _Unpickler(path, archive.read(pickled), records, prefix).load()
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(path, "PyTorch", error) from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, struct.error, RuntimeError, OverflowError) as error:
        raise damaged(path, "PyTorch", error) from error


def is_archive(path: Path) -> bool:
    """Whether ``path`` is the zip archive that torch writes since 1.6."""
    return zipfile.is_zipfile(path)


def damaged(path: Path, kind: str, error: Exception) -> WeightsError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return WeightsError(f"{path} is damaged or not a {kind} file ({reason}): copy or download it again")


def tensors_of(path: Path, saved: Any) -> dict[str, Extent | TensorReference]:
    """The flat dictionary of tensors in a state-dict file, or under its key ``model``."""
    if isinstance(saved, Mapping) and isinstance(saved.get("model"), Mapping):
        saved = saved["model"]
    if not isinstance(saved, Mapping) or not all(
        isinstance(key, str) and isinstance(x, (Extent, TensorReference)) for key, x in saved.items()
    ):
        raise WeightsError(f"{path} must hold a dictionary of tensors, as torch.save writes a state dict")
    return dict(saved)


def _records(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Record -> where its bytes start in the file, and how many they are."""
    found = {}
    size = path.stat().st_size
    with open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {info.filename} is compressed")
            file.seek(info.header_offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            if signature != b"PK\x03\x04":
                raise ValueError(f"its record {info.filename} is not where its list says")
            start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if start + info.file_size > size:
                raise ValueError(f"its record {info.filename} is cut short")
            found[info.filename] = (start, info.file_size)
    return found


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, path: Path, pickled: bytes, records: Mapping[str, tuple[int, int]], prefix: str
    ) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._path, self._records, self._prefix = path, records, prefix
        self._known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): _size,
            (REFERENCE_MODULE, REFERENCE_NAME): TensorReference,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place among weights")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something other than a tensor's bytes")
        return _Storage(str(key), dtype)

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Extent:
        start, size = self._records[f"{self._prefix}data/{storage.key}"]
        last = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and last * storage.dtype.itemsize > size:
            raise ValueError(f"the bytes of its tensor {storage.key} are cut short")
        kept = None if is_row_major(shape, stride) else tuple(stride)
        return Extent(self._path, start + offset * storage.dtype.itemsize, storage.dtype, tuple(shape), kept)


def _parameter(data: Extent, *_: Any) -> Extent:
    return data


def _size(sizes: Any = ()) -> tuple[int, ...]:
    return tuple(sizes)
