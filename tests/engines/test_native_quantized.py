"""QLoRA on the native engine: a base in 4 bits, against PEFT on bitsandbytes' own layers and on a plain
model of the dequantised weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import Mock

import adapter_fixture
import pytest
import torch
from adapter_fixture import (
    AdapterCase,
    Dequantized,
    StartedAdapters,
    exact_gradients,
    outcomes,
    peft_oracle,
    qlora,
    run_case,
)
from parallel_fixture import SHAPE, Outcome, merged, worst
from torch import Tensor, nn

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.model import check_parallel
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.models import nf4
from nxdt_align.models.adapters import quantized_layers
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.sharding import MAGNITUDE

pytest.importorskip("peft")
bitsandbytes: Any = pytest.importorskip("bitsandbytes")

TOLERANCE = 1e-6
"""Of loss and norms, and of each factor's gradient relative to its largest entry, in float64."""
WEIGHT_TOLERANCE = 1e-5
LIBRARY_TOLERANCE = 1e-5
"""Of factors' gradients, where the library computes in float32 too."""


@dataclass(frozen=True)
class ByLibrary(AdapterCase):
    """The plain model with bitsandbytes' layers, for which PEFT has adapters of their own."""

    def model(self, seed: int) -> Decoder:
        model = super().model(seed)
        modules = dict(model.named_modules())
        for path in quantized_layers(self.shape, self.spec):
            plain, (parent, _, name) = modules[path], path.rpartition(".")
            assert isinstance(plain, nn.Linear)
            layer = bitsandbytes.nn.Linear4bit(
                *plain.weight.shape[::-1], bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            weight = plain.weight.detach().clone()
            layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            setattr(modules[parent], name, layer.to("cpu"))
        return model


KINDS = {
    "LoRA": qlora(),
    "DoRA": qlora(dora=True),
    "some layers, and a module whole": qlora(
        target_modules=["q_proj"], modules_to_save=["o_proj", "lm_head"]
    ),
}
CASES = {name: AdapterCase(spec=spec, steps=2) for name, spec in KINDS.items()}
FSDP = {"dp2 fsdp": AdapterCase(data=2, fsdp=True, spec=qlora(), checkpointing=("full", ()), steps=2)}
OTHERS = {
    "dp2": AdapterCase(data=2, spec=qlora(), steps=2),
    "dp2 zero1": AdapterCase(data=2, zero1=True, spec=qlora(), steps=2),
    "dp2 fsdp, some layers": AdapterCase(
        data=2, fsdp=True, spec=KINDS["some layers, and a module whole"], steps=2
    ),
}
WHOLE_BLOCKS = replace(SHAPE, hidden_size=64, intermediate_size=128, head_dim=16)
"""Rows of whole blocks, as the library's own products on a CPU need them."""


def assert_as(want: Outcome, exact: dict[str, Tensor], ranks: list[Outcome]) -> None:
    for got in ranks:
        assert abs(got.loss - want.loss) <= TOLERANCE
        assert abs(got.evaluated - want.loss) <= TOLERANCE
        assert abs(got.final - want.final) <= TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=TOLERANCE)
    gradient = worst(merged([r.gradients for r in ranks]), exact, relative=True)
    weight = worst(merged([r.weights for r in ranks]), want.weights, relative=False)
    assert gradient[0] <= TOLERANCE, gradient
    assert weight[0] <= WEIGHT_TOLERANCE, weight


def wanted(case: AdapterCase) -> tuple[Outcome, dict[str, Tensor]]:
    plain = Dequantized(spec=case.spec, steps=case.steps)
    return peft_oracle(plain), exact_gradients(plain)


class _FreshMagnitudes(StartedAdapters):
    def read(self, name: str) -> Tensor:
        if not name.endswith(f".{MAGNITUDE}"):
            return super().read(name)
        return torch.linalg.vector_norm(super().read(f"{name.rpartition('.')[0]}.weight"), dim=1)


