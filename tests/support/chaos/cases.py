"""Kills, signals, full disks, damage and races: a case is one run that something befalls."""

from __future__ import annotations

import errno
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from chaos.processes import Command, Ended, Moment, Strike, moments, run
from chaos.trial import ALONE, ASYNC, TWO, Kind, Result, Trial

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Befall = Callable[[Path], str]
"""Given an empty folder, returns what went wrong: nothing is empty."""
STOPPED_AT = 4
"""Steps of the run whose files are damaged, or that is resumed twice at once."""


@dataclass(frozen=True)
class Outcome:
    """``fault``: what went wrong; nothing is empty."""

    group: str
    case: str
    fault: str
    inputs: int = 1


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    befall: Befall
    inputs: int = 1

    def run(self, folder: Path) -> Outcome:
        folder.mkdir(parents=True)
        try:
            fault = self.befall(folder)
        except Exception as error:  # the harness's own: it must not hide the others' outcomes
            fault = f"{type(error).__name__}: {error}"
        if not fault:
            shutil.rmtree(folder)
        return Outcome(self.group, self.name, fault, self.inputs)


class Truths:
    """Undisturbed runs of each kind, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._results: dict[Kind, Result] = {}
        self._moments: list[Moment] = []
        self._seconds: dict[Kind, float] = {}

    def result(self, kind: Kind) -> Result:
        with self._lock:
            if kind not in self._results:
                begun = time.monotonic()
                self._results[kind] = Trial(self._folder / kind.name, kind).result
                self._seconds[kind] = time.monotonic() - begun
            return self._results[kind]

    def seconds(self, kind: Kind) -> float:
        self.result(kind)
        return self._seconds[kind]

    def moments(self) -> list[Moment]:
        """Of a run in one process."""
        with self._lock:
            if not self._moments:
                self._moments = Trial(self._folder / "moments", ALONE).moments()
            return self._moments


# Kills


NAMED = {
    "before the run has a folder": r"os.mkdir experiments$",
    "tokens, before they have their name": r"os.rename experiments/cache/tokens/.*",
    "reference pass, between two parts": r"os.rename experiments/cache/reference/.*part-00001.*",
    "the run's identity": r"os.rename experiments/run/\*/run_identity.json",
    "first checkpoint, half": r"open .*step=2.*/trainer.pt",
    "second checkpoint, whole, without its name": r"os.rename experiments/run/\*/checkpoints/run--step=4.*",
    "a checkpoint's removal": r"shutil.rmtree .*removing-run--step=2.*",
    "the last checkpoint is there, no export": r"os.mkdir .*hf_export.*",
    "export, half": r"open .*hf_export.*/tokenizer.json",
    "export, whole, without its name": r"os.rename experiments/run/\*/hf_export",
}
"""Moments of a run, and the pattern of the first that each stands for."""


def named(found: Sequence[Moment], pattern: str) -> Moment:
    """Raises LookupError where no moment of a run matches, as after a file's name has changed."""
    for moment in found:
        if re.fullmatch(pattern, str(moment)):
            return moment
    raise LookupError(f"no moment of a run is {pattern!r}")


def strike(truths: Truths, kind: Kind, moment: Moment, how: signal.Signals, rank: int = 0) -> Befall:
    def befall(folder: Path) -> str:
        trial = Trial(folder, kind)
        ended = trial.run(strike=Strike(moment, how), rank=rank)
        # Before the first step and in the export a rank ends at once, and the others notice.
        others = {1} if "/checkpoints/" not in moment.path else set()
        return _fault(ended, how, rank, others) or trial.finish(truths.result(kind))

    return befall


def _fault(ended: Sequence[Ended], how: signal.Signals, rank: int, others: set[int]) -> str:
    """Of processes of which that of ``rank`` got a signal; the others may end with the statuses ``others``,
    too."""
    for number, one in enumerate(ended):
        if one.fault:
            return f"rank {number} {one.fault}: {one.error}"
    if how != signal.SIGKILL:
        # 0: the signal came when nothing was left to do.
        wanted = {128 + how, -how, 0}
        wrong = [
            one.status
            for number, one in enumerate(ended)
            if one.status not in (wanted if number == rank else wanted | others)
        ]
        if wrong:
            return f"status {wrong[0]} after {how.name}: {ended[0].error}"
    elif ended[rank].status not in (-signal.SIGKILL, 0):
        return f"status {ended[rank].status}: {ended[rank].error}"
    return ""


def kill_at_any_time(truths: Truths, kind: Kind, share: float) -> Befall:
    """``share`` of the seconds that a run takes."""

    def befall(folder: Path) -> str:
        trial = Trial(folder, kind)
        running = trial.start()
        running[0].process.join(share * truths.seconds(kind))
        for process in running:
            process.process.kill()
        for process in running:
            process.wait()
        return trial.finish(truths.result(kind))

    return befall


