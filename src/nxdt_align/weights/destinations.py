"""The folders that a conversion can write: made in a staging folder, read back, and finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nxdt_align.models.partition import Partition
from nxdt_align.models.presets import LlamaConfig
from nxdt_align.named_tensors import WeightSource
from nxdt_align.weights.export import config_json, tokenizer_files
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.hf_writer import CONFIG, UNFINISHED_CONFIG, HFWriter
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.nxdt_files import DONE, MODEL, TAG
from nxdt_align.weights.nxdt_writer import NxDTWriter

RECORD = "conversion.json"
"""What a converted NxD checkpoint was made from, and the checksums of its weights."""
_UNFINISHED_MODEL = "model.partial"

Dtypes = Callable[[str], torch.dtype]


class Writer(Protocol):
    """Whole weights into files, in any order and from several threads."""

    def total_bytes(self) -> int: ...

    def create(self) -> Iterator[Path]:
        """Make what is there before the first weight; yields as it goes."""
        ...

    def open(self) -> None:
        """Find the places in what ``create`` has made, now or before."""
        ...

    def write(self, name: str, whole: Tensor) -> None:
        """Raises OSError."""
        ...

    def description(self) -> dict[str, Any]:
        """What makes two conversions write the same; ``config`` is the model's shape."""
        ...


class Destination(Protocol):
    """One kind of folder."""

    def writer(self, staging: Path) -> Writer: ...

    def reopen(self, staging: Path) -> WeightSource:
        """What was written, read as a user of the folder reads it."""
        ...

    def finish(self, staging: Path, record: Mapping[str, Any]) -> None:
        """Make the folder one that is loaded; the last thing written says that it is whole."""
        ...

    def restart(self, staging: Path) -> None:
        """Undo what an interrupted ``finish`` has done, all or some of it."""
        ...


class HFDestination:
    """A folder that transformers loads."""

    def __init__(
        self, config: LlamaConfig, dtypes: Dtypes, *, tokenizer: Path | None = None, max_shard_bytes: int
    ) -> None:
        self._config, self._dtypes, self._most = config, dtypes, max_shard_bytes
        self._tokenizer = [] if tokenizer is None else tokenizer_files(tokenizer)

    def writer(self, staging: Path) -> HFWriter:
        return HFWriter(staging, self._config, self._dtypes, max_shard_bytes=self._most)

    def reopen(self, staging: Path) -> WeightSource:
        return HFFolder(staging, staging / UNFINISHED_CONFIG)

    def finish(self, staging: Path, record: Mapping[str, Any]) -> None:
        for file in self._tokenizer:
            shutil.copyfile(file, staging / file.name)
        os.rename(staging / UNFINISHED_CONFIG, staging / CONFIG)

    def restart(self, staging: Path) -> None:
        rename_back(staging / CONFIG, staging / UNFINISHED_CONFIG)


class NxDTDestination:
    """A folder that NxD Training's ``resume_from_checkpoint`` takes."""

    def __init__(self, partition: Partition, dtypes: Dtypes, *, xser: bool = False) -> None:
        self._partition, self._dtypes, self._xser = partition, dtypes, xser

    def writer(self, staging: Path) -> NxDTWriter:
        return NxDTWriter(staging / _UNFINISHED_MODEL, self._partition, self._dtypes, xser=self._xser)

    def reopen(self, staging: Path) -> WeightSource:
        return NxDTFolder(staging, self._partition.config, shards=staging / _UNFINISHED_MODEL)

    def finish(self, staging: Path, record: Mapping[str, Any]) -> None:
        os.rename(staging / _UNFINISHED_MODEL, staging / MODEL)
        values = config_json(self._partition.config, self._dtypes("model.norm.weight"))
        (staging / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (staging / TAG).write_text("1")
        (staging / DONE).write_text("1")

    def restart(self, staging: Path) -> None:
        for name in (DONE, TAG):
            (staging / name).unlink(missing_ok=True)
        rename_back(staging / MODEL, staging / _UNFINISHED_MODEL)


def rename_back(finished: Path, unfinished: Path) -> None:
    if finished.exists():
        os.rename(finished, unfinished)
