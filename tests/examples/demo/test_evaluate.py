"""Figures by transformers: rewards by hand, log-probabilities against one sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from demo.evaluate import HuggingFaceModel, Likelihoods, Pair, read_pairs, rewards

from nxdt_align.errors import UserError


def _likelihoods(chosen: list[float], rejected: list[float], tokens: list[float]) -> Likelihoods:
    return Likelihoods(np.array(chosen), np.array(rejected), np.array(tokens), np.array(tokens) * 2)


def test_dpo_rewards_by_hand() -> None:
    """beta 0.5: chosen 0.5 * (-1 + 3, -4 + 4, -2 + 1) = (1, 0, -0.5); rejected 0.5 * (-5 + 4, -1 + 1, -2 + 3)
    = (-0.5, 0, 0.5). One pair ordered, one tied, one not: accuracy 1.5 / 3; margin (1.5 + 0 - 1) / 3."""
    reference = _likelihoods([-3, -4, -1], [-4, -1, -3], [1, 1, 1])
    result = rewards("dpo", 0.5, _likelihoods([-1, -4, -2], [-5, -1, -2], [1, 1, 1]), reference)
    assert result.chosen.tolist() == [1, 0, -0.5]
    assert result.rejected.tolist() == [-0.5, 0, 0.5]
    assert result.accuracy == 0.5
    assert result.margin == pytest.approx(0.5 / 3)


def test_orpo_rewards_by_hand() -> None:
    """beta 0.1, mean over 2 chosen and 4 rejected tokens: 0.1 * -1 = -0.1, 0.1 * -2 = -0.2."""
    policy = _likelihoods([-2], [-8], [2])
    result = rewards("orpo", 0.1, policy, policy)
    assert result.chosen.tolist() == pytest.approx([-0.1])
    assert result.rejected.tolist() == pytest.approx([-0.2])
    assert result.accuracy == 1.0
    assert result.margin == pytest.approx(0.1)


def test_likelihoods_equal_those_of_one_sequence_at_a_time(tiny_demo: Path, pairs: list[Pair]) -> None:
    model = HuggingFaceModel(tiny_demo / "model")
    found = model.evaluate(pairs).likelihoods
    tokenizer = model.tokenizer
    for index, pair in enumerate(pairs[:6]):
        for response, logps, tokens in (
            (pair.chosen, found.chosen, found.chosen_tokens),
            (pair.rejected, found.rejected, found.rejected_tokens),
        ):
            ids = tokenizer(f"{pair.prompt} {response}{tokenizer.eos_token}", return_tensors="pt")[
                "input_ids"
            ]
            n = len(response.split()) + 1
            with torch.inference_mode():
                table = model.model(input_ids=ids).logits[0].log_softmax(-1)
            expected = sum(float(table[i - 1, ids[0, i]]) for i in range(ids.shape[1] - n, ids.shape[1]))
            assert tokens[index] == n
            assert logps[index] == pytest.approx(expected, abs=1e-4)


def test_completions_in_a_batch_equal_those_of_one_prompt_at_a_time(
    tiny_demo: Path, pairs: list[Pair]
) -> None:
    model = HuggingFaceModel(tiny_demo / "model")
    together = model.evaluate(pairs)
    alone = [model.evaluate([pair]).completions[0] for pair in pairs[:5]]
    assert list(together.completions[:5]) == alone
    assert together.share_right == sum(together.right) / len(pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{\n", r"heldout.jsonl:1: not a JSON object with prompt, chosen and rejected"),
        ('{"prompt": "a", "chosen": "b"}\n', "KeyError.'rejected'"),
        ('["a"]\n', "not a JSON object"),
        (
            json.dumps({"prompt": "Write a poem.", "chosen": "b", "rejected": "c"}),
            "no instruction of the demo's",
        ),
    ],
)
def test_a_file_of_other_records_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "heldout.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path)


def test_a_missing_file_and_a_folder_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"heldout\.jsonl does not exist; python -m demo.prepare"):
        read_pairs(tmp_path)
    with pytest.raises(UserError, match=r"not a Hugging Face model folder: it has no config.json"):
        HuggingFaceModel(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        HuggingFaceModel(tmp_path)
