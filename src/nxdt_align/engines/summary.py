"""The file that makes a folder a checkpoint: it names every other file, and is written last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_align.engines.base import EngineError


class CheckpointError(EngineError):
    """A checkpoint that cannot be written, read, or used with this model."""


def damaged(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {directory} is damaged: {what}. Take another checkpoint, or copy it again"
    )


@dataclass(frozen=True)
class Summary:
    """A file ``name``: format and version, what the engine says of the checkpoint, and every other file's
    size. ``writer`` stands in messages."""

    name: str
    format: str
    version: int
    writer: str

    def write(self, directory: Path, said: Mapping[str, Any], files: Iterable[Path] | None = None) -> None:
        """Describe the folder, whose other files (or ``files``) are all there. Raises OSError."""
        if files is None:
            files = sorted(f for f in directory.rglob("*") if f.is_file())
        sizes = {str(f.relative_to(directory)): f.stat().st_size for f in files}
        summary = {"format": self.format, "version": self.version, **said, "files": sizes}
        (directory / self.name).write_text(json.dumps(summary, indent=2) + "\n")

    def require_whole(self, directory: Path) -> dict[str, Any]:
        """What the file says. Raises CheckpointError unless every file that it names is there in full."""
        if not directory.is_dir():
            what = "not a folder" if directory.exists() else "missing"
            raise CheckpointError(f"checkpoint {directory}: {what}")
        summary = self._read(directory)
        for name, size in summary["files"].items():
            path = directory / name
            have = path.stat().st_size if path.is_file() else None
            if have != size:
                what = "is missing" if have is None else f"has {have} bytes instead of {size}"
                raise CheckpointError(
                    f"checkpoint {directory} is incomplete: {name} {what}. "
                    "Take another checkpoint, or copy it again"
                )
        return summary

    def _read(self, directory: Path) -> dict[str, Any]:
        try:
            summary: dict[str, Any] = json.loads((directory / self.name).read_text())
            if (summary["format"], summary["version"]) != (self.format, self.version):
                raise ValueError(f"format {summary['format']!r}, version {summary['version']}")
            return summary | {"files": dict(summary["files"])}
        except FileNotFoundError as error:
            raise self._missing(directory) from error
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {directory}: {self.name} is not one that this version reads: {error!r}"
            ) from error

    def _missing(self, directory: Path) -> CheckpointError:
        found = sorted(f.name for f in directory.iterdir())
        if not found:
            return CheckpointError(
                f"checkpoint {directory}: the folder is empty; name one that a run has written"
            )
        return CheckpointError(
            f"{directory} is not a whole checkpoint of {self.writer}: {self.name} is missing; it holds "
            + ", ".join(found[:5])
        )
