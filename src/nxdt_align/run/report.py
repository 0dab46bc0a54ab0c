"""The report of runs that are named by their folders, or by something in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nxdt_align.config.start import EVENT_FILES, METRICS_FILE, REPORT_FILE, follow, near, run_folder
from nxdt_align.errors import UserError
from nxdt_align.evaluation.report import read_run, to_dict, write_reports
from nxdt_align.run.locate import refuse_runs
from nxdt_align.run.places import require_page

__all__ = ["report", "summary"]


def report(runs: Sequence[Path], out: Path | None = None) -> tuple[Path, list[str]]:
    """Write the page of runs, and the same as JSON beside it.

    Args:
        runs: each a run's folder, or a checkpoint or export in it.
        out: the page, replaced if it is there; None: report.html in the run's folder, of several in the
            current one.

    Returns its path, and each run's verdict in a sentence. Raises UserError for a folder that is no run's,
    and for a page that cannot be written.
    """
    folders = [_folder_of(run) for run in runs]
    page = out or (folders[0] / REPORT_FILE if len(folders) == 1 else Path(REPORT_FILE))
    require_page(page)
    verdicts = write_reports(folders, page)
    return page, [verdict.summary for verdict in verdicts]


def summary(runs: Sequence[Path]) -> dict[str, Any]:
    """What ``report`` writes as JSON, without writing anything."""
    folders = [_folder_of(run) for run in runs]
    return to_dict([read_run(folder, folder.name) for folder in folders])


def _folder_of(path: Path) -> Path:
    place = follow(path.expanduser())
    if not place.exists():
        raise UserError(f"{path} does not exist: {near(place) or 'name the folder of a run'}")
    found = run_folder(place)
    if found is not None:
        return found
    if place.is_dir() and any(True for name in (METRICS_FILE, EVENT_FILES) for _ in place.glob(name)):
        return place  # such as NxD Training's own runs
    if place.is_dir():
        refuse_runs(place)
    raise UserError(f"{path} is no folder of a run: it has neither {METRICS_FILE} nor a TensorBoard file")
