"""neuron-monitor in a run through the command line: its values beside the loss, its end with the run's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from neuron_monitor_fixture import FOREVER, Install, is_running, pid_in
from training_fixture import Project, scalars

from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.neuron.monitor import NeuronMonitor


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    return Project.create(root)


@pytest.fixture
def program(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that reports; a run's first step waits for its first report. Returns where its pid is."""
    pid = tmp_path / "pid"
    install(f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n{FOREVER}")
    start = NeuronMonitor.start

    def start_and_wait(monitor: NeuronMonitor) -> bool:
        started = start(monitor)
        while monitor.newest() is None:
            os.sched_yield()
        return started

    monkeypatch.setattr(NeuronMonitor, "start", start_and_wait)
    return pid


def test_values_are_beside_the_loss(project: Project, program: Path) -> None:
    assert project.train("trainer.max_steps=4", "trainer.log_every_n_steps=2", "data.val_dir=null") == 0
    curves = scalars(project.only_run())
    assert curves["neuron/core_0/utilization_percent"] == [(2, 87.5), (4, 87.5)]
    assert [step for step, _ in curves["reduced_train_loss"]] == [2, 4]
    assert curves["neuron/host_memory_gib"] == [(2, 3.0), (4, 3.0)]
    assert not is_running(pid_in(program))


def test_it_ends_with_a_run_that_fails(
    project: Project, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(NativeEngine, "step", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        project.train("trainer.max_steps=4")
    assert not is_running(pid_in(program))


@pytest.mark.parametrize("variables", [{"COMPILE": "1"}, {"LOCAL_RANK": "1"}])
def test_dry_run_steps_and_other_processes_of_a_node_start_none(
    project: Project, program: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert project.train("trainer.max_steps=1", "data.val_dir=null", "data.global_batch_size=2") == 0
    assert not program.exists()
