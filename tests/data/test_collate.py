"""Where each token stands, written out by hand for one pair in each layout."""

from __future__ import annotations

import numpy as np
import torch

from nxdt_align.batch import IGNORE_LABEL, PADDING_SEGMENT, Batch, SlotRole
from nxdt_align.data.collate import Collator, GlobalCounts
from nxdt_align.data.packing import Bucket, Layout
from nxdt_align.data.steps import PAIR_ROLES
from nxdt_align.data.tokenize import Example

X = IGNORE_LABEL
PAD = PADDING_SEGMENT


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


PAIR = Example("00" * 16, tokens(1, 2, 3), (tokens(10, 11, 12), tokens(20, 21)))


def collate(layout: Layout, bucket: Bucket) -> Batch:
    return Collator([PAIR], layout, PAIR_ROLES)([[0]], bucket, GlobalCounts(1, 5))


def test_shared_prompt() -> None:
    """Prompt 1 2 once; each response follows the prompt's last token 3 and lacks its own last one."""
    batch = collate("shared_prompt", Bucket(9, 6, 4))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 3, 20, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 1, 2, 2, PAD, PAD]]
    assert batch.response_positions.tolist() == [[2, 3, 4, 5, 6, 0]]
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
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 1, 16, 16, 17, 17, PAD]]
    assert batch.response_positions.tolist() == [[2, 3, 4, 7, 8, 0]]


def test_none_gives_each_response_its_row_in_pair_order() -> None:
    batch = collate("none", Bucket(6, 4, 1))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 0], [1, 2, 3, 20, 0, 0]]
    assert batch.slot_role.tolist() == [[SlotRole.CHOSEN], [SlotRole.REJECTED]]
    assert batch.labels.tolist() == [[10, 11, 12, X], [20, 21, X, X]]


def test_prompts_are_predicted_for_the_first_response() -> None:
    """Tokens 2 and 3 of the prompt 1 2 3, from its first two places; slots 2 and above are prompts of 0 and
    above. Sums of responses do not count them."""
    collator = Collator([PAIR], "shared_prompt", PAIR_ROLES, with_prompts=True)
    batch = collator([[0]], Bucket(9, 8, 2), GlobalCounts(1, 5))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 11, 3, 20, 0, 0]]
    assert batch.response_positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]]
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
