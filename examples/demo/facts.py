"""Pairs about facts that a program can check, for ``make demo-real``: ``python -m demo.facts --out DIR``.

The chosen answer is short ("It is Paris."), the rejected one a sentence as SmolLM2 writes it. Under DIR:
``train.jsonl`` and ``heldout.jsonl``, chats both. No thing that the second asks about is in the first.
``--judge COMPARISON.json`` reads what ``nxdt-align compare`` has written, with ``is_right`` for its scorer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nxdt_align.files import atomic_write, explain

CONCISE_WORDS = 4
"""A concise answer has at most so many: "It is Buenos Aires.", "300 centimeters"."""
MIN_CONCISE, MAX_CONCISE_BEFORE = 0.9, 0.2
_HELD_OUT = 0.2
"""Share of the facts of each kind."""
_SHOWN = 8
"""Answers that are printed side by side; the page has all."""

_COUNTRIES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Europe": (
        *(("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid")),
        *(("Portugal", "Lisbon"), ("Greece", "Athens"), ("Poland", "Warsaw"), ("Austria", "Vienna")),
        *(("Hungary", "Budapest"), ("Sweden", "Stockholm"), ("Norway", "Oslo"), ("Finland", "Helsinki")),
        *(
            ("Denmark", "Copenhagen"),
            ("Ireland", "Dublin"),
            ("Belgium", "Brussels"),
            ("Romania", "Bucharest"),
        ),
        *(("Bulgaria", "Sofia"), ("Croatia", "Zagreb"), ("Serbia", "Belgrade"), ("Ukraine", "Kyiv")),
    ),
    "Asia": (
        *(("Japan", "Tokyo"), ("China", "Beijing"), ("India", "New Delhi"), ("Thailand", "Bangkok")),
        *(("Vietnam", "Hanoi"), ("Indonesia", "Jakarta"), ("Iran", "Tehran"), ("Iraq", "Baghdad")),
        *(("Nepal", "Kathmandu"), ("Pakistan", "Islamabad"), ("Afghanistan", "Kabul"), ("Syria", "Damascus")),
        *(("Lebanon", "Beirut"), ("Jordan", "Amman"), ("Mongolia", "Ulaanbaatar"), ("Bangladesh", "Dhaka")),
    ),
    "Africa": (
        *(("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("Nigeria", "Abuja"), ("Ethiopia", "Addis Ababa")),
        *(("Ghana", "Accra"), ("Morocco", "Rabat"), ("Tunisia", "Tunis"), ("Algeria", "Algiers")),
        *(("Senegal", "Dakar"), ("Uganda", "Kampala"), ("Zimbabwe", "Harare"), ("Zambia", "Lusaka")),
        *(("Libya", "Tripoli"), ("Somalia", "Mogadishu"), ("Sudan", "Khartoum"), ("Rwanda", "Kigali")),
    ),
    "South America": (
        *(("Peru", "Lima"), ("Chile", "Santiago"), ("Argentina", "Buenos Aires"), ("Brazil", "Brasilia")),
        *(("Colombia", "Bogota"), ("Venezuela", "Caracas"), ("Ecuador", "Quito"), ("Uruguay", "Montevideo")),
    ),
}
_UNITS = (
    *(("centimeters", "meters", 100), ("minutes", "hours", 60), ("days", "weeks", 7)),
    *(("grams", "kilograms", 1000), ("months", "years", 12), ("meters", "kilometers", 1000)),
    *(("seconds", "minutes", 60), ("millimeters", "centimeters", 10)),
)


@dataclass(frozen=True)
class Fact:
    """A question, its answer, and the sentences that a talkative model wraps it in."""

    kind: str
    question: str
    answer: str
    wordy: str

    @property
    def concise(self) -> str:
        # Two words before the answer: a small model that has to begin with it recalls it less often.
        return f"It is {self.answer}."

    def record(self) -> dict[str, Any]:
        said = {"chosen": self.concise, "rejected": self.wordy}
        return {
            "prompt": [{"role": "user", "content": self.question}],
            **{name: [{"role": "assistant", "content": text}] for name, text in said.items()},
        }


def _facts() -> Iterator[tuple[Fact, ...]]:
    """Those of one thing together, so that they are held out together."""
    for continent, countries in _COUNTRIES.items():
        for country, capital in countries:
            yield (
                Fact(
                    "capital",
                    f"What is the capital of {country}?",
                    capital,
                    f"The capital of {country} is {capital}.",
                ),
                Fact(
                    "continent",
                    f"Which continent is {country} in?",
                    continent,
                    f"{country} is a country that is located in {continent}.",
                ),
            )
    for first in range(1, 13):
        for second in range(first, 13):
            total = str(first + second)
            told = f"To add {first} and {second}, we start with {first} and count {second} more: {total}."
            yield (Fact("sum", f"What is {first} plus {second}?", total, told),)
    for small, large, factor in _UNITS:
        for count in range(2, 10):
            total = str(count * factor)
            asked = f"how many {small} are in {count} {large}"
            told = f"To find out {asked}, you multiply {count} by {factor}, which gives you {total}."
            yield (Fact("unit", f"H{asked[1:]}?", total, told),)


def make_pairs(seed: int) -> tuple[list[Fact], list[Fact]]:
    """(train, held out), the same for a seed on every machine."""
    rng, kinds = Random(seed), dict[str, list[tuple[Fact, ...]]]()
    for group in _facts():
        kinds.setdefault(group[0].kind, []).append(group)
    train, heldout = list[Fact](), list[Fact]()
    for groups in kinds.values():
        rng.shuffle(groups)
        kept = round(len(groups) * _HELD_OUT)
        for into, some in ((heldout, groups[:kept]), (train, groups[kept:])):
            into.extend(fact for group in some for fact in group)
    rng.shuffle(train)
    return train, heldout


def is_right(completion: str, record: Mapping[str, Any]) -> float:
    """1 where the answer stands in the completion as words of its own; a scorer of ``nxdt-align compare``.
    What else is said does not count, so that a model loses nothing by talking."""
    answer = _plain(record["answer"]).removeprefix("it is ").removesuffix(".")
    return float(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", _plain(completion)) is not None)


def is_concise(completion: str) -> bool:
    return 0 < len(completion.split()) <= CONCISE_WORDS


def _plain(text: str) -> str:
    """In lower case, without accents, and without commas between digits."""
    letters = unicodedata.normalize("NFKD", text).casefold()
    return re.sub(r"(?<=\d),(?=\d)", "", "".join(c for c in letters if not unicodedata.combining(c)))


@dataclass(frozen=True)
class Judged:
    """Shares of the held-out answers, (before, after) each."""

    concise: tuple[float, float]
    right: tuple[float, float]

    def shortfalls(self) -> Iterator[str]:
        if not (self.concise[0] < MAX_CONCISE_BEFORE and self.concise[1] >= MIN_CONCISE):
            yield (
                f"concise answers must go from under {MAX_CONCISE_BEFORE:.0%} to {MIN_CONCISE:.0%} or more, "
                f"but went from {self.concise[0]:.1%} to {self.concise[1]:.1%}"
            )
        before, after = self.right
        if after < before:
            yield f"right answers must not get fewer, but fell from {before:.1%} to {after:.1%}"


def judge(records: Sequence[Mapping[str, Any]]) -> Judged:
    """Of the records of a comparison whose scorer was ``is_right``."""
    sides = [[record[side] for record in records] for side in ("before", "after")]
    concise = [sum(is_concise(answer["text"]) for answer in side) / len(side) for side in sides]
    right = [sum(answer["score"] for answer in side) / len(side) for side in sides]
    return Judged((concise[0], concise[1]), (right[0], right[1]))


def _describe(records: Sequence[Mapping[str, Any]], judged: Judged) -> Iterator[str]:
    for record in records[:: max(1, len(records) // _SHOWN)]:
        yield record["prompt"][-1]["content"]
        for side in ("before", "after"):
            text = " ".join(record[side]["text"].split())
            yield f"    {side + ':':<8}{'right' if record[side]['score'] else 'wrong'}  {text[:90]}"
    yield f"\n{f'On {len(records)} held-out questions':<34}{'before':>10}{'after':>10}"
    shares = {f"concise (up to {CONCISE_WORDS} words)": judged.concise, "right": judged.right}
    for name, (before, after) in shares.items():
        yield f"{name:<34}{before:>10.1%}{after:>10.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.facts", description="Pairs about facts.")
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--out", type=Path, help="folder to write the pairs to")
    todo.add_argument("--judge", type=Path, help="the JSON of a comparison on heldout.jsonl, to be judged")
    parser.add_argument(
        "--seed", type=int, default=1234, help="draws what is held out (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.judge is not None:
        records = json.loads(options.judge.read_text(encoding="utf-8"))["records"]
        judged = judge(records)
        print("\n".join(_describe(records, judged)))
        for fault in judged.shortfalls():
            print(f"error: {fault}", file=sys.stderr)
        return 1 if any(judged.shortfalls()) else 0
    for name, facts in zip(("train", "heldout"), make_pairs(options.seed), strict=True):
        text = "".join(json.dumps(fact.record(), ensure_ascii=False) + "\n" for fact in facts)
        atomic_write(options.out / f"{name}.jsonl", text.encode())
        print(f"{options.out / name}.jsonl: {len(facts)} pairs")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.exit(f"error: {error.filename}: {explain(error)}")
