"""Several processes on this machine that form a gloo group, and what becomes of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 900
"""Seconds that the processes of one call may take, on a loaded machine too: few take more than 20."""
PRELOAD = [
    *("torch", "torch.distributed.tensor.parallel", "torch.distributed.fsdp"),
    *("lightning.pytorch", "nemo.utils.exp_manager", "transformers", "nxdt_align.run.run"),
]
"""What the server that forks processes has imported. One server serves all tests of a pytest process, and
the first that asks for it says what it imports: so all say the same."""
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit codes of a process whose memory is damaged."""


def run_parallel(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, world, *arguments)`` in each of ``world`` processes with a gloo group, all at once.

    Returns the ranks' results, which torch.save must be able to write. ``function`` must be importable by
    its module's name. Raises AssertionError with the traceback of the first rank that fails.

    A rank that a signal ends (the C library's "unaligned tcache chunk", say) is no exception of ours to
    trace: all start once more, with a warning. torch 2.13's gloo damages the heap now and then: seen once in
    these tests, and at will in a loop of nothing but torch's own functional collectives, of which one result
    was dropped unwaited. What our own code damages fails the second time too.
    """
    try:
        return _run(world, function, arguments)
    except RankCrash as crash:
        warnings.warn(f"{crash}; all ranks are started once more", RuntimeWarning, stacklevel=2)
    return _run(world, function, arguments)


class RankCrash(AssertionError):
    """A rank that a signal ended, not an exception."""


def _run(world: int, function: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    # A server that has imported torch forks the processes: each starts in well under a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(folder, rank, world, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        _await(processes, folder)
        for rank, process in enumerate(processes):
            if process.exitcode in CRASHES:
                raise RankCrash(f"rank {rank} was ended by {signal.Signals(-process.exitcode).name}")
        results = [_result(folder, rank) for rank in range(world)]
    return results


@dataclass(frozen=True)
class Ended:
    """Exit statuses per rank, and what each has written to standard output and error."""

    statuses: list[int]
    said: list[str]

    def well(self) -> str:
        """All that was said, where every rank ended well; else AssertionError with it."""
        said = "".join(self.said)
        assert not any(self.statuses), f"{self.statuses}: {said[-6000:]}"
        return said


def run_forked(world: int, *arguments: str, script: str | None = None, folder: Path | None = None) -> Ended:
    """The command line, or the Python text ``script``, in ``world`` processes that are started in ``folder``
    with the variables that torchrun sets. As one fails the others are killed, as torchrun does.

    A process that is started anew imports everything anew, which takes longer than a small run: that is kept
    for tests of train.sh, of torchrun, and of the start itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name) / f"{rank}.log" for rank in range(world)]
        processes = [
            context.Process(target=_forked, args=(log, rank, world, store.port, arguments, script, folder))
            for rank, log in enumerate(logs)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT
        while any(p.is_alive() for p in processes):
            if any(p.exitcode for p in processes) or time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        return Ended([int(p.exitcode or 0) for p in processes], [log.read_text() for log in logs])


def _forked(
    log: Path,
    rank: int,
    world: int,
    port: int,
    arguments: Sequence[str],
    script: str | None,
    folder: Path | None,
) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    from nxdt_align.cli import main

    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if world > 1:
        os.environ |= {
            **{name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")},
            **{name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")},
            **dict.fromkeys(("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"), "0"),
            "GROUP_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": "none",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    if folder is not None:
        os.chdir(folder)
    torch.set_num_threads(1)
    rank_zero_only.rank = rank  # it reads the variable when Lightning is imported, in the server
    status: Any = 0
    try:
        if script is None:
            status = main(list(arguments))
        else:
            sys.argv = ["-c", *arguments]
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # what a plain exit waits for is not under test


def _rank(
    folder: Path, rank: int, world: int, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT),
        )
        result = function(rank, world, *arguments)
        dist.barrier()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    torch.save(result, folder / f"{rank}.part")
    (folder / f"{rank}.part").replace(folder / f"{rank}.pt")
    dist.destroy_process_group()


def _await(processes: Sequence[Any], folder: Path) -> None:
    """Ends as soon as one has failed: the others would wait for it."""
    deadline = time.monotonic() + TIMEOUT
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(folder.glob("*.error")):
            break
        time.sleep(0.02)
    if any(folder.glob("*.error")) or time.monotonic() >= deadline:
        for process in processes:
            process.kill()
    for process in processes:
        process.join()


def _result(folder: Path, rank: int) -> Any:
    errors = sorted(folder.glob("*.error"), key=lambda f: f.stat().st_mtime)
    assert not errors, f"rank {errors[0].stem} of a parallel test failed:\n{errors[0].read_text()}"
    path = folder / f"{rank}.pt"
    assert path.exists(), f"rank {rank} gave no result within {TIMEOUT} s"
    return torch.load(path, weights_only=False)
