"""NxD's checkpoint folder with what a run needs to go on: what is in it, and whether it is whole.

::

    <folder>/checkpoint, done          text "1" (NxD's)
    <folder>/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt
    <folder>/optim/dp_rank_DD_tp_rank_TT_pp_rank_PP.pt    DD is 00, but for ZeRO-1
    <folder>/user_content.pt           the trainer's state, plain values only
    <folder>/nxdt_align.json           ours: step, sizes of ranks, and the size of every other file

Reading one never executes anything in it. Nothing here needs NxD.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from nxdt_align.engines.base import EngineError

FORMAT, VERSION = "nxdt-align NxD checkpoint", 1
SUMMARY, EXTRA = "nxdt_align.json", "user_content.pt"
MODEL, OPTIMIZER = "model", "optim"
CUTS = "pipeline_cuts"
"""The stages' last layers, whether they were asked for or even; not in checkpoints of before there was a
choice, which are even."""
SIZES = ("tensor", "pipeline", "data", "kv_multiplier", "qkv", "zero1", CUTS)
"""What must be as it was for a rank to find its shards again."""


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used with this model."""


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that this engine wrote, whole or damaged."""
    return (Path(path) / SUMMARY).is_file()


def checkpoint_step(path: Path) -> int | None:
    """The optimizer steps of a whole checkpoint; None where ``path`` is not one."""
    try:
        return int(require_whole(Path(path))["step"])
    except CheckpointError:
        return None


def read_extra(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``extra``. Raises CheckpointError where it cannot be read."""
    require_whole(Path(path))
    try:
        extra: dict[str, Any] = torch.load(Path(path) / EXTRA, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise damaged(path, f"{EXTRA} cannot be read as plain values") from error
    return extra


def require_whole(directory: Path) -> dict[str, Any]:
    """``nxdt_align.json``. Raises CheckpointError unless every file that it names is there in full."""
    if not directory.is_dir():
        what = "not a folder" if directory.exists() else "missing"
        raise CheckpointError(f"checkpoint {directory}: {what}")
    try:
        summary: dict[str, Any] = json.loads((directory / SUMMARY).read_text())
        if (summary["format"], summary["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {summary['format']!r}, version {summary['version']}")
        files: dict[str, int] = dict(summary["files"])
    except FileNotFoundError as error:
        found = ", ".join(sorted(f.name for f in directory.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"{directory} is not a whole checkpoint of nxdt-align's engine nxd: it holds {found}"
        ) from error
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {directory}: {SUMMARY} is not one that this version reads: {error!r}"
        ) from error
    for name, size in files.items():
        path = directory / name
        have = path.stat().st_size if path.is_file() else None
        if have != size:
            what = "is missing" if have is None else f"has {have} bytes instead of {size}"
            raise CheckpointError(
                f"checkpoint {directory} is incomplete: {name} {what}. "
                "Take another checkpoint, or copy it again"
            )
    return summary


def write_summary(directory: Path, step: int, sizes: dict[str, Any], has_optimizer: bool) -> None:
    """Describe the folder, whose other files are all there. Raises OSError."""
    files = sorted(f for f in directory.rglob("*") if f.is_file())
    summary = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "has_optimizer": has_optimizer,
        "parallel": sizes,
        "files": {str(f.relative_to(directory)): f.stat().st_size for f in files},
    }
    (directory / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def require_sizes(directory: Path, summary: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise CheckpointError where the ranks were otherwise when the checkpoint was written."""
    saved = {CUTS: present.get(CUTS), **summary["parallel"]}
    # Data-parallel ranks hold the same, unless the optimizer's state is split over them.
    matter = [key for key in SIZES if key != "data" or saved["zero1"] or present["zero1"]]
    differ = [f"{key} {saved[key]} (now {present[key]})" for key in matter if saved[key] != present[key]]
    if differ:
        raise CheckpointError(
            f"checkpoint {directory} was written by ranks of other sizes: {', '.join(differ)}. Set "
            "distributed_strategy and model.pipeline_cuts as they were; or convert the weights with "
            "nxdt-align convert, and start from them with model.weight_init_only: True"
        )


def damaged(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {directory} is damaged: {what}. Take another checkpoint, or copy it again"
    )
