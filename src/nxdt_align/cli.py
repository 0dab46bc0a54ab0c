"""The command line, ``nxdt-align``. Reads the environment; imports nothing heavy before training."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from nxdt_align import TORCH, __version__, cli_evaluation, cli_reference
from nxdt_align.cli_conversion import add_conversion_verbs, conversion_options
from nxdt_align.cli_doctor import add_neuron_options, neuron_doctor
from nxdt_align.cli_reference import add_reference_verb
from nxdt_align.cli_sweep import add_sweep_options, sweep
from nxdt_align.config.check import (
    CheckedConfig,
    ConfigError,
    Fault,
    check_notices,
    load_checked,
    with_check,
)
from nxdt_align.config.engines import Engine, on_torch_neuron, resolve_engine
from nxdt_align.config.keys import all_keys, describe_keys, nearest_key
from nxdt_align.config.load import copy_preset, presets, read_config, to_yaml
from nxdt_align.config.loggers import PACKAGES
from nxdt_align.config.neuron_packages import neuron_available
from nxdt_align.config.schema import Config
from nxdt_align.config.start import hub_models
from nxdt_align.errors import SharedError, UserError
from nxdt_align.files import explain
from nxdt_align.messages import show_on_terminal
from nxdt_align.neuron.environment import (
    COMPILE_ONLY,
    DOWNCASTS,
    describe,
    missing_from,
    missing_variables,
    neuron_environment,
    replaced,
    torch_neuron_environment,
)
from nxdt_align.redaction import redact
from nxdt_align.stop_signals import SIGNALS, Stopped, StopSignals

if TYPE_CHECKING:
    from nxdt_align.run import RunEnv

_DESCRIPTION = """\
Preference alignment of language models from NxD Training's YAML.

  nxdt-align config --config-name NAME [key=value ...]   print the resolved configuration
  nxdt-align plan --config-name NAME [key=value ...]     print rows, graphs and device memory
  nxdt-align doctor --config-name NAME [key=value ...]   what is wrong with the data, and how to mend it
  nxdt-align graphs --config-name NAME [key=value ...]   what Trainium would compile, without a Trainium
  nxdt-align train --config-name NAME [key=value ...]    train, in this process
  nxdt-align launch [key=value ...]                      train.sh: as many processes as CONF_FILE asks for
  nxdt-align reference precompute --config-name NAME     reference values ahead; also inspect, merge, verify
  nxdt-align sweep --config-name NAME key=a,b ...        one run per combination of values, and a report
  nxdt-align presets [cp NAME FILE]                      list the configs, or copy one
  nxdt-align convert SOURCE DESTINATION [--tp N ...]     Hugging Face <-> NxD Training, checked
  nxdt-align export CHECKPOINT DESTINATION               any checkpoint as a Hugging Face folder
  nxdt-align inspect PATH                                describe a checkpoint
  nxdt-align generate MODEL --prompts FILE               let a run, checkpoint or export answer prompts
  nxdt-align chat MODEL                                  talk to it
  nxdt-align compare BEFORE AFTER --data FILE            two models on the same records, side by side
  nxdt-align report RUN [RUN ...]                        what runs did: curves, settings, a verdict in words
  nxdt-align doctor --neuron [--config-name NAME ...]    an archive for whoever is to find a fault on a node
  nxdt-align --help-keys [SECTION]                       every key: type, default, meaning
