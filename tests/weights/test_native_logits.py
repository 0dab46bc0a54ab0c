"""NxD's shards, converted from transformers' folders, in the native engine spread over four processes: the
logits are those of transformers, whatever sizes the shards were cut for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import run
from matrix import asked, but_for
from rank_processes import run_parallel
from shard_loading import CASES, WORLD, Scores, all_scores, random_ids
from torch import Tensor

from nxdt_align.models.presets import DecoderConfig
from nxdt_align.weights.nxdt import NxDTFolder

TOLERANCE = 1e-5
"""Absolute, and relative to each logit."""


def transformers_logits(config: DecoderConfig, folder: Path) -> Tensor:
    """Of a random model that is then saved in ``folder``."""
    import transformers

    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(transformers.AutoConfig.for_model(**config.to_hf_dict()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    model.save_pretrained(folder)
    with torch.no_grad():
        logits: Tensor = model(random_ids(config)).logits
    return logits


Found = dict[str, tuple[Tensor, list[Scores]]]
USUAL = (
    *("tp2, separate 1", "tp4, split 1", "tp4, split 2, tied", "pp2, fused 1", "pp2 tp2, fused 2"),
    "tp2, coalesced 1",
)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Case -> transformers' logits, and each rank's."""
    folder = tmp_path_factory.mktemp("shards")
    wanted, cases = [], asked(request, CASES)
    for name, case in cases.items():
        shards = folder / name / "pretrained_ckpt"
        wanted.append(transformers_logits(case.config, folder / name / "hf"))
        run(folder / name / "hf", shards, **case.sizes)
        held = NxDTFolder(shards, case.config).partition
        assert (held.qkv, held.kv_multiplier) == (case.qkv, case.sizes["kv_multiplier"])
    ranks = run_parallel(WORLD, all_scores, folder, cases)
    return {name: (wanted[i], [rank[i] for rank in ranks]) for i, name in enumerate(cases)}


@pytest.mark.parametrize("name", but_for(USUAL, CASES))
def test_logits_of_the_engine_are_those_of_transformers(name: str, found: Found) -> None:
    parallel, (wanted, ranks) = CASES[name].parallel, found[name]
    assert wanted.std() > 0.5, "weights so small that their places hardly matter"
    logits = [values for seen, _ in ranks for values in seen]
    assert len(logits) == WORLD // parallel.pipeline
    for values in logits:
        torch.testing.assert_close(values, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    targets = random_ids(CASES[name].config)[:, 1:]
    tokens = wanted[:, :-1].log_softmax(-1).gather(2, targets[:, :, None]).squeeze(2)
    for _, logps in ranks:
        torch.testing.assert_close(logps, tokens.sum(1), rtol=TOLERANCE, atol=TOLERANCE)
