"""The process that a verb runs in: the environment variables that it reads and sets, and what it prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING

from nxdt_align import TORCH
from nxdt_align.config.check import CheckedConfig
from nxdt_align.config.engines import Engine, on_torch_neuron, with_torch_neuron
from nxdt_align.config.neuron_packages import neuron_stack, torch_neuron_fault
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.messages import show_on_terminal
from nxdt_align.neuron.environment import (
    COMPILE_ONLY,
    DOWNCASTS,
    INSPECT,
    INSPECT_DIR,
    LOGICAL_CORES,
    missing_from,
    missing_variables,
    neuron_environment,
    replaced,
    torch_neuron_environment,
)
from nxdt_align.redaction import redact
from nxdt_align.stop_signals import StopSignals

if TYPE_CHECKING:
    from nxdt_align.run import RunEnv

LAUNCHED = "NXDT_ALIGN_LAUNCHED"
UNLOADED = "Failed to load the backend extension"
"""How torch's RuntimeError begins where ``import torch`` cannot load a device's package."""
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_HANDS_SIGNALS_ON = ("NXDT_ALIGN_COMMAND", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Environment:
    """Environment variables that the launcher and train.sh set."""

    rank: int
    world_size: int
    local_rank: int
    compile_only: bool
    train_iters: int | None
    debug: bool
    compiles_without_device: bool = False
    """Whether TorchNeuron compiles where there is no device of its own."""
    told_cores: int | None = None
    """Physical NeuronCores of a device, where the runtime has been told; it heeds that, not trainer.lnc."""
    command: str | None = None
    """The user's, where another program has started this one for it."""
    is_launched: bool = False
    """Whether ``launch_workers`` has started this process, and ends it."""
    shares_signals: bool = False
    """Whether a signal may come more than once: from the system, and from what has started this process."""

    @classmethod
    def of_this_process(cls) -> Environment:
        return cls.read(os.environ)

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        iters = variables.get("TRAIN_ITERS")
        return cls(
            rank=_number(variables, "RANK", 0),
            world_size=_number(variables, "WORLD_SIZE", 1, least=1),
            local_rank=_number(variables, "LOCAL_RANK", 0),
            compile_only=variables.get("COMPILE") == "1",
            train_iters=_number(variables, "TRAIN_ITERS", 1, least=1) if iters else None,
            debug=variables.get("NXDT_ALIGN_DEBUG") == "1",
            compiles_without_device=variables.get(COMPILE_ONLY) == "1",
            told_cores={"1": 1, "2": 2}.get(variables.get(LOGICAL_CORES, "")),
            command=variables.get("NXDT_ALIGN_COMMAND"),
            is_launched=LAUNCHED in variables,
            shares_signals=any(name in variables for name in _HANDS_SIGNALS_ON),
        )

    def with_told_cores(self, checked: CheckedConfig) -> CheckedConfig:
        """With ``trainer.lnc`` as the runtime of TorchNeuron's device has been told: kernels and prices of
        rows follow from it."""
        config = checked.config
        if self.told_cores is None or checked.engine != "native" or not on_torch_neuron(config):
            return checked
        return replace(checked, config=_with_cores(config, self.told_cores))

    def as_run_here(self, config: Config) -> Config:
        """For a plan: with what a run takes here, where TorchNeuron is installed and ``config`` is for it."""
        found = with_torch_neuron(config)
        return found if found is config or self.told_cores is None else _with_cores(found, self.told_cores)

    def stop_signals(self) -> StopSignals:
        repeats = float("inf") if self.is_launched else 1.0 if self.shares_signals else 0.2
        return StopSignals(speaks=self.rank == 0, repeats=repeats)


