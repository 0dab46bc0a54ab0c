"""Every logged value as a line of JSON in the run's folder, for programs: ``metrics.jsonl``.

A line has ``step`` (optimizer steps done), ``time`` (seconds since 1970) and the metrics under TensorBoard's
names; null for a value that is not finite. A resumed run first writes a line ``{"resumed_after": step}``:
lines of later steps before it belong to what was lost with the process, and are logged again.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from nxdt_align.config.start import METRICS_FILE
from nxdt_align.files import append_lines, explain

log = logging.getLogger(__name__)

HOST_MEMORY, DEVICE_MEMORY = "memory/host_gib", "memory/device_gib"
"""Peaks of rank 0: its process's resident memory, and what torch allocated on CUDA."""
_KIB = 1 if sys.platform == "darwin" else 1024


class MetricsFile(Logger):
    """Appends to ``metrics.jsonl``; of rank 0 alone. Ends with one warning where it cannot be written, as a
    run does not need it.

    Args:
        folder: the run's.
        resumed_step: of the checkpoint that the run resumes from; None for a new run.
    """

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        super().__init__()
        self._file = folder / METRICS_FILE
        self._has_stopped = False
        if resumed_step is not None:
            self._append({"resumed_after": resumed_step})

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        numbers = {name: float(value) for name, value in {**metrics, **_memory()}.items()}
        known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._append({"step": step, "time": round(time.time(), 3), **known})

    def log_hyperparams(self, *arguments: Any, **settings: Any) -> None:
        """The settings are in the run's config.yaml."""

    def _append(self, values: Mapping[str, Any]) -> None:
        if self._has_stopped:
            return
        try:
            append_lines(self._file, [json.dumps(values)])
        except OSError as error:
            self._has_stopped = True
            log.warning("%s cannot be written: %s; training goes on without it", self._file, explain(error))


def _memory() -> dict[str, float]:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / 2**30
    device = torch.accelerator.current_accelerator(check_available=True)
    # Under one name for CUDA and for a device that registers itself, as TorchNeuron's.
    peak = None if device is None else getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return {HOST_MEMORY: host} if peak is None else {HOST_MEMORY: host, DEVICE_MEMORY: peak() / 2**30}
