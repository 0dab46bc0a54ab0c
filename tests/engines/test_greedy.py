"""Tokens from a live policy are those of transformers' greedy search on the same weights, for every family
and layout of ranks; a prompt's completion depends on nothing else in the batch; no random number is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from backend_fixture import ALONE, StateDict, config_of, drawn
from backend_fixture import VALUES as THEIRS
from families_fixture import CONFIGS, build, theirs, window
from oracle import ModuleWeights
from parallel_fixture import Case, run_parallel

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.models.backend.model import StockAttention
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import CausalAttention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention

PROMPTS = [[1, 17, 40, 5, 22], [1, 9], [1, *range(3, 21)]]
TOKENS, LENGTH = 12, 31
"""The longest prompt has 19 tokens."""


def of_transformers(model: Any, ends: Sequence[int] = (2,)) -> list[list[int]]:
    """Each prompt alone, with a key-value cache."""
    from transformers import GenerationConfig

    settings: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(ends), pad_token_id=0
    )
    found = []
    for prompt in PROMPTS:
        made = model.generate(torch.tensor([prompt]), generation_config=settings)
        found.append(made[0, len(prompt) :].tolist())
    return found


def of_policy(engine: NativeEngine, ends: Sequence[int] = (2,), **settings: Any) -> list[list[int]]:
    return engine.greedy(PROMPTS, length=LENGTH, max_tokens=TOKENS, ends=ends, **settings)


def engine_of(config: DecoderConfig, attention: Any = None) -> NativeEngine:
    engine = NativeEngine(config, attention or BlockAttention())
    engine.load_weights(ModuleWeights(build(config)))
    return engine


USUAL = ("llama", "qwen2, windows", "gemma3")


@pytest.mark.parametrize("attention", [BlockAttention, DenseAttention])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.full) for n in CONFIGS]
)
def test_families(name: str, attention: Any) -> None:
    """With windows that prompts exceed, where there are any."""
    config = window(CONFIGS[name], 9)
    found = of_policy(engine_of(config, attention()))
    assert found == of_transformers(theirs(config, build(config)))
    assert len({token for row in found for token in row}) > 3, "the texts say something"


@pytest.mark.full
@pytest.mark.parametrize("name", [*THEIRS, *ALONE])
def test_families_of_transformers(name: str) -> None:
    config = config_of(name)
    model = drawn(config).eval()
    engine = NativeEngine(config, StockAttention() if name in ALONE else BlockAttention())
    engine.load_weights(StateDict(config, model))
    assert of_policy(engine) == of_transformers(model)


def test_ends_and_rows() -> None:
    """A completion ends with the first of its ends, and is the same alone and among others."""
    engine = engine_of(CONFIGS["llama"])
    whole = of_policy(engine, ends=())
    assert all(len(row) == TOKENS for row in whole)
    ends = {whole[0][3], whole[1][0]}
    found = of_policy(engine, ends=tuple(ends))
    for row, cut in zip(whole, found, strict=True):
        at = next((i for i, token in enumerate(row) if token in ends), TOKENS - 1)
        assert cut == row[: at + 1]
    alone = [engine.greedy([p], length=40, max_tokens=TOKENS, ends=()) for p in PROMPTS]
    assert [row for (row,) in alone] == whole
    assert of_policy(engine_of(CONFIGS["llama"], CausalAttention()), ends=()) == whole


def test_draws_from_the_logits() -> None:
    """``draw`` gets the logits of transformers' own forward pass, and decides; torch's generator stays."""
    config = CONFIGS["llama"]
    engine, model = engine_of(config), theirs(config, build(config))
    seen = []

    def second(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits.topk(2).indices[:, 1]

    state = torch.random.get_rng_state()
    found = of_policy(engine, ends=(), draw=second)
    assert torch.equal(state, torch.random.get_rng_state())
    for prompt, logits in zip(PROMPTS, seen[0], strict=True):
        wanted = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
        assert found[PROMPTS.index(prompt)][0] == int(wanted.topk(2).indices[1])


SPREADS = {
    "tp2 dp2 sp fsdp": Case(tensor=2, data=2, sequence_parallel=True, fsdp=True),
    "pp2 dp2, interleaved": Case(pipeline=2, data=2, virtual_pipeline=2),
    "pp2 tp2 sp": Case(pipeline=2, tensor=2, sequence_parallel=True, attention="blocks"),
    "tp4, 2 kv heads": Case(tensor=4, attention="blocks"),
}


def spread(rank: int, world: int, cases: Sequence[Case]) -> list[Any]:
    found: list[Any] = []
    for case in cases:
        engine = case.engine(rank)
        found.append(of_policy(engine, ends=()))
        if case.tensor > 1 or case.pipeline > 1:
            with pytest.raises(EngineError, match="logits"):
                of_policy(engine, draw=lambda logits: logits.argmax(-1))
    return found


@pytest.mark.full
def test_layouts_of_ranks() -> None:
    """Every rank has the tokens of one process."""
    cases = [replace(case, std=0.15, loss="orpo") for case in SPREADS.values()]
    (wanted,) = spread(0, 1, [Case(std=0.15, loss="orpo")])
    for found in run_parallel(4, spread, cases):
        assert found == [wanted] * len(cases)