def kills(truths: Truths, seed: int, count: int) -> Iterator[Case]:
    """At every named moment, and at ``count`` others: half at a moment, half at any time."""
    yield from named_kills(truths, NAMED)
    rng = random.Random(f"kills {seed}")
    for number in range(count):
        kind = rng.choice((ALONE, ASYNC, TWO))
        rank = rng.randrange(kind.ranks)
        if number % 2:
            share = rng.uniform(0.0, 1.0)
            yield Case(
                "kill", f"{kind.name}, after {share:.3f} of a run", kill_at_any_time(truths, kind, share)
            )
        else:
            # Rank 1 passes through fewer moments than rank 0: then nothing befalls it.
            moment = rng.choice(truths.moments())
            name = f"{kind.name}, rank {rank}, {moment}"
            yield Case("kill", name, strike(truths, kind, moment, signal.SIGKILL, rank))


def named_kills(truths: Truths, names: Sequence[str], kind: Kind = ALONE) -> Iterator[Case]:
    for name in names:
        moment = named(truths.moments(), NAMED[name])
        yield Case("kill", f"{kind.name}, {name}", strike(truths, kind, moment, signal.SIGKILL))


def signals(truths: Truths, seed: int, count: int) -> Iterator[Case]:
    rng = random.Random(f"signals {seed}")
    for number in range(count):
        kind, how = rng.choice((ALONE, ASYNC, TWO)), SIGNALS[number % len(SIGNALS)]
        moment, rank = rng.choice(truths.moments()), rng.randrange(kind.ranks)
        name = f"{how.name}, {kind.name}, rank {rank}, {moment}"
        yield Case("signal", name, strike(truths, kind, moment, how, rank))


# Disks


def fill(truths: Truths, kind: Kind, moment: Moment | None, largest_file: int | None = None) -> Befall:
    """From ``moment`` on nothing can be made; or no file may be larger than ``largest_file`` bytes."""

    def befall(folder: Path) -> str:
        trial = Trial(folder, kind)
        how = None if moment is None else Strike(moment, errno.ENOSPC)
        for ended in trial.run(strike=how, largest_file=largest_file):
            if ended.fault:
                return f"{ended.fault}: {ended.error}"
        return trial.finish(truths.result(kind))

    return befall


def full_disks(truths: Truths, seed: int, count: int) -> Iterator[Case]:
    rng = random.Random(f"disks {seed}")
    for number in range(count):
        kind = rng.choice((ALONE, ASYNC))
        if number % 3:
            moment = rng.choice(truths.moments())
            yield Case("full disk", f"{kind.name}, {moment}", fill(truths, kind, moment, None))
        else:
            size = int(10 ** rng.uniform(2.0, 6.0))
            yield Case("full disk", f"{kind.name}, ulimit -f {size} B", fill(truths, kind, None, size))


# Damage


def _flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def _truncate(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(max(1, file.stat().st_size))])


def _junk(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(max(1, file.stat().st_size)))


def _empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def _delete(file: Path, rng: random.Random) -> None:
    file.unlink()


DAMAGE = {"a bit flipped": _flip, "cut": _truncate, "junk": _junk, "empty": _empty, "deleted": _delete}
NOT_OURS = ("events.out.tfevents*", "*.log", "*.txt", "hparams.yaml")
"""What others log: nothing reads it again."""


def stopped_run(folder: Path) -> Trial:
    """With two checkpoints, caches, and steps left to do."""
    trial = Trial(folder, ALONE)
    for ended in trial.run(f"trainer.max_steps={STOPPED_AT}"):
        assert ended.status == 0, ended.said[-3000:]
    return trial


def what_a_run_keeps(trial: Trial) -> list[Path]:
    """Files, from the project's folder."""
    root = trial.project.root
    files = sorted(f for f in (root / "experiments").rglob("*") if f.is_file())
    return [f.relative_to(root) for f in files if not any(f.match(pattern) for pattern in NOT_OURS)]


def damage(truths: Truths, which: int | str, how: str, seed: int) -> Befall:
    """``which``: the number of the file in ``what_a_run_keeps``, or a pattern of its path."""

    def befall(folder: Path) -> str:
        trial = stopped_run(folder)
        files = what_a_run_keeps(trial)
        if isinstance(which, str):
            files = [file for file in files if fnmatch(str(file), which)]
        file = files[which % len(files) if isinstance(which, int) else 0]
        DAMAGE[how](trial.project.root / file, random.Random(f"damage {seed} {which} {how}"))
        before = trial.project.only_run()
        (ended,) = trial.run()
        wrong = ended.fault and f"{ended.fault}: {ended.error}"
        if trial.project.runs() != [before]:
            wrong = wrong or "a new run, though there were checkpoints"
        if ended.status and "/checkpoints/" in str(file):
            wrong = wrong or f"does not go on from the checkpoint that is whole: {ended.error}"
        if not ended.status:
            wrong = wrong or trial.compare(truths.result(ALONE))
        return wrong and f"{file}: {wrong}"

    return befall


