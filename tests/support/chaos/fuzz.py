"""Fuzzed configurations and data files: a batch is read in one process, one after the other."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rank_processes import PRELOAD
from training_fixture import Project

from chaos.cases import Case
from chaos.processes import CONTEXT, TIMEOUT

BATCH = 50
SECONDS = 30
"""That one input may take: none takes more than 3 on an idle machine."""
Inputs = Callable[[int, Project], Iterator[Sequence[str]]]
"""A seed and a project -> command lines."""


def data_files(seed: int, project: Project) -> Iterator[Sequence[str]]:
    from fuzz_data import damaged_files

    folder = project.root / "fuzzed"
    folder.mkdir()
    plan = ["plan", *project.arguments()[1:]]
    for path in damaged_files(seed, folder):
        yield [*plan, f"data.train_dir={path}"]


def configurations(seed: int, project: Project) -> Iterator[Sequence[str]]:
    from fuzz_config import broken_configs

    good = (project.root / "conf" / "run.yaml").read_text()
    path = project.root / "conf" / "fuzzed.yaml"
    for case in broken_configs(seed, good):
        path.write_text(case.text, encoding="utf-8", errors="surrogatepass")
        yield ["config", "--config-name", str(path), *case.overrides]


def batches(group: str, inputs: Inputs, seed: int, count: int) -> Iterator[Case]:
    for number in range(-(-count // BATCH)):
        size = min(BATCH, count - number * BATCH)
        name = f"{size} inputs of seed {1000 * seed + number}"
        yield Case(group, name, _read(inputs, 1000 * seed + number, size), size)


def _read(inputs: Inputs, seed: int, size: int) -> Callable[[Path], str]:
    def befall(folder: Path) -> str:
        report = folder / "report.jsonl"
        process = CONTEXT.Process(target=_child, args=(inputs, seed, size, folder, report, list(sys.path)))
        CONTEXT.set_forkserver_preload(PRELOAD)
        process.start()
        process.join(TIMEOUT + size * SECONDS)
        hangs = process.is_alive()
        process.kill()
        process.join()
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        faults = [f"{line['arguments'][-3:]}: {line['fault']}" for line in lines if line.get("fault")]
        if lines and "fault" not in lines[-1]:
            how = "hangs" if hangs else f"ends the process ({process.exitcode})"
            faults.append(f"{lines[-1]['arguments'][-3:]}: {how}")
        elif len(lines) < 2 * size:
            faults.append(f"stopped after {len(lines) // 2} inputs ({process.exitcode})")
        return f"{len(faults)} of {size}: {faults[0]}" if faults else ""

    return befall


def _child(inputs: Inputs, seed: int, size: int, folder: Path, report: Path, path: list[str]) -> None:
    sys.path[:] = path
    os.chdir(folder)
    (folder / "project").mkdir()
    project = Project.create(folder / "project", pairs=4)
    signal.signal(signal.SIGALRM, _too_long)
    with report.open("a", buffering=1) as file:
        for arguments in islice(inputs(seed, project), size):
            file.write(json.dumps({"arguments": arguments}) + "\n")
            file.write(json.dumps({"arguments": arguments, "fault": fault_of(arguments)}) + "\n")


class TooLong(BaseException):
    """No handler of Exception may take it for an error of the input's."""


def _too_long(*_: Any) -> None:
    raise TooLong(f"takes more than {SECONDS} seconds")


def fault_of(arguments: Sequence[str]) -> str:
    """What is wrong with how the command line deals with them; nothing is empty."""
    from nxdt_align.cli import main

    said = io.StringIO()
    signal.alarm(SECONDS)
    begun = time.monotonic()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status: Any = main(arguments)
    except SystemExit as error:
        status = error.code
    except TooLong as error:
        return str(error)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"traceback: {type(error).__name__}: {str(error)[:200]} ({where})"
    finally:
        signal.alarm(0)
    text = said.getvalue()
    if "Traceback (most recent call last)" in text:
        return "traceback in what it says"
    if status and "error" not in text:
        return f"status {status} without a word, after {time.monotonic() - begun:.1f} s"
    return ""
