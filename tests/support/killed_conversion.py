"""A conversion in a process of its own, which is killed.

Kept out of the test's own file, which such a process cannot import.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

from checkpoint_fixture import SIZES, run
from rank_processes import PRELOAD

from nxdt_align.run.native_writer import NativeWriter
from nxdt_align.weights.hf_writer import HFWriter
from nxdt_align.weights.nxdt_writer import NxDTWriter
from nxdt_align.weights.staging import Staging

KINDS: dict[str, dict[str, Any]] = {
    "plain shards": SIZES,
    "xser shards": SIZES | {"xser": True},
    "hf": {"to": "hf", "max_shard_bytes": 10_000},
    "native": {"to": "native"},
}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def convert_and_die(kind: str, moment: str, folder: Path) -> None:
    """In a process of its own. ``writing``: while several threads have weights in hand; ``finishing``: once
    all is written and verified and the files have their final names, before the folder gets its own."""
    if moment == "finishing":
        Staging.publish = die  # type: ignore[method-assign]
    started, lock = 0, threading.Lock()
    for writer in (NxDTWriter, HFWriter, NativeWriter):
        write = writer.write

        def counting(self: Any, name: str, whole: Any, write: Any = write) -> None:
            nonlocal started
            with lock:
                started += 1
                is_last = started == 12
            if is_last and moment == "writing":
                die()
            write(self, name, whole)

        writer.write = counting  # type: ignore[method-assign]
    run(folder / "hf", folder / "out", **KINDS[kind])


def kill_a_conversion(kind: str, moment: str, folder: Path) -> Path:
    """Returns what it leaves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=convert_and_die, args=(kind, moment, folder))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (f for f in folder.iterdir() if f.name != "hf")
    assert left.name.startswith("."), "it has taken the destination's name"
    return left
