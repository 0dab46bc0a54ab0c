"""Models of every family on engine nxd, over tensor-parallel ranks and stages, against the plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_fixture import CONFIGS, window
from nxd_families import expected, off_the_plain_model, step
from nxd_fixture import Case, plain, require_nxd, run_ranks, start

from nxdt_align.models.presets import DecoderConfig
from nxdt_align.weights.nxdt import NxDTFolder

pytestmark = pytest.mark.nxd

WIDE = {name: replace(window(config, 24), num_attention_heads=8) for name, config in CONFIGS.items()}
"""Eight query heads to two kv heads; windows that some pairs exceed."""
SPREADS = {
    "tp2": Case(tp=2),
    "tp2 sp": Case(tp=2, sp=True),
    "tp2 sp, fused": Case(tp=2, sp=True, qkv="fused"),
    "tp2, separate": Case(tp=2, qkv="separate", sp=True),
    "tp4, kv copies": Case(tp=4, kv=2),
    "tp4 sp, kv copies": Case(tp=4, kv=2, sp=True),
    "tp4 sp, kv copies, fused": Case(tp=4, kv=2, sp=True, qkv="fused"),
    "tp2, coalesced": Case(tp=2, qkv="coalesced", sp=True),
    "tp2 pp2 sp": Case(tp=2, pp=2, sp=True),
    "pp2": Case(pp=2),
    "tp2 dp2": Case(tp=2, dp=2, sp=True),
}
USUAL = ("tp2 sp", "tp4 sp, kv copies", "tp2 pp2 sp")
TOLERANCE = 2e-5
"""Of a gradient's largest entry."""


def config_of(name: str, spread: str) -> DecoderConfig:
    """As many kv heads as query heads where one layer has all; a head of its own in a pipeline."""
    case, config = SPREADS[spread], WIDE[name]
    heads = config.num_attention_heads if case.qkv == "coalesced" else config.num_key_value_heads
    tied = config.tie_word_embeddings and case.pp == 1
    return replace(config, num_key_value_heads=heads, tie_word_embeddings=tied)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """(spread, family) -> what the ranks found, of the cases that this session is asked for."""
    require_nxd()
    items = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params for item in items if hasattr(item, "callspec")]
    pairs = [(p["spread"], p["name"]) for p in asked if "spread" in p]
    results = {}
    for world in sorted({SPREADS[spread].world for spread, _ in pairs}):
        here = [pair for pair in pairs if SPREADS[pair[0]].world == world]
        jobs = [(step, (SPREADS[pair[0]], config_of(pair[1], pair[0]), _loss(*pair))) for pair in here]
        ranks = run_ranks(world, jobs, tmp_path_factory.mktemp("ranks") / str(world))
        results |= dict(zip(here, ranks, strict=True))
    return results


def _loss(spread: str, name: str) -> str:
    return "dpo" if spread == "tp2 sp" else "orpo"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "spread", [pytest.param(s, marks=() if s in USUAL else pytest.mark.full) for s in SPREADS]
)
def test_as_the_plain_model(found: dict[str, Any], spread: str, name: str) -> None:
    case, config, loss = SPREADS[spread], config_of(name, spread), _loss(spread, name)
    ranks = found[spread, name]
    assert off_the_plain_model(case, config, loss, ranks) <= TOLERANCE
    _, wanted = expected(config, loss)
    norm = torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt()
    for rank in ranks:
        torch.testing.assert_close(rank["norm"], norm, rtol=1e-5, atol=0)


def saved(name: str, folder: str) -> None:
    config = config_of(name, "tp4 sp, kv copies")
    start(SPREADS["tp4 sp, kv copies"], config).save(Path(folder), None, {})


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_the_converter_reads_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Biases and norms of heads that have copies, too."""
    require_nxd()
    config = config_of(name, "tp4 sp, kv copies")
    run_ranks(4, [(saved, (name, str(tmp_path / "saved")))], tmp_path / "ranks")
    source = NxDTFolder(tmp_path / "saved", config)
    for key, parameter in plain(0, config).named_parameters():
        assert source.read(key).equal(parameter), key
