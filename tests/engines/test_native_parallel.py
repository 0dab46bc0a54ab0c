"""The native engine spread over processes against the plain model in one.

fp32 is held to the oracle; what the oracle does not have (bf16, losses that couple examples) to the same
engine in one process.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from matrix import asked, but_for
from oracle import ExampleSet
from parallel_fixture import (
    SHAPE,
    Case,
    Outcome,
    exact_gradients,
    merged,
    oracle,
    outcomes,
    run_case,
    run_parallel,
    worst,
)
from small_tokenizers import make_tokenizer

from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.token_sets import tokenize_records
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.parallelize import check_sizes
from nxdt_align.engines.native.settings import Precision
from nxdt_align.models.presets import LLAMA3_8B

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-6
"""Of a parameter's largest gradient."""
NORM_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-5
"""After 5 AdamW steps with active clipping."""
BF16_LOSS_TOLERANCE = 0.005
BF16_GRADIENT_TOLERANCE = 0.06
"""Relative L2 error of a parameter's gradient: ranks round partial sums to 8 bits before adding them."""
REAL_ROUNDING = 3e-6
"""The largest error that one process's own rounding in fp32 may give on real pairs, against float64."""

SPREADS = {
    "tp2": Case(tensor=2),
    "tp2 sp": Case(tensor=2, sequence_parallel=True),
    "tp4 sp, 2 kv heads": Case(tensor=4, sequence_parallel=True),
    "dp4": Case(data=4),
    "dp4 zero1": Case(data=4, zero1=True),
    "dp4 fsdp": Case(data=4, fsdp=True),
    "tp2 dp2 sp": Case(tensor=2, data=2, sequence_parallel=True),
    "tp2 dp2 sp zero1": Case(tensor=2, data=2, sequence_parallel=True, zero1=True),
    "tp2 dp2 sp fsdp": Case(tensor=2, data=2, sequence_parallel=True, fsdp=True),
}
BOTH_LOSSES = ("tp2", "tp2 sp", "tp4 sp, 2 kv heads", "dp4 zero1", "dp4 fsdp", "tp2 dp2 sp")
MAIN = {
    f"{name}, {loss}": replace(case, loss=loss)
    for name, case in SPREADS.items()
    for loss in ("dpo", "orpo")
    if loss == "dpo" or name in BOTH_LOSSES
}
TWO_BY_TWO = Case(tensor=2, data=2, sequence_parallel=True, steps=2)
EMPTY = Case(data=4, pairs=1, attention="blocks", min_micro_batches=1, steps=2)
TIED = replace(SHAPE, tie_word_embeddings=True)
FULL, SELECTIVE = ("full", ()), ("selective", ("CoreAttention", "LlamaMLP", "LlamaRMSNorm"))
VARIANTS = {
    "packed": replace(TWO_BY_TWO, layout="packed"),
    "padded": replace(TWO_BY_TWO, layout="none", fsdp=True),
    "rows without padding": replace(TWO_BY_TWO, attention="blocks"),
    "rows without padding, 1 kv head per rank": Case(tensor=4, attention="blocks", steps=2),
    "rows that tp does not divide": replace(TWO_BY_TWO, buckets=(97,)),
    "ranks without an example, zero1": replace(EMPTY, zero1=True),
    "ranks without an example, fsdp, tp": replace(EMPTY, data=2, tensor=2, sequence_parallel=True, fsdp=True),
    "full checkpointing": replace(TWO_BY_TWO, checkpointing=FULL, fsdp=True),
    "selective checkpointing": Case(
        tensor=4, sequence_parallel=True, checkpointing=SELECTIVE, layout="packed", steps=2
    ),
    "tied head": replace(TWO_BY_TWO, shape=TIED, fsdp=True),
    "tied head, no fsdp": replace(TWO_BY_TWO, shape=TIED),
}
COUPLED = {"aot": replace(TWO_BY_TWO, loss="aot", fsdp=True)}
BF16 = Precision(compute=torch.bfloat16)
LOW = {
    "bf16": replace(TWO_BY_TWO, precision=BF16),
    "bf16, 1 kv head per rank": Case(tensor=4, precision=BF16, steps=2),
    "bf16 fsdp": replace(TWO_BY_TWO, precision=BF16, fsdp=True),
    "bf16 zero1": replace(TWO_BY_TWO, precision=BF16, zero1=True),
    "autocast": replace(TWO_BY_TWO, precision=Precision(autocast=True), zero1=True),
}
COPIED = {
    "copied reference, fsdp": replace(TWO_BY_TWO, copies_reference=True, fsdp=True),
    "copied reference, zero1, bf16": replace(TWO_BY_TWO, copies_reference=True, zero1=True, precision=BF16),
}
CASES = {**MAIN, **VARIANTS, **COUPLED, **LOW, **COPIED}


