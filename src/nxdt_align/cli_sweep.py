"""The verb sweep: combinations of values as processes of train.sh, one after another."""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nxdt_align.config.check import ConfigError, with_check
from nxdt_align.config.load import find_config, read_config, to_yaml
from nxdt_align.config.schema import Config
from nxdt_align.config.sweep import Combination, combinations, first_values, key_by_name
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.stop_signals import SIGNALS, status

if TYPE_CHECKING:
    from nxdt_align.run.sweep import SweepRun

_FOLDER = "exp_manager.explicit_log_dir"

log = logging.getLogger(__name__)


def add_sweep_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the sweep's folder, one for each run in it (default: sweeps/NAME in exp_manager.exp_dir)",
    )
    verb.add_argument("--list", action="store_true", help="print the runs, and start none")


def sweep(
    arguments: argparse.Namespace,
    variables: Mapping[str, str],
    more: Sequence[str],
    show: Callable[[str], None],
) -> int:
    """Args:
        variables: the environment.
        more: overrides that the environment gives.

    Returns 0, 1 where a run has failed, 128 + the number of a signal that ended the sweep.
    """
    name, path = arguments.config_name, arguments.config_path
    given = [*arguments.overrides, *more]
    config = read_config(name, first_values(given), path)[0]
    objective = config.model_alignment_strategy.objective
    found = combinations(given, lambda key: key_by_name(key, objective))
    if variables.get("COMPILE") == "1":
        raise UserError("COMPILE=1 is for one run at a time: nxdt-align launch compiles ahead of a sweep")
    if variables.get("REFERENCE"):
        raise UserError(
            "REFERENCE: train.sh would compute reference values instead of each run; unset it, or give it to "
            "nxdt-align launch ahead of a sweep"
        )
    if config.exp_manager.explicit_log_dir is not None:
        raise UserError(f"{_FOLDER}: is a folder for one run; --out names that of a sweep")
    out = (arguments.out or _default_folder(config)).absolute()
    runs = _distinct([(each, _checked(each, out, name, path)) for each in found])
    if arguments.list:
        show("\n".join(each.label for each, _ in runs))
        return 0
    from nxdt_align.run.sweep import Sweep, SweepRun

    launcher = _Launcher(find_config(name, path), out, variables)
    made = Sweep(out, launcher.start)
    with launcher.hands_signals_on():
        ended = made.run([SweepRun(each.label, each.overrides, settings) for each, settings in runs])
    if not ended:
        show("sweep: stopped; the same command goes on")
        return status(launcher.received[0])
    reported = made.report()
    lines = [f"{label}: failed with status {made.statuses[label]}" for label in made.failed]
    if reported is not None:
        page, verdicts = reported
        lines = [*(f"{label}: {verdict}" for label, verdict in verdicts), *lines, f"report: {page}"]
    show("\n".join(lines))
    return 1 if made.failed else 0


def _default_folder(config: Config) -> Path:
    return (
        Path(config.exp_manager.exp_dir or "nemo_experiments")
        / "sweeps"
        / (config.exp_manager.name or config.name)
    )


def _checked(each: Combination, out: Path, name: str, path: Path | None) -> str:
    """The combination's resolved YAML. Raises ConfigError with all faults, as train does."""
    config, faults = read_config(name, each.overrides, path)
    faults = with_check(config, faults)
    if faults:
        raise ConfigError(faults, f"{config.source} with {each.label}")
    return to_yaml(config)


def _distinct(runs: Sequence[tuple[Combination, str]]) -> list[tuple[Combination, str]]:
    """Those of different settings, each with its settings: 0.1 and 0.10 are one value."""
    found: dict[str, Combination] = {}
    for each, settings in runs:
        first = found.setdefault(settings, each)
        if first is not each:
            log.log(NOTICE, "sweep: %s is what %s is, and is run once", " ".join(each.overrides), first.label)
    return [(each, settings) for settings, each in found.items()]


@dataclass
class _Launcher:
    """Starts train.sh for one run at a time, in a session of its own: a signal reaches it from here alone."""

    config: Path
    out: Path
    variables: Mapping[str, str]
    received: list[int] = field(default_factory=list)
    """Signals, in their order."""
    _early: list[int] = field(default_factory=list)
    """Those that came while a run was being started, before it could be handed any."""
    _child: subprocess.Popen[bytes] | None = None

    def start(self, run: SweepRun) -> int | None:
        if self.received:  # between two runs
            return None
        script = Path(__file__).resolve().with_name("train.sh")
        own = {
            "CONF_FILE": str(self.config),
            "LOG_PATH": str(self.out / "logs" / run.label),
            "NXDT_ALIGN_PYTHON": self.variables.get("NXDT_ALIGN_PYTHON") or sys.executable,
        }
        overrides = [
            *run.overrides,
            f"{_FOLDER}={self.out / run.label}",
            *run.names,
            # What was stopped goes on from its checkpoint.
            *("exp_manager.resume_if_exists=True", "exp_manager.resume_ignore_no_checkpoint=True"),
        ]
        environment = {key: text for key, text in self.variables.items() if key != "TRAIN_ITERS"}
        command = ["bash", str(script), *overrides]
        self._child = subprocess.Popen(command, env={**environment, **own}, start_new_session=True)
        while self._early:
            self._child.send_signal(self._early.pop(0))
        code = self._child.wait()
        self._child = None
        if self.received:
            return None
        return code if code >= 0 else status(-code)

    @contextmanager
    def hands_signals_on(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hand_on) for number in (*SIGNALS, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)  # nothing where it has just ended
