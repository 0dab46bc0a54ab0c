"""The truth that layouts, engines and precisions are tested against.

One plain fp32 Llama, one response at a time, whole logits, and losses written out from their papers:
none of the code that packs, gathers, chunks or reduces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nxdt_align.data.tokenize import Example
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig, fresh_weight
from nxdt_align.named_tensors import WeightSource
from nxdt_align.ops.attention import visibility

TINY = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)


@dataclass
class ExampleSet:
    """Examples with the length arrays that planners read."""

    examples: list[Example]
    record_ids: list[str] = field(init=False)
    prompt_lengths: np.ndarray = field(init=False)
    response_lengths: np.ndarray = field(init=False)
    truncated: int = 0

    def __post_init__(self) -> None:
        self.record_ids = [e.record_id for e in self.examples]
        self.prompt_lengths = np.array([len(e.prompt) for e in self.examples])
        self.response_lengths = np.array([[len(r) for r in e.responses] for e in self.examples])

    def ids(self) -> np.ndarray:
        """As TokenizedSet.ids: (N, 16) uint8, of whatever text the ids are here."""
        digests = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in self.record_ids]
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def random_examples(
    count: int,
    seed: int,
    *,
    prompt: tuple[int, int] = (1, 30),
    response: tuple[int, int] = (1, 20),
    responses: int = 2,
) -> ExampleSet:
    """Random tokens; lengths uniform in the closed ranges, single-token responses included."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, TINY.vocab_size, rng.integers(low, high + 1)).astype(np.int32)

    return ExampleSet(
        [
            Example(f"{i:032x}", tokens(*prompt), tuple(tokens(*response) for _ in range(responses)))
            for i in range(count)
        ]
    )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, context: Tensor | None, softcap: float | None = None
) -> Tensor:
    """``context``: (B, S, S) bool, true where a token is seen; None for all before it."""
    groups = q.shape[2] // k.shape[2]
    q = q.transpose(1, 2)
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    if context is None and softcap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    seen = (
        torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() if context is None else context[:, None]
    )
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def plain_model(seed: int = 0) -> Decoder:
    model = Decoder(TINY, causal_attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + (parameter.ndim == 1))
    return model


@torch.no_grad()
def draw_weights(model: Decoder, seed: int) -> None:
    """Fill every parameter with its ``fresh_weight``, whatever device and dtype it is on."""
    for name, parameter in model.named_parameters():
        parameter.copy_(fresh_weight(model.config, name, seed))


def response_logp(model: Decoder, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """log p(response | prompt), a scalar, from whole logits."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    positions = torch.arange(ids.shape[1])[None]
    context = None
    if model.config.sliding_window is not None:
        index = positions.to(torch.int32)
        context = model.model.prepare(torch.zeros_like(index), index + 1, visibility)
    logits = model.logits(model(ids, positions, context))[0]
    logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    return logps[len(prompt) - 1 :].sum()


def pair_logps(model: Decoder, example: Example) -> tuple[Tensor, Tensor]:
    chosen, rejected = (response_logp(model, example.prompt, r) for r in example.responses)
    return chosen, rejected


def dpo_loss(model: Decoder, reference: Decoder, examples: Sequence[Example], beta: float) -> Tensor:
    """Mean over pairs of -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected))."""
    losses = []
    for example in examples:
        chosen, rejected = pair_logps(model, example)
        with torch.no_grad():
            reference_chosen, reference_rejected = pair_logps(reference, example)
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        losses.append(torch.log1p(torch.exp(-beta * margin)))
    return torch.stack(losses).mean()


def orpo_loss(model: Decoder, examples: Sequence[Example], beta: float) -> Tensor:
    """Mean over pairs of NLL a token - beta * log sigmoid(log odds ratio), in float64 at the end."""
    losses = []
    for example in examples:
        means = [
            (logp / len(response)).double()
            for logp, response in zip(pair_logps(model, example), example.responses, strict=True)
        ]
        odds = [p - torch.log(1 - torch.exp(p)) for p in means]
        losses.append(-means[0] + beta * torch.log1p(torch.exp(-(odds[0] - odds[1]))))
    return torch.stack(losses).mean().float()


def gradients(loss: Tensor, model: Decoder) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_gradients_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Each parameter's largest difference, relative to its largest gradient entry."""
    assert set(got) == set(want)
    for name, wanted in want.items():
        error = float((got[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"


class ModuleWeights(WeightSource):
    """A model's parameters as an engine's WeightSource."""

    def __init__(self, model: Decoder) -> None:
        self._tensors = {name: p.detach() for name, p in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        return self._tensors[name][tuple(region)]
