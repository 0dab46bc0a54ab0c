"""Adapters on the native engine, spread over processes, against PEFT's own layers on the plain model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from adapter_fixture import AdapterCase, exact_gradients, lora, outcomes, peft_oracle, run_case
from parallel_fixture import Outcome, merged, worst
from torch import Tensor

from nxdt_align.engines.native.settings import Precision
from nxdt_align.models.adapters import AdapterSpec

pytest.importorskip("peft")

TOLERANCE = 1e-6
"""Of the loss and the norms, and of each factor's gradient relative to its largest entry, in float64."""
WEIGHT_TOLERANCE = 1e-5
"""After 5 AdamW steps with active clipping."""
BF16_TOLERANCE = 0.06
"""Relative L2 error of a factor's gradient: ranks round partial sums to 8 bits before adding them."""

SPREADS = {
    "alone": AdapterCase(),
    "tp2": AdapterCase(tensor=2),
    "tp2 sp": AdapterCase(tensor=2, sequence_parallel=True),
    "tp4 sp, 2 kv heads": AdapterCase(tensor=4, sequence_parallel=True),
    "dp4": AdapterCase(data=4),
    "dp4 zero1": AdapterCase(data=4, zero1=True),
    "dp4 fsdp": AdapterCase(data=4, fsdp=True),
    "tp2 dp2 sp": AdapterCase(tensor=2, data=2, sequence_parallel=True),
    "tp2 dp2 sp zero1": AdapterCase(tensor=2, data=2, sequence_parallel=True, zero1=True),
    "tp2 dp2 sp fsdp": AdapterCase(tensor=2, data=2, sequence_parallel=True, fsdp=True),
    "pp2": AdapterCase(pipeline=2),
    "pp2 x 2 chunks": AdapterCase(pipeline=2, virtual_pipeline=2, attention="blocks"),
    "pp4": AdapterCase(pipeline=4, min_micro_batches=4),
    "pp2 dp2 zero1": AdapterCase(pipeline=2, data=2, zero1=True),
    "pp2 dp2 fsdp": AdapterCase(pipeline=2, data=2, fsdp=True),
    "pp2 x 2 chunks dp2 fsdp": AdapterCase(pipeline=2, virtual_pipeline=2, data=2, fsdp=True),
    "pp2 tp2 sp": AdapterCase(pipeline=2, tensor=2, sequence_parallel=True),
}
KINDS = {"LoRA": lora(), "rsLoRA": lora(rslora=True), "DoRA": lora(dora=True)}
DEFAULT = ("alone", "tp2 sp")
"""Layouts of the default run; LoRA's and DoRA's alone, as rsLoRA is another scale."""
SAVED = lora(modules_to_save=["embed_tokens", "lm_head", "norm", "input_layernorm"])
FULL, SELECTIVE = ("full", ()), ("selective", ("CoreAttention", "LlamaMLP", "LlamaRMSNorm"))
VARIANTS = {
    "modules to save, tp2 dp2 sp fsdp": replace(SPREADS["tp2 dp2 sp fsdp"], spec=SAVED, steps=2),
    "modules to save, norms recomputed": replace(
        SPREADS["tp2 sp"], spec=SAVED, checkpointing=SELECTIVE, steps=2
    ),
    "compiled": replace(SPREADS["alone"], compiled="aot_eager", steps=2),
    "full checkpointing": replace(SPREADS["tp2 dp2 sp fsdp"], checkpointing=FULL, steps=2),
    "some layers": replace(
        SPREADS["pp2 tp2 sp"], spec=lora(target_modules=["model.layers.[02].*(q|v)_proj", "o_proj"]), steps=2
    ),
    "a projection alone": replace(SPREADS["tp2 sp"], spec=lora(target_modules=["down_proj"]), steps=2),
}


def matrix(names: tuple[str, ...], kinds: tuple[str, ...]) -> dict[str, AdapterCase]:
    return {f"{name}, {kind}": replace(SPREADS[name], spec=KINDS[kind]) for name in names for kind in kinds}


CASES = matrix(DEFAULT, ("LoRA", "DoRA"))
OTHERS = matrix(tuple(SPREADS), tuple(KINDS)) | VARIANTS


@pytest.fixture(scope="module")
def trained() -> dict[str, list[Outcome]]:
    return outcomes(CASES)


@pytest.fixture(scope="module")
def others() -> dict[str, list[Outcome]]:
    return outcomes(OTHERS)


@cache
def wanted(spec: AdapterSpec, steps: int) -> tuple[Outcome, dict[str, Tensor]]:
    case = AdapterCase(spec=spec, steps=steps)
    return peft_oracle(case), exact_gradients(case)


