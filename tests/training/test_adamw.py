from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nxdt_align.training.adamw import AdamWFP32OptState, AdamWInGraph, keep_saved_dtypes

SETTINGS: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, 5), (33,), (2, 3, 4)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def take_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("variant", [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}])
def test_fp32_is_torch_adamw_bit_for_bit(variant: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    mine = AdamWFP32OptState(ours, **SETTINGS, **variant)
    reference = torch.optim.AdamW(theirs, **SETTINGS, **variant)
    for step in range(7):
        take_step(mine, ours, step)
        take_step(reference, theirs, step)
        if step == 3:
            mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 1e-3
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for name, value in reference.state[b].items():
            assert torch.equal(mine.state[a][name], value)


@pytest.mark.parametrize("variant", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}])
def test_the_update_of_a_compiled_graph_is_torchs(variant: dict[str, Any]) -> None:
    """But for the last digits of a power, which count most in the first steps. No gradient, no update."""
    ours, theirs = parameters(), parameters()
    settings = SETTINGS | {"betas": (0.9, 0.999)} | variant
    mine, reference = AdamWInGraph(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(7):
        for optimizer, params in ((mine, ours), (reference, theirs)):
            params[2].grad = None
            take_step(optimizer, params[:2], step)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert ours[2] not in mine.state
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert mine.state[a].keys() == reference.state[b].keys()
        for name, value in reference.state[b].items():
            torch.testing.assert_close(mine.state[a][name], value, rtol=1e-6, atol=1e-7)


def test_a_parameter_without_gradient_stays() -> None:
    params = parameters()
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    optimizer = AdamWFP32OptState(params, **SETTINGS)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_have_fp32_states_and_arithmetic(dtype: torch.dtype) -> None:
    """Each step is torch's AdamW on float32 copies with the float32 states, rounded once."""
    ours = parameters(dtype)
    optimizer = AdamWFP32OptState(ours, **SETTINGS)
    wide = [nn.Parameter(p.detach().float()) for p in ours]
    reference = torch.optim.AdamW(wide, **SETTINGS)
    for step in range(5):
        take_step(optimizer, ours, step)
        for a, b in zip(ours, wide, strict=True):
            assert a.grad is not None
            b.grad = a.grad.float()
        reference.step()
        for a, b in zip(ours, wide, strict=True):
            b.data.copy_(b.data.to(dtype))
            assert a.dtype == dtype and torch.equal(a.float(), b)
            for name in ("exp_avg", "exp_avg_sq"):
                assert optimizer.state[a][name].dtype == torch.float32
                assert torch.equal(optimizer.state[a][name], reference.state[b][name])


def test_a_resumed_bf16_run_is_the_uninterrupted_one() -> None:
    """torch's load_state_dict would round the float32 states to bf16."""
    whole, first = parameters(torch.bfloat16), parameters(torch.bfloat16)
    uninterrupted, interrupted = AdamWFP32OptState(whole, **SETTINGS), AdamWFP32OptState(first, **SETTINGS)
    for step in range(6):
        take_step(uninterrupted, whole, step)
    for step in range(3):
        take_step(interrupted, first, step)
    saved = copy.deepcopy(interrupted.state_dict())
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = AdamWFP32OptState(second, **SETTINGS)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        take_step(resumed, second, step)
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(uninterrupted.state[a]["exp_avg"], resumed.state[b]["exp_avg"])


def test_loaded_states_are_copies() -> None:
    params = parameters(torch.bfloat16)
    optimizer = AdamWFP32OptState(params, **SETTINGS)
    take_step(optimizer, params, 0)
    saved = optimizer.state_dict()
    other = AdamWFP32OptState(parameters(torch.bfloat16), **SETTINGS)
    other.load_state_dict(saved)
    before = saved["state"][0]["exp_avg"].clone()
    take_step(other, other.param_groups[0]["params"], 1)
    assert torch.equal(saved["state"][0]["exp_avg"], before)


def test_saved_dtypes_are_kept_for_any_optimizer() -> None:
    """A float32 state of a bf16 parameter, as NeMo's Novograd has one."""
    params = parameters(torch.bfloat16)
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    take_step(optimizer, params, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].float() + 1e-4
    keep_saved_dtypes(optimizer)
    optimizer.load_state_dict(saved)
    for index, p in enumerate(params):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], saved["state"][index]["momentum_buffer"])
