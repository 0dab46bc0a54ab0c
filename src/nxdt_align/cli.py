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
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from nxdt_align import cli_evaluation, cli_reference
from nxdt_align.cli_conversion import conversion_options
from nxdt_align.cli_doctor import neuron_doctor
from nxdt_align.cli_parser import parse
from nxdt_align.cli_process import (
    LAUNCHED,
    UNLOADED,
    Environment,
    enter_run,
    lacked_variables,
    note,
    reader_may_stop,
    require_torch,
    show,
    wanted_variables,
)
from nxdt_align.cli_sweep import sweep
from nxdt_align.config.check import (
    CheckedConfig,
    ConfigError,
    Fault,
    check_notices,
    load_checked,
    with_check,
)
from nxdt_align.config.engines import Engine, resolve_engine, with_torch_neuron
from nxdt_align.config.keys import all_keys, describe_keys, nearest_key
from nxdt_align.config.load import copy_preset, presets, read_config, to_yaml
from nxdt_align.config.loggers import PACKAGES
from nxdt_align.config.neuron_packages import neuron_available
from nxdt_align.config.schema import Config
from nxdt_align.config.start import hub_models
from nxdt_align.errors import SharedError, UserError
from nxdt_align.files import explain
from nxdt_align.messages import show_on_terminal
from nxdt_align.neuron.environment import describe
from nxdt_align.redaction import redact
from nxdt_align.stop_signals import SIGNALS, Stopped

_USERS_OS_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
)
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 for a user error, 130 when interrupted, 128 + the number of
    a signal that ended training."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("NXDT_ALIGN_DEBUG") == "1"
    try:
        if arguments.verb in _NEED_TORCH:
            # What does not fit is what doctor --neuron is asked to write down.
            require_torch(os.environ, loads=not (arguments.verb == "doctor" and arguments.neuron))
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
    except RuntimeError as error:
        if debug or not str(error).startswith(UNLOADED):
            raise
        _complain(error, f"{error} The reason: {' '.join(str(error.__cause__).split())}")
    except OSError as error:
        if debug or error.errno not in _USERS_OS_ERRORS:
            raise
        about = f"{error.filename}: " if error.filename else ""
        _complain(error, about + explain(error))
    return 1


