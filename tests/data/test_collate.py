"""Where each token stands, written out by hand for one pair in each layout."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nxdt_align.batch import IGNORE_LABEL, Batch, SlotRole
from nxdt_align.data.collate import Collator, GlobalCounts
from nxdt_align.data.packing import Bucket, Layout, RowPlanner, example_tokens
from nxdt_align.data.steps import PAIR_ROLES, SINGLE_ROLES
from nxdt_align.data.tokenize import Example
from nxdt_align.errors import UserError

X = IGNORE_LABEL


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


PAIR = Example("00" * 16, tokens(1, 2, 3), (tokens(10, 11, 12), tokens(20, 21)))


def collate(layout: Layout, bucket: Bucket) -> Batch:
    return Collator([PAIR], layout, PAIR_ROLES)([[0]], bucket, GlobalCounts(1, 5))


def test_shared_prompt() -> None:
    """Prompt 1 2 once, before it the chosen response, last token first, and behind it the rejected one: each
    begins with the prompt's last token 3 and lacks its own last one. Labels stand in reading order."""
    batch = collate("shared_prompt", Bucket(9, 6, 4))
    assert batch.input_ids.tolist() == [[11, 10, 3, 1, 2, 3, 20, 0, 0]]
    assert batch.position_ids.tolist() == [[4, 3, 2, 0, 1, 2, 3, 0, 0]]
    assert batch.key_start.tolist() == [[0, 1, 2, 3, 3, 3, 3, 7, 8]]
    assert batch.key_stop.tolist() == [[5, 5, 5, 4, 5, 6, 7, 8, 9]]
    assert batch.key_start.dtype == batch.key_stop.dtype == torch.int32
    assert batch.response_positions.tolist() == [[2, 1, 0, 5, 6, 0]]
    assert batch.labels.tolist() == [[10, 11, 12, 20, 21, X]]
    assert batch.slot_index.tolist() == [[0, 0, 0, 1, 1, 0]]
    assert batch.slot_valid.tolist() == [[True, True, False, False]]
    assert batch.slot_role.tolist() == [[SlotRole.CHOSEN, SlotRole.REJECTED] * 2]
    assert batch.record_index.tolist() == [[0, 0, -1, -1]]
    assert (float(batch.global_pairs), float(batch.global_tokens)) == (1.0, 5.0)


def test_packed_repeats_the_prompt() -> None:
    batch = collate("packed", Bucket(10, 6, 2))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 1, 2, 3, 20, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]]
    assert batch.key_start.tolist() == [[0, 0, 0, 0, 0, 5, 5, 5, 5, 9]]
    assert batch.key_stop.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert batch.response_positions.tolist() == [[2, 3, 4, 7, 8, 0]]


def test_none_gives_each_response_its_row_in_pair_order() -> None:
    batch = collate("none", Bucket(6, 4, 1))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 0], [1, 2, 3, 20, 0, 0]]
    assert batch.slot_role.tolist() == [[SlotRole.CHOSEN], [SlotRole.REJECTED]]
    assert batch.labels.tolist() == [[10, 11, 12, X], [20, 21, X, X]]


def test_prompts_are_predicted_for_the_first_response() -> None:
    """Tokens 2 and 3 of the prompt 1 2 3, from its first two tokens; slots 2 and above are prompts of 0 and
    above. Sums of responses do not count them."""
    collator = Collator([PAIR], "shared_prompt", PAIR_ROLES, with_prompts=True)
    batch = collator([[0]], Bucket(9, 8, 2), GlobalCounts(1, 5))
    assert batch.input_ids.tolist() == [[11, 10, 3, 1, 2, 3, 20, 0, 0]]
    assert batch.response_positions.tolist() == [[3, 4, 2, 1, 0, 5, 6, 0]]
    assert batch.labels.tolist() == [[2, 3, 10, 11, 12, 20, 21, X]]
    assert batch.slot_index.tolist() == [[2, 2, 0, 0, 0, 1, 1, 0]]
    values = torch.tensor([[100.0, 200.0, 1.0, 2.0, 3.0, 10.0, 20.0, 999.0]])
    assert batch.sum_per_slot(values).tolist() == [[6.0, 30.0]]
    assert batch.sum_per_prompt(values).tolist() == [[300.0, 0.0]]
    assert batch.with_tail_weight(0.5).token_weights.tolist() == [[1, 1, 1, 1, 0.5, 1, 1, 1]]  # type: ignore[union-attr]