"""
_USERS_OS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
_INTERRUPTED = 130
LAUNCHED = "NXDT_ALIGN_LAUNCHED"
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
            command=variables.get("NXDT_ALIGN_COMMAND"),
            is_launched=LAUNCHED in variables,
            shares_signals=any(name in variables for name in _HANDS_SIGNALS_ON),
        )

    def stop_signals(self) -> StopSignals:
        repeats = float("inf") if self.is_launched else 1.0 if self.shares_signals else 0.2
        return StopSignals(speaks=self.rank == 0, repeats=repeats)


def _number(variables: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = variables.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"the environment variable {name} must be a whole number from {least}, but is {text!r}"
        )
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 for a user error, 130 when interrupted, 128 + the number of
    a signal that ended training."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("NXDT_ALIGN_DEBUG") == "1"
    try:
        if arguments.verb in _NEED_TORCH:
            _require_torch()
        return _VERBS[arguments.verb](arguments, Environment.of_this_process())
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            stopped.tell()  # where the run itself has not, as it had not begun
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except UserError as error:
        if debug:
            raise
        _complain(error, str(error))
    except OSError as error:
        if debug or error.errno not in _USERS_OS_ERRORS:
            raise
        about = f"{error.filename}: " if error.filename else ""
        _complain(error, about + explain(error))
    return 1


def _require_torch() -> None:
    """Raise UserError if torch is missing or out of range. Reads its metadata: the import takes seconds."""
    oldest, newest = (".".join(map(str, version)) for version in TORCH)
    wanted = f"nxdt-align runs on torch {oldest} to {newest}"
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{wanted}, but {sys.executable} has none; pip install torch=={newest}.0") from error
    if not TORCH[0] <= tuple(int(part) for part in found.split(".")[:2]) <= TORCH[1]:
        raise UserError(f"{wanted}, but {sys.executable} has {found}; pip install torch=={newest}.0")


def _complain(error: Exception, message: str) -> None:
    """Print the error. Every process finds the same fault in a configuration, or is told of a shared one, so
    only the first of each node reports it; another error may occur on one rank only."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if isinstance(error, ConfigError | SharedError) and local_rank != "0":
        return
    place = f" (rank {rank})" if rank != "0" else ""
    print(redact(f"error{place}: {message}"), file=sys.stderr)


# Arguments


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.command = shlex.join(["nxdt-align", *argv])
    flags = [text for text in rest if text.startswith("-")]
    if flags or (rest and not hasattr(arguments, "overrides")):
        # parse_known_args also returns unknown flags, which must not pass as overrides.
        parser.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    if rest:
        # Overrides after an option, which argparse does not add to those before it.
        arguments.overrides = [*arguments.overrides, *rest]
    if arguments.help_keys is not None:
        arguments.verb = "help-keys"
    if arguments.verb is None:
        parser.print_help()
        parser.exit(2)
    may_lack_config = getattr(arguments, "neuron", False) or getattr(arguments, "action", None) == "inspect"
    needs_config = arguments.verb != "help-keys" and not may_lack_config
    if needs_config and hasattr(arguments, "config_name") and arguments.config_name is None:
        verb = " ".join(filter(None, (arguments.verb, getattr(arguments, "action", None))))
        parser.error(f"{verb} needs --config-name NAME")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "nxdt-align",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nxdt-align {__version__}")
    _add_help_keys(parser, default=None)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    config = _add_verb(verbs, "config", "check a configuration and print it as YAML, defaults included")
    config.add_argument("--no-check", action="store_true", help="print it without checking its values")
    _add_help_keys(config, default=argparse.SUPPRESS)
    plan = _add_verb(
        verbs, "plan", "tokenize the data and print rows, graphs and device memory, without a model"
    )
    doctor = _add_verb(
        verbs,
        "doctor",
        "examine the data before a run: bad records, duplicates, leakage, length bias, truncation, template; "
        "status 1 where a fault is found",
    )
    doctor.add_argument("--show", type=int, default=0, metavar="N", help="print N records as tokens")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    add_neuron_options(doctor)
    graphs = _add_verb(
        verbs,
        "graphs",
        "record every graph of a rank of the run, without running it, and say what is in it; needs no Neuron "
        "device, weights or other rank, but for engine nxd torch_xla and neuronx_distributed",
    )
    graphs.add_argument(
        "--ranks",
        type=_numbers,
        default=[0],
        metavar="R,...",
        help="ranks to record, each in a process of its own, and to compare (default: 0)",
    )
    graphs.add_argument(
        "--device",
        choices=("trn1", "trn2"),
        help="whose times are estimated (default: trn1 on engine nxd, trn2 on native)",
    )
    graphs.add_argument("--json", action="store_true", help="print JSON")
    for verb in (plan, graphs):
        verb.add_argument(
            "--lengths",
            type=_numbers,
            metavar="P,N,...",
            help="tokens of a prompt and of each of its responses, which stand for the data",
        )
    for verb in (plan, graphs, doctor):
        verb.add_argument(
            "--import-own-parts",
            action="store_true",
            help="import the user's own parts that the YAML names by dotted path, as train does",
        )
    train = _add_verb(verbs, "train", "train in this process; train.sh starts all processes of the run")
    train.add_argument(
        "--dry-run-steps", action="store_true", help="a few steps that write nothing, as with COMPILE=1"
    )
    train.add_argument(
        "--print-env",
        action="store_true",
        help="print the environment variables of the Neuron stack as this run would set them, and stop",
    )
    launch = verbs.add_parser(
        "launch",
        help="train.sh of this package: CONF_FILE, COMPILE and TRAIN_ITERS are environment variables",
        allow_abbrev=False,
    )
    launch.add_argument("--path", action="store_true", help="print the path of train.sh and stop")
    launch.add_argument("--print-env", action="store_true", help="as train.sh --print-env")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the YAML's values")
    add_sweep_options(
        _add_verb(
            verbs,
            "sweep",
            "train once for each combination of the values that keys have, key=a,b, in a folder each, and "
            "write the report of all; what is finished is not run again",
        )
    )
    listing = verbs.add_parser("presets", help="list the configs, one line each, or copy one")
    listing.add_argument(
        "copy",
        nargs="*",
        metavar="cp NAME FILE",
        help="copy a config, comments included, to a new file, to be changed",
    )
    listing.add_argument(
        "--config-path", "-cp", type=Path, metavar="DIR", help="folder of configs (default: conf)"
    )
    _add_verb(verbs, "processes", "check a configuration and print the processes per node needs")
    add_conversion_verbs(verbs)
    add_reference_verb(verbs, _add_config)
    cli_evaluation.add_evaluation_verbs(verbs)
    ahead = verbs.add_parser(
        "precompile", help="run neuron_parallel_compile and fail where it did not compile every graph"
    )
    ahead.add_argument("of_compiler", nargs=argparse.REMAINDER, metavar="COMMAND")
    workers = verbs.add_parser(
        "workers", help="torchrun, whose processes end by a signal as one process does"
    )
    workers.add_argument("of_torchrun", nargs=argparse.REMAINDER, metavar="TORCHRUN'S ARGUMENTS")
    return parser


