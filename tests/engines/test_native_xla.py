"""The native engine on torch_xla's CPU device against the oracle, and its steps: one graph each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixture import lora, started
from oracle import (
    TINY,
    ExampleSet,
    ModuleWeights,
    assert_gradients_close,
    dpo_loss,
    gradients,
    orpo_loss,
    plain_model,
    random_examples,
)

from nxdt_align.batch import Batch, Topology
from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines import xla
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Precision
from nxdt_align.engines.native.xla_engine import XlaEngine
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.models.decoder import Decoder
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.training.optim import build_optimizer

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")
TOLERANCE = 1e-5
"""fp32 on two backends that sum in other orders."""
OBJECTIVES = {"dpo": DPOLoss(DPOConfig(kl_beta=0.1)), "orpo": ORPOLoss(ORPOConfig(beta=0.2))}
LAYOUTS: tuple[Layout, ...] = ("none", "packed", "shared_prompt")


def steps(examples: ExampleSet, layout: Layout, per_step: int, micro: int = 1) -> list[list[Batch]]:
    """The examples in order, ``per_step`` at a time, in one bucket and a fixed number of micro-batches."""
    planner = RowPlanner(
        examples,
        layout,
        examples_per_step=per_step,
        seq_length=128,
        buckets=[128],
        micro_batch_size=micro,
        fixed_micro_batches=True,
    )
    dataset = StepDataset(examples, planner, layout, Topology())  # type: ignore[arg-type]
    return [dataset[range(i, min(i + per_step, len(examples)))] for i in range(0, len(examples), per_step)]


def to_device(batches: Sequence[Batch]) -> list[Batch]:
    return [batch.to(xla.device()) for batch in batches]


def engine(on_xla: bool, precision: Precision = Precision(), **settings: Any) -> NativeEngine:  # noqa: B008
    cls, device = (XlaEngine, xla.device()) if on_xla else (NativeEngine, torch.device("cpu"))
    built = cls(TINY, DenseAttention(), precision=precision, device=device, **settings)
    start, adapters = plain_model(0), settings.get("adapters")
    built.load_weights(ModuleWeights(start) if adapters is None else started(start, adapters))
    built.load_reference(ModuleWeights(plain_model(1)))
    return built


def compilations() -> int:
    return xla.XlaCompiler(tells_keys=False).count()


def graphs_run() -> int:
    from torch_xla.debug import metrics

    return sum(metrics.counter_value(name) or 0 for name in ("UncachedCompile", "CachedCompile"))


def gradients_of(policy: NativeEngine) -> dict[str, torch.Tensor]:
    return {name: p.grad.cpu() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_the_oracles(name: str, layout: Layout) -> None:
    examples = random_examples(7, seed=4)
    (batches,) = steps(examples, layout, 7, micro=2)
    policy = engine(on_xla=True)
    output = policy.step(to_device(batches), GlobalMeanObjective(OBJECTIVES[name]))
    norm = policy.clip_gradients(None)
    policy.mark_step()
    model, pairs = plain_model(0), examples.examples
    wanted = dpo_loss(model, plain_model(1), pairs, 0.1) if name == "dpo" else orpo_loss(model, pairs, 0.2)
    loss, total_norm = policy.fetch([output.loss, norm])
    assert loss == pytest.approx(float(wanted.detach()), abs=TOLERANCE)
    truth = gradients(wanted, model)
    assert_gradients_close(gradients_of(policy), truth, TOLERANCE)
    exact = torch.stack([g.norm() for g in truth.values()]).norm()
    assert total_norm == pytest.approx(float(exact), rel=TOLERANCE)


@pytest.mark.parametrize("recomputed", [("full",), ("selective", ["LlamaMLP", "LlamaRMSNorm"])], ids=str)
def test_adapters_get_their_gradients_where_the_first_layers_input_needs_none(recomputed: Any) -> None:
    """Of a frozen embedding. Against a CPU's, where nothing is recomputed."""
    (batches,) = steps(random_examples(7, seed=4), "shared_prompt", 7, micro=2)
    spec = lora(TINY, target_modules=["down_proj"])

    def configure(decoder: Decoder) -> None:
        decoder.set_checkpointing(*recomputed, recompute=xla.recompute)

    found = []
    for policy in (engine(True, adapters=spec, configure_model=configure), engine(False, adapters=spec)):
        given = to_device(batches) if policy.lazy else batches
        output = policy.step(given, GlobalMeanObjective(OBJECTIVES["dpo"]))
        policy.mark_step()
        (loss,) = policy.fetch([output.loss])
        found.append((loss, gradients_of(policy)))
    (loss, got), (wanted, truth) = found
    assert loss == pytest.approx(wanted, abs=TOLERANCE)
    assert len(truth) == 2 * len(spec.targets) == 4
    assert_gradients_close(got, truth, TOLERANCE)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "full checkpointing"])
