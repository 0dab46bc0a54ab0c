"""Models that transformers computes, on every layout, against their own forward pass, a response each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_fixture import ALONE, VALUES, WINDOWS, StateDict, config_of, dpo_loss, drawn
from layouts import ATTENTIONS, GRADIENT_TOLERANCE, LAYOUTS, LOSS_TOLERANCE
from oracle import ExampleSet, assert_gradients_close, random_examples
from torch import Tensor

from nxdt_align.batch import Topology
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.backend.model import StockAttention
from nxdt_align.ops.attention import Attention

BETA = 0.3
EXAMPLES = random_examples(6, 1)
"""Up to 50 tokens, so beyond every window."""


def engine(config: TransformersConfig, attention: Attention, **settings: Any) -> NativeEngine:
    """With the policy's weights, and another model's as the reference."""
    made = NativeEngine(config, attention, **settings)
    made.load_weights(StateDict(config, drawn(config, 0)))
    made.load_reference(StateDict(config, drawn(config, 1)))
    return made


def steps(config: TransformersConfig, layout: Layout, examples: ExampleSet, micro: int = 2) -> StepDataset:
    planner = RowPlanner(
        examples,
        layout,
        examples_per_step=len(examples),
        seq_length=96,
        micro_batch_size=micro,
        window=config.sliding_window,
        only_local=config.layer_types is None,
    )
    return StepDataset(examples, planner, layout, Topology())


def loss_and_gradients(made: NativeEngine, data: StepDataset) -> tuple[float, dict[str, Tensor]]:
    batches = data[list(range(len(data.examples)))]
    output = made.step(batches, GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=BETA))))
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return float(output.loss), found


@pytest.fixture(scope="module")
def truth() -> dict[str, tuple[float, dict[str, Tensor]]]:
    return {}


def true_values(name: str, known: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    if name not in known:
        config = config_of(name)
        model, reference = drawn(config, 0), drawn(config, 1)
        loss = dpo_loss(model, reference, EXAMPLES, BETA)
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        wanted = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
        known[name] = float(loss), dict(zip(names, wanted, strict=True))
    return known[name]  # type: ignore[no-any-return]


USUAL = {("blocks", "shared_prompt"), ("dense", "packed")}
CASES = [
    pytest.param(name, attention, layout, marks=() if (attention, layout) in USUAL else pytest.mark.full)
    for name in VALUES
    for attention in ATTENTIONS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("name", "attention", "layout"), CASES)
def test_layouts_equal_one_response_at_a_time(
    name: str, attention: str, layout: Layout, truth: dict[str, Any]
) -> None:
    config = config_of(name)
    assert config.findings.refusal is None
    wanted, gradients = true_values(name, truth)
    made = engine(config, ATTENTIONS[attention])
    loss, found = loss_and_gradients(made, steps(config, layout, EXAMPLES))
    assert abs(loss - wanted) <= LOSS_TOLERANCE * abs(wanted)
    assert_gradients_close(found, gradients, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", list(ALONE))
def test_a_model_that_does_not_take_our_layouts_runs_one_response_per_row(
    name: str, truth: dict[str, Any]
) -> None:
    config = config_of(name)
    assert config.findings.refusal is not None
    wanted, gradients = true_values(name, truth)
    made = engine(config, StockAttention())
    loss, found = loss_and_gradients(made, steps(config, "none", EXAMPLES))
    assert abs(loss - wanted) <= LOSS_TOLERANCE * abs(wanted)
    assert_gradients_close(found, gradients, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3"])
@pytest.mark.parametrize("recomputed", ["full", "CoreAttention"])
def test_recomputed_activations_give_the_same(name: str, recomputed: str, truth: dict[str, Any]) -> None:
    config = config_of(name)
    granularity: Any = "full" if recomputed == "full" else "selective"
    made = engine(
        config,
        ATTENTIONS["blocks"],
        configure_model=lambda model: model.set_checkpointing(granularity, [recomputed]),
    )
    wanted, gradients = true_values(name, truth)
    loss, found = loss_and_gradients(made, steps(config, "shared_prompt", EXAMPLES))
    assert abs(loss - wanted) <= LOSS_TOLERANCE * abs(wanted)
    assert_gradients_close(found, gradients, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "granite", "deepseek_v3"])
def test_bf16_is_near(name: str, truth: dict[str, Any]) -> None:
    """Rotary frequencies and a router's balancing bias stay float32; else the error would be far larger."""
    config = config_of(name)
    wanted, _ = true_values(name, truth)
    made = engine(config, ATTENTIONS["blocks"], precision=Precision(compute=torch.bfloat16))
    loss, _ = loss_and_gradients(made, steps(config, "shared_prompt", EXAMPLES))
    assert loss == pytest.approx(wanted, rel=0.05)
    held = dict(made._policy.named_parameters())
    fixed = {name: held[name].dtype for name in config.float32_weights}
    assert set(fixed.values()) <= {torch.float32}


@pytest.mark.parametrize(("size", "key"), [({"tensor": 2}, "tensor"), ({"pipeline": 2}, "pipeline")])
def test_tensor_and_pipeline_parallel_are_refused(size: dict[str, int], key: str) -> None:
    with pytest.raises(EngineError, match=f"{key}_model_parallel_size: must be 1 for a gpt2.*fsdp: True"):
        NativeEngine(
            config_of("gpt2"),
            ATTENTIONS["dense"],
            parallel=Parallel(**size),
            topology=Topology(world_size=2),
        )


@pytest.mark.parametrize("name", list(WINDOWS))
def test_windows_are_found(name: str) -> None:
    config = config_of(name)
    assert config.sliding_window == WINDOWS[name]
    assert (config.layer_types is None) == (name == "mixtral, windows")


def test_examples_exceed_every_window() -> None:
    longest = max(len(e.prompt) + max(map(len, e.responses)) for e in EXAMPLES.examples)
    assert longest > max(WINDOWS.values())
