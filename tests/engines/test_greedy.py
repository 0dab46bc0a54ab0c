"""Tokens from a live policy are those of transformers' greedy search on the same weights, for every family
and layout of ranks; a prompt's completion depends on nothing else in the batch; no random number is drawn.
One process keeps keys and values, and what it computes is what whole passes compute."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from adapter_fixture import AdapterCase, lora
from backend_fixture import ALONE, StateDict, config_of, drawn
from backend_fixture import VALUES as THEIRS
from families_fixture import CONFIGS, build, theirs, window
from oracle import ModuleWeights
from parallel_fixture import LOSSES, Case, adamw, run_parallel
from torch import Tensor

from nxdt_align.batch import Topology
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.settings import Precision
from nxdt_align.engines.spread import SpreadEngine
from nxdt_align.losses.objective import GlobalMeanObjective
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


# One process with a cache, against whole passes


@contextmanager
def tokens_of_passes(engine: NativeEngine) -> Iterator[list[int]]:
    """How many go through the first layer in each forward pass meanwhile."""
    passes: list[int] = []
    layer = engine._policy.whole.decoder.layers()[0]
    hook = layer.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[:-1].numel()))
    try:
        yield passes
    finally:
        hook.remove()


def whole_passes() -> Any:
    return mock.patch.object(NativeEngine, "_rows_of_texts", SpreadEngine._rows_of_texts)


def told(engine: NativeEngine, *, forced: bool = False) -> tuple[list[list[int]], Tensor]:
    """Tokens, and the logits of every pass, (passes, prompts, V). ``forced``: the tokens are given, so that
    logits which are rounded otherwise are still of the same texts."""
    logits: list[Tensor] = []

    def note(found: Tensor) -> Tensor:
        logits.append(found)
        return torch.arange(len(found)) + 5 * len(logits) if forced else found.argmax(-1)

    return of_policy(engine, ends=(), draw=note), torch.stack(logits)


def compare(engine: NativeEngine, *, first: int, tolerance: float = 1e-5) -> Tensor:
    """With the cache, in passes of ``first`` tokens and then one per prompt, as by whole passes; logits."""
    forced = tolerance > 1e-5
    state = torch.random.get_rng_state()
    with tokens_of_passes(engine) as passes:
        tokens, logits = told(engine, forced=forced)
        assert passes == [first] + [len(PROMPTS)] * (TOKENS - 1)
        passes.clear()
        with whole_passes():
            wanted, wanted_logits = told(engine, forced=forced)
        assert len(passes) == TOKENS and min(passes) > len(PROMPTS)
    assert torch.equal(state, torch.random.get_rng_state())
    assert tokens == wanted
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=tolerance)
    return logits


LONGEST, STATIC = len(PROMPTS) * max(map(len, PROMPTS)), len(PROMPTS) * LENGTH


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.full) for n in CONFIGS]
)
def test_a_cache_is_whole_passes(name: str) -> None:
    compare(engine_of(window(CONFIGS[name], 9)), first=LONGEST)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "gemma2" else pytest.mark.full) for n in THEIRS]
)
def test_a_cache_of_transformers_models(name: str) -> None:
    config = config_of(name, **({"sliding_window": 9} if "sliding_window" in THEIRS[name] else {}))
    engine = NativeEngine(config, BlockAttention())
    engine.load_weights(StateDict(config, drawn(config).eval()))
    compare(engine, first=LONGEST)


POLICIES: dict[str, Case] = {
    "lora with dropout": AdapterCase(std=0.15, spec=lora(dropout=0.5)),
    "bf16 with masters": Case(std=0.15, attention="blocks", precision=Precision(compute=torch.bfloat16)),
    "autocast": Case(std=0.15, attention="blocks", precision=Precision(autocast=True)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_cache_follows_the_policy(name: str) -> None:
    """Right behind an optimizer step, which the masters and the adapters have and the cache must see."""
    case = POLICIES[name]
    engine = case.engine(0)
    first = STATIC if case.attention == "dense" else LONGEST
    tolerance = 1e-5 if case.precision == Precision() else 0.1
    before = compare(engine, first=first, tolerance=tolerance)
    optimizer = adamw([parameter for _, parameter in engine.named_parameters()])
    optimizer.param_groups[0]["lr"] = 0.05
    for _ in range(2):  # the first moves an adapter's second factor alone, from 0
        engine.step(case.micro_batches(0, case.examples()), GlobalMeanObjective(LOSSES[case.loss]))
        optimizer.step()
    after = compare(engine, first=first, tolerance=tolerance)
    assert float((after[0] - before[0]).abs().max()) > 0.5


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_reference_answers(is_kept: bool) -> None:
    """With a cache of its own: the tokens of the policy's start, wherever the policy has gone. A second
    model goes with ``drop_reference``; with adapters (here not 0 at the start) it is the policy's, with them
    off."""
    case = AdapterCase(std=0.15) if is_kept else Case(std=0.15, attention="blocks")
    engine = case.engine(0)
    engine.load_reference(None)
    start = of_policy(engine, reference=is_kept)
    optimizer = adamw([parameter for _, parameter in engine.named_parameters()])
    optimizer.param_groups[0]["lr"] = 0.05
    for _ in range(2):
        engine.step(case.micro_batches(0, case.examples()), GlobalMeanObjective(LOSSES[case.loss]))
        optimizer.step()
    trained = of_policy(engine)
    model = engine._frozen
    assert model is not None and (model is engine._policy) is is_kept
    assert of_policy(engine, reference=True) == start != trained
    with whole_passes():
        assert of_policy(engine, reference=True) == start
    assert of_policy(engine) == trained
    kept = weakref.ref(model.whole)
    del model
    engine.drop_reference()
    gc.collect()
    assert (kept() is None) is not is_kept


def test_a_cache_ends_with_its_passes() -> None:
    """Also where something raises: the model attends as before, and nothing that was kept is left."""
    engine = engine_of(CONFIGS["llama"])
    scorer = engine._policy.whole
    layers: Any = scorer.decoder.layers()
    own, kept = scorer.attention, []

    def stop(logits: Tensor) -> Tensor:
        assert layers[1].self_attn.core_attn.attend is scorer.attention is not own
        kept.append(weakref.ref(scorer.attention))
        if len(kept) > 1:
            raise KeyError("the user's own")
        return logits.argmax(-1)

    with pytest.raises(KeyError) as caught:
        of_policy(engine, draw=stop)
    assert scorer.attention is own and all(layer.self_attn.core_attn.attend is own for layer in layers)
    del caught
    assert kept[0]() is None


def alone_with(**settings: Any) -> NativeEngine:
    return NativeEngine(CONFIGS["llama"], DenseAttention(), groups=Groups(), **settings)


WHOLE: dict[str, Callable[[], NativeEngine]] = {
    "compiled": lambda: Case(compiled="eager").engine(0),
    "several processes": lambda: alone_with(topology=Topology(world_size=2, data_parallel_size=2)),
    "another device": lambda: alone_with(device="meta"),
    "the model's own attention": lambda: NativeEngine(config_of("stablelm"), StockAttention()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_passes_elsewhere(name: str) -> None:
    """Each of one shape."""
    with WHOLE[name]()._rows_of_texts(LENGTH) as rows:
        sizes = [rows([[*prompt, *range(more)] for prompt in PROMPTS]).input_ids.shape for more in range(3)]
    assert sizes == [(len(PROMPTS), LENGTH)] * 3


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