def test_prompts_are_predicted_once_where_each_response_has_its_own() -> None:
    packed = Collator([PAIR], "packed", PAIR_ROLES, with_prompts=True)
    batch = packed([[0]], Bucket(10, 7, 2), GlobalCounts(1, 5))
    assert batch.response_positions.tolist() == [[0, 1, 2, 3, 4, 7, 8]]
    assert batch.slot_index.tolist() == [[2, 2, 0, 0, 0, 1, 1]]
    rows = Collator([PAIR], "none", PAIR_ROLES, with_prompts=True)
    batch = rows([[0]], Bucket(6, 5, 1), GlobalCounts(1, 5))
    assert batch.labels.tolist() == [[2, 3, 10, 11, 12], [20, 21, X, X, X]]
    assert batch.slot_index.tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_sums_per_slot_ignore_padding_even_where_it_is_not_zero() -> None:
    batch = collate("shared_prompt", Bucket(9, 6, 4))
    values = torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0, 999.0]])
    assert batch.sum_per_slot(values).tolist() == [[6.0, 30.0, 0.0, 0.0]]


def test_one_token_of_prompt_and_of_responses() -> None:
    """Prompt 3, responses 10 and 20: each response is predicted from a copy of the 3, which sees itself."""
    example = Example("00" * 16, tokens(3), (tokens(10), tokens(20)))
    batch = Collator([example], "shared_prompt", PAIR_ROLES)([[0]], Bucket(3, 3, 2), GlobalCounts(1, 2))
    assert batch.input_ids.tolist() == [[3, 3, 0]]
    assert batch.position_ids.tolist() == [[0, 0, 0]]
    assert (batch.key_start.tolist(), batch.key_stop.tolist()) == ([[0, 1, 2]], [[1, 2, 3]])
    assert batch.response_positions.tolist() == [[0, 1, 0]]
    assert batch.labels.tolist() == [[10, 20, X]]


def test_single_responses_stay_forward() -> None:
    example = Example("00" * 16, tokens(1, 2, 3), (tokens(10, 11, 12),))
    batch = Collator([example], "shared_prompt", SINGLE_ROLES)([[0]], Bucket(6, 4, 1), GlobalCounts(1, 3))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 0]]
    assert batch.key_start.tolist() == [[0, 0, 0, 0, 0, 5]]
    assert batch.response_positions.tolist() == [[2, 3, 4, 0]]


@pytest.mark.parametrize(("window", "shared"), [(5, True), (4, False)])
def test_an_example_longer_than_the_window_is_laid_as_packed(window: int, shared: bool) -> None:
    """The pair's prompt and longer response take 2 + 3 tokens."""
    bucket = Bucket(10, 6, 2)
    collator = Collator([PAIR], "shared_prompt", PAIR_ROLES, window=window)
    batch = collator([[0]], bucket, GlobalCounts(1, 5))
    wanted = collate("shared_prompt" if shared else "packed", bucket)
    assert batch.input_ids.equal(wanted.input_ids) and batch.key_start.equal(wanted.key_start)
    lengths = SimpleNamespace(prompt_lengths=np.array([3]), response_lengths=np.array([[3, 2]]))
    assert example_tokens(lengths, "shared_prompt", window).tolist() == [7 if shared else 9]


def test_three_responses_of_a_prompt_are_laid_as_packed() -> None:
    responses = (tokens(10), tokens(20, 21), tokens(30))
    example = Example("00" * 16, tokens(1, 2), responses)
    roles = (SlotRole.CHOSEN, SlotRole.REJECTED, SlotRole.REJECTED)
    batch = Collator([example], "shared_prompt", roles)([[0]], Bucket(8, 4, 3), GlobalCounts(1, 4))
    assert batch.input_ids.tolist() == [[1, 2, 1, 2, 20, 1, 2, 0]]
    assert batch.key_start.tolist() == [[0, 0, 2, 2, 2, 5, 5, 7]]
    lengths = SimpleNamespace(prompt_lengths=np.array([2]), response_lengths=np.array([[1, 2, 1]]))
    assert example_tokens(lengths, "shared_prompt").tolist() == [7]


def test_a_window_shorter_than_a_response_is_refused_with_the_record() -> None:
    lengths = SimpleNamespace(prompt_lengths=np.array([3, 2]), response_lengths=np.array([[3, 2], [4, 9]]))
    fault = (
        r"sliding_window: must be at least the longest response, but is 8, and example 1 of data.train_dir "
        r"has a response of 9 tokens, .*; set data.seq_length to 8 at most"
    )
    with pytest.raises(UserError, match=fault):
        RowPlanner(*(lengths, "packed"), examples_per_step=2, seq_length=16, window=8, name="data.train_dir")


def test_a_device_has_its_integers_in_32_bits_where_it_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type "meta" stands for "neuron" here, which no torch knows without Neuron's own package."""
    batch = collate("packed", Bucket(10, 6, 2))
    assert batch.to("cpu").input_ids.dtype == torch.int64
    monkeypatch.setattr("nxdt_align.batch.INT32_DEVICES", ("meta",))
    there = batch.to("meta")
    integers = {
        f.name: getattr(there, f.name).dtype for f in fields(there) if getattr(there, f.name) is not None
    }
    assert torch.int64 not in integers.values()
    assert integers["input_ids"] == integers["position_ids"] == integers["key_stop"] == torch.int32
    assert integers["slot_valid"] == torch.bool and integers["global_pairs"] == torch.float32