USUAL = (
    *("tp4 sp, 2 kv heads, dpo", "dp4 zero1, orpo", "tp2 dp2 sp fsdp, dpo"),
    *("rows without padding, 1 kv head per rank", "ranks without an example, fsdp, tp"),
    "selective checkpointing",
)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    return outcomes(asked(request, CASES))


@cache
def wanted(loss: str, steps: int, pairs: int, tied: bool) -> Outcome:
    return oracle(Case(loss=loss, steps=steps, pairs=pairs, shape=TIED if tied else SHAPE))


def assert_as(
    ranks: list[Outcome],
    want: Outcome,
    tolerance: float = GRADIENT_TOLERANCE,
    final_tolerance: float = LOSS_TOLERANCE,
) -> None:
    for got in ranks:
        for loss in (got.loss, got.evaluated, got.restarted):
            assert abs(loss - want.loss) <= LOSS_TOLERANCE
        assert abs(got.final - want.final) <= final_tolerance
        assert got.norm == pytest.approx(want.norm, rel=NORM_TOLERANCE)
        assert got.parameter_norm == pytest.approx(want.parameter_norm, rel=NORM_TOLERANCE)
    gradient = worst(merged([r.gradients for r in ranks]), want.gradients, relative=True)
    weight = worst(merged([r.weights for r in ranks]), want.weights, relative=False)
    print(f"loss {abs(ranks[0].loss - want.loss):.1e}, gradient {gradient[0]:.1e}, weight {weight[0]:.1e}")
    assert gradient[0] <= tolerance, gradient
    assert weight[0] <= WEIGHT_TOLERANCE, weight


@pytest.mark.parametrize("name", but_for(USUAL, [*MAIN, *VARIANTS]))
def test_as_the_plain_model(found: dict[str, list[Outcome]], name: str) -> None:
    case = CASES[name]
    assert_as(found[name], wanted(case.loss, case.steps, case.pairs, case.shape.tie_word_embeddings))


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_examples(found: dict[str, list[Outcome]], name: str) -> None:
    assert_as(found[name], run_case(0, CASES[name].alone))


@pytest.mark.parametrize("name", but_for(("bf16, 1 kv head per rank", "autocast"), LOW))
def test_low_precision_as_in_one_process(found: dict[str, list[Outcome]], name: str) -> None:
    ranks, want = found[name], run_case(0, CASES[name].alone)
    for got in ranks:
        assert abs(got.loss - want.loss) <= BF16_LOSS_TOLERANCE
        assert abs(got.final - want.final) <= BF16_LOSS_TOLERANCE
        assert got.parameter_norm == pytest.approx(want.parameter_norm, rel=1e-6)
    gradients, weights = merged([r.gradients for r in ranks]), merged([r.weights for r in ranks])
    for parameter, wished in want.gradients.items():
        assert gradients[parameter].dtype == weights[parameter].dtype == torch.float32
        error = float((gradients[parameter] - wished).norm() / wished.norm())
        assert error <= BF16_GRADIENT_TOLERANCE, f"{parameter}: {error:.3f}"


@pytest.mark.parametrize("name", but_for(["copied reference, zero1, bf16"], COPIED))
def test_a_copied_reference_stays_where_the_policy_started(
    found: dict[str, list[Outcome]], name: str
) -> None:
    """Policy and reference start equal, so the loss is ln 2; once the policy has moved, it no longer is."""
    for got in found[name]:
        assert got.evaluated == pytest.approx(0.693147, abs=2e-6)
        assert all(torch.equal(policy, reference) for _, policy, reference in got.logps)
        assert got.final < 0.6931


