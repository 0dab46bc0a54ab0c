"""Short runs that are good, or bad in a known way: settings and data of each, and what a verdict should find.

All start from the demo's warm-up. A case says which rules its run was made to show; what it may or may not
show besides, as a collapsed policy may overfit too, is not judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from nxdt_align.files import atomic_write

TOO_HIGH, NOTHING, OVERFITTING = "learning rate too high", "nothing learnt", "overfitting"
LENGTH, DISPLACEMENT, NOISE = "length exploitation", "likelihood displacement", "data noise"
APART = "reference is not the start"
RULES = (TOO_HIGH, NOTHING, OVERFITTING, LENGTH, DISPLACEMENT, NOISE, APART)

Pair = dict[str, str]
Change = Callable[[list[Pair], Random], list[Pair]]
"""Of a file's pairs."""
DPO = "model_alignment_strategy.dpo"


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    shows: frozenset[str] = frozenset()
    """Rules that the verdict should find."""
    open: frozenset[str] = frozenset()
    """Rules that are not judged of it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the demo's DPO config that it changes."""
    data: str = "as they are"
    """Key of DATA."""
    steps: float = 1.0
    """Times those of the others."""
    reference: bool = False
    """Whether the reference is another model than the start."""


def _flipped(share: float) -> Change:
    """Chosen and rejected exchanged in so many of the pairs."""

    def change(pairs: list[Pair], rng: Random) -> list[Pair]:
        return [_exchanged(pair) if rng.random() < share else pair for pair in pairs]

    return change


def _exchanged(pair: Pair) -> Pair:
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def _longer_is_chosen(pairs: list[Pair], rng: Random) -> list[Pair]:
    """The wrong answer, twice over, against itself: nothing but length tells them apart."""
    found = []
    for pair in pairs:
        text = pair["rejected"]
        found.append({**pair, "chosen": f"{text} {text}", "rejected": text})
    return found


def _either_is_longer(pairs: list[Pair], rng: Random) -> list[Pair]:
    """As ``_longer_is_chosen``, with the shorter one chosen in half of them."""
    return [_exchanged(pair) if rng.random() < 0.5 else pair for pair in _longer_is_chosen(pairs, rng)]


def _nearly_alike(pairs: list[Pair], rng: Random) -> list[Pair]:
    """The rejected answer is the chosen one with its last word taken off or doubled."""
    found = []
    for pair in pairs:
        words = pair["chosen"].split()
        other = words[:-1] if len(words) > 1 and rng.random() < 0.5 else [*words, words[-1]]
        found.append({**pair, "rejected": " ".join(other)})
    return found


def _first(count: int) -> Change:
    return lambda pairs, rng: pairs[:count]


def _as_they_are(pairs: list[Pair], rng: Random) -> list[Pair]:
    return pairs


DATA: Mapping[str, tuple[Change, Change]] = {
    "as they are": (_as_they_are, _as_they_are),
    "half are flipped": (_flipped(0.5), _flipped(0.5)),
    "the longer is chosen": (_longer_is_chosen, _either_is_longer),
    "nearly alike": (_nearly_alike, _nearly_alike),
    "32 pairs": (_first(32), _as_they_are),
    "16 flipped pairs": (lambda pairs, rng: _flipped(0.5)(pairs[:16], rng), _as_they_are),
}
"""Name -> changes of the training and the held-out pairs."""


def write_data(folder: Path, name: str) -> tuple[Path, Path]:
    """The changed pairs of the demo's files in ``folder``, beside them."""
    found = []
    for split, change in zip(("train", "heldout"), DATA[name], strict=True):
        pairs = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        changed = change(pairs, Random(f"{name} {split}"))
        file = folder / f"{name.replace(' ', '_')}_{split}.jsonl"
        atomic_write(file, "".join(json.dumps(pair) + "\n" for pair in changed).encode())
        found.append(file)
    return found[0], found[1]


def _cases() -> Iterator[Case]:
    rate = "model.optim.lr"
    # Plain DPO lowers chosen log-probabilities a little, or not: not judged.
    usual = frozenset({DISPLACEMENT})
    for seed in (1, 2, 3, 4):
        yield Case(f"good, seed {seed}", open=usual, settings={"seed": seed})
    for value in (1e-5, 4e-5, 8e-5):
        yield Case(f"good, lr {value:g}", open=usual, settings={rate: value})
    for beta in (0.1, 0.3, 1.0):
        yield Case(f"good, beta {beta:g}", open=usual, settings={f"{DPO}.kl_beta": beta})
    for scale in (0.5, 1.0):
        yield Case(f"good, nll_scale {scale:g}", settings={f"{DPO}.nll_scale": scale})
    yield Case("good, ipo", open=usual, settings={f"{DPO}.loss_type": "ipo"})

    collapse = frozenset({OVERFITTING, LENGTH, DISPLACEMENT, NOISE, NOTHING})
    for value in (3e-3, 1e-2, 3e-2):
        for clip in (1.0, None):
            given = {rate: value, "trainer.gradient_clip_val": clip}
            yield Case(f"lr {value:g}, clip {clip}", frozenset({TOO_HIGH}), collapse, given)

    for value in (1e-10, 1e-9, 1e-8, 3e-8):
        yield Case(f"lr {value:g}", frozenset({NOTHING}), settings={rate: value})
    for value in (2e-7, 1e-6):
        given = {
            rate: value,
            "model.optim.sched.warmup_steps": 100_000,
            "model.optim.sched.max_steps": 200_000,
        }
        yield Case(f"lr {value:g}, endless warm-up", frozenset({NOTHING}), settings=given)

    for value in (1e-4, 2e-4, 4e-4):
        for data in ("32 pairs", "16 flipped pairs"):
            given = {rate: value, "data.global_batch_size": 16}
            yield Case(
                f"{data}, lr {value:g}",
                frozenset({OVERFITTING}),
                frozenset({DISPLACEMENT, TOO_HIGH, NOISE, LENGTH}),
                given,
                data,
                steps=2.0,
            )

    for seed, value in ((1, 2e-5), (2, 4e-5), (3, 8e-5), (4, 8e-5), (5, 1.6e-4)):
        given = {"seed": seed, rate: value}
        # Half of the held-out pairs go the other way, so validation gets worse as length is learnt.
        besides = frozenset({OVERFITTING, DISPLACEMENT, NOISE})
        yield Case(f"length, seed {seed}", frozenset({LENGTH}), besides, given, "the longer is chosen")

    # The last three were made after the rule had got its second condition from the others.
    rates = (1e-4, 1e-4, 2e-4, 2e-4, 4e-4, 5e-5, 1e-4, 3e-4)
    for seed, value in enumerate(rates, 1):
        besides = frozenset({DISPLACEMENT, OVERFITTING})
        given = {"seed": seed, rate: value}
        yield Case(f"noise, seed {seed}", frozenset({NOISE}), besides, given, "half are flipped")

    for seed, value in ((1, 1e-4), (2, 2e-4), (3, 2e-4), (4, 3e-4), (5, 3e-4)):
        given = {"seed": seed, rate: value, f"{DPO}.kl_beta": 0.1}
        besides = frozenset({TOO_HIGH, LENGTH, OVERFITTING})
        yield Case(f"alike, seed {seed}", frozenset({DISPLACEMENT}), besides, given, "nearly alike")

    for seed in (1, 2, 3, 4, 5):
        yield Case(f"other reference, seed {seed}", frozenset({APART}), usual, {"seed": seed}, reference=True)


CASES: Sequence[Case] = tuple(_cases())
