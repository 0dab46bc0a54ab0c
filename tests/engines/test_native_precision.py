"""16 bits and autocast against the fp32 oracle: loss and gradients, masters and their sums in fp32."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    TINY,
    ExampleSet,
    ModuleWeights,
    dpo_loss,
    gradients,
    plain_model,
    random_examples,
)

from nxdt_align.batch import Batch, Topology
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Precision
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention

LOSS_TOLERANCE = 0.02
"""bf16 keeps 8 bits: 0.4% a rounding. Sums of up to 20 log-probabilities, times beta 0.1."""
GRADIENT_TOLERANCE = 0.06
"""Relative L2 error of a parameter's gradient."""
KINDS = {
    "bf16": Precision(compute=torch.bfloat16),
    "autocast": Precision(autocast=True),
    "fp16": Precision(compute=torch.float16),
}
TIGHTER = {"fp16": 1 / 8}
"""Of these tolerances: fp16 has three more bits than bf16."""


def micro_batches(examples: ExampleSet, micro: int) -> list[Batch]:
    planner = RowPlanner(
        examples, "shared_prompt", examples_per_step=len(examples), seq_length=96, micro_batch_size=micro
    )
    return StepDataset(examples, planner, "shared_prompt", Topology())[tuple(range(len(examples)))]  # type: ignore[arg-type]


def engine(precision: Precision, attention: DenseAttention | BlockAttention) -> NativeEngine:
    built = NativeEngine(TINY, attention, precision=precision)
    built.load_weights(ModuleWeights(plain_model(0)))
    built.load_reference(ModuleWeights(plain_model(1)))
    return built


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", [DenseAttention(), BlockAttention()], ids=["dense", "blocks"])
def test_loss_and_gradients_are_the_oracles_to_the_dtypes_rounding(
    kind: str, attention: DenseAttention | BlockAttention
) -> None:
    examples = random_examples(7, seed=4)
    policy = engine(KINDS[kind], attention)
    output = policy.step(micro_batches(examples, 1), GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1))))
    model = plain_model(0)
    wanted = dpo_loss(model, plain_model(1), examples.examples, 0.1)
    share = TIGHTER.get(kind, 1.0)
    assert abs(float(output.loss) - float(wanted.detach())) <= LOSS_TOLERANCE * share
    truth = gradients(wanted, model)
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        error = float((parameter.grad - truth[name]).norm() / truth[name].norm())
        assert error <= GRADIENT_TOLERANCE * share, f"{name}: {error:.3f}"


def test_masters_add_up_steps_that_bf16_would_lose() -> None:
    """A norm's weight is 1 +- a little; bf16's spacing there is 2^-7. Twenty steps of 1e-3 each vanish in
    bf16 one by one; the masters keep them, and the next step computes with their sum."""
    policy = engine(KINDS["bf16"], DenseAttention())
    masters = dict(policy.named_parameters())
    master = masters["model.norm.weight"]
    start = master.detach().clone()
    batches = micro_batches(random_examples(3, seed=1), 1)
    before = policy.response_logps(batches[0])
    for _ in range(20):
        policy.step(batches, GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1))))
        with torch.no_grad():
            master.add_(1e-3)
    assert torch.allclose(master, start + 0.02, atol=1e-5)
    assert float((policy.response_logps(batches[0]) - before).abs().max()) > 1e-2