def test_every_step_is_one_graph_and_computes_what_the_cpu_does(kind: str) -> None:
    """Six steps of other lengths, two of them at a learning rate of 0, and a smaller last one: two graphs are
    compiled (the second one's optimizer has a state), one is run a step, and no operation falls back."""
    from torch_xla.debug import metrics

    examples = random_examples(23, seed=9)
    every = steps(examples, "shared_prompt", 4)
    precision = Precision(compute=torch.bfloat16) if kind == "bf16" else Precision()
    granularity = "full" if kind == "full checkpointing" else None
    policies = [
        engine(
            on_xla,
            precision,
            configure_model=partial(
                Decoder.set_checkpointing,
                granularity=granularity,
                recompute=xla.recompute if on_xla else None,
            ),
        )
        for on_xla in (True, False)
    ]
    curves = []
    metrics.clear_all()
    for policy in policies:
        optimizer = build_optimizer(
            policy.named_parameters(), "adamw_fp32OptState", {"lr": 0.0, "weight_decay": 0.01}
        )
        curve = []
        for i, batches in enumerate(every):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * max(i - 1, 0)
            if policy.lazy:
                batches = to_device(batches)
            output = policy.step(batches, GlobalMeanObjective(OBJECTIVES["dpo"]))
            norm = policy.clip_gradients(1.0)
            optimizer.step()
            policy.mark_step()
            curve.append(policy.fetch([output.loss, norm]))
            if policy.lazy:
                assert graphs_run() == i + 1
        assert [group["lr"] for group in optimizer.param_groups] == [4e-3] * len(optimizer.param_groups)
        curves.append(curve)
    assert compilations() == 2
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []
    tolerance = 0.05 if kind == "bf16" else 1e-4
    torch.testing.assert_close(
        torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=tolerance, atol=tolerance
    )
    for (name, on_xla), (_, on_cpu) in zip(*(p.named_parameters() for p in policies), strict=True):
        assert bool(on_xla.isfinite().all()), name
        torch.testing.assert_close(on_xla.cpu(), on_cpu, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("name", "precision", "saved"),
    [
        ("adamw_fp32OptState", Precision(), 1),
        ("adamw", Precision(), 2),
        ("adamw_fp32OptState", Precision(compute=torch.bfloat16), 1),
    ],
    ids=["fp32", "torch's AdamW", "bf16"],
)
def test_a_step_behind_a_checkpoint_is_the_graph_of_one_behind_a_step(
    tmp_path: Path, name: str, precision: Precision, saved: int
) -> None:
    """Saved behind the first step, where every count is 1, or the second, and taken up by new objects, as the
    strategy does it. Loading is no graph at all."""
    examples = random_examples(12, seed=9)
    every = steps(examples, "shared_prompt", 4)
    objective = GlobalMeanObjective(OBJECTIVES["dpo"])

    def started() -> tuple[NativeEngine, torch.optim.Optimizer]:
        policy = engine(on_xla=True, precision=precision)
        return policy, build_optimizer(policy.named_parameters(), name, {"lr": 1e-3, "weight_decay": 0.01})

    def step(policy: NativeEngine, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> list[float]:
        output = policy.step(to_device(batches), objective)
        norm = policy.clip_gradients(1.0)
        optimizer.step()
        policy.mark_step()
        return policy.fetch([output.loss, norm])

    first, optimizer = started()
    curve = []
    for i, batches in enumerate(every):
        if i == saved:
            first.save(tmp_path / "saved", optimizer, {"global_step": i})
        curve.append(step(first, optimizer, batches))
    compiled = compilations()

    before = graphs_run()
    second, optimizer = started()
    second.load(tmp_path / "saved", None)
    second.load(tmp_path / "saved", optimizer)
    assert graphs_run() == before
    assert [step(second, optimizer, batches) for batches in every[saved:]] == curve[saved:]
    assert compilations() == compiled
