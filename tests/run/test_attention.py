"""``data.attention``: the device's own by default, and a clear error for one that device or layout lack."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_align.config.alignment import ModelAlignmentStrategyConfig, SFTConfig
from nxdt_align.config.data import Attention, DataConfig, Packing
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.models.presets import TINY
from nxdt_align.ops.attention import CausalAttention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.run.assemble import attention, row_multiple

NEURON: Any = SimpleNamespace(type="neuron")
"""A device that no torch knows without Neuron's own package."""
MISTRAL = replace(TINY, model_type="mistral", sliding_window=1024)


def config(kind: Attention, packing: Packing | None = None, seq_length: int = 4096) -> Config:
    return replace(Config(), data=DataConfig(attention=kind, packing=packing, seq_length=seq_length))


def test_each_device_has_its_own() -> None:
    chosen = {
        name: type(attention(config("auto"), torch.device(name), TINY)) for name in ("cpu", "cuda", "xla")
    }
    assert chosen == {"cpu": BlockAttention, "cuda": FlexAttention, "xla": DenseAttention}
    assert isinstance(attention(config("dense"), torch.device("cuda"), TINY), DenseAttention)


def test_a_neuron_device_takes_its_flash_kernel_where_no_mask_is_needed() -> None:
    """Rows of a multiple of 512 tokens, as the kernel asks for."""
    plain = config("auto", "none", 1000)
    chosen = attention(plain, NEURON, TINY)
    assert isinstance(chosen, CausalAttention) and row_multiple(plain, NEURON, TINY) == 512
    with pytest.raises(UserError, match="multiple of 512 tokens, but a row has 1000"):
        chosen.prepare(*torch.zeros(2, 1, 1000))
    for packed in (config("auto"), config("auto", "packed")):
        assert isinstance(attention(packed, NEURON, TINY), DenseAttention)
        assert row_multiple(packed, NEURON, TINY) == 1
    assert isinstance(attention(config("auto", "none", 4096), NEURON, MISTRAL), DenseAttention)
    assert isinstance(attention(config("auto", "none", 1024), NEURON, MISTRAL), CausalAttention)
    # Elsewhere rows of any length.
    assert row_multiple(config("causal", "none"), torch.device("cpu"), TINY) == 1


def test_the_layout_is_the_objectives_own_where_the_yaml_says_nothing() -> None:
    sft = ModelAlignmentStrategyConfig(sft=SFTConfig(packing=False))
    assert replace(Config(), model_alignment_strategy=sft).layout == "none"
    packed = ModelAlignmentStrategyConfig(sft=SFTConfig(packing=True))
    assert replace(Config(), model_alignment_strategy=packed).layout == "packed"
    assert Config().layout == "shared_prompt"


@pytest.mark.parametrize(
    ("kind", "device", "fault"),
    [
        (
            "flex",
            "cpu",
            "flex needs trainer.accelerator cuda, but this run's device is cpu; auto, dense, blocks",
        ),
        (
            "blocks",
            "xla",
            "blocks needs trainer.accelerator cpu, but this run's device is xla; auto, dense would",
        ),
    ],
)
def test_a_kind_of_another_device_is_refused(kind: Attention, device: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        attention(config(kind), torch.device(device), TINY)


@pytest.mark.parametrize("packing", [None, "packed", "shared_prompt"])
def test_causal_is_refused_for_layouts_that_need_bounds(packing: Packing | None) -> None:
    fault = (
        f"data.attention: causal takes no bounds .* but the layout is {packing or 'shared_prompt'}: set "
        r"data.packing=none, the one layout that it computes, or data.attention=dense"
    )
    with pytest.raises(UserError, match=fault):
        attention(config("causal", packing), torch.device("cpu"), TINY)
    assert isinstance(attention(config("causal", "none"), torch.device("cpu"), TINY), CausalAttention)


def test_causal_is_refused_for_a_window_shorter_than_the_sequence() -> None:
    with pytest.raises(UserError, match=r"sliding_window is 1024, but data.seq_length 4096; set data"):
        attention(config("causal", "none"), torch.device("cpu"), MISTRAL)
