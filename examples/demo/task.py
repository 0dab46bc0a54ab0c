"""Instructions whose answers a program can verify, with the mistake that a careless writer makes on each.

A family is one kind of instruction ("Sort these numbers in ascending order: 7 3 9 1."). Its verifier
computes from instruction and answer whether the answer is right. It never sees the answer that the
generator wrote, and accepts every right one: even numbers, for example, may come in any order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from nxdt_align.errors import UserError

Items = tuple[str, ...]
"""Numbers or letters, in the order in which an instruction or an answer names them."""

DIGITS = "0123456789"
LETTERS = "abcdefghijkl"
_INSTRUCTION = re.compile(r"(?P<request>[^:]+): (?P<items>[a-z0-9]+( [a-z0-9]+)*)\.")


class TaskError(UserError):
    """Not an instruction of this task."""


@dataclass(frozen=True)
class Family:
    """One kind of instruction."""

    name: str
    request: str
    """What is asked; an instruction is ``f"{request}: {items}."``."""
    alphabet: str
    lengths: tuple[int, int]
    """Fewest and most items of an instruction."""
    hard_from: int
    """An instruction of so many items or more is hard: careless writers tend to get it wrong."""
    verify: Callable[[Items, Items], bool]
    """Whether the answer's items (second) answer the instruction's (first)."""
    solve: Callable[[Items], Sequence[str]]
    blunder: Callable[[Items], Sequence[str]]
    """What a careless writer answers. For some items that happens to be right."""
    repeats: bool = False
    """Whether an instruction may name an item twice."""


@dataclass(frozen=True)
class Problem:
    """An instruction of a family."""

    family: Family
    items: Items

    @property
    def instruction(self) -> str:
        return f"{self.family.request}: {' '.join(self.items)}."

    @property
    def right(self) -> str:
        """A right answer."""
        return " ".join(self.family.solve(self.items))

    @property
    def wrong(self) -> str:
        """A careless writer's answer."""
        return " ".join(self.family.blunder(self.items))

    @property
    def is_hard(self) -> bool:
        return len(self.items) >= self.family.hard_from

    def accepts(self, answer: str) -> bool:
        """Whether ``answer``, its items parted by white space or commas, is right."""
        return self.family.verify(self.items, tuple(answer.replace(",", " ").split()))


def draw_problem(rng: Random) -> Problem:
    """A problem of a random family whose two answers are right and wrong, as they should be."""
    while True:
        family = rng.choice(FAMILIES)
        length = rng.randint(*family.lengths)
        pick = (
            rng.choices(family.alphabet, k=length) if family.repeats else rng.sample(family.alphabet, length)
        )
        problem = Problem(family, tuple(pick))
        if problem.right and problem.wrong and not problem.accepts(problem.wrong):
            return problem


def read_problem(instruction: str) -> Problem:
    """The problem that an instruction's text states. Raises TaskError where it states none."""
    match = _INSTRUCTION.fullmatch(instruction)
    for family in FAMILIES:
        if match and family.request == match["request"]:
            items = tuple(match["items"].split())
            if set(items) <= set(family.alphabet):
                return Problem(family, items)
    requests = ", ".join(f"'{family.request}: ...'" for family in FAMILIES)
    raise TaskError(f"{instruction!r} is no instruction of the demo's task, which knows {requests}")


def is_right(instruction: str, answer: str) -> bool:
    """Whether ``answer`` is right. Raises TaskError where ``instruction`` is none of this task."""
    return read_problem(instruction).accepts(answer)


def _is_sorted(given: Items, answer: Items) -> bool:
    """One character an item, for which the alphabet's order is the numbers' order."""
    return Counter(given) == Counter(answer) and all(a <= b for a, b in pairwise(answer))


def _is_reversed(given: Items, answer: Items) -> bool:
    return len(answer) == len(given) and all(answer[-1 - i] == item for i, item in enumerate(given))


def _is_even_part(given: Items, answer: Items) -> bool:
    even = [item for item in given if int(item) % 2 == 0]
    return Counter(answer) == Counter(even)


def _is_count(given: Items, answer: Items) -> bool:
    return (
        len(answer) == 1
        and re.fullmatch("[0-9]{1,3}", answer[0]) is not None
        and int(answer[0]) == len(given)
    )


FAMILIES = (
    Family(
        name="sort numbers",
        request="Sort these numbers in ascending order",
        alphabet=DIGITS,
        lengths=(4, 7),
        hard_from=6,
        verify=_is_sorted,
        solve=sorted,
        blunder=lambda items: sorted(items, reverse=True),
    ),
    Family(
        name="sort letters",
        request="Put these letters in alphabetical order",
        alphabet=LETTERS,
        lengths=(4, 7),
        hard_from=6,
        verify=_is_sorted,
        solve=sorted,
        blunder=lambda items: items,
    ),
    Family(
        name="reverse",
        request="Write these letters backwards",
        alphabet=LETTERS,
        lengths=(3, 5),
        hard_from=4,
        verify=_is_reversed,
        solve=lambda items: items[::-1],
        blunder=lambda items: items,
    ),
    Family(
        name="even",
        request="Keep only the even numbers",
        alphabet=DIGITS,
        lengths=(4, 7),
        hard_from=6,
        verify=_is_even_part,
        solve=lambda items: [item for item in items if int(item) % 2 == 0],
        blunder=lambda items: [item for item in items if int(item) % 2 == 1],
    ),
    Family(
        name="count",
        request="Count these letters",
        alphabet=LETTERS,
        lengths=(3, 9),
        hard_from=6,
        repeats=True,
        verify=_is_count,
        solve=lambda items: [str(len(items))],
        blunder=lambda items: [str(len(items) - 1)],
    ),
)
