"""What the command line takes: verbs, their options, overrides."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from nxdt_align import __version__
from nxdt_align.cli_conversion import add_conversion_verbs
from nxdt_align.cli_doctor import add_neuron_options
from nxdt_align.cli_evaluation import add_evaluation_verbs
from nxdt_align.cli_reference import add_reference_verb
from nxdt_align.cli_sweep import add_sweep_options

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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a verb, and as ``command`` all of them as text. Ends the process with status 2 where
    they are none, as argparse does."""
    parser = make_parser()
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


def make_parser() -> argparse.ArgumentParser:
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
    printed = doctor.add_mutually_exclusive_group()
    printed.add_argument("--show", type=int, default=0, metavar="N", help="print N records as tokens")
    printed.add_argument("--json", action="store_true", help="print JSON, without records")
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
    processes = _add_verb(
        verbs, "processes", "check a configuration and print how many processes a node needs"
    )
    processes.add_argument(
        "--engine", action="store_true", help="print the engine that runs it here instead, nxd or native"
    )
    add_conversion_verbs(verbs)
    add_reference_verb(verbs, _add_config)
    add_evaluation_verbs(verbs)
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
