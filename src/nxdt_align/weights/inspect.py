"""Describes checkpoints in plain values for people and programs, with the model's config.json or without."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from nxdt_align.models.partition import EMBEDDING, HEAD, QKV
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.named_tensors import WeightSource, require_fit, summary
from nxdt_align.weights.extents import Extent, WeightsError, read_region, same_bytes
from nxdt_align.weights.names import is_recomputed
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.nxdt_files import (
    Files,
    find_shards,
    is_xser,
    layers_of,
    model_folder,
    open_shard,
    qkv_style,
    refuse_unfinished,
    shard_name,
)

_LAYOUTS = {
    "hf": "Hugging Face",
    "nxdt": "NxD (NxD Training)",
    "meta": "Meta's original download",
    "native": "nxdt-align's native engine (DCP)",
}
_LOADERS = {
    "hf": "transformers; nxdt-align (resume_from_checkpoint)",
    "nxdt": "NxD Training at the same sizes; nxdt-align at any (resume_from_checkpoint)",
    "meta": "nxdt-align convert",
    "native": "nxdt-align's native engine (resume_from_checkpoint)",
}
_UNKNOWN = (
    "the numbers of heads and the head dim (only their products), how many rows pad the vocabulary (they "
    "are among the parameters), rotary base and scaling, norm epsilon, special tokens: give the model's "
    "config.json with --config"
)
_ATTENTION, _GATE_UP = "self_attn.", "mlp.gate_up_proj.weight"
_OUTPUT = _ATTENTION + "o_proj.weight"
_KEYS: dict[QKV, str] = {
    "split": _ATTENTION + "qkv_proj.weight_k",
    "fused": _ATTENTION + "qkv_proj.weight_qkv",
    "separate": _ATTENTION + "k_proj.weight",
    "coalesced": _ATTENTION + "qkv_proj.weight",
}
_WHOLE = ("norm.weight", "o_proj.bias", "down_proj.bias")
"""Ends of the names of what every tensor-parallel rank holds whole."""
_BLOCK = 1 << 22
"""Entries of the embedding to compare at a time."""


def describe(path: Path, source: WeightSource, config: ModelShape, layout: str) -> dict[str, Any]:
    """Layout, sizes, dtypes, parameter count, names and loaders of an opened checkpoint."""
    names = source.names()
    dtypes = Counter(str(source.dtype(name)).removeprefix("torch.") for name in names)
    found = {
        **_place(path, layout),
        "parameters": sum(prod(source.shape(name)) for name in names),
        "dtypes": dict(sorted(dtypes.items())),
        "model": _sizes_of(config),
    }
    if isinstance(source, NxDTFolder):
        found["shards"] = _shards(source)
    return found | {"weights": summary(names)}


def _sizes_of(config: ModelShape) -> dict[str, Any]:
    sizes: dict[str, Any] = {"layers": config.num_hidden_layers, "hidden size": config.hidden_size}
    if isinstance(config, DecoderConfig):
        sizes |= {
            "query heads": config.num_attention_heads,
            "kv heads": config.num_key_value_heads,
            "head dim": config.head_dim,
            "intermediate size": config.intermediate_size,
        }
    sizes |= {"vocabulary": config.vocab_size, "tied head": config.tie_word_embeddings}
    if not isinstance(config, DecoderConfig):
        sizes["computed by"] = f"transformers ({config.model_type})"
    return sizes


def describe_bare(path: Path) -> dict[str, Any]:
    """``describe`` as far as shards allow without a config.json; ``unknown`` lists the rest.

    Raises WeightsError: shards are missing or damaged, or ranks hold different tensors.
    """
    return _place(path, "nxdt") | _BareShards(path).description()


def to_text(description: dict[str, Any]) -> str:
    """The description in lines for a terminal."""
    lines = []
    for key, value in description.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items())
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  {entry}" for entry in value)]
        else:
            lines.append(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
    return "\n".join(lines)


def _place(path: Path, layout: str) -> dict[str, Any]:
    return {
        "path": str(path),
        "layout": _LAYOUTS[layout],
        "loaded by": _LOADERS[layout],
        "bytes on disk": _bytes(path),
    }


def _shards(source: NxDTFolder) -> dict[str, Any]:
    held, last = source.partition, source.config.num_hidden_layers - 1
    return {
        "tensor parallel": held.tp,
        "pipeline parallel": held.pp,
        "layers of the stages": [end - start for start, end in pairwise([-1, *held.stage_ends, last])],
        "kv multiplier": held.kv_multiplier,
        "qkv": held.qkv,
        "files": "xser" if source.is_xser else "plain",
        "padded vocabulary": held.padded_vocab,
        "checksums": "compared when read" if source.has_checksums else "none",
    }


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files)


class _BareShards:
    """NxD's shards without a config.json.

    Shards do not mark head boundaries, so only the product of heads and head dim is known. Copies of kv heads
    can be detected, as they are equal. Rank 0 represents its stage, whose ranks hold tensors of the same
    names and shapes.
    """

    def __init__(self, path: Path) -> None:
        folder = model_folder(path)
        assert folder is not None, "detect.layout_of has found shards"
        refuse_unfinished(folder)
        grid = find_shards(folder)
        self._path = path
        self._files: Files = {place: open_shard(file) for place, file in grid.items()}
        self._is_xser = is_xser(grid.values())
        self._tp, self._pp = 1 + max(t for t, _ in grid), 1 + max(p for _, p in grid)
        self._require_alike()
        every = {n: x for stage in range(self._pp) for n, x in self._files[0, stage].items()}
        self._local = {name: extent for name, extent in every.items() if not is_recomputed(name)}
        self._qkv = qkv_style(path, self._local)
        self._layer = f"model.layers.{min(layers_of(self._local))}."
        self._copies = self._kv_copies()

    def description(self) -> dict[str, Any]:
        is_tied = self._is_tied()
        dtypes = Counter(str(extent.dtype).removeprefix("torch.") for extent in self._local.values())
        stages = [sorted(layers_of(self._files[0, stage])) for stage in range(self._pp)]
        return {
            "parameters": self._parameters(is_tied),
            "dtypes": dict(sorted(dtypes.items())),
            "model": {"layers": len(layers_of(self._local)), **self._sizes(), "tied head": is_tied},
            "shards": {
                "tensor parallel": self._tp,
                "pipeline parallel": self._pp,
                "layers of the stages": [len(held) for held in stages],
                "kv multiplier": self._copies,
                "qkv": self._qkv,
                "files": "xser" if self._is_xser else "plain",
                "last rows of the embedding that are 0": self._zero_rows(),
            },
            "unknown": _UNKNOWN,
            "tensors of a rank": summary(self._local),
        }

    def _sizes(self) -> dict[str, int]:
        start, stop = self._key_rows()
        rows, hidden = self._extent(EMBEDDING).shape
        return {
            "hidden size": hidden,
            "query heads x head dim": self._extent(self._layer + _OUTPUT).shape[1] * self._tp,
            "kv heads x head dim": (stop - start) * self._tp // self._copies,
            "intermediate size": self._extent(self._layer + _GATE_UP).shape[0] // 2 * self._tp,
            "vocabulary with its padding": rows * self._tp,
        }

    def _parameters(self, is_tied: bool) -> int:
        """Each weight once."""
        start, stop = self._key_rows()
        hidden, layers = self._extent(EMBEDDING).shape[1], len(layers_of(self._local))
        held = sum(
            prod(extent.shape) * (1 if name.endswith(_WHOLE) and "_projection_norm" not in name else self._tp)
            for name, extent in self._local.items()
            if not (is_tied and name == HEAD)
        )
        # Keys and values, which have copies; every other share is there once.
        per_row = 2 * hidden + 2 * any("bias_k" in name or "bias_qkv" in name for name in self._local)
        per_row += any("k_projection_norm" in name for name in self._local)
        every_copy = layers * (stop - start) * self._tp * per_row
        return held - every_copy + every_copy // self._copies

    def _extent(self, name: str) -> Extent:
        if name not in self._local:
            raise WeightsError(f"{self._path} holds no {name}: shards or tensors are missing")
        return self._local[name]

    def _require_alike(self) -> None:
        for (rank, stage), tensors in self._files.items():
            require_fit(
                f"{self._path}: {shard_name(rank, stage)}",
                {name: (extent.shape, extent.dtype) for name, extent in tensors.items()},
                {name: (extent.shape, extent.dtype) for name, extent in self._files[0, stage].items()},
                to=shard_name(0, stage),
                error=WeightsError,
                hint="Ranks of a stage hold tensors of the same names, shapes and dtypes",
            )

    def _key_rows(self) -> tuple[int, int]:
        """The rows of a rank's keys in the tensor that holds them."""
        rows = self._extent(self._layer + _KEYS[self._qkv]).shape[0]
        if self._qkv in ("split", "separate"):
            return 0, rows
        # One tensor of q, k and v in this order: o_proj takes as many columns as q has rows.
        queries = self._extent(self._layer + _OUTPUT).shape[1]
        return queries, queries + (rows - queries) // 2

    def _kv_copies(self) -> int:
        """The largest number of equal copies in the ranks' keys of one layer."""
        if self._qkv in ("separate", "coalesced"):
            return 1
        name, rows = self._layer + _KEYS[self._qkv], slice(*self._key_rows())
        stage = next(p for p in range(self._pp) if name in self._files[0, p])
        keys = [_rows(self._files[rank, stage][name], rows) for rank in range(self._tp)]
        return next(
            copies
            for copies in range(self._tp, 0, -1)
            if self._tp % copies == 0
            and all(same_bytes(part, keys[i % (self._tp // copies)]) for i, part in enumerate(keys))
        )

    def _is_tied(self) -> bool:
        """Whether there is no separate head, or one equal to the embedding."""
        if HEAD not in self._local:
            return True
        head, embedding = self._local[HEAD], self._extent(EMBEDDING)
        if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
            return False
        return all(
            same_bytes(_rows(self._of_rank(HEAD, rank), part), _rows(self._of_rank(EMBEDDING, rank), part))
            for rank in range(self._tp)
            for part in self._blocks()
        )

    def _zero_rows(self) -> int:
        count = 0
        for rank in reversed(range(self._tp)):
            for part in reversed(self._blocks()):
                is_zero = (_rows(self._of_rank(EMBEDDING, rank), part) == 0).all(dim=1)
                count += int(is_zero.flip(0).int().cumprod(0).sum())
                if not is_zero.all():
                    return count
        return count

    def _of_rank(self, name: str, rank: int) -> Extent:
        return next(self._files[rank, p][name] for p in range(self._pp) if name in self._files[rank, p])

    def _blocks(self) -> list[slice]:
        """The embedding's rows on a rank, in blocks of bounded memory."""
        rows, hidden = self._extent(EMBEDDING).shape
        step = max(1, _BLOCK // max(1, hidden))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _rows(extent: Extent, rows: slice) -> Tensor:
    return read_region(extent, (rows, *(slice(0, size) for size in extent.shape[1:])))
