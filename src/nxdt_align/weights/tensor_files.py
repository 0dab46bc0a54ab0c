"""One file of tensors, safetensors or PyTorch's, opened without reading the tensors.

A PyTorch file's pickle is read by an unpickler that knows only tensors, their containers and torch_xla's
TensorReference, and never calls anything that the file names.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nxdt_align.named_tensors import NamedTensors
from nxdt_align.weights.extents import Extent, WeightsError, is_row_major, read_region, read_tensor

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
STATE_KEYS = ("model", "state", "state_dict", "model_state_dict")
"""Keys of a state dict that is saved beside other values: NxD's, the reference DPO implementation's (its
``policy.pt``), and what others commonly use."""
REFERENCE_MODULE, REFERENCE_NAME = "torch_xla.utils.serialization", "TensorReference"
_BUILTINS = ("builtins", "__builtin__")
"""Python's module of them, and its name in pickles of protocol 2."""
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


def open_tensor_file(path: Path) -> NamedTensors:
    """The tensors under the file's own names. Raises WeightsError for a file that is damaged."""
    if path.suffix == ".safetensors":
        return _ExtentsFile(path, _safetensors_extents(path))
    if zipfile.is_zipfile(path):  # as torch writes since 1.6
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
    """A file of torch before 1.6: not a zip archive, so it is read completely."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise damaged(path, "PyTorch", error) from error
        self._tensors: dict[str, Tensor] = _state_dict(path, content, Tensor)

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
    """The tensors' positions from the header, which safetensors' own reader has validated."""
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


# PyTorch's files: an index of what they hold


class TensorReference:
    """Replaces torch_xla's class of this name: a tensor in a separate file, number ``tid``."""

    tid: int


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype


def read_index(path: Path) -> Any:
    """What was saved, with an Extent instead of each tensor.

    Raises WeightsError for a damaged file, one that holds anything but tensors, numbers, text and containers
    of them, or one of torch before 1.6.
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


def damaged(path: Path, kind: str, error: Exception) -> WeightsError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return WeightsError(f"{path} is damaged or not a {kind} file ({reason}): copy or download it again")


def tensors_of(path: Path, saved: Any) -> dict[str, Extent | TensorReference]:
    """The flat dictionary of tensors in a state-dict file, or under one of the keys ``STATE_KEYS``."""
    return _state_dict(path, saved, (Extent, TensorReference))


def _state_dict(path: Path, saved: Any, kind: type | tuple[type, ...]) -> dict[str, Any]:
    if isinstance(saved, Mapping):
        saved = next((saved[key] for key in STATE_KEYS if isinstance(saved.get(key), Mapping)), saved)
    if isinstance(saved, Mapping) and ("param_groups" in saved or "last_epoch" in saved):
        raise WeightsError(
            f"{path} holds the state of an optimizer or a schedule: give the file of the model's weights, "
            "such as policy.pt"
        )
    if not isinstance(saved, Mapping) or not all(
        isinstance(key, str) and isinstance(x, kind) for key, x in saved.items()
    ):
        raise WeightsError(f"{path} must hold a dictionary of tensors, as torch.save writes a state dict")
    return dict(saved)


def _records(path: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Record -> offset and size of its bytes in the file."""
    found = {}
    size = path.stat().st_size
    with open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {info.filename} is compressed")
            file.seek(info.header_offset)
            # The central directory gives the local header's offset only; name and extra field (torch's
            # alignment padding) have other lengths there.
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
            # Metrics that are saved beside weights; nothing reads them.
            ("collections", "defaultdict"): _plain_dict,
            **{(module, name): _Unread for module in _BUILTINS for name in ("list", "float", "int")},
            **{(f"numpy.{core}.multiarray", "scalar"): _Unread for core in ("core", "_core")},
            ("numpy", "dtype"): _Unread,
            ("_codecs", "encode"): _Unread,
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


class _Unread:
    """In place of a value beside the tensors, or of a function that would make it; does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _parameter(data: Extent, *_: Any) -> Extent:
    return data


def _size(sizes: Any = ()) -> tuple[int, ...]:
    return tuple(sizes)
