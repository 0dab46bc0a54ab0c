"""NxD's checkpoint folder with what a run needs to go on: what is in it, and whether it is whole.

::

    <folder>/checkpoint, done          text "1", as NxD's own
    <folder>/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt
    <folder>/optim/dp_rank_DD_tp_rank_TT_pp_rank_PP.pt    DD is 00, but for ZeRO-1
    <folder>/user_content.pt           the trainer's state, plain values only
    <folder>/nxdt_align.json           ours: step, sizes of ranks, and size and checksum of every other file

Reading one never executes anything in it. Nothing here needs NxD.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nxdt_align.engines.checkpoint_folder import CheckpointError, Summary, damaged
from nxdt_align.engines.digests import check_archive

EXTRA, DONE = "user_content.pt", "done"
MODEL, OPTIMIZER = "model", "optim"
CUTS = "pipeline_cuts"
"""The stages' last layers, whether they were asked for or even; not in checkpoints of before there was a
choice, which are even."""
SIZES = ("tensor", "pipeline", "data", "kv_multiplier", "qkv", "zero1", CUTS)
"""What must be as it was for a rank to find its shards again."""


def _check_content(directory: Path, name: str) -> None:
    """By the checksums that torch wrote into ``name``."""
    if name.endswith(".pt"):
        check_archive(directory / name)


SUMMARY = Summary(
    name="nxdt_align.json",
    format="nxdt-align NxD checkpoint",
    version=1,
    writer="nxdt-align's engine nxd",
    says={"has_optimizer": bool, "parallel": dict},
    check_content=_check_content,
)
is_checkpoint, checkpoint_step = SUMMARY.is_checkpoint, SUMMARY.checkpoint_step
require_intact = SUMMARY.require_intact


def read_extra(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``extra``. Raises CheckpointError where it cannot be read."""
    SUMMARY.require_whole(Path(path))
    try:
        extra = torch.load(Path(path) / EXTRA, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise damaged(path, f"{EXTRA} cannot be read as plain values") from error
    return SUMMARY.plain(Path(path), extra)


def sizes_of(path: Path) -> dict[str, Any]:
    """How the ranks that wrote a checkpoint held its model: SIZES. Raises CheckpointError."""
    found = {CUTS: None, **SUMMARY.require_whole(Path(path))["parallel"]}
    missing = [key for key in SIZES if key not in found]
    if missing:
        raise damaged(path, f"{SUMMARY.name} does not say {', '.join(missing)}")
    return found


def description(extra: Mapping[str, Any], sizes: Mapping[str, Any], has_optimizer: bool) -> dict[str, Any]:
    """What the summary says of a checkpoint; ``global_step`` of ``extra`` is its step."""
    return {"step": int(extra.get("global_step", 0)), "has_optimizer": has_optimizer, "parallel": dict(sizes)}


def require_sizes(directory: Path, summary: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise CheckpointError where the ranks were otherwise when the checkpoint was written."""
    saved = {CUTS: present.get(CUTS), **summary["parallel"]}
    # Data-parallel ranks hold the same, unless the optimizer's state is split over them.
    matter = [key for key in SIZES if key != "data" or saved.get("zero1") or present["zero1"]]
    differ = [
        f"{key} {saved.get(key)} (now {present[key]})" for key in matter if saved.get(key) != present[key]
    ]
    if differ:
        raise CheckpointError(
            f"checkpoint {directory} was written by ranks of other sizes: {', '.join(differ)}. Set "
            "distributed_strategy and model.pipeline_cuts as they were; or convert the weights with "
            "nxdt-align convert, and start from them with model.weight_init_only: True"
        )
