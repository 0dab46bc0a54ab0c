"""Adapters on the NxD engine, over tensor-parallel ranks, stages and copies, against PEFT's own layers on the
plain model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixture import (
    AdapterCase,
    exact_gradients,
    exact_oracle,
    in_float64,
    lora,
    peft_oracle,
    started,
)
from nxd_fixture import Case, engine, one_copy, require_nxd, run_ranks, whole
from parallel_fixture import LOSSES, SHAPE, Outcome, train, worst

from nxdt_align.batch import Batch
from nxdt_align.data.packing import RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.nxd.settings import Precision
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.presets import DecoderConfig

pytestmark = pytest.mark.nxd
pytest.importorskip("peft")

WIDE = replace(SHAPE, num_attention_heads=8, head_dim=4)
"""Eight query heads to two kv heads."""
TOLERANCE = 1e-6
"""Of the loss and the norms, and of each factor's gradient relative to its largest entry, in float64."""
WELL_CONDITIONED = 13
"""Draw of pairs. On it PEFT's own float32 gradients of LoRA are 6.1e-7 of a factor's largest entry off
float64's, which the cases in float32 leave room for. The matrix is computed in float64 on both sides: of 23
draws there is none on which float32 rounds PEFT's LoRA, rsLoRA and DoRA, of both shapes, by less than 8.1e-7
(up to 1.4e-6), with the plain model in one process."""
WEIGHT_TOLERANCE = 1e-5
"""After 5 AdamW steps with active clipping."""


@dataclass(frozen=True)
class Adapted:
    """A way to spread a model, and its adapters."""

    spread: Case = field(default_factory=Case)
    kind: tuple[tuple[str, Any], ...] = ()
    """Settings of the adapters."""
    checkpointing: str | None = None
    steps: int = 5
    dtype: torch.dtype = torch.float64

    @property
    def shape(self) -> DecoderConfig:
        heads = 8 if self.spread.qkv == "coalesced" else 2
        return replace(WIDE, num_key_value_heads=heads)

    @property
    def spec(self) -> AdapterSpec:
        return lora(self.shape, **dict(self.kind))

    @property
    def plain(self) -> AdapterCase:
        """The same on the native engine, whole, as the oracle and the weights are made of."""
        return AdapterCase(shape=self.shape, spec=self.spec, steps=self.steps, seed=WELL_CONDITIONED)

    def start(self) -> Any:
        def configure(decoder: Any) -> None:
            decoder.set_checkpointing(self.checkpointing)

        built = engine(
            self.spread,
            self.shape,
            adapters=self.spec,
            seed=3,
            configure_model=configure,
            precision=Precision(self.dtype),
        )
        built.load_weights(started(self.plain.model(0), self.spec))
        built.load_reference(None)
        return built

    def batches(self, built: Any) -> list[Batch]:
        examples = self.plain.examples()
        planner = RowPlanner(
            examples,
            "shared_prompt",
            examples_per_step=len(examples),
            seq_length=96,
            ranks=built.topology.data_parallel_size,
            micro_batch_size=1,
            min_micro_batches=2,
        )
        dataset = StepDataset(examples, planner, "shared_prompt", built.topology)  # type: ignore[arg-type]
        found: list[Batch] = dataset[tuple(range(len(examples)))]
        return found


SPREADS = {
    "alone": Case(),
    "tp2": Case(tp=2),
    "tp2 sp": Case(tp=2, sp=True),
    "tp2 fused": Case(tp=2, qkv="fused"),
    "tp2 separate": Case(tp=2, qkv="separate"),
    "tp2 separate sp": Case(tp=2, qkv="separate", sp=True),
    "tp4 kv2": Case(tp=4, kv=2),
    "tp4 kv2 sp": Case(tp=4, kv=2, sp=True),
    "tp4 kv2 fused": Case(tp=4, kv=2, qkv="fused"),
    "tp4 kv2 fused sp": Case(tp=4, kv=2, sp=True, qkv="fused"),
    "tp2 kv2 fused": Case(tp=2, kv=2, qkv="fused"),
    "tp2 coalesced": Case(tp=2, qkv="coalesced"),
    "tp2 coalesced sp": Case(tp=2, qkv="coalesced", sp=True),
    "tp2 dp2 sp": Case(tp=2, dp=2, sp=True),
    "pp2": Case(pp=2),
    "pp2 cut": Case(pp=2, cuts=(0,)),
    "tp2 pp2 sp": Case(tp=2, pp=2, sp=True),
}
KINDS: dict[str, tuple[tuple[str, Any], ...]] = {
    "LoRA": (),
    "rsLoRA": (("rslora", True),),
    "DoRA": (("dora", True),),
}
DEFAULT = ("tp4 kv2 sp", "tp2 pp2 sp")
CASES = {f"{name}, LoRA": Adapted(SPREADS[name], dtype=torch.float32) for name in DEFAULT}
OTHERS = {
    f"{name}, {kind}": Adapted(spread, settings)
    for name, spread in SPREADS.items()
    for kind, settings in KINDS.items()
} | {
    "recomputed": Adapted(SPREADS["tp2 sp"], checkpointing="full", steps=2),
    "recomputed, pp2": Adapted(SPREADS["pp2"], checkpointing="full", steps=2),
    "a projection alone": Adapted(SPREADS["tp4 kv2 sp"], (("target_modules", ("v_proj",)),), steps=2),
    "some layers": Adapted(
        SPREADS["tp2 pp2 sp"],
        (("target_modules", ("model.layers.[02].*(q|v)_proj", "o_proj", "up_proj")),),
        steps=2,
    ),
    "modules to save": Adapted(
        SPREADS["tp2 pp2 sp"],
        (("modules_to_save", ("embed_tokens", "lm_head", "norm", "input_layernorm")),),
        steps=2,
    ),
}


