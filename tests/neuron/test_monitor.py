"""neuron-monitor beside a run, with programs that do what it may do: all that a run must survive."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from neuron_monitor_fixture import FOREVER, SECONDS, Install, is_running, pid_in, wait_for

from nxdt_align.neuron.monitor import NeuronMonitor


@pytest.fixture
def monitor() -> Iterator[NeuronMonitor]:
    made = NeuronMonitor()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def every_message(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("nxdt_align"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="nxdt_align")


def has_ended(pid: int) -> bool:
    """Of a process that lost its parent: where process 1 reaps none it stays a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_newest_report(install: Install, monitor: NeuronMonitor) -> None:
    install(FOREVER)
    assert monitor.newest() is None
    assert monitor.start()
    assert monitor.start(), "it runs already"
    wait_for(monitor.newest)
    newest = monitor.newest()
    assert newest is not None
    assert newest.metrics()["neuron/core_0/utilization_percent"] == 87.5
    monitor.stop()
    assert monitor.newest() is None


def test_without_the_program_nothing_happens(
    monitor: NeuronMonitor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not monitor.start()
    assert monitor.newest() is None
    monitor.stop()
    assert caplog.messages == []


def test_program_that_does_not_start(
    install: Install, monitor: NeuronMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    install("").write_text("#!/no/such/interpreter\n")
    assert not monitor.start()
    assert monitor.newest() is None
    (message,) = caplog.messages
    assert "neuron-monitor does not start" in message


def test_program_that_dies(
    install: Install, monitor: NeuronMonitor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Its values go with it, it is reaped, and one warning says so."""
    install(f"print(BUSY)\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nsys.exit(3)")
    monitor.start()
    wait_for(lambda: caplog.messages)
    assert caplog.messages == ["neuron-monitor has ended, so device values are no longer logged"]
    assert monitor.newest() is None
    assert not is_running(pid_in(tmp_path / "pid"))


def test_garbage_is_passed_over_with_one_warning(
    install: Install, monitor: NeuronMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    binary = "sys.stdout.buffer.write(b'\\xff\\x00{' * 999 + b'\\n')"
    install(f"{binary}\nprint('starting 1')\nprint('starting 2')\n{FOREVER}")
    monitor.start()
    wait_for(monitor.newest)
    assert len([m for m in caplog.messages if "no report, which is passed over" in m]) <= 2
    assert len(caplog.messages) <= 2


def test_an_endless_line_takes_little_memory(
    install: Install,
    monitor: NeuronMonitor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("nxdt_align.neuron.monitor._LONGEST_LINE", 1000)
    install("while True:\n    sys.stdout.write('x' * 4096)")
    monitor.start()
    wait_for(lambda: caplog.messages)
    assert monitor.newest() is None


def test_a_program_that_falls_silent_gives_no_stale_values(install: Install, tmp_path: Path) -> None:
    monitor = NeuronMonitor(max_age=0.3)
    quiet = tmp_path / "quiet"
    install(
        f"while not os.path.exists({str(quiet)!r}):\n    print(BUSY, flush=True)\n    time.sleep(0.02)\n"
        "time.sleep(600)"
    )
    try:
        monitor.start()
        wait_for(monitor.newest)
        quiet.touch()
        wait_for(lambda: monitor.newest() is None)
    finally:
        monitor.stop()


def test_one_warning_for_an_error_that_lasts(
    install: Install, monitor: NeuronMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    install(
        "import json\nfor i in range(20):\n"
        "    data = json.loads(BUSY)\n"
        "    data['neuron_runtime_data'][0]['error'] = f'lost device 3 at {i} s'\n"
        "    print(json.dumps(data), flush=True)\n"
        "print(BUSY, flush=True)\ntime.sleep(600)"
    )
    monitor.start()
    wait_for(lambda: (newest := monitor.newest()) and not newest.errors)
    assert caplog.messages == ["neuron-monitor reports: Neuron runtime of process 17: lost device 3 at 0 s"]


def test_stop_kills_the_whole_group_and_leaves_no_zombie(
    install: Install, monitor: NeuronMonitor, tmp_path: Path
) -> None:
    """The program ignores SIGTERM's politeness for its child, which would live on without it."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    install(
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{FOREVER}"
    )
    monitor.start()
    pids = [pid_in(tmp_path / "child"), pid_in(tmp_path / "pid")]
    wait_for(monitor.newest)
    monitor.stop()
    monitor.stop()
    assert not is_running(pids[1])
    wait_for(lambda: has_ended(pids[0]))


def test_a_program_that_ignores_the_signal_is_killed(
    install: Install, monitor: NeuronMonitor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nxdt_align.neuron.monitor._GRACE", 0.2)
    install(
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{FOREVER}"
    )
    monitor.start()
    pid = pid_in(tmp_path / "pid")
    start = time.monotonic()
    monitor.stop()
    assert not is_running(pid)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "raise SystemExit(1)"])
def test_it_ends_with_the_process_that_started_it(
    install: Install, tmp_path: Path, repo: Path, end: str
) -> None:
    """Whether that process ends well, fails, or is killed."""
    install(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{FOREVER}")
    code = (
        "import os, time\nfrom nxdt_align.neuron.monitor import NeuronMonitor\n"
        "monitor = NeuronMonitor()\nassert monitor.start()\n"
        f"while monitor.newest() is None: time.sleep(0.01)\n{end}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo / "src")}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=300)
    pid = pid_in(tmp_path / "pid")
    wait_for(lambda: has_ended(pid))
