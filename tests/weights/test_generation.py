"""generation_config.json on the way from folder to folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixture import CONFIG, SIZES, MakeHF, run

from nxdt_align.models.presets import TINY
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.generation import generation_json, read_generation

LLAMA3 = {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.42.3",
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("start", "ends", "wanted"),
    [
        (None, [], {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}),
        (None, [2], {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}),
        # Without the mark, for which transformers would take config.json's ids instead.
        (None, [7, 2], {"bos_token_id": 1, "eos_token_id": [2, 7]}),
        ({"_from_model_config": True, "eos_token_id": 2}, [7], {"eos_token_id": [2, 7]}),
        (
            {"_from_model_config": True, "eos_token_id": 2},
            [],
            {"_from_model_config": True, "eos_token_id": 2},
        ),
        ({"eos_token_id": [5, 2], "top_k": 3}, [9, 5], {"eos_token_id": [5, 2, 9], "top_k": 3}),
        ({"temperature": 0.5}, [7], {"temperature": 0.5, "eos_token_id": [2, 7]}),
        ({"eos_token_id": None}, [], {"eos_token_id": None}),
        ({"eos_token_id": [4]}, [4], {"eos_token_id": [4]}),
    ],
)
def test_what_was_trained_is_added_and_all_else_stays(
    start: dict[str, Any] | None, ends: list[int], wanted: dict[str, Any]
) -> None:
    assert generation_json(TINY, start, ends) == wanted


def test_a_model_without_eos_stops_at_what_was_trained() -> None:
    found = generation_json(replace(TINY, bos_token_id=None, eos_token_id=None), None, [7])
    assert found == {"eos_token_id": 7}


@pytest.mark.parametrize("options", [SIZES, {**SIZES, "xser": True}, {"to": "native"}], ids=str)
@pytest.mark.parametrize("start", [LLAMA3, None])
def test_conversions_carry_it_there_and_back(
    options: dict[str, Any], start: dict[str, Any] | None, make_hf: MakeHF, tmp_path: Path
) -> None:
    hf, file = make_hf(CONFIG, generation=start), "generation_config.json"
    if start is None:
        (hf / file).unlink()
    run(hf, tmp_path / "there", **options)
    assert (tmp_path / "there" / file).exists() == (start is not None)
    run(tmp_path / "there", tmp_path / "back", to="hf")
    # As from the model's config where there is none; its eos are 2 and 7.
    wanted = start or {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 7]}
    assert json.loads((tmp_path / "back" / file).read_text()) == wanted


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "must hold a JSON object, but holds a list"),
        (
            '{"eos_token_id": "</s>"}',
            '`eos_token_id` must be a whole number, a list of them or null, but is "</s>"',
        ),
        ('{"eos_token_id": [2, true]}', r"but is \[2, true\]; correct or remove it"),
    ],
)
def test_a_damaged_one_is_named_before_anything_is_written(
    content: str, fault: str, make_hf: MakeHF, tmp_path: Path
) -> None:
    hf = make_hf(CONFIG)
    (hf / "generation_config.json").write_text(content)
    with pytest.raises(WeightsError, match=f"{hf}/generation_config.json.*{fault}"):
        run(hf, tmp_path / "out", **SIZES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    assert read_generation(tmp_path) is None