def trained(case: Adapted) -> Outcome:
    with in_float64() if case.dtype == torch.float64 else nullcontext():
        built = case.start()
        return train(built, case.batches(built), LOSSES["dpo"], case.steps)


def outcomes(cases: dict[str, Adapted], folder: Path) -> dict[str, list[Outcome]]:
    require_nxd()
    found: dict[str, list[Outcome]] = {}
    for world in sorted({case.spread.world for case in cases.values()}):
        here = {name: case for name, case in cases.items() if case.spread.world == world}
        jobs = [(trained, (case,)) for case in here.values()]
        found |= dict(zip(here, run_ranks(world, jobs, folder / str(world)), strict=True))
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    return outcomes(CASES, tmp_path_factory.mktemp("usual"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    return outcomes(OTHERS, tmp_path_factory.mktemp("others"))


@cache
def wanted(plain: AdapterCase, dtype: torch.dtype) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """What PEFT finds, and its gradients in float64."""
    if dtype == torch.float64:
        found = exact_oracle(plain)
        return found, found.gradients
    return peft_oracle(plain), exact_gradients(plain)


def assert_as_peft(case: Adapted, ranks: list[Outcome]) -> None:
    """Loss, norm with each factor once, each factor's gradient, and the factors after the steps."""
    want, exact = wanted(case.plain, case.dtype)
    for got in ranks:
        assert abs(got.loss - want.loss) <= TOLERANCE
        assert abs(got.evaluated - want.loss) <= TOLERANCE
        assert abs(got.final - want.final) <= TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=TOLERANCE)
        assert got.parameter_norm == pytest.approx(want.parameter_norm, rel=TOLERANCE)
    for copy in range(case.spread.dp):
        shards = one_copy(case.spread, ranks, copy)
        gradients = whole(case.spread, case.shape, [r.gradients for r in shards], 1e-6, case.spec)
        weights = whole(case.spread, case.shape, [r.weights for r in shards], 1e-6, case.spec)
        gradient, weight = (
            worst(gradients, exact, relative=True),
            worst(weights, want.weights, relative=False),
        )
        assert gradient[0] <= TOLERANCE, gradient
        assert weight[0] <= WEIGHT_TOLERANCE, weight


@pytest.mark.parametrize("name", CASES)
def test_as_peft_on_the_plain_model(usual: dict[str, list[Outcome]], name: str) -> None:
    assert_as_peft(CASES[name], usual[name])


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_as_peft_in_every_layout(others: dict[str, list[Outcome]], name: str) -> None:
    assert_as_peft(OTHERS[name], others[name])


DROPOUT = (("dropout", 0.3),)


def with_dropout(checkpointing: str | None) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Two steps of a micro-batch on torch_xla's CPU device, without an update between them."""
    from nxdt_align.engines.nxd import compat

    platform = compat.start("xla")
    from nxdt_align.engines.nxd.engine import NxDEngine
    from nxdt_align.engines.nxd.mesh import make_mesh
    from nxdt_align.engines.nxd.settings import Parallel

    def configure(decoder: Any) -> None:
        decoder.set_checkpointing(checkpointing, (), platform.recompute())

    case = Adapted(kind=DROPOUT)
    built = NxDEngine(
        case.shape,
        make_mesh(Parallel(qkv="fused"), platform),
        adapters=case.spec,
        seed=3,
        configure_model=configure,
    )
    built.load_weights(started(case.plain.model(0), case.spec))
    built.load_reference(None)
    batches = [batch.to(built.device) for batch in case.batches(built)[:1]]
    found = []
    for _ in range(2):
        output = built.step(batches, GlobalMeanObjective(LOSSES["dpo"]))
        built.mark_step()
        gradients = {n: p.grad.detach().cpu() for n, p in built.named_parameters() if p.grad is not None}
        found.append((float(output.loss), gradients))
    return found


@pytest.mark.xla
def test_masks_are_recomputed_alike_on_the_device_and_others_at_the_next_step(tmp_path: Path) -> None:
    require_nxd()
    [kept] = run_ranks(1, [(with_dropout, (None,))], tmp_path / "kept", gloo=False)[0]
    [again] = run_ranks(1, [(with_dropout, ("full",))], tmp_path / "again", gloo=False)[0]
    for (loss, gradients), (other_loss, others) in zip(kept, again, strict=True):
        assert loss == pytest.approx(other_loss, abs=TOLERANCE)
        assert worst(others, gradients, relative=True)[0] <= 1e-5
    assert abs(kept[0][0] - kept[1][0]) > 1e-6
    assert all(float(g.abs().max()) > 0 for g in kept[0][1].values())
