"""Arguments of generate, chat, compare and report, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DTYPES = ("bf16", "fp16", "fp32")
_NO_OPTIONS = ("verb", "command", "help_keys")


def add_evaluation_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add them to the command line's parser."""
    generate = _add(verbs, "generate", "let a model answer the prompts of a file; a JSON line each")
    add = generate.add_argument
    add(
        "--prompts",
        required=True,
        metavar="FILE",
        help="in any format that training reads, responses or none; or a data set's name on the Hub",
    )
    add("--out", type=Path, metavar="FILE", help="a new .jsonl to write instead of printing")
    _add_many(generate, "of the prompts")
    chat = _add(verbs, "chat", "talk to a model, with its chat template")
    chat.add_argument("--system", metavar="TEXT", help="the conversation's system message")
    compare = verbs.add_parser(
        "compare",
        help="the same prompts through two models side by side: answers, scores, implicit rewards",
        allow_abbrev=False,
    )
    add = compare.add_argument
    add("before", type=Path, metavar="BEFORE", help="a run, a checkpoint or export of one, weights")
    add("after", type=Path, metavar="AFTER", help="another")
    add("--data", required=True, metavar="FILE", help="pairs, single responses or prompts, in any format")
    add("--out", type=Path, metavar="FILE", help="the page (default: compare.html), its JSON beside it")
    add("--json", action="store_true", help="print the JSON, and write nothing")
    add(
        "--score",
        default="auto",
        metavar="NAME",
        help="exact, gsm8k, none, or the dotted path of a function (completion, record) -> number "
        "(default: by the data's answers)",
    )
    add(
        "--beta", type=float, metavar="B", help="of implicit rewards (default: that of AFTER's run, else 0.1)"
    )
    _add_many(compare, "of the data")
    report = verbs.add_parser(
        "report",
        help="write the page of a run, or of several side by side: curves, settings, a verdict in words",
        allow_abbrev=False,
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the run's folder; of several runs, in the current one)",
    )
    report.add_argument("--json", action="store_true", help="print the same as JSON, and write nothing")
    for verb, tokens in ((generate, 256), (compare, 256), (chat, 1024)):
        _add_common(verb, tokens)


def _add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    verb.add_argument(
        "model", type=Path, metavar="MODEL", help="a run, a checkpoint or export of one, a folder of weights"
    )
    return verb


def _add_many(verb: argparse.ArgumentParser, of: str) -> None:
    """Of verbs that answer a whole file."""
    add = verb.add_argument
    add("--format", metavar="NAME", help=f"{of}, as data.format (default: by their keys)")
    add("--limit", type=int, metavar="N", help="the first N records alone")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    add(
        "--backend",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="auto: vLLM where it and an accelerator are there, else transformers",
    )
    add("--tp", dest="tensor_parallel", type=int, default=1, metavar="N", help="devices, for vLLM")


def _add_common(verb: argparse.ArgumentParser, tokens: int) -> None:
    add = verb.add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="probability to draw from (default: 1)")
    add("--max-tokens", type=int, default=tokens, metavar="N", help=f"new tokens (default: {tokens})")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    add("--device", metavar="NAME", help="cpu or cuda (default: an accelerator if there is one)")
    add("--dtype", choices=_DTYPES, help="of the model (default: its own, on a CPU fp32)")
    add("--tokenizer", type=Path, metavar="DIR", help="default: the model's")
    add(
        "--chat-template-kwargs",
        type=_variables,
        metavar="JSON",
        help="variables of the chat template: '{\"enable_thinking\": false}' (default: the model's run's)",
    )


def _variables(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object of names and values, but is {text!r}")
    return values


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the verb's function in run/generation.py takes by name."""
    return {name: value for name, value in vars(arguments).items() if name not in _NO_OPTIONS}


def generate(arguments: argparse.Namespace, show: Callable[[str], None]) -> int:
    from nxdt_align.run import generation

    rows = generation.generate(**options(arguments))
    if arguments.out is None:
        show("\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in rows))
    return 0


def compare(arguments: argparse.Namespace, show: Callable[[str], None]) -> int:
    from nxdt_align.run import comparison

    given = options(arguments)
    if given.pop("json"):
        found = comparison.compare(**given | {"out": None})
        show(json.dumps(found, indent=2, ensure_ascii=False, default=str))
        return 0
    page = given["out"] = given["out"] or Path("compare.html")
    found = comparison.compare(**given)
    show(f"{found['verdict']}\ncomparison: {page}")
    return 0


def report(arguments: argparse.Namespace, show: Callable[[str], None]) -> int:
    from nxdt_align.run import report as reports

    if arguments.json:
        show(json.dumps(reports.summary(arguments.runs), indent=2, default=str))
        return 0
    page, verdicts = reports.report(arguments.runs, arguments.out)
    said = [f"{run}: {verdict}" for run, verdict in zip(arguments.runs, verdicts, strict=True)]
    show("\n".join([*said, f"report: {page}"]))
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Asks on standard error, and on a terminal alone: standard output holds answers and nothing else."""
    from nxdt_align.run import generation

    talks = sys.stdin.isatty()

    def ask() -> str | None:
        if talks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if talks:
        print(generation.CHAT_HELP, file=sys.stderr)
    generation.chat(ask=ask, show=show, **options(arguments))
    return 0
