"""Adapters on models that transformers computes, against PEFT's own layers in transformers' own model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_adapters import FLOAT64, BackendCase, exact_gradients, peft_oracle, run_cases
from backend_fixture import config_of
from parallel_fixture import Outcome, merged, worst
from rank_processes import run_parallel

from nxdt_align.engines.native.settings import Precision

pytest.importorskip("peft")

TOLERANCE = 1e-6
"""Of the loss, and of each factor's gradient relative to its largest entry, in float64."""
WEIGHT_TOLERANCE = 1e-5
"""After 5 AdamW steps with active clipping."""
KINDS = {"LoRA": (), "rsLoRA": (("rslora", True),), "DoRA": (("dora", True),)}
ROUNDS = "DoRA"
"""Its norms of weights round more: on an Intel CPU PEFT's own gradients in float32 are 0.8e-6 and 0.9e-6 of
the largest off float64's, and ours 1.0e-6 and 1.1e-6. So the engine computes it in float64, too."""
CASES = {
    f"{name}, {kind}": BackendCase(
        config_of(name), settings, steps=5, precision=FLOAT64 if kind == ROUNDS else Precision()
    )
    for name in ("gpt2", "phi")
    for kind, settings in KINDS.items()
}

USUAL = ("gpt2, DoRA", "phi, LoRA")


def assert_as_peft(case: BackendCase, ranks: list[Outcome]) -> None:
    plain = replace(case, data=1, kind="none", checkpointing=None, precision=Precision())
    want, exact = peft_oracle(plain), exact_gradients(replace(plain, steps=1))
    rounding = 0.0
    if case.data > 1 and case.precision != FLOAT64:
        # Of one process, which depends on the CPU: over ranks it must be no more than that and the tolerance.
        rounding = worst(replace(plain, steps=1).run().gradients, exact, relative=True)[0]
    for got in ranks:
        assert abs(got.loss - want.loss) <= TOLERANCE
        assert abs(got.evaluated - want.loss) <= TOLERANCE
        assert abs(got.final - want.final) <= TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=TOLERANCE)
    gradient = worst(merged([rank.gradients for rank in ranks]), exact, relative=True)
    weight = worst(merged([rank.weights for rank in ranks]), want.weights, relative=False)
    assert gradient[0] <= TOLERANCE + rounding, gradient
    assert weight[0] <= WEIGHT_TOLERANCE, weight


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.full) for name in CASES]
)
def test_as_peft_in_transformers_own_model(name: str) -> None:
    assert_as_peft(CASES[name], [CASES[name].run()])


SAVED = (("modules_to_save", ("ln_f", "h.1.ln_1", "wpe")), ("target_modules", ("c_attn", "mlp.c_proj")))
SPREADS = {
    "gpt2, modules to save, zero1": BackendCase(config_of("gpt2"), SAVED, data=2, kind="zero1", steps=2),
    "phi, DoRA, fsdp": BackendCase(
        config_of("phi"), KINDS["DoRA"], data=2, kind="fsdp", checkpointing="full", steps=2
    ),
    "gpt2, DoRA, data parallel": BackendCase(
        config_of("gpt2"), KINDS["DoRA"], data=2, steps=2, precision=FLOAT64
    ),
    "gpt2, modules to save, fsdp": BackendCase(config_of("gpt2"), SAVED, data=2, kind="fsdp", steps=2),
    "glm, modules to save, fsdp": BackendCase(
        config_of("glm"),
        (("modules_to_save", ("lm_head", "embed_tokens", "norm")),),
        data=2,
        kind="fsdp",
        steps=2,
    ),
}


@pytest.mark.full
def test_as_peft_over_two_ranks() -> None:
    found = run_parallel(2, run_cases, list(SPREADS.values()))
    for index, case in enumerate(SPREADS.values()):
        assert_as_peft(case, [rank[index] for rank in found])


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3"])
def test_bf16_has_float32_factors_and_a_bf16_base(name: str) -> None:
    """What transformers keeps in float32, a router's balancing bias, stays so, and is not trained."""
    case = BackendCase(config_of(name), precision=Precision(compute=torch.bfloat16))
    engine = case.engine()
    kept = case.config.float32_weights
    assert {p.dtype for n, p in engine._policy.frozen() if n not in kept} == {torch.bfloat16}
    assert {p.dtype for n, p in engine._policy.frozen() if n in kept} <= {torch.float32}
    assert all(p.dtype == torch.float32 for _, p in engine.named_parameters())
    assert {n.rpartition(".")[2] for n, _ in engine.named_parameters()} == {"lora_A", "lora_B"}