@pytest.mark.parametrize("name", ["tp4 sp, 2 kv heads, dpo", "tp2 dp2 sp fsdp, dpo"])
def test_log_probabilities_of_policy_and_reference(found: dict[str, list[Outcome]], name: str) -> None:
    """Each record's are those of one process, on every rank that has its row."""
    want = {}
    (alone,) = [run_case(0, replace(CASES[name].alone, steps=1))]
    for records, *logps in alone.logps:
        for record, *values in zip(records.flatten().tolist(), *map(torch.flatten, logps), strict=True):
            want.setdefault(record, []).extend(values)
    seen = set()
    for got in found[name]:
        for records, *logps in got.logps:
            mine: dict[int, list[torch.Tensor]] = {}
            for record, *values in zip(records.flatten().tolist(), *map(torch.flatten, logps), strict=True):
                mine.setdefault(record, []).extend(values)
            for record in mine.keys() - {-1}:
                assert torch.allclose(torch.stack(mine[record]), torch.stack(want[record]), atol=2e-5)
            seen |= mine.keys() - {-1}
    assert seen == set(range(8))


def real_pairs(file: Path, count: int) -> ExampleSet:
    records = load_records([Source(str(file))], "pair", on_bad_record="drop", limit=count).records
    tokenized = tokenize_records(records, Tokenization(make_tokenizer(), Truncation(96, 48)), None)
    return ExampleSet([tokenized[i] for i in range(len(tokenized))])


def test_real_pairs(shared_data: Path) -> None:
    """Pairs of HH-RLHF, 48 prompt and up to 2 x 48 response tokens each, against gradients in float64.

    Seen: the ranks 1.7e-6 away, one process 2.1e-6, the plain model in fp32 2.4e-6. So fp32 itself is further
    than 1e-6 from the truth with that many tokens, and two right results are up to 2.7e-6 apart; the ranks
    may be at most 1e-6 further from the truth than one process is. The loss after two steps of AdamW, which
    makes small gradients' rounding large, likewise: seen 1.1e-6, one process 0.5e-6.
    """
    shape = replace(SHAPE, vocab_size=len(make_tokenizer()))
    case = Case(
        tensor=2,
        data=2,
        sequence_parallel=True,
        zero1=True,
        shape=shape,
        given=real_pairs(shared_data / "hh_harmless_base.jsonl.gz", 8),
        steps=2,
    )
    ranks = [outcome for (outcome,) in run_parallel(4, run_cases_of, case)]
    exact = exact_gradients(case)
    alone, want = run_case(0, case.alone), oracle(case)
    rounding, name = worst(alone.gradients, exact, relative=True)
    print(f"one process {rounding:.1e}")
    assert rounding <= REAL_ROUNDING, name
    drift = abs(alone.final - want.final)
    assert drift <= LOSS_TOLERANCE
    assert_as(ranks, replace(want, gradients=exact), rounding + GRADIENT_TOLERANCE, drift + LOSS_TOLERANCE)


def run_cases_of(rank: int, world: int, case: Case) -> list[Outcome]:
    return [run_case(rank, case)]


# Sizes


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (3, r"must divide num_attention_heads \(32\) and must divide intermediate_size \(14336\)"),
        (3, r"num_key_value_heads \(8\) or be a multiple of it, but is 3; 1, 2, 4, 8, 16, 32 would do"),
        (64, r"must divide num_attention_heads \(32\), but is 64; 1, 2, 4, 8, 16, 32 would do"),
    ],
)
def test_sizes_that_do_not_divide(tensor: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_sizes(LLAMA3_8B, tensor)


def test_vocabulary_that_does_not_divide() -> None:
    with pytest.raises(EngineError, match=r"must divide vocab_size \(128257\), but is 8; 1 would do"):
        check_sizes(replace(LLAMA3_8B, vocab_size=128257), 8)