def damages(truths: Truths, seed: int, count: int) -> Iterator[Case]:
    """Of every file in turn, in every way."""
    for number in range(count):
        file, way = divmod(number, len(DAMAGE))
        how = list(DAMAGE)[way]
        yield Case("damage", f"file {file} {how}", damage(truths, file, how, seed))


# Races


def two_new_runs(*difference: str) -> Befall:
    """Under one name; the second's YAML differs by ``difference``. Both are held up where they are about to
    make the run's folder, after they have looked for a name for it."""
    about_to = Strike(Moment("os.mkdir", "experiments/run/*"), signal.SIGSTOP)

    def befall(folder: Path) -> str:
        trial = Trial(folder, ALONE)
        both = [*trial.start(strike=about_to), *trial.start(*difference, strike=about_to, wait=False)]
        stopped = [process.await_stop() for process in both]  # each: the second may wait for the first
        if not any(stopped):
            return "no moment at which the run's folder is made"
        for process in both:
            process.go_on()
        ended = [process.wait() for process in both]
        for one in ended:
            if one.fault:
                return f"{one.fault}: {one.error}"
        done = sum(one.status == 0 for one in ended)
        if difference and done != 2:
            return f"two different runs, of which one failed: {ended[0].error}; {ended[1].error}"
        whole = [path for path in trial.project.runs() if (path / "hf_export").is_dir()]
        if len(whole) != done:
            return f"{done} runs ended well, in {len(whole)} folder"
        return ""

    return befall


def two_resumes(truths: Truths) -> Befall:
    """Of one run: the second starts while the first is held up between two steps' checkpoints."""
    between = named(truths.moments(), NAMED["the last checkpoint is there, no export"])

    def befall(folder: Path) -> str:
        trial = stopped_run(folder)
        (first,) = trial.start(strike=Strike(between, signal.SIGSTOP))
        if not first.await_stop():
            return f"ended before the moment: {first.wait().error}"
        (second,) = trial.run(wait=False)
        first.go_on()
        ended = first.wait()
        for one in (ended, second):
            if one.fault:
                return f"{one.fault}: {one.error}"
        if ended.status != 0:
            return f"the first one was disturbed: {ended.error}"
        if second.status == 0:
            return "both went on"
        return trial.compare(truths.result(ALONE))

    return befall


def races(truths: Truths) -> Iterator[Case]:
    yield Case("race", "two starts of one run", two_new_runs())
    yield Case("race", "two runs of one name, other seed", two_new_runs("seed=8"))
    yield Case(
        "race", "two runs of one name, other beta", two_new_runs("model_alignment_strategy.dpo.kl_beta=0.2")
    )
    yield Case("race", "two resumes", two_resumes(truths))


# Conversions


def conversions(seed: int, count: int) -> Iterator[Case]:
    """``convert`` killed at a moment, then made again: the same files as one that nothing befell."""
    rng = random.Random(f"conversions {seed}")
    for _ in range(count):
        share = rng.random()
        yield Case("kill", f"convert, at {share:.3f} of its moments", _kill_a_conversion(share))


def _kill_a_conversion(share: float) -> Befall:
    def befall(folder: Path) -> str:
        trial = Trial(folder, ALONE)
        for ended in trial.run("trainer.max_steps=1"):
            assert ended.status == 0, ended.said[-3000:]
        source, out = trial.project.only_run() / "hf_export", trial.project.root / "out"
        arguments = ["convert", str(source), str(out), "--to", "nxdt", "--tp", "2"]
        command = Command(arguments, below=trial.project.root)
        ended, found = moments(command, folder)
        assert ended.status == 0, ended.said[-3000:]
        shutil.move(out, folder / "whole")
        at = found[int(share * len(found))]
        killed = run(replace(command, strike=Strike(at, signal.SIGKILL)), folder)
        if killed.fault:
            return f"{killed.fault}: {killed.error}"
        if not out.exists():
            again = run(replace(command, arguments=[*arguments, "--resume"]), folder)
            if again.status != 0:
                return f"the next start ends with {again.status}: {again.error}"
        return "" if _files(out) == _files(folder / "whole") else "other files"

    return befall


def _files(folder: Path) -> Mapping[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