def _numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be whole numbers between commas, but is {text!r}")
    return [int(number) for number in numbers]


def _add_help_keys(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--help-keys",
        nargs="?",
        const="",
        default=default,
        metavar="SECTION",
        help="print every key, or those of a section: type, default and meaning",
    )


def _add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    _add_config(verb)
    return verb


def _add_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--config-name", "-cn", metavar="NAME", help="name of a config, with or without .yaml, or a path"
    )
    verb.add_argument(
        "--config-path", "-cp", type=Path, metavar="DIR", help="folder of configs (default: conf)"
    )
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the YAML's values")


def _overrides(arguments: argparse.Namespace, environment: Environment) -> list[str]:
    steps = environment.train_iters
    return [*arguments.overrides, *([] if steps is None else [f"trainer.max_steps={steps}"])]


# Verbs

_WEIGHTS = ("exp_manager.resume_from_checkpoint", "model_alignment_strategy.reference_model")
"""Keys that name folders of weights; the first also provides config.json if model.model_config is unset."""
_READ_FOR_DATA = ("data.train_dir", "data.val_dir", "data.tokenizer.type")


def _config(arguments: argparse.Namespace, environment: Environment) -> int:
    """Prints what is right but for this machine, as it may be meant for another, and then stops as train
    would."""
    overrides = _overrides(arguments, environment)
    config, faults = read_config(arguments.config_name, overrides, arguments.config_path)
    engine = resolve_engine(config, neuron_available())
    if not arguments.no_check:
        faults = with_check(config, faults, engine=engine)
    if all(fault.is_missing_path for fault in faults):
        _show(to_yaml(config).removesuffix("\n"))
    if faults:
        raise ConfigError(faults, config.source)
    if arguments.no_check:
        return 0
    _require_torch()
    show_on_terminal(rank=0)
    _missing_variables(config, engine)
    from nxdt_align.run import RunEnv
    from nxdt_align.run.mode import RunMode
    from nxdt_align.run.ready import not_checked, require_ready
    from nxdt_align.run.settle import settle

    settled = settle(config, engine, weights=False)
    for note in settled.notes:
        _note(note)
    env, fetches = RunEnv(world_size=config.world_size), not hub_models(config)
    require_ready(settled.config, engine, env, RunMode(), fetches=fetches)
    _note(not_checked(config))
    return 0


def _train(arguments: argparse.Namespace, environment: Environment) -> int:
    if arguments.print_env:
        return _print_env(arguments, environment)
    with environment.stop_signals() as signals:
        checked = _checked(arguments, environment, environment.world_size, notify=environment.rank == 0)
        if not checked.config.exp_manager.create_preemption_callback:
            signals.uninstall()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
        if environment.rank == 0:
            _note_node(checked, environment, writes=not (arguments.dry_run_steps or environment.compile_only))
        command = environment.command or arguments.command
        env = enter_run(checked, environment, signals, command=command, dry_run=arguments.dry_run_steps)
        from nxdt_align import run

        run.train(checked, env)
    return 0


