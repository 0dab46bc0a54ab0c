"""neuron-monitor's JSON as numbers, and what of it is a complaint."""

from __future__ import annotations

import json
from typing import Any

import pytest
from neuron_monitor_fixture import BUSY, node, report

from nxdt_align.neuron.report import parse


def errors(*runtimes: dict[str, Any]) -> tuple[str, ...]:
    return parse(json.dumps(node(*runtimes))).errors


def test_values_of_a_busy_node() -> None:
    """Core 0: 8 GiB of tensors and 1 GiB of code; 87.5% and 12.5% are 50% on average."""
    found = parse(json.dumps(BUSY))
    assert found.metrics() == {
        "neuron/core_0/utilization_percent": 87.5,
        "neuron/core_0/memory_gib": 9.0,
        "neuron/core_1/utilization_percent": 12.5,
        "neuron/utilization_percent": 50.0,
        "neuron/device_memory_gib": 9.0,
        "neuron/runtime_host_memory_gib": 1.0,
        "neuron/host_memory_gib": 3.0,
    }
    assert found.errors == ()


def test_processes_of_a_node_are_put_together() -> None:
    """Each process reports its own cores; memory adds up where two use one."""
    first = report(cores={"0": 50.0}, memory={"0": {"tensors": 2**30}})
    second = report(cores={"1": 30.0}, memory={"0": {"tensors": 2**30}, "10": {"constants": 2**31}})
    values = parse(json.dumps(node(first, second))).metrics()
    assert values["neuron/core_0/memory_gib"] == 2.0
    assert values["neuron/core_10/memory_gib"] == 2.0
    assert "neuron/core_10/utilization_percent" not in values
    assert values["neuron/utilization_percent"] == 40.0
    assert values["neuron/device_memory_gib"] == 4.0
    assert values["neuron/runtime_host_memory_gib"] == 2.0


def test_an_idle_node_has_host_memory_alone() -> None:
    assert parse(json.dumps(node())).metrics() == {"neuron/host_memory_gib": 3.0}


def test_runtime_errors_are_sentences() -> None:
    broken = report(cores={}, memory={}, error="runtime has gone")
    broken["report"]["memory_used"]["error"] = "no counters"
    broken["report"]["neuron_runtime_vcpu_usage"] = {"error": "open /proc/17/stat: no such file"}
    broken["report"]["execution_stats"] = {
        "error_summary": {"generic": 0, "hardware": 2, "numerical": 1},
        "execution_summary": {"completed": 5, "timed_out": 3, "failed_to_queue": 0},
        "error": "",
    }
    assert errors(broken) == (
        "Neuron runtime of process 17: runtime has gone",
        "Neuron runtime of process 17: memory_used: no counters",
        "Neuron runtime of process 17: executions failed with hardware errors",
        "Neuron runtime of process 17: executions failed with numerical errors",
        "Neuron runtime of process 17: executions timed out",
    )


def test_device_errors_are_sentences() -> None:
    data = node() | {"neuron_hardware_info": {"error": "no driver"}}
    assert parse(json.dumps(data)).errors == ("Neuron devices: no driver",)


@pytest.mark.parametrize(
    "line", ["", "neuron-monitor: starting", "[1]", "3", '{"neuron', b"\xff\xfe", "[" * 100000]
)
def test_what_is_no_report(line: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse(line)


def at_every_place(value: Any, other: Any) -> list[Any]:
    """``value`` with ``other`` in the place of each of its parts, one at a time."""
    found = [other]
    if isinstance(value, dict):
        for key, part in value.items():
            found += [{**value, key: changed} for changed in at_every_place(part, other)]
    if isinstance(value, list):
        for i, part in enumerate(value):
            found += [[*value[:i], changed, *value[i + 1 :]] for changed in at_every_place(part, other)]
    return found


@pytest.mark.parametrize("other", [None, 7, "text", [1], {"a": "b"}, float("nan"), True, {"x": {"y": {}}}])
def test_any_misshapen_part_counts_as_not_reported(other: Any) -> None:
    whole = parse(json.dumps(BUSY)).metrics()
    places = at_every_place(BUSY, other)
    assert len(places) > 30
    for data in places:
        if isinstance(data, dict):
            values = parse(json.dumps(data)).metrics()
            assert all(value == value for value in values.values())  # no NaN
            assert values.keys() <= whole.keys()
