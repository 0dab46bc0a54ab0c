"""The staging folder of an unfinished conversion, and the journal from which it resumes.

The folder is a hidden sibling of the destination, so that the last step is a single rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nxdt_align.files import flush_tree, lock, publish_folder
from nxdt_align.weights.extents import WeightsError

JOURNAL = "conversion.jsonl"
_SUFFIX = ".nxdt-partial"


class Staging:
    """The unfinished output of one conversion; a context that holds a lock on it.

    Args:
        identity: identifies source and target; must match to resume.
        resume: continue an earlier attempt; without it, its leftovers are removed.

    Raises WeightsError: the destination is not free, another process is writing it, or the leftovers are of
    another conversion.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any], *, resume: bool = False) -> None:
        self.destination = destination.absolute()
        self.folder = self.destination.with_name(f".{self.destination.name}{_SUFFIX}")
        self.checksums: dict[str, int] = {}
        """Weight -> CRC-32 of its bytes, for the weights written so far."""
        self.nans: dict[str, int] = {}
        self.is_created = False
        """Whether all files are there at full size."""
        self.resumed = False
        self._identity = json.loads(json.dumps(identity, default=str))
        self._resume = resume

    def __enter__(self) -> Staging:
        self._require_free_destination()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / JOURNAL, "a+")
        except OSError as error:
            raise WeightsError(
                f"cannot write {self.destination}: {error.strerror}; choose another"
            ) from error
        try:
            if lock(self._file.fileno()) is False:
                raise WeightsError(
                    f"another conversion is writing {self.destination}: wait for it, or choose another folder"
                )
            self._resume_or_clear()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def record_created(self) -> None:
        self.is_created = True
        self._append({"created": True})

    def record(self, name: str, checksum: int, nans: int) -> None:
        """Record in the journal that the weight is written."""
        self.checksums[name] = checksum
        self.nans[name] = nans
        self._append({"name": name, "crc32": checksum, "nans": nans})

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Rename the folder to its destination. Until then, an interrupted conversion can resume from the
        journal."""
        flush_tree(self.folder)
        (self.folder / JOURNAL).unlink()
        # Never replace something that appeared at the destination meanwhile.
        publish_folder(self.folder, self.destination, replace=False)

    def bytes_on_disk(self) -> int:
        """Bytes that an earlier attempt already occupies."""
        # st_blocks counts 512-byte units on every file system; st_size would count holes too.
        return sum(f.stat().st_blocks * 512 for f in self.folder.rglob("*") if f.is_file())

    def _require_free_destination(self) -> None:
        if not os.path.lexists(self.destination):
            return
        if not self.destination.is_dir():
            raise WeightsError(f"{self.destination} is a file: choose a folder for the output")
        if any(self.destination.iterdir()):
            raise WeightsError(f"{self.destination} is not empty: choose another folder, or remove it")

    def _resume_or_clear(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):  # the last line was being written
            self._file.truncate(len(whole.encode()))
        entries = self._entries(whole) if self._resume else []
        if not entries:
            self._clear()
            self._append({"identity": self._identity})
            return
        if entries[0].get("identity") != self._identity:
            raise WeightsError(
                f"{self.folder} is left from another conversion (its source has changed, or the options are "
                "others): call again with the same source and options, or without --resume to start over"
            )
        self.resumed = True
        for entry in entries[1:]:
            if "name" in entry:
                self.checksums[entry["name"]] = entry["crc32"]
                self.nans[entry["name"]] = entry["nans"]
            self.is_created = self.is_created or "created" in entry

    def _entries(self, text: str) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError as error:
            raise WeightsError(
                f"{self.folder / JOURNAL} is damaged: call again without --resume to start over"
            ) from error

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != JOURNAL:
                entry.unlink()
        self._file.truncate(0)

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