def _note_node(checked: CheckedConfig, environment: Environment, *, writes: bool) -> None:
    """Say what this node's system would let go wrong later."""
    from nxdt_align.neuron import node

    settings, said = checked.config.exp_manager, []
    if writes:
        folder = Path(settings.explicit_log_dir or settings.exp_dir or "nemo_experiments").absolute()
        said.append(node.local_disk_notice(folder, node.read_text(node.MOUNTS), os.environ))
    if checked.engine == "nxd" and neuron_available():
        ports = node.needed_ports(os.environ, checked.config.trainer.num_nodes, environment.world_size)
        texts = (node.read_text(path) for path in (node.RESERVED_PORTS, node.LOCAL_PORTS))
        said.append(node.ports_notice(ports, *texts))
    for notice in filter(None, said):
        _note(notice)


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
    variables = _missing_variables(checked.config, checked.engine)
    for name in replaced(os.environ, variables) if environment.rank == 0 else ():
        _note(
            f"{name} is set to 0 instead of {os.environ[name]}: torch_xla would store all float32 tensors as "
            "bf16, including log-probabilities and master weights; precision.type selects what is bf16"
        )
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


def _read_to_plan(
    arguments: argparse.Namespace, environment: Environment
) -> tuple[Config, list[Fault], set[str]]:
    """The configuration, what this machine lacks for it, and the keys of what a plan does not read."""
    config, missing = _read(arguments, environment, checked=True)
    weights = _WEIGHTS if config.model.model_config is not None else _WEIGHTS[1:]
    return config, missing, {*weights, *PACKAGES, "exp_manager.files_to_copy"}


def _plan(arguments: argparse.Namespace, environment: Environment) -> int:
    """Plans for all ranks in one process; needs neither the weights nor the Neuron packages."""
    config, missing, unread = _read_to_plan(arguments, environment)
    if arguments.lengths is not None:
        unread |= set(_READ_FOR_DATA)
    needed = [fault for fault in missing if fault.path not in unread]
    if needed:
        raise ConfigError(needed, config.source)
    for notice in (*check_notices(config), *(f"train would stop: {fault}" for fault in missing)):
        _note(notice)
    from nxdt_align.run.plan import plan_report

    engine = resolve_engine(config, neuron_available())
    own_parts = arguments.import_own_parts
    _show(plan_report(config, engine, lengths=arguments.lengths, import_own_parts=own_parts))
    return 0


def _neuron_doctor(arguments: argparse.Namespace, environment: Environment) -> int:
    def read() -> Config:
        return _read_to_plan(arguments, environment)[0]

    def plan(config: Config) -> str:
        from nxdt_align.run.plan import plan_report

        return plan_report(config, resolve_engine(config, neuron_available=True))

    for line in neuron_doctor(arguments, os.environ, read, plan):
        _show(line)
    return 0


def _doctor(arguments: argparse.Namespace, environment: Environment) -> int:
    if arguments.neuron:
        return _neuron_doctor(arguments, environment)
    config, missing, unread = _read_to_plan(arguments, environment)
    needed = [fault for fault in missing if fault.path not in unread]
    if needed:
        raise ConfigError(needed, config.source)
    show_on_terminal(rank=0)
    from nxdt_align.run.doctor import diagnose

    engine = resolve_engine(config, neuron_available())
    found = diagnose(config, engine, import_own_parts=arguments.import_own_parts)
    if arguments.json:
        _show(found.to_json())
        return 0 if found.is_fit else 1
    if arguments.show > 0:
        _show(found.show(arguments.show, colours=sys.stdout.isatty()))
    _show(found.to_text())
    return 0 if found.is_fit else 1