def _complain(error: Exception, message: str) -> None:
    """Print the error. Every process finds the same fault in a configuration, or is told of a shared one, so
    only the first of each node reports it; another error may occur on one rank only."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if isinstance(error, ConfigError | SharedError) and local_rank != "0":
        return
    place = f" (rank {rank})" if rank != "0" else ""
    print(redact(f"error{place}: {message}"), file=sys.stderr)


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
        show(to_yaml(config).removesuffix("\n"))
    if faults:
        raise ConfigError(faults, config.source)
    if arguments.no_check:
        return 0
    require_torch(os.environ)
    show_on_terminal(rank=0)
    lacked_variables(config, engine)
    from nxdt_align.run import RunEnv
    from nxdt_align.run.mode import RunMode
    from nxdt_align.run.ready import not_checked, require_ready
    from nxdt_align.run.settle import settle

    settled = settle(config, engine, weights=False)
    for text in settled.notes:
        note(text)
    env, fetches = RunEnv(world_size=config.world_size), not hub_models(config)
    require_ready(settled.config, engine, env, RunMode(), fetches=fetches)
    note(not_checked(config))
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
        note(notice)


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
        note(notice)
    from nxdt_align.run.plan import plan_report

    config = environment.as_run_here(config)
    engine = resolve_engine(config, neuron_available())
    own_parts = arguments.import_own_parts
    show(plan_report(config, engine, lengths=arguments.lengths, import_own_parts=own_parts))
    return 0


def _neuron_doctor(arguments: argparse.Namespace, environment: Environment) -> int:
    def read() -> Config:
        return _read_to_plan(arguments, environment)[0]

    def plan(config: Config) -> str:
        from nxdt_align.run.plan import plan_report

        config = environment.as_run_here(config)
        return plan_report(config, resolve_engine(config, neuron_available=True))

    for line in neuron_doctor(arguments, os.environ, read, plan):
        show(line)
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

    config = environment.as_run_here(config)
    engine = resolve_engine(config, neuron_available())
    found = diagnose(config, engine, import_own_parts=arguments.import_own_parts)
    if arguments.json:
        show(found.to_json())
        return 0 if found.is_fit else 1
    if arguments.show > 0:
        show(found.show(arguments.show, colours=sys.stdout.isatty()))
    show(found.to_text())
    return 0 if found.is_fit else 1


def _graphs(arguments: argparse.Namespace, environment: Environment) -> int:
    config, missing, unread = _read_to_plan(arguments, environment)
    if arguments.lengths is not None:
        unread |= set(_READ_FOR_DATA)
    needed = [fault for fault in missing if fault.path not in unread]
    if any(fault.path in _READ_FOR_DATA for fault in needed):
        note("--lengths P,N,N takes examples of so many tokens for the data, which is then not read")
    if needed:
        raise ConfigError(needed, config.source)
    show_on_terminal(rank=0)
    from nxdt_align.run import graphs

    config = environment.as_run_here(config)
    own = "trn2" if config.distributed_strategy.engine == "native" else "trn1"
    ranks, lengths, chip = arguments.ranks, arguments.lengths, arguments.device or own
    device = graphs.device_of(chip, config.trainer.lnc)
    if not arguments.import_own_parts:
        graphs.refuse_own_parts(config, with_data=lengths is None)
    if len(ranks) == 1:
        # NxD logs to the standard output, which is the report's.
        with redirect_stdout(sys.stderr):
            found, steps = graphs.reports(config, ranks[0], lengths, device)
        show(
            json.dumps([graphs.to_dict(ranks[0], found, steps, device)])
            if arguments.json
            else graphs.to_text(ranks[0], found, steps, device)
        )
        return 0
    overrides = _overrides(arguments, environment)
    options = ["--config-name", arguments.config_name, "--json", "--device", chip]
    options += [] if arguments.config_path is None else ["--config-path", str(arguments.config_path)]
    options += [] if lengths is None else ["--lengths", ",".join(map(str, lengths))]
    options += ["--import-own-parts"] if arguments.import_own_parts else []
    tables = graphs.of_ranks([*options, *overrides], ranks)
    show(json.dumps(tables) if arguments.json else graphs.compare(tables))
    return 0


def _processes(arguments: argparse.Namespace, environment: Environment) -> int:
    if arguments.engine:
        show(resolve_engine(_read(arguments, environment, checked=False)[0], neuron_available()))
        return 0
    checked = _checked(arguments, environment, None, notify=False)
    lacked_variables(checked.config, checked.engine)
    show(str(checked.config.trainer.devices))
    return 0


def _print_env(arguments: argparse.Namespace, environment: Environment) -> int:
    """Works without the Neuron packages and the data: shows what the target machine would set."""
    config, _ = _read(arguments, environment, checked=True)
    # As on the machine that the YAML is for; of trn2, this one.
    config = with_torch_neuron(config)
    is_for_neuron = config.trainer.accelerator in ("auto", "neuron")
    engine = resolve_engine(config, is_for_neuron or neuron_available())
    if engine != resolve_engine(config, neuron_available()):
        note("this machine has no NeuronCores; these are the variables of one that has")
    wanted = wanted_variables(config, engine)
    if engine != "nxd" and not wanted:
        note(
            f"engine {engine} sets none of them; distributed_strategy.engine=nxd shows what is set on Neuron"
        )
    show("\n".join(describe(os.environ, wanted)))
    return 0


def _launch(arguments: argparse.Namespace, environment: Environment) -> int:
    """Replace this process by train.sh, with this interpreter unless NXDT_ALIGN_PYTHON names another."""
    script = str(Path(__file__).resolve().with_name("train.sh"))
    if arguments.path:
        show(script)
        return 0
    os.environ.setdefault("NXDT_ALIGN_PYTHON", sys.executable)
    options = ["--print-env"] if arguments.print_env else []
    # exec, so that signals reach train.sh itself and its exit status is this command's.
    os.execvp("bash", ["bash", script, *options, *arguments.overrides])


def _sweep(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return sweep(arguments, os.environ, _overrides(arguments, environment)[len(arguments.overrides) :], show)


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
        show(f"{file}: use it with --config-name {shlex.quote(str(file))}")
        return 0
    found = presets(arguments.config_path)
    width = max(len(name) for name, _ in found)
    show("\n".join(f"{name:<{width}}  {purpose}".rstrip() for name, purpose in found))
    return 0


def _help_keys(arguments: argparse.Namespace, environment: Environment) -> int:
    section = arguments.help_keys
    if section and section not in all_keys():
        near = nearest_key(section)
        raise UserError(f"no key {section!r}{f'; did you mean {near}?' if near else ''}")
    show(describe_keys(section))
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
    show(json.dumps(found, indent=2) if arguments.json else conversion.to_text(found))
    return 0


def _reference(arguments: argparse.Namespace, environment: Environment) -> int:
    if arguments.action == "merge":
        show(cli_reference.merge(arguments))
        return 0
    if arguments.action == "inspect":
        show_on_terminal(rank=0)

        def read() -> tuple[Config, Engine]:
            checked = _checked(arguments, environment, None, notify=True)
            return checked.config, checked.engine

        show(cli_reference.inspect(arguments, read))
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
        show(text)
    return 0 if agree else 1


def _generate(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return cli_evaluation.generate(arguments, show)


def _compare(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return cli_evaluation.compare(arguments, show)


def _report(arguments: argparse.Namespace, environment: Environment) -> int:
    show_on_terminal(rank=0)
    return cli_evaluation.report(arguments, show)


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
        note(notice)
    return environment.with_told_cores(checked)


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
