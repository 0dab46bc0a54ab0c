"""Chunked log-probabilities against log_softmax over whole logits: values, gradients, shards, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, TokenStatistic
from nxdt_align.ops import logprobs
from nxdt_align.ops.logprobs import VocabShard, token_logps

ALL_STATISTICS: tuple[TokenStatistic, ...] = ("collisions", "entropy", "mean_logit", "is_top1", "top1")


def whole(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logps = (hidden.float() @ head.float().T).log_softmax(-1)
    kept = labels != IGNORE_LABEL
    picked = logps.gather(-1, torch.where(kept, labels, 0)[..., None]).squeeze(-1)
    return torch.where(kept, picked, 0.0)


def sample(
    vocabulary: int = 50, positions: int = 30, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(vocabulary + positions)
    hidden = torch.randn(2, positions, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, positions), generator=generator)
    labels[torch.rand(2, positions, generator=generator) < 0.3] = IGNORE_LABEL
    weights = torch.randn(2, positions, generator=generator)
    return hidden, head, labels, weights


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("chunk_bytes", [2**27, 64 * 50 * 4])
def test_values_and_gradients_equal_whole_logits(
    compact: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerance 1e-6, also where 60 positions take many chunks (the smallest chunk is 64)."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)
    hidden, head, labels, weights = sample(positions=200)
    wanted = whole(hidden, head, labels)
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), [hidden, head])
    logps, _ = token_logps(hidden, head, labels, compact=compact)
    grads = torch.autograd.grad((logps * weights).sum(), [hidden, head])
    torch.testing.assert_close(logps, wanted, atol=2e-6, rtol=1e-6)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_ignored_positions_give_zero_and_no_gradient() -> None:
    hidden, head, _, _ = sample()
    labels = torch.full((2, 30), IGNORE_LABEL)
    for compact in (False, True):
        logps, _ = token_logps(hidden, head, labels, compact=compact)
        assert torch.equal(logps, torch.zeros(2, 30))
        grads = torch.autograd.grad(logps.sum(), [hidden, head])
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_collisions_are_the_log_of_summed_squared_probabilities() -> None:
    hidden, head, labels, _ = sample()
    _, (collisions,) = token_logps(hidden, head, labels, wanted=["collisions"])
    wanted = (hidden @ head.T).softmax(-1).square().sum(-1).log()
    assert not collisions.requires_grad
    torch.testing.assert_close(
        collisions, torch.where(labels == IGNORE_LABEL, 0.0, wanted), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def read_off(hidden: Tensor, head: Tensor, labels: Tensor) -> dict[TokenStatistic, Tensor]:
    """Each statistic by its definition, from whole logits in float64."""
    logits = hidden.double() @ head.double().T
    logps = logits.log_softmax(-1)
    return {
        "collisions": logps.exp().square().sum(-1).log(),
        "entropy": -(logps.exp() * logps).sum(-1),
        "mean_logit": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == labels).double(),
        "top1": logits.argmax(-1).double(),
    }


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("tile_bytes", [2**23, 64 * 64 * 4])
@pytest.mark.parametrize("names", [ALL_STATISTICS, ALL_STATISTICS[::-1], ("is_top1", "entropy")])
def test_readings_are_those_of_whole_logits(
    compact: bool, tile_bytes: int, names: tuple[TokenStatistic, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for in any order, over one tile or many, beside the same log-probs and gradients."""
    monkeypatch.setattr(logprobs, "CACHED_BYTES", tile_bytes)
    hidden, head, labels, weights = sample(vocabulary=300, positions=200)
    with torch.no_grad():
        top = (hidden @ head.T).argmax(-1)
    labels[0] = torch.where(labels[0] == IGNORE_LABEL, IGNORE_LABEL, top[0])  # else hardly any label is first
    logps, statistics = token_logps(hidden, head, labels, compact=compact, wanted=names)
    for name, got in zip(names, statistics, strict=True):
        assert got.dtype == torch.float32 and not got.requires_grad
        wanted = torch.where(labels == IGNORE_LABEL, 0.0, read_off(hidden, head, labels)[name])
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5, msg=name)
    alone, none = token_logps(hidden, head, labels, compact=compact)
    assert none == () and torch.equal(alone, logps)
    grads = (torch.autograd.grad((x * weights).sum(), [hidden, head]) for x in (logps, alone))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_logits_are_no_reading_of_tiles() -> None:
    hidden, head, labels, _ = sample()
    with pytest.raises(ValueError, match="logits are never whole here"):
        token_logps(hidden, head, labels, wanted=["logits"])


