"""The verifier knows right from wrong without the generator's answers."""

from __future__ import annotations

from random import Random

import pytest
from demo.task import FAMILIES, TaskError, draw_problem, is_right, read_problem


@pytest.mark.parametrize(
    ("instruction", "right", "wrong"),
    [
        (
            "Sort these numbers in ascending order: 7 3 9 1.",
            ["1 3 7 9", " 1, 3, 7, 9 "],
            ["9 7 3 1", "7 3 9 1", "1 3 7", "1 3 3 7 9", "1 3 7 8", "1379", "", "1 3 7 9."],
        ),
        (
            "Put these letters in alphabetical order: k a l b.",
            ["a b k l"],
            ["a b l k", "a b k", "k a l b", "a b k l m", "A b k l"],
        ),
        ("Write these letters backwards: c a b.", ["b a c"], ["c a b", "b a", "b a c c", "bac", ""]),
        # Any order of the even numbers will do.
        (
            "Keep only the even numbers: 4 7 2 9.",
            ["4 2", "2 4"],
            ["4", "7 9", "4 2 7", "4 4 2", "none", "4 2 0"],
        ),
        ("Count these letters: a a b c.", ["4", "04"], ["3", "four", "4 4", "", "-4", "4.0", "\u0664"]),
    ],
)
def test_a_verifier_decides_what_answers_an_instruction(
    instruction: str, right: list[str], wrong: list[str]
) -> None:
    assert [is_right(instruction, answer) for answer in right] == [True] * len(right)
    assert [is_right(instruction, answer) for answer in wrong] == [False] * len(wrong)


def test_every_family_is_drawn_with_a_right_and_a_wrong_answer() -> None:
    rng = Random(0)
    problems = [draw_problem(rng) for _ in range(2000)]
    assert {problem.family.name for problem in problems} == {family.name for family in FAMILIES}
    for problem in problems:
        assert is_right(problem.instruction, problem.right)
        assert not is_right(problem.instruction, problem.wrong)
    hard = sum(problem.is_hard for problem in problems)
    assert 0.4 < hard / len(problems) < 0.65


def test_an_instruction_is_read_back_from_its_text() -> None:
    rng = Random(1)
    for _ in range(200):
        problem = draw_problem(rng)
        assert read_problem(problem.instruction) == problem


@pytest.mark.parametrize(
    "text",
    [
        "Sort these numbers in ascending order: 7 x 9.",
        "Sort these numbers in ascending order: .",
        "Write a poem: a b.",
        "Count these letters a b.",
        "",
    ],
)
def test_another_text_is_refused_with_what_the_task_knows(text: str) -> None:
    with pytest.raises(TaskError, match=r"no instruction of the demo's task.*'Count these letters: ...'"):
        is_right(text, "1")