@pytest.mark.parametrize(
    "name", [name if name == "LoRA" else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_as_peft_on_the_dequantised_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's magnitudes start as the norms of the rows that there are, not of the unquantised weight's."""
    monkeypatch.setattr(adapter_fixture, "StartedAdapters", _FreshMagnitudes)
    case = CASES[name]
    assert_as(*wanted(case), [run_case(0, case)])


def test_a_layer_is_quantised_once_for_its_weight_and_its_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Mock(wraps=nf4.quantized)
    monkeypatch.setattr(nf4, "quantized", calls)
    spec = qlora(dora=True)
    AdapterCase(spec=spec).engine(0)
    assert calls.call_count == len(quantized_layers(SHAPE, spec))


@pytest.mark.full
def test_compiled_as_op_by_op() -> None:
    """The dequantised weight is in a layer's graph, which may keep other things for its backward pass."""
    case = CASES["LoRA"]
    assert_as(*wanted(case), [run_case(0, replace(case, compiled="aot_eager"))])


def test_as_peft_on_the_librarys_layers() -> None:
    """Loss, gradients and the factors after 2 steps."""
    case = replace(CASES["LoRA"], shape=WHOLE_BLOCKS, spec=qlora(shape=WHOLE_BLOCKS))
    want = peft_oracle(ByLibrary(spec=case.spec, shape=WHOLE_BLOCKS, steps=2))
    got = run_case(0, case)
    assert abs(got.loss - want.loss) <= TOLERANCE
    assert worst(got.gradients, want.gradients, relative=True)[0] <= LIBRARY_TOLERANCE
    assert worst(got.weights, want.weights, relative=False)[0] <= WEIGHT_TOLERANCE


@pytest.mark.parametrize(
    "cases", [FSDP, pytest.param(OTHERS, marks=pytest.mark.full)], ids=["fsdp", "others"]
)
def test_over_data_parallel_ranks(cases: dict[str, AdapterCase]) -> None:
    for name, ranks in outcomes(cases).items():
        print(name)
        assert_as(*wanted(cases[name]), ranks)


def test_the_reference_is_the_quantised_base_and_checkpoints_hold_adapters_alone() -> None:
    case = CASES["LoRA"]
    engine = case.engine(0)
    batches = case.micro_batches(0, case.examples())
    plain = super(AdapterCase, Dequantized(spec=case.spec)).engine(0)
    original = super(AdapterCase, case).engine(0)
    for batch in batches:
        reference = engine.response_logps(batch, reference=True)
        torch.testing.assert_close(reference, plain.response_logps(batch), rtol=1e-6, atol=1e-5)
        assert not torch.allclose(reference, original.response_logps(batch), rtol=1e-4, atol=1e-4)
    assert all(name.endswith(("lora_A", "lora_B")) for name, _ in engine._saved_parameters())


def test_bf16_and_autocast_compute_near_float32() -> None:
    want = run_case(0, CASES["LoRA"])
    for precision in (Precision(compute=torch.bfloat16), Precision(autocast=True)):
        got = run_case(0, replace(CASES["LoRA"], precision=precision))
        assert abs(got.loss - want.loss) <= 2e-3
        errors = [
            float((got.gradients[name] - exact).norm() / exact.norm())
            for name, exact in want.gradients.items()
        ]
        assert sorted(errors)[len(errors) // 2] <= 0.06


def test_fsdp_wants_a_torch_that_gathers_bytes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nxdt_align.engines.native.model.is_too_old", lambda: True)
    check_parallel(SHAPE, Parallel(zero1=True), is_quantized=True)
    check_parallel(SHAPE, Parallel(fsdp=True))
    with pytest.raises(EngineError, match="fsdp: must be False with a quantised base and torch"):
        check_parallel(SHAPE, Parallel(fsdp=True), is_quantized=True)


@pytest.mark.parametrize("spread", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_tensor_and_pipeline_parallel_are_refused(spread: dict[str, int]) -> None:
    with pytest.raises(EngineError, match="must be 1 with a quantised base"):
        AdapterCase(spec=qlora(), **spread).engine(0)  # type: ignore[arg-type]