def _graphs(arguments: argparse.Namespace, environment: Environment) -> int:
    config, missing, unread = _read_to_plan(arguments, environment)
    if arguments.lengths is not None:
        unread |= set(_READ_FOR_DATA)
    needed = [fault for fault in missing if fault.path not in unread]
    if any(fault.path in _READ_FOR_DATA for fault in needed):
        _note("--lengths P,N,N takes examples of so many tokens for the data, which is then not read")
    if needed:
        raise ConfigError(needed, config.source)
    show_on_terminal(rank=0)
    from nxdt_align.run import graphs

    own = "trn2" if config.distributed_strategy.engine == "native" else "trn1"
    ranks, lengths, device = arguments.ranks, arguments.lengths, graphs.DEVICES[arguments.device or own]
    if not arguments.import_own_parts:
        graphs.refuse_own_parts(config, with_data=lengths is None)
    if len(ranks) == 1:
        # NxD logs to the standard output, which is the report's.
        with redirect_stdout(sys.stderr):
            found, steps = graphs.reports(config, ranks[0], lengths, device)
        _show(
            json.dumps([graphs.to_dict(ranks[0], found, steps, device)])
            if arguments.json
            else graphs.to_text(ranks[0], found, steps, device)
        )
        return 0
    overrides = _overrides(arguments, environment)
    options = ["--config-name", arguments.config_name, "--json", "--device", device.name]
    options += [] if arguments.config_path is None else ["--config-path", str(arguments.config_path)]
    options += [] if lengths is None else ["--lengths", ",".join(map(str, lengths))]
    options += ["--import-own-parts"] if arguments.import_own_parts else []
    tables = graphs.of_ranks([*options, *overrides], ranks)
    _show(json.dumps(tables) if arguments.json else graphs.compare(tables))
    return 0


def _processes(arguments: argparse.Namespace, environment: Environment) -> int:
    checked = _checked(arguments, environment, None, notify=False)
    _missing_variables(checked.config, checked.engine)
    _show(str(checked.config.trainer.devices))
    return 0


def _missing_variables(config: Config, engine: Engine) -> dict[str, str]:
    if engine == "nxd":
        return missing_variables(config, os.environ)
    return missing_from(os.environ, _wanted_variables(config, engine))


def _wanted_variables(config: Config, engine: Engine) -> dict[str, str]:
    """On torch_xla's device engine native must not inherit torch_xla's downcasts either."""
    if engine == "nxd":
        return neuron_environment(config)
    if on_torch_neuron(config):
        return torch_neuron_environment(config)
    is_xla = config.trainer.accelerator == "xla"
    return {name: "0" for name in DOWNCASTS if is_xla and name in os.environ}


def _print_env(arguments: argparse.Namespace, environment: Environment) -> int:
    """Works without the Neuron packages and the data: shows what the target machine would set."""
    config, _ = _read(arguments, environment, checked=True)
    # As on the machine that the YAML is for.
    is_for_neuron = config.trainer.accelerator in ("auto", "neuron")
    engine = resolve_engine(config, is_for_neuron or neuron_available())
    if engine != resolve_engine(config, neuron_available()):
        _note("this machine has no NeuronCores; these are the variables of one that has")
    wanted = _wanted_variables(config, engine)
    if engine != "nxd" and not wanted:
        _note(
            f"engine {engine} sets none of them; distributed_strategy.engine=nxd shows what is set on Neuron"
        )
    _show("\n".join(describe(os.environ, wanted)))
    return 0


def _launch(arguments: argparse.Namespace, environment: Environment) -> int:
    """Replace this process by train.sh, with this interpreter unless NXDT_ALIGN_PYTHON names another."""
    script = str(Path(__file__).resolve().with_name("train.sh"))
    if arguments.path:
        _show(script)
        return 0
    os.environ.setdefault("NXDT_ALIGN_PYTHON", sys.executable)
    options = ["--print-env"] if arguments.print_env else []
    # exec, so that signals reach train.sh itself and its exit status is this command's.
    os.execvp("bash", ["bash", script, *options, *arguments.overrides])


