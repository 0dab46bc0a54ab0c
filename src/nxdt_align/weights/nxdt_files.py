"""The files of NxD's checkpoint folder, found and opened without reading a tensor.

::

    <tag>/checkpoint, done     text "1"
    <tag>/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt            a dictionary of local tensors, or (xser)
    <tag>/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt.tensors/   of references to files in this folder
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nxdt_align.models.partition import QKV
from nxdt_align.named_tensors import summary
from nxdt_align.weights.extents import Extent, WeightsError
from nxdt_align.weights.tensor_files import TensorReference, read_index, tensors_of

MODEL, DONE, TAG = "model", "done", "checkpoint"
TENSORS, INFO = ".tensors", ".info.pt"
_SHARD = re.compile(r"^dp_rank_(\d{2,})_tp_rank_(\d{2,})_pp_rank_(\d{2,})\.pt$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_EXPERTS = re.compile(r"^dp_rank_\d+_ep_rank_\d+_")

Files = dict[tuple[int, int], dict[str, Extent]]
"""(tp rank, pp rank) -> local tensors by NxD's names."""


def shard_name(tp_rank: int, pp_rank: int) -> str:
    return f"dp_rank_00_tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:02d}.pt"


def model_folder(path: Path) -> Path | None:
    """The folder of shards at ``path``, a checkpoint's folder or its model folder; None for neither."""
    for folder in (path / MODEL, path):
        if folder.is_dir() and any(_SHARD.match(f.name) or _EXPERTS.match(f.name) for f in folder.iterdir()):
            return folder
    return None


def refuse_unfinished(folder: Path) -> None:
    """Raise WeightsError for an interrupted save, which has its tag file but no ``done``. (NxD's converter
    writes neither.)"""
    tag = folder.parent if folder.name == MODEL else folder
    if (tag / TAG).is_file() and not (tag / DONE).is_file():
        raise WeightsError(
            f"{tag} is not finished: it has no `{DONE}` file, so whatever wrote it was interrupted; "
            "take another checkpoint, or write it again"
        )


def find_shards(folder: Path) -> dict[tuple[int, int], Path]:
    files = sorted(folder.iterdir())
    # Before anything else: names with an ep_rank do not match _SHARD, so the folder would seem empty.
    experts = next((f.name for f in files if _EXPERTS.match(f.name)), None)
    if experts is not None:
        raise WeightsError(f"{folder / experts} is a shard of a mixture of experts, which is not supported")
    matches = [(match, file) for file in files if (match := _SHARD.match(file.name))]
    replicas = [file.name for match, file in matches if int(match[1])]
    if replicas:
        raise WeightsError(
            f"{folder} holds shards of several data-parallel ranks, such as {replicas[0]}: surplus"
        )
    found = {(int(match[2]), int(match[3])): file for match, file in matches}
    tp, pp = 1 + max(t for t, _ in found), 1 + max(p for _, p in found)
    missing = [shard_name(t, p) for t in range(tp) for p in range(pp) if (t, p) not in found]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise WeightsError(
            f"{folder} has {len(found)} shards, but tp {tp} x pp {pp} (the highest ranks among them) needs "
            f"{tp * pp}. Missing: {shown}; or the highest ranks are surplus, left over from another model"
        )
    return dict(sorted(found.items()))


def open_shard(path: Path) -> dict[str, Extent]:
    tensors = tensors_of(path, read_index(path))
    return {
        name: _referred(path, name, found) if isinstance(found, TensorReference) else found
        for name, found in tensors.items()
    }


def _referred(path: Path, name: str, reference: TensorReference) -> Extent:
    number = getattr(reference, "tid", None)
    if not isinstance(number, int):
        raise WeightsError(f"{path} refers to no file for {name}: copy the checkpoint again")
    file = path.with_name(path.name + TENSORS) / f"tensor_{number}.pt"
    if not file.is_file():
        raise WeightsError(f"{path} refers to {file} for {name}, which is missing: copy the checkpoint again")
    found = read_index(file)
    if not isinstance(found, Extent):
        raise WeightsError(f"{file} must hold one tensor, {name}")
    return found


def is_xser(shards: Iterable[Path]) -> bool:
    return any(file.with_name(file.name + TENSORS).is_dir() for file in shards)


def qkv_style(path: Path, local: Iterable[str]) -> QKV:
    """The storage style of q, k and v, from tensor names. Raises WeightsError for other models."""
    marks: dict[str, QKV] = {
        ".qkv_proj.weight_qkv": "fused",
        ".qkv_proj.weight_q": "split",
        ".qkv_proj.weight": "coalesced",
        ".self_attn.q_proj.weight": "separate",
    }
    for mark, style in marks.items():
        if any(name.endswith(mark) for name in local):
            return style
    if any(".query_key_value." in name or name.startswith("language_model.") for name in local):
        raise WeightsError(f"{path} is a checkpoint of the megatron model style, and only hf is supported")
    raise WeightsError(f"{path} holds no attention weights of a decoder: {', '.join(summary(local)[:6])}")


def layers_of(names: Iterable[str]) -> set[int]:
    """The numbers of the decoder layers that the names are of."""
    return {int(match[1]) for name in names if (match := _LAYER.match(name))}
