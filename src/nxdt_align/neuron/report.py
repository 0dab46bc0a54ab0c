"""Parses neuron-monitor's output, one JSON object per period, into numbers and error messages.

Format: the Neuron Monitor User Guide of AWS's documentation, metric groups ``neuroncore_counters``,
``memory_used``, ``execution_stats`` and ``memory_info``. A group that is missing or misshapen counts as
not reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30
_READ_GROUPS = ("neuroncore_counters", "memory_used", "execution_stats")
_FAILED_EXECUTIONS = ("timed_out", "failed_to_queue", "incorrect_input")


@dataclass(frozen=True)
class Core:
    """A NeuronCore, over all runtimes that use it; None for what was not reported."""

    utilization: float | None = None
    """Percent of the period in use."""
    memory: float | None = None
    """Bytes of device memory: tensors, code, constants, scratchpad."""


@dataclass(frozen=True)
class Report:
    """One period of a node."""

    cores: Mapping[int, Core]
    device_memory: float | None
    """Bytes of device memory, of all runtimes."""
    runtime_host_memory: float | None
    """Bytes of host memory that the runtimes hold."""
    host_memory: float | None
    """Bytes of host memory in use on the node."""
    errors: tuple[str, ...]
    """Errors, one sentence each."""

    def metrics(self) -> dict[str, float]:
        """Name -> value for a logger: percent and GiB."""
        values: dict[str, float | None] = {}
        for index, core in sorted(self.cores.items()):
            values[f"neuron/core_{index}/utilization_percent"] = core.utilization
            values[f"neuron/core_{index}/memory_gib"] = _gib(core.memory)
        used = [core.utilization for core in self.cores.values() if core.utilization is not None]
        values["neuron/utilization_percent"] = sum(used) / len(used) if used else None
        values["neuron/device_memory_gib"] = _gib(self.device_memory)
        values["neuron/runtime_host_memory_gib"] = _gib(self.runtime_host_memory)
        values["neuron/host_memory_gib"] = _gib(self.host_memory)
        return {name: value for name, value in values.items() if value is not None}


def parse(line: str | bytes) -> Report:
    """One line of neuron-monitor's output. Raises ValueError unless it is a JSON object."""
    try:
        data = json.loads(line)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    listed = data.get("neuron_runtime_data")
    runtimes = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    used = [_mapping(entry, "report", "memory_used", "neuron_runtime_used_bytes") for entry in runtimes]
    return Report(
        cores=_cores(runtimes),
        device_memory=_total(_number(each.get("neuron_device")) for each in used),
        runtime_host_memory=_total(_number(each.get("host")) for each in used),
        host_memory=_number(_mapping(data, "system_data", "memory_info").get("memory_used_bytes")),
        errors=(*_hardware_error(data), *(text for entry in runtimes for text in _errors(entry))),
    )


def _cores(runtimes: list[dict[str, Any]]) -> dict[int, Core]:
    utilization: dict[int, float] = {}
    memory: dict[int, float] = {}
    for runtime in runtimes:
        counters = _mapping(runtime, "report", "neuroncore_counters", "neuroncores_in_use")
        for index, counter in _by_core(counters):
            value = _number(counter.get("neuroncore_utilization"))
            if value is not None:
                utilization[index] = max(value, utilization.get(index, 0.0))
        usage = ("report", "memory_used", "neuron_runtime_used_bytes", "usage_breakdown")
        for index, kinds in _by_core(_mapping(runtime, *usage, "neuroncore_memory_usage")):
            total = _total(map(_number, kinds.values()))
            if total is not None:
                memory[index] = memory.get(index, 0.0) + total
    found = sorted({*utilization, *memory})
    return {index: Core(utilization.get(index), memory.get(index)) for index in found}


def _by_core(cores: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, values in cores.items():
        if index.isdecimal() and isinstance(values, dict):
            yield int(index), values


def _errors(runtime: Mapping[str, Any]) -> Iterator[str]:
    """Errors of one runtime, without counts, so that a lasting fault reads the same in each period."""
    name = f"Neuron runtime of process {runtime.get('pid', '?')}"
    if runtime.get("error"):
        yield f"{name}: {runtime['error']}"
    for group in _READ_GROUPS:
        error = _mapping(runtime, "report", group).get("error")
        if error:
            yield f"{name}: {group}: {error}"
    statistics = _mapping(runtime, "report", "execution_stats")
    for kind, count in _mapping(statistics, "error_summary").items():
        if _number(count):
            yield f"{name}: executions failed with {kind} errors"
    for kind in _FAILED_EXECUTIONS:
        if _number(_mapping(statistics, "execution_summary").get(kind)):
            yield f"{name}: executions {kind.replace('_', ' ')}"


def _hardware_error(data: Mapping[str, Any]) -> Iterator[str]:
    error = _mapping(data, "neuron_hardware_info").get("error")
    if error:
        yield f"Neuron devices: {error}"


# Values of unknown shape


def _mapping(data: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at ``path``; an empty one where there is none."""
    for name in path:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _total(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _gib(value: float | None) -> float | None:
    return None if value is None else value / GIB
