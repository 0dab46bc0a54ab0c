"""The NxD engine's frozen reference in a dtype of its own, beside a policy in another, against the plain
model in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nxd_fixture import Case, dataset, engine, examples, objective, plain, require_nxd, run_ranks, weights
from oracle import pair_logps
from torch.nn import functional as F

from nxdt_align.batch import Batch
from nxdt_align.engines.nxd.settings import Precision
from nxdt_align.models.decoder import Decoder

pytestmark = pytest.mark.nxd
CASES = [Case(tp=2, sp=True), Case(pp=2)]
FLOAT, LOW = Precision(), Precision(torch.bfloat16, masters=True)
MIXES = {"float32 reference": (LOW, FLOAT), "bf16 reference": (FLOAT, LOW)}
"""Precision of the policy, and of the reference."""
BETA = 0.1
Scores = dict[tuple[int, int], float]
"""(pair, chosen or rejected) -> log-probability of the response, nats."""


def asked(case: Case, mix: str) -> dict[str, Any]:
    policy, reference = MIXES[mix]
    built = engine(case, precision=policy, reference_precision=reference)
    built.load_weights(weights(0))
    batches = dataset(built.topology, "none")[tuple(range(len(examples())))]
    built.load_reference(None)
    copied = _scores(batches, [built.response_logps(b, reference=True) for b in batches])
    built.load_reference(weights(1))
    return {
        "policy": _scores(batches, [built.response_logps(b) for b in batches]),
        "copied": copied,
        "other": _scores(batches, [built.response_logps(b, reference=True) for b in batches]),
        "loss": float(built.step(batches, objective("dpo")).loss),
    }


def _scores(batches: list[Batch], logps: list[torch.Tensor]) -> Scores:
    found = {}
    for batch, values in zip(batches, logps, strict=True):
        for row, slot in batch.slot_valid.nonzero().tolist():
            place = int(batch.record_index[row, slot]), int(batch.slot_role[row, slot])
            found[place] = float(values[row, slot])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Case, str], Any]:
    require_nxd()
    keys = [(case, mix) for case in CASES for mix in MIXES]
    ranks = run_ranks(2, [(asked, key) for key in keys], tmp_path_factory.mktemp("ranks"))
    return dict(zip(keys, ranks, strict=True))


@torch.no_grad()
def exact(model: Decoder) -> Scores:
    pairs = [pair_logps(model, example) for example in examples().examples]
    return {(i, role): float(value) for i, pair in enumerate(pairs) for role, value in enumerate(pair)}


def largest_error(got: Scores, wanted: Scores) -> float:
    """Nats, relative to the log-probability."""
    assert got.keys() == wanted.keys()
    return max(abs(got[place] - value) / abs(value) for place, value in wanted.items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_float32_reference_is_exact_beside_a_bf16_policy(results: Any, case: Case) -> None:
    """2e-6: float32's rounding. A copy of the policy is one of its master weights. bf16 has 8 bits: the
    policy is off by 1e-4 and more."""
    for rank in results[case, "float32 reference"]:
        assert largest_error(rank["other"], exact(plain(1))) <= 2e-6
        assert largest_error(rank["copied"], exact(plain(0))) <= 2e-6
        assert 1e-4 < largest_error(rank["policy"], exact(plain(0))) < 2e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bf16_reference_leaves_a_float32_policy_exact(results: Any, case: Case) -> None:
    for rank in results[case, "bf16 reference"]:
        assert largest_error(rank["policy"], exact(plain(0))) <= 2e-6
        for key, seed in (("other", 1), ("copied", 0)):
            assert 1e-4 < largest_error(rank[key], exact(plain(seed))) < 2e-2


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_that_of_both(results: Any, case: Case, mix: str) -> None:
    """DPO by hand from the two models' log-probabilities."""
    for rank in results[case, mix]:
        policy, reference = rank["policy"], rank["other"]
        ratios = {place: policy[place] - reference[place] for place in policy}
        margins = torch.tensor([ratios[pair, 0] - ratios[pair, 1] for pair in range(len(examples()))])
        assert rank["loss"] == pytest.approx(float(-F.logsigmoid(BETA * margins).mean()), rel=1e-5)
