"""Arguments of doctor, and its part for Neuron nodes."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nxdt_align.config.load import to_yaml
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError


def add_neuron_options(doctor: argparse.ArgumentParser) -> None:
    """Add them to the verb's parser."""
    doctor.add_argument(
        "--neuron",
        action="store_true",
        help="write an archive of what shows why a run on this Neuron node failed: versions, environment, "
        "devices, limits, and of a configuration its values, plan and graph manifest; no weights, no data",
    )
    doctor.add_argument(
        "--run",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="a run's folder: its settings, logs",
    )
    doctor.add_argument(
        "--log", action="append", type=Path, default=[], metavar="FILE", help="a log, such as train.sh's"
    )
    doctor.add_argument(
        "--out",
        type=Path,
        default=Path("nxdt-align-doctor.tar.gz"),
        metavar="FILE",
        help="the archive (default: nxdt-align-doctor.tar.gz)",
    )
    doctor.add_argument(
        "--flash",
        action="store_true",
        help="first compare the flash kernel of model.fusions.flash_attention_packed with a dense mask on a "
        "NeuronCore",
    )


def neuron_doctor(
    arguments: argparse.Namespace,
    variables: Mapping[str, str],
    read: Callable[[], Config],
    plan: Callable[[Config], str],
) -> Iterator[str]:
    """Check, collect, and write the archive; lines for the user.

    Args:
        variables: this process's environment.
        read: the configuration, where --config-name names one.
        plan: a configuration's rows and memory.
    """
    if not arguments.flash:
        yield from _archive(arguments, variables, read, plan, {})
        return
    from nxdt_align.run.neuron_check import flash_lines

    try:
        lines = flash_lines()
    except Exception as error:
        # Whatever a kernel, its compiler or another version's signature raises: the archive shows why, so it
        # comes first.
        trace = "".join(traceback.format_exception(error))
        yield from _archive(arguments, variables, read, plan, {"flash.txt": lambda: trace})
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"doctor --flash: {told}") from error
    yield from lines
    yield from _archive(arguments, variables, read, plan, {"flash.txt": lambda: "\n".join(lines)})


def _archive(
    arguments: argparse.Namespace,
    variables: Mapping[str, str],
    read: Callable[[], Config],
    plan: Callable[[Config], str],
    made: dict[str, Callable[[], str]],
) -> Iterator[str]:
    """Write it, with ``made`` beside what is always in it."""
    from nxdt_align.neuron import bundle

    files = list(arguments.log)
    if arguments.config_name is not None:
        from nxdt_align.run.neuron_check import manifest_of

        config = read()
        made = {**made, "config.yaml": lambda: to_yaml(config), "plan.txt": lambda: plan(config)}
        manifest = manifest_of(config)
        if manifest.is_file():
            files.append(manifest)
    parts = bundle.collect(variables, runs=arguments.run, files=files, made=made)
    bundle.write(arguments.out, parts)
    yield f"{arguments.out}: {len(parts)} files, {arguments.out.stat().st_size / 1024:,.0f} KiB"
    yield "read it before you send it: tar -xzOf FILE | less shows all that is in it"