def require_torch(variables: Mapping[str, str], *, loads: bool = True) -> None:
    """Raise UserError if torch is missing or out of range, or if it would import a TorchNeuron that does not
    fit. Reads metadata: the import takes seconds, and would end in a traceback.

    Args:
        loads: whether the verb can do nothing without that import.
    """
    oldest, newest = (".".join(map(str, version)) for version in TORCH)
    wanted = f"nxdt-align runs on torch {oldest} to {newest}"
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{wanted}, but {sys.executable} has none; pip install torch=={newest}.0") from error
    if not TORCH[0] <= tuple(int(part) for part in found.split(".")[:2]) <= TORCH[1]:
        raise UserError(f"{wanted}, but {sys.executable} has {found}; pip install torch=={newest}.0")
    if not loads or variables.get(_AUTOLOAD) == "0" or neuron_stack() != "native":
        return
    fault = torch_neuron_fault(found)
    if fault is not None:
        without = f"{_AUTOLOAD}=0 with trainer.accelerator=cpu runs without it"
        raise UserError(f"torch would not load TorchNeuron: {fault}; {without}")


def _with_cores(config: Config, lnc: int) -> Config:
    return replace(config, trainer=replace(config.trainer, lnc=lnc))


def _number(variables: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = variables.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"the environment variable {name} must be a whole number from {least}, but is {text!r}"
        )
    return int(text)


def enter_run(
    checked: CheckedConfig,
    environment: Environment,
    signals: StopSignals,
    *,
    command: str | None = None,
    dry_run: bool = False,
) -> RunEnv:
    """Prepare this process for training: set up its log, and the Neuron stack's variables, which torch_xla
    and the Neuron runtime read when they are imported.

    Args:
        signals: handles signals, where it is installed.
        command: the user's, to start the run again.
        dry_run: a few steps that write nothing, as with ``COMPILE=1``.
    """
    show_on_terminal(environment.rank)
    variables = lacked_variables(checked.config, checked.engine)
    for name in replaced(os.environ, variables) if environment.rank == 0 else ():
        note(
            f"{name} is set to 0 instead of {os.environ[name]}: torch_xla would store all float32 tensors as "
            "bf16, including log-probabilities and master weights; precision.type selects what is bf16"
        )
    profiler = checked.config.trainer.profiler
    is_profiled = profiler is not None and (environment.rank == 0 or profiler.all_ranks)
    if not is_profiled or dry_run or environment.compile_only:
        variables = {name: value for name, value in variables.items() if name not in (INSPECT, INSPECT_DIR)}
    if INSPECT_DIR in variables and environment.rank == 0:
        folder = variables[INSPECT_DIR]
        note(f"trainer.profiler: Neuron's runtime, where there is one, writes its own profile to {folder}")
    os.environ.update(variables)
    from nxdt_align.run import RunEnv

    return RunEnv(
        rank=environment.rank,
        world_size=environment.world_size,
        local_rank=environment.local_rank,
        compile_only=environment.compile_only or dry_run,
        compiles_without_device=environment.compiles_without_device,
        signals=signals if signals.is_installed else None,
        command=command,
    )


def lacked_variables(config: Config, engine: Engine) -> dict[str, str]:
    """The variables that a run of ``config`` must set in this process.

    Raises ConfigError for a compile cache that cannot be written to.
    """
    if engine == "nxd":
        return missing_variables(config, os.environ)
    return missing_from(os.environ, wanted_variables(config, engine))


def wanted_variables(config: Config, engine: Engine) -> dict[str, str]:
    """On torch_xla's device engine native must not inherit torch_xla's downcasts either."""
    if engine == "nxd":
        return neuron_environment(config)
    if on_torch_neuron(config):
        return torch_neuron_environment(config)
    is_xla = config.trainer.accelerator == "xla"
    return {name: "0" for name in DOWNCASTS if is_xla and name in os.environ}


def show(text: str) -> None:
    """Print a long text to a reader that may close the pipe early, as ``head`` does."""
    with reader_may_stop():
        print(text)


@contextmanager
def reader_may_stop() -> Iterator[None]:
    """Write and flush output; where the reader of the pipe is gone, the rest is dropped."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again at exit, which would raise a second BrokenPipeError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Tell the user something that is no error."""
    print(redact(f"notice: {text}"), file=sys.stderr)