def _sweep(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return sweep(arguments, os.environ, _overrides(arguments, environment)[len(arguments.overrides) :], _show)


def _precompile(arguments: argparse.Namespace, environment: Environment) -> int:
    from nxdt_align.neuron.compile import precompile

    precompile(arguments.of_compiler)
    return 0


def _workers(arguments: argparse.Namespace, environment: Environment) -> int:
    os.environ[LAUNCHED] = "1"
    from nxdt_align.run.workers import launch_workers

    return launch_workers(arguments.of_torchrun[1:], debug=environment.debug)


def _presets(arguments: argparse.Namespace, environment: Environment) -> int:
    if arguments.copy:
        if len(arguments.copy) != 3 or arguments.copy[0] != "cp":
            raise UserError(f"presets {shlex.join(arguments.copy)}: must be presets cp NAME FILE")
        file = copy_preset(arguments.copy[1], Path(arguments.copy[2]), arguments.config_path)
        _show(f"{file}: use it with --config-name {shlex.quote(str(file))}")
        return 0
    found = presets(arguments.config_path)
    width = max(len(name) for name, _ in found)
    _show("\n".join(f"{name:<{width}}  {purpose}".rstrip() for name, purpose in found))
    return 0


def _help_keys(arguments: argparse.Namespace, environment: Environment) -> int:
    section = arguments.help_keys
    if section and section not in all_keys():
        near = nearest_key(section)
        raise UserError(f"no key {section!r}{f'; did you mean {near}?' if near else ''}")
    _show(describe_keys(section))
    return 0


def _convert(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0, level=logging.INFO)
    values = conversion_options(arguments)
    from nxdt_align.run import conversion

    act = conversion.export if arguments.verb == "export" else conversion.convert
    act(values.pop("source"), values.pop("destination"), **values)
    return 0


def _inspect(arguments: argparse.Namespace, environment: Environment) -> int:
    from nxdt_align.run import conversion

    found = conversion.describe(arguments.path, arguments.config)
    _show(json.dumps(found, indent=2) if arguments.json else conversion.to_text(found))
    return 0


def _reference(arguments: argparse.Namespace, environment: Environment) -> int:
    if arguments.action == "merge":
        _show(cli_reference.merge(arguments))
        return 0
    if arguments.action == "inspect":
        show_on_terminal(rank=0)

        def read() -> tuple[Config, Engine]:
            checked = _checked(arguments, environment, None, notify=True)
            return checked.config, checked.engine

        _show(cli_reference.inspect(arguments, read))
        return 0
    speaks = environment.rank == 0
    with environment.stop_signals() as signals:
        checked = _checked(arguments, environment, environment.world_size, notify=speaks)
        command = environment.command or arguments.command
        env = enter_run(checked, environment, signals, command=command)
        if arguments.action == "verify":
            text, agree = cli_reference.verify(arguments, checked, env)
        else:
            text, agree = cli_reference.precompute(arguments, checked, env), True
    if speaks:
        _show(text)
    return 0 if agree else 1


def _generate(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return cli_evaluation.generate(arguments, _show)


def _compare(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return cli_evaluation.compare(arguments, _show)


def _report(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return cli_evaluation.report(arguments, _show)


def _chat(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    with reader_may_stop():
        return cli_evaluation.chat(arguments)


def _read(
    arguments: argparse.Namespace, environment: Environment, *, checked: bool
) -> tuple[Config, list[Fault]]:
    """The configuration, for any engine, and a fault for each of its files that is missing on this machine.

    Raises ConfigError for any other fault.
    """
    config, faults = read_config(
        arguments.config_name, _overrides(arguments, environment), arguments.config_path
    )
    if checked:
        faults = with_check(config, faults)
    missing = [fault for fault in faults if fault.is_missing_path]
    if len(faults) > len(missing):
        raise ConfigError(faults, config.source)
    return config, missing


def _checked(
    arguments: argparse.Namespace,
    environment: Environment,
    world_size: int | None,
    notify: bool,
) -> CheckedConfig:
    overrides = _overrides(arguments, environment)
    checked = load_checked(arguments.config_name, overrides, arguments.config_path, world_size)
    for notice in checked.notices if notify else ():
        _note(notice)
    return checked


def _show(text: str) -> None:
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


def _note(text: str) -> None:
    print(redact(f"notice: {text}"), file=sys.stderr)


_NEED_TORCH = (
    "plan",
    "doctor",
    "graphs",
    "train",
    "sweep",
    "workers",
    "convert",
    "export",
    "inspect",
    "reference",
    "generate",
    "compare",
    "chat",
)
_VERBS: dict[str, Callable[[argparse.Namespace, Environment], int]] = {
    "config": _config,
    "plan": _plan,
    "doctor": _doctor,
    "graphs": _graphs,
    "train": _train,
    "launch": _launch,
    "sweep": _sweep,
    "processes": _processes,
    "precompile": _precompile,
    "workers": _workers,
    "presets": _presets,
    "help-keys": _help_keys,
    "convert": _convert,
    "export": _convert,
    "inspect": _inspect,
    "reference": _reference,
    "generate": _generate,
    "compare": _compare,
    "chat": _chat,
    "report": _report,
}