def assert_as_peft(case: AdapterCase, ranks: list[Outcome]) -> None:
    """Loss, norm, each factor's gradient on its ranks, and the factors after the steps."""
    want, exact = wanted(case.spec, case.steps)
    for got in ranks:
        assert abs(got.loss - want.loss) <= TOLERANCE
        assert abs(got.evaluated - want.loss) <= TOLERANCE
        assert abs(got.final - want.final) <= TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=TOLERANCE)
        assert got.parameter_norm == pytest.approx(want.parameter_norm, rel=TOLERANCE)
    gradient = worst(merged([r.gradients for r in ranks]), exact, relative=True)
    weight = worst(merged([r.weights for r in ranks]), want.weights, relative=False)
    assert gradient[0] <= TOLERANCE, gradient
    assert weight[0] <= WEIGHT_TOLERANCE, weight


@pytest.mark.parametrize("name", CASES)
def test_as_peft_on_the_plain_model(trained: dict[str, list[Outcome]], name: str) -> None:
    assert_as_peft(CASES[name], trained[name])


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_as_peft_in_every_layout(others: dict[str, list[Outcome]], name: str) -> None:
    assert_as_peft(OTHERS[name], others[name])


def test_adapters_off_are_the_start_to_the_last_bit_whatever_the_factors() -> None:
    case = AdapterCase()
    engine = case.engine(0)
    batches = case.micro_batches(0, case.examples())
    before = [engine.response_logps(batch, reference=True) for batch in batches]
    with torch.no_grad():
        for _, parameter in engine.named_parameters():
            parameter.add_(1.0)
    after = [engine.response_logps(batch, reference=True) for batch in batches]
    plain = super(AdapterCase, case).engine(0)
    assert all(
        a.equal(b) and a.equal(plain.response_logps(c))
        for a, b, c in zip(before, after, batches, strict=True)
    )


DROPOUT = AdapterCase(spec=lora(dropout=0.3), steps=2)
DROPOUTS = {
    "tp2": replace(DROPOUT, tensor=2),
    "tp4, 2 kv heads": replace(DROPOUT, tensor=4, checkpointing=FULL),
    "fsdp": replace(DROPOUT, data=2, fsdp=True, steps=1),
    "pp2": replace(DROPOUT, pipeline=2, checkpointing=FULL, steps=1),
}


@pytest.mark.full
def test_dropout_is_that_of_one_process_over_tensor_parallel_ranks_and_is_recomputed_alike() -> None:
    """A mask of divided inputs is cut from the whole; the same seed gives the same steps. What other layouts
    draw differs, and leaves evaluation and reference alone."""
    found, alone = outcomes(DROPOUTS), run_case(0, DROPOUT)
    assert (
        run_case(0, DROPOUT)
        .gradients["model.layers.0.mlp.down_proj.lora_A"]
        .equal(alone.gradients["model.layers.0.mlp.down_proj.lora_A"])
    )
    without = run_case(0, replace(DROPOUT, spec=lora()))
    assert abs(alone.loss - without.loss) > 1e-5
    assert alone.evaluated == without.evaluated
    for name in ("tp2", "tp4, 2 kv heads"):
        for got in found[name]:
            assert abs(got.loss - alone.loss) <= TOLERANCE
            assert worst(got.gradients, alone.gradients, relative=True)[0] <= 5e-6
            assert worst(got.weights, alone.weights, relative=False)[0] <= WEIGHT_TOLERANCE
    for name in ("fsdp", "pp2"):
        assert all(abs(got.evaluated - alone.evaluated) <= TOLERANCE for got in found[name])


LOW = {
    "bf16": replace(SPREADS["tp2 dp2 sp"], precision=Precision(compute=torch.bfloat16), steps=1),
    "bf16 fsdp": replace(SPREADS["tp2 dp2 sp fsdp"], precision=Precision(compute=torch.bfloat16), steps=1),
    "bf16 zero1": replace(SPREADS["dp4 zero1"], precision=Precision(compute=torch.bfloat16), steps=1),
}


@pytest.mark.full
def test_bf16_has_float32_factors_and_a_bf16_base() -> None:
    _, exact = wanted(KINDS["LoRA"], 1)
    for name, ranks in outcomes(LOW).items():
        got = merged([r.gradients for r in ranks])
        assert all(gradient.dtype == torch.float32 for gradient in got.values()), name
        errors = {n: float((got[n] - exact[n]).norm() / exact[n].norm()) for n in exact}
        assert sorted(errors.values())[len(errors) // 2] <= BF16_TOLERANCE, (name, errors)
    engine = replace(LOW["bf16"], tensor=1, data=1, sequence_parallel=False).engine(0)
    assert all(p.dtype == torch.bfloat16 for _, p in engine._policy.frozen())


def test_a_pipeline_stage_without_a_weight_to_train_is_refused() -> None:
    case = AdapterCase(pipeline=2, spec=lora(target_modules=["model.layers.0.*"]))
    with pytest.raises(AssertionError, match="must leave each pipeline stage a weight to train"):
        outcomes({"": case})
