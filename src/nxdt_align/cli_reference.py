"""Arguments of reference, and what it prints."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError

if TYPE_CHECKING:
    from nxdt_align.config.check import CheckedConfig
    from nxdt_align.run import RunEnv

_SAMPLE = 64


def add_reference_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    add_config: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add it to the command line's parser; ``add_config`` adds what names a configuration."""
    text = "reference log-probabilities apart from training: computed ahead, inspected, merged, verified"
    parser = verbs.add_parser("reference", help=text, description=text, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    ahead = _add(
        actions,
        "precompute",
        "compute what a run of this configuration would begin with, on one process or several, and train "
        "nothing",
    )
    ahead.add_argument(
        "--share",
        type=_share,
        default=(0, 1),
        metavar="I/N",
        help="the I-th of N equal shares alone, counted from 1: for N machines, whose stores are merged",
    )
    inspect = _add(
        actions, "inspect", "say what a store holds, and whether a configuration's data are complete in it"
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help="a store, or a folder of stores")
    merge = _add(actions, "merge", "add stores of several machines to one")
    merge.add_argument("paths", nargs="+", type=Path, metavar="SOURCE ... DESTINATION")
    merge.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-6,
        metavar="T",
        help="by which values of a record may differ, of the larger one (default: 1e-6); the destination's "
        "then counts, else that of the store named first",
    )
    merge.add_argument(
        "--precision",
        metavar="TEXT",
        help="store the values under this precision, as reference inspect shows that of a configuration, "
        "whatever it was computed in: the other engine's, which gives the same values; it is taken on trust",
    )
    verify = _add(
        actions,
        "verify",
        "compute a sample of the stored values again, and compare; status 1 where they differ",
    )
    verify.add_argument(
        "--records",
        type=int,
        default=_SAMPLE,
        metavar="N",
        help=f"about so many of each split (default: {_SAMPLE})",
    )
    for action in (ahead, inspect, verify):
        add_config(action)
    for action in (ahead, inspect, merge, verify):
        action.add_argument("--json", action="store_true", help="print JSON")


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return actions.add_parser(name, help=text, description=text, allow_abbrev=False)


def _share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, as 2/4, but is {text!r}")
    return int(number) - 1, int(of)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:  # to not-a-number no difference is too large
        raise argparse.ArgumentTypeError(f"must be a finite number from 0, but is {text!r}")
    return value


def precompute(arguments: argparse.Namespace, checked: CheckedConfig, env: RunEnv) -> str:
    """Compute values, and say what was done."""
    if env.compile_only:
        raise UserError(
            "COMPILE=1: compiles a training run's graphs, the reference pass's among them, and computes "
            "nothing: leave it out for reference precompute"
        )
    from nxdt_align.reference.precompute import PassSummary, Share
    from nxdt_align.run.precomputed import precompute_ahead

    done = precompute_ahead(checked, env, Share(*arguments.share))
    if arguments.json:
        return json.dumps(done, indent=2)
    lines = [f"{split}: {PassSummary(**each)}" for split, each in done["splits"].items()]
    left = sum(each["left"] for each in done["splits"].values())
    end = f"complete but for {left:,} records of other shares" if left else "complete"
    return "\n".join([*lines, f"{done['store']}: {end}"])


def verify(arguments: argparse.Namespace, checked: CheckedConfig, env: RunEnv) -> tuple[str, bool]:
    """Compare values; what was found, and whether all agree."""
    if arguments.records < 1:
        raise UserError(f"--records: must be at least 1, but is {arguments.records}")
    from nxdt_align.run.precomputed import verify_stored

    found = verify_stored(checked, env, arguments.records)
    agree = all(each["worst"] <= found["tolerance"] for each in found["splits"].values())
    if arguments.json:
        return json.dumps(found | {"agree": agree}, indent=2), agree
    return "\n".join(_of_verified(found, agree)), agree


def _of_verified(found: dict[str, Any], agree: bool) -> Iterator[str]:
    tolerance = found["tolerance"]
    for split, each in found["splits"].items():
        missing = f"{each['missing']:,} of {each['records']:,} records have no value"
        yield f"{split}: {each['compared']:,} compared, {missing}"
        if each["worst"] > tolerance:
            yield (
                f"  record {each['worst_record']} differs by {each['worst']:.3g} nats per token (tolerance "
                f"{tolerance:g})"
            )
        elif each["compared"]:
            yield f"  they agree to {each['worst']:.3g} nats per token (tolerance {tolerance:g})"
    if not agree:
        yield f"{found['store']} holds values of other weights or other data: remove it, and compute it again"


def inspect(arguments: argparse.Namespace, read: Callable[[], tuple[Config, Engine]]) -> str:
    """Describe the stores at a path; ``read`` gives the configuration, where --config-name names one."""
    if arguments.overrides and arguments.config_name is None:
        raise UserError(f"{arguments.overrides[0]}: overrides need --config-name NAME")
    path: Path = arguments.path
    from nxdt_align.reference.stores import words
    from nxdt_align.run import precomputed

    reports = precomputed.inspect(path)
    against = None
    if arguments.config_name is not None:
        config, engine = read()
        against = precomputed.completeness(config, engine, path)
    if arguments.json:
        stores = [
            {"fingerprint": report.fingerprint, **vars(report), "path": str(report.path)}
            for report in reports
        ]
        return json.dumps({"stores": stores, "against": against}, indent=2)
    lines = [line for report in reports for line in words(report)]
    return "\n".join([*lines, *_of_completeness(against, path)])


def _of_completeness(against: dict[str, Any] | None, path: Path) -> Iterator[str]:
    if against is None:
        return
    yield f"the configuration reads store {against['fingerprint']}"
    if not against["is_there"]:
        yield f"  which is not in {path}; it is made from"
        yield from (f"  {name}: {value}" for name, value in against["made_from"].items())
        for store in against["in_other_precision"]:
            yield (
                f"  {store} tells its precision in the other engine's words: reference merge --precision "
                f"'{against['made_from']['precision']}' takes its values over, on trust"
            )
    for split, each in against["splits"].items():
        missing = f"{each['missing']:,} of {each['records']:,} records have no value"
        yield f"  {split}: {missing if each['missing'] else 'complete'} ({each['records']:,} records)"


def merge(arguments: argparse.Namespace) -> str:
    """Merge stores."""
    if len(arguments.paths) < 2:
        raise UserError("reference merge needs stores and a destination: SOURCE ... DESTINATION")
    from nxdt_align.reference.stores import merge as merge_stores

    *sources, destination = arguments.paths
    done = merge_stores(sources, destination, tolerance=arguments.tolerance, precision=arguments.precision)
    if arguments.json:
        return json.dumps(vars(done) | {"path": str(done.path)}, indent=2)
    return (
        f"{done.path}: {done.records:,} records, {done.added:,} added from {done.sources} stores, "
        f"{done.known:,} known before"
    )
