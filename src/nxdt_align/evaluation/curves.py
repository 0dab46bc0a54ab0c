"""The curves of a run's folder: metrics.jsonl and every TensorBoard file, joined by step.

A run that was stopped and resumed has several files, and steps that were logged twice: the later values
count, as the earlier ones were lost with the process that wrote them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nxdt_align.config.start import EVENT_FILES, METRICS_FILE
from nxdt_align.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curve:
    """One metric: ``values[i]`` at the end of optimizer step ``steps[i]``, steps ascending, all finite."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def last(self) -> float:
        return self.values[-1]

    def mean(self, begin: float, end: float) -> float:
        """Over a part of the curve, as shares of its points: ``mean(0.75, 1)`` is its last quarter's."""
        count = len(self.values)
        first = min(int(begin * count), count - 1)
        part = self.values[first : max(math.ceil(end * count), first + 1)]
        return sum(part) / len(part)


@dataclass
class Curves:
    """A run's metrics by name; validation's begin with ``val_``."""

    by_name: Mapping[str, Curve]
    notes: list[str] = field(default_factory=list)
    """What could not be read."""

    def __getitem__(self, name: str) -> Curve:
        """Empty where nothing has been logged under this name."""
        return self.by_name.get(name, Curve())

    @property
    def last_step(self) -> int:
        """0 where nothing has been logged yet."""
        return max((curve.steps[-1] for curve in self.by_name.values()), default=0)


_NO_STEP = 2**53
"""From here on a plot's float64 is not the step."""

Table = dict[int, dict[str, float]]
"""Step -> metric -> value."""


def read_curves(run: Path) -> Curves:
    """Of the run's folder, however damaged. Raises UserError where it is none."""
    if not run.is_dir():
        raise UserError(f"{run} is no folder: name that of a run")
    notes: list[str] = []
    # Apart, as each says which steps were lost. A line's value counts: an event's is rounded to float32.
    table, lines = _read_events(run, notes), _read_lines(run / METRICS_FILE, notes)
    for step, values in lines.items():
        table.setdefault(step, {}).update(values)
    names = dict.fromkeys(name for values in table.values() for name in values)
    by_name = {}
    for name in names:
        points = sorted((step, values[name]) for step, values in table.items() if name in values)
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if finite:
            by_name[name] = Curve(*map(tuple, zip(*finite, strict=True)))
        if len(finite) < len(points):
            notes.append(f"{name}: {len(points) - len(finite)} of {len(points)} values are not finite")
    return Curves(by_name, notes)


def _forget_after(table: Table, step: int) -> None:
    for later in [known for known in table if known > step]:
        del table[later]


def _read_lines(file: Path, notes: list[str]) -> Table:
    table: Table = {}
    if not file.is_file():
        return table
    lines = file.read_bytes().split(b"\n")
    bad = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if "resumed_after" in values:
                _forget_after(table, _step(values["resumed_after"]))
                continue
            step = _step(values.pop("step"))
            values.pop("time", None)
            numbers = {str(k): math.nan if v is None else float(v) for k, v in values.items()}
        # OverflowError: 1e999 is read as infinity, and 400 digits are no float.
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
            bad += 1
            # The last line may be cut off by a kill or a full disk.
            where = "the last line" if number == len(lines) else f"line {number}"
            if bad == 1:
                notes.append(f"{file.name}: {where} is damaged and left out")
            continue
        table.setdefault(step, {}).update(numbers)
    if bad > 1:
        notes.append(f"{file.name}: {bad} lines are damaged and left out")
    return table


def _step(value: Any) -> int:
    step = int(value)
    if abs(step) >= _NO_STEP:
        raise ValueError
    return step


def _read_events(run: Path, notes: list[str]) -> Table:
    table: Table = {}
    files = [(events, file) for file in run.glob(EVENT_FILES) if (events := list(_events(file, notes)))]
    # By the time of their first event: names of one second and process do not sort.
    for events, _ in sorted(files, key=lambda each: each[0][0].wall_time):
        for event in events:
            if event.session_log.status == event.session_log.START and event.step > 0:
                _forget_after(table, event.step - 1)
            for value in event.summary.value:
                number = _scalar(value)
                if number is not None:
                    table.setdefault(event.step, {})[value.tag] = number
    return table


def _events(file: Path, notes: list[str]) -> Iterator[Any]:
    """The events of a TensorBoard file up to its end, or to where it is cut."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat import tf

    try:
        yield from LegacyEventFileLoader(str(file)).Load()
    except (tf.errors.OpError, DecodeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        notes.append(f"{file.name}: read up to where it is damaged ({reason})")
    else:
        if not _is_whole(file):  # which the loader takes for the end of a file that is being written
            notes.append(f"{file.name}: its end is cut off or damaged; it is read up to there")


def _is_whole(file: Path) -> bool:
    """Whether the records of a TFRecord file (length, checksum, bytes, checksum) end where the file does."""
    content, at = file.read_bytes(), 0
    while at + 8 <= len(content):
        at += 8 + 4 + int.from_bytes(content[at : at + 8], "little") + 4
    return at == len(content)


def _scalar(value: Any) -> float | None:
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind == "tensor" and not value.tensor.tensor_shape.dim and value.tensor.float_val:
        return float(value.tensor.float_val[0])
    return None
