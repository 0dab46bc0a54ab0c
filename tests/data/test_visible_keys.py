"""What each token sees in each layout, read off a model's Jacobian and compared with what its record says.

A token that predicts the k-th token of a response sees the prompt and the response's first k tokens, once
each and nothing else: however rows are laid out, whatever attends over them. One layer, so that what moves a
token's logits is what it attends to; token ids are all different, so that a key is known by its id.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import TINY
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, Batch, Topology
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.data.tokenize import Example
from nxdt_align.models.decoder import Decoder
from nxdt_align.ops.attention import Attention, CausalAttention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.ops.ragged import ModelInputs, PaddedRows, RaggedRow

SIZES = [(3, 4, 2), (1, 3, 3), (5, 1, 1), (1, 1, 1), (2, 6, 1), (4, 2, 5)]
"""Tokens of prompt, first and second response, of each record."""
ATTENTIONS: dict[str, Attention] = {
    "dense": DenseAttention(),
    "blocks": BlockAttention(),
    "causal": CausalAttention(),
    "flex": FlexAttention(compiled=False),
}
PADDING_ID = 0


class Records:
    """Examples whose tokens are numbered through, from 1 on."""

    def __init__(self, responses: int) -> None:
        self.examples = []
        count = 1
        for index, sizes in enumerate(SIZES):
            parts = []
            for size in sizes[: 1 + responses]:
                parts.append(np.arange(count, count + size, dtype=np.int32))
                count += size
            self.examples.append(Example(f"{index:032x}", parts[0], tuple(parts[1:])))
        self.vocabulary = count
        self.prompt_lengths = np.array([len(e.prompt) for e in self.examples])
        self.response_lengths = np.array([[len(r) for r in e.responses] for e in self.examples])
        self.record_ids = [e.record_id for e in self.examples]

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    def seen_by_label(self, window: int | None) -> dict[int, list[int]]:
        """Id of a predicted token -> ids of the tokens that its prediction may see."""
        seen = {}
        for example in self.examples:
            for response in example.responses:
                sequence = [*example.prompt.tolist(), *response.tolist()]
                for at in range(1, len(sequence)):
                    seen[sequence[at]] = (
                        sequence[:at] if window is None else sequence[max(0, at - window) : at]
                    )
        return seen


def seen_keys(model: Decoder, attention: Attention, batch: Batch) -> list[tuple[int, list[int]]]:
    """(id of the token predicted, ids of the inputs that move its logits), for each label of a row."""
    inputs = ModelInputs.of(batch)
    rows = PaddedRows(inputs) if attention.static_shapes else RaggedRow.of(inputs)
    assert model.model.embed_tokens is not None
    hidden = model.model.embed_tokens(rows.input_ids).detach().requires_grad_()
    context = model.model.prepare(rows.key_start, rows.key_stop, attention.prepare)

    def logits(x: Tensor) -> Tensor:
        return rows.at_responses(model.logits(model(x, rows.position_ids, context))).flatten(0, -2).sum(-1)

    model.model.takes_hidden_states = True
    labels = rows.labels.flatten().tolist()
    if isinstance(attention, FlexAttention):
        moved = moved_by_difference(logits, hidden.detach())
    else:
        out = logits(hidden)
        moved = torch.stack([torch.autograd.grad(one, hidden, retain_graph=True)[0] for one in out]).ne(0)
    model.model.takes_hidden_states = False
    ids = rows.input_ids.flatten()
    return [
        (label, ids[moving.any(-1).flatten()].tolist())
        for label, moving in zip(labels, moved, strict=True)
        if label != IGNORE_LABEL
    ]


@torch.no_grad()
def moved_by_difference(logits: object, x: Tensor) -> Tensor:
    """(labels, B, S, 1): off CUDA FlexAttention has no backward pass."""
    assert callable(logits)
    before = logits(x)
    columns = []
    for at in range(x.shape[0] * x.shape[1]):
        other = x.clone()
        other.view(-1, x.shape[-1])[at] *= -3
        columns.append(logits(other) != before)
    return torch.stack(columns, -1).view(len(before), *x.shape[:2], 1)


def batches(records: Records, layout: Layout, window: int | None) -> list[Batch]:
    planner = RowPlanner(
        records,
        layout,
        examples_per_step=len(records),
        seq_length=14,
        micro_batch_size=1,
        with_prompts=True,
        window=window,
    )
    data = StepDataset(records, planner, layout, Topology(), with_prompts=True)  # type: ignore[arg-type]
    return data[range(len(records))]


CASES = [
    (attention, layout, window)
    for attention in ATTENTIONS
    for layout in ("none", "packed", "shared_prompt")
    for window in (None, 6)
    if attention != "causal" or (layout == "none" and window is None)
]


@pytest.mark.parametrize(("attention", "layout", "window"), CASES)
@pytest.mark.parametrize("responses", [1, 2])
def test_a_token_sees_its_prompt_and_its_response_so_far(
    attention: str, layout: Layout, window: int | None, responses: int
) -> None:
    torch.manual_seed(0)
    records = Records(responses)
    shape = replace(
        TINY, num_hidden_layers=1, vocab_size=records.vocabulary, sliding_window=window, model_type="mistral"
    )
    model = Decoder(shape, ATTENTIONS[attention]).double()
    expected = records.seen_by_label(window)
    found: set[int] = set()
    for batch in batches(records, layout, window):
        for label, ids in seen_keys(model, ATTENTIONS[attention], batch):
            assert Counter(ids) == Counter(expected[label]), f"the token that predicts {label}"
            found.add(label)
    assert found == set(expected)


@pytest.mark.parametrize("layout", ["none", "packed", "shared_prompt"])
def test_padding_sees_itself_alone(layout: Layout) -> None:
    for batch in batches(Records(2), layout, None):
        real = batch.labels.ne(IGNORE_LABEL)
        last = torch.where(real, batch.response_positions, -1).amax(1)
        index = torch.arange(batch.input_ids.shape[1])
        padding = index > last[:, None]
        assert batch.input_ids[padding].eq(PADDING_ID).all()
        assert batch.key_start[padding].equal(index.expand_as(padding)[padding].int())
        assert batch.key_stop[padding].equal(batch.key_start[padding] + 1)
        # No real token sees padding.
        assert (batch.key_stop.amax(1) <= batch.input_ids.shape[1]).all()
        assert all(
            (row[: n + 1] <= n + 1).all() for row, n in zip(batch.key_stop, last.tolist(), strict=True)
        )
