"""The truncation rule: by hand on small cases, and its invariants on many random lengths."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nxdt_align.data.tokenize import Truncation, TruncationMode
from nxdt_align.errors import UserError

BOS = 0


def tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


PROMPT = [BOS, *tokens(1, 9)]
"""BOS and the tokens 1 to 9."""


@pytest.mark.parametrize(
    ("rule", "responses", "kept_prompt", "kept_lengths"),
    [
        (Truncation(14, 10), [4, 3], PROMPT, [4, 3]),
        # 10 + 4 > 12: the longer response loses two; the shorter, which fits with one token less, one.
        (Truncation(12, 10), [4, 3], PROMPT, [2, 2]),
        (Truncation(12, 11, "keep_end"), [4, 3], [BOS, *tokens(3, 7)], [4, 3]),
        (Truncation(12, 4), [4, 3], [BOS, 7, 8, 9], [4, 3]),
        (Truncation(6, 4), [4, 1], [BOS, 7, 8, 9], [2, 1]),
        (Truncation(6, 4, "keep_end"), [4, 1], [BOS, 9], [4, 1]),
        # The prompt is gone but for BOS; then the ends of the responses go.
        (Truncation(6, 4, "keep_end"), [9, 5], [BOS], [5, 5]),
        (Truncation(6, 1), [9, 5], [BOS], [5, 5]),
        # A prompt longer than the sequence, without a rule for it: one response token stays.
        (Truncation(6), [3, 3], [BOS, 6, 7, 8, 9], [1, 1]),
        (Truncation(6, mode="keep_end"), [3, 2], [BOS, 8, 9], [3, 2]),
    ],
)
def test_by_hand(
    rule: Truncation, responses: list[int], kept_prompt: list[int], kept_lengths: list[int]
) -> None:
    prompt, kept, cut = rule(PROMPT, [tokens(100 * i, n) for i, n in enumerate(responses, 1)], BOS)
    assert prompt == kept_prompt
    assert kept == [tokens(100 * i, n) for i, n in enumerate(kept_lengths, 1)]
    assert cut == (kept_prompt != PROMPT or kept_lengths != responses)


def test_without_bos_the_last_prompt_token_stays() -> None:
    prompt, (response,), cut = Truncation(4, 3, "keep_end")([1, 2, 3], [tokens(10, 9)], None)
    assert (prompt, response, cut) == ([3], [10, 11, 12], True)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("with_bos", [True, False])
def test_invariants(mode: TruncationMode, with_bos: bool) -> None:
    """Over random lengths: the sequence fits, BOS stays, a response keeps its start and one token at
    least, the prompt keeps its end, and nothing is cut that had room."""
    rng = random.Random(f"{mode}{with_bos}")
    for _ in range(3000):
        seq_length = rng.randint(2, 40)
        limit = rng.randint(1, seq_length - 1)
        body = tokens(1, rng.randint(0 if with_bos else 1, 50))
        prompt = [BOS, *body] if with_bos else body
        responses = [tokens(1000, rng.randint(1, 50)), tokens(2000, rng.randint(1, 50))]
        longest = max(map(len, responses))
        kept, answers, cut = Truncation(seq_length, limit, mode)(prompt, responses, BOS)

        assert 1 <= len(kept) <= limit
        assert kept[0] == BOS if with_bos else True
        kept_body = kept[1:] if with_bos else kept
        assert kept_body == body[len(body) - len(kept_body) :]
        for answer, whole in zip(answers, responses, strict=True):
            assert len(answer) >= 1 and answer == whole[: len(answer)]
            assert len(kept) + len(answer) <= seq_length
            assert len(answer) == min(len(whole), seq_length - len(kept))
        allowed = min(len(prompt), limit)
        if mode == "keep_end":
            assert len(kept) == min(allowed, max(seq_length - longest, 1))
        else:
            assert len(kept) == allowed
        assert cut == (kept != prompt or answers != responses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, None), r"data\.seq_length must be at least 2 .* but is 1"),
        ((8, 8), r"max_prompt_length must be at least 1 and below data\.seq_length \(8\).* but is 8"),
        ((8, 0), "max_prompt_length must be at least 1"),
        ((8, 4, "keep_middle"), "truncation_mode must be keep_start or keep_end, but is 'keep_middle'"),
    ],
)
def test_impossible_rules(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Truncation(*arguments)
