"""A small model, trained, and its checkpoint by the native engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nxdt_align.engines.checkpoint_folder import Summary
from nxdt_align.engines.native.checkpoint import SUMMARY
from nxdt_align.engines.native.saving import save

SHARD = "tensors/__0_0.distcp"


class Net(nn.Module):
    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, width, generator=generator))
        self.low = nn.Parameter(torch.randn(5, generator=generator).to(torch.bfloat16))
        self.norm = nn.Parameter(torch.tensor(1.5))


def parameters(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(net.named_parameters())


def adamw(net: nn.Module) -> torch.optim.AdamW:
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.0}, {"params": decayed}]
    return torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def trained(steps: int = 3) -> tuple[Net, torch.optim.AdamW]:
    net = Net()
    optimizer = adamw(net)
    train(net, optimizer, steps)
    return net, optimizer


def assert_same(left: Any, right: Any) -> None:
    """Equal in type, dtype and every bit."""
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert left == right


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def write(tmp_path: Path) -> Path:
    """A checkpoint of three steps, in a folder of its own."""
    net, optimizer = trained()
    folder = tmp_path / "step=3"
    save(folder, parameters(net), optimizer, {"global_step": 3})
    return folder


def as_earlier_version(folder: Path, summary: Summary = SUMMARY) -> None:
    """Have the checkpoint describe its files as they are now by their sizes alone, as before there were
    checksums."""
    said = json.loads((folder / summary.name).read_text())
    del said["crc32"], said["crc32_of_this"]
    said["files"] = {name: (folder / name).stat().st_size for name in said["files"]}
    (folder / summary.name).write_text(json.dumps(said))
