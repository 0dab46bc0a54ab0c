"""``data.attention``: the device's own kind by default, and a clear error for one that it has not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nxdt_align.config.data import Attention, DataConfig
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.run.assemble import attention


def config(kind: Attention) -> Config:
    return replace(Config(), data=DataConfig(attention=kind))


def test_each_device_has_its_own() -> None:
    chosen = {name: type(attention(config("auto"), torch.device(name))) for name in ("cpu", "cuda", "xla")}
    assert chosen == {"cpu": BlockAttention, "cuda": FlexAttention, "xla": DenseAttention}
    assert isinstance(attention(config("dense"), torch.device("cuda")), DenseAttention)


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
        attention(config(kind), torch.device(device))