def test_bf16_operands_accumulate_in_fp32() -> None:
    """NxD's own function is off by 0.06 in bf16; the operands' rounding is all that may remain here."""
    hidden, head, labels, _ = sample(dtype=torch.bfloat16)
    logps, _ = token_logps(hidden, head, labels)
    torch.testing.assert_close(logps, whole(hidden, head, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", [int, lambda first: torch.tensor([first])], ids=["number", "tensor"])
def test_two_shards_of_the_vocabulary_equal_the_whole(start: Callable[[int], int | Tensor]) -> None:
    """Each rank by itself, its reductions completed with what the other rank would have given."""
    hidden, head, labels, weights = sample()
    with torch.no_grad():
        logits = (hidden @ head.T).reshape(-1, 50)
    parts = (head[:25], head[25:])
    whole_max = logits.max(-1).values
    expected = whole(hidden, head, labels)
    total_hidden = torch.zeros_like(hidden)
    for rank, part in enumerate(parts):
        other = logits[:, 25:] if rank == 0 else logits[:, :25]
        other_labels = labels.reshape(-1) - (25 if rank == 0 else 0)
        held = (labels.reshape(-1) != IGNORE_LABEL) & (other_labels >= 0) & (other_labels < 25)
        target = torch.where(
            held, other.gather(1, torch.where(held, other_labels, 0)[:, None]).squeeze(1), 0.0
        )
        # The order of reductions of one chunk: the norm, then the target.
        queue = iter([(other - whole_max[:, None]).exp().sum(-1), target])
        shard = VocabShard(
            start(25 * rank), lambda m: whole_max, lambda v, q=queue: v + next(q) if v.ndim == 1 else v
        )
        leaf = part.detach().requires_grad_()
        logps, _ = token_logps(hidden, leaf, labels, shard=shard)
        torch.testing.assert_close(logps, expected, atol=2e-6, rtol=1e-6)
        grad_hidden, grad_head = torch.autograd.grad((logps * weights).sum(), [hidden, leaf])
        total_hidden += grad_hidden
        wanted_head = torch.autograd.grad((whole(hidden, head, labels) * weights).sum(), head)[0]
        torch.testing.assert_close(grad_head, wanted_head[25 * rank : 25 * rank + 25], atol=1e-5, rtol=1e-5)
    wanted_hidden = torch.autograd.grad((whole(hidden, head, labels) * weights).sum(), hidden)[0]
    torch.testing.assert_close(total_hidden, wanted_hidden, atol=1e-5, rtol=1e-5)


MEMORY_SCRIPT = """
import torch
from pathlib import Path
from nxdt_align.ops.logprobs import token_logps
def peak():  # KiB; getrusage's starts from the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
torch.manual_seed(0)
hidden = torch.randn(1, 8192, 64).requires_grad_()
head = torch.randn(128256, 64).requires_grad_()
labels = torch.randint(0, 128256, (1, 8192))
token_logps(hidden[:, :64], head, labels[:, :64])[0].sum().backward()
hidden.grad = None
before = peak()
token_logps(hidden, head, labels)[0].sum().backward()
print((peak() - before) / 2**20)
"""


@pytest.mark.full
def test_memory_of_a_long_row_is_far_below_its_logits() -> None:
    """8,192 positions x 128,256 tokens: full fp32 logits are 3.9 GiB; here the peak grows by < 1 GiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert 0.1 < float(done.stdout) < 0.93


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("tile_bytes", [2**23, 64 * 64 * 4])
def test_capped_logits(compact: bool, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, gradients and statistics of 3 * tanh(logits / 3), most of them capped, over one tile
    or many."""
    monkeypatch.setattr(logprobs, "CACHED_BYTES", tile_bytes)
    hidden, head, labels, weights = sample(vocabulary=300, positions=200)
    capped = 3 * torch.tanh(hidden @ head.T / 3)
    kept = labels != IGNORE_LABEL
    wanted = capped.log_softmax(-1).gather(-1, torch.where(kept, labels, 0)[..., None]).squeeze(-1) * kept
    wanted_grads = torch.autograd.grad((wanted * weights).sum(), [hidden, head])
    names: tuple[TokenStatistic, ...] = ("mean_logit", "entropy")
    logps, (mean, entropy) = token_logps(hidden, head, labels, compact=compact, wanted=names, softcap=3.0)
    grads = torch.autograd.grad((logps * weights).sum(), [hidden, head])
    torch.testing.assert_close(logps, wanted.detach(), atol=2e-6, rtol=1e-6)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean, capped.detach().mean(-1) * kept, atol=1e-5, rtol=1e-5)
    logs = capped.detach().log_softmax(-1)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1) * kept, atol=1e-5, rtol=1e-5)
