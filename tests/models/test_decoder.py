"""The plain model against transformers on the same weights, in fp32 on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import draw_weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nxdt_align.errors import UserError
from nxdt_align.models.decoder import RECOMPUTABLE, Decoder, DecoderLayer, RMSNorm
from nxdt_align.models.presets import TINY, DecoderConfig, RopeScaling, parameter_count, weight_shapes
from nxdt_align.models.rotary import inverse_frequencies
from nxdt_align.ops.attention import visibility
from nxdt_align.weights.names import to_hf

LLAMA3_ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)

SHAPES = {
    "multi-head": replace(TINY, num_key_value_heads=4),
    "grouped-query": TINY,
    "multi-query": replace(TINY, num_key_value_heads=1),
    "tied": replace(TINY, tie_word_embeddings=True),
    "llama3 rope": replace(TINY, rope_scaling=LLAMA3_ROPE, rope_theta=5000.0, max_position_embeddings=512),
    "linear rope": replace(TINY, rope_scaling=RopeScaling("linear", 4.0)),
    "own head_dim": replace(TINY, head_dim=16),
    "mistral": replace(TINY, model_type="mistral", head_dim=16, rms_norm_eps=1e-6),
}


def attend(q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> Tensor:
    """Softmax attention; ``context`` is a dense mask, (B, S, S) bool, true where a token is seen."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bsnh,btnh->bnst", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~context[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bnst,btnh->bsnh", weights, v)


def causal(rows: int, tokens: int) -> Tensor:
    return torch.ones(rows, tokens, tokens, dtype=torch.bool).tril()


def build(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = Decoder(config, attend)
    # A large spread, so that attention is far from uniform and a wrong angle shows.
    model.config = replace(config, initializer_range=0.2)
    draw_weights(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model


def transformers_model(model: Decoder) -> Any:
    import transformers

    values = model.config.to_hf_dict()
    hf_config = transformers.AutoConfig.for_model(**values, attn_implementation="eager")
    auto: Any = transformers.AutoModelForCausalLM
    hf = auto.from_config(hf_config).float()
    weights = {to_hf(name): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = hf.load_state_dict(weights, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    return hf


def batch(config: DecoderConfig, rows: int = 2, tokens: int = 24, start: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(start, start + tokens).expand(rows, -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [0, 200])
def test_logits_and_gradients_equal_those_of_transformers(shape: str, start: int) -> None:
    """To 1e-5, at positions from 0 and from 200: past the 64 of the llama3 scaling's context."""
    model = build(SHAPES[shape])
    hf = transformers_model(model)
    ids, positions = batch(model.config, start=start)
    logits = model.logits(model(ids, positions, causal(*ids.shape)))
    expected = hf(ids, position_ids=positions, attention_mask=None, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert float(logits.detach().std()) > 0.5

    torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    torch.autograd.backward(F.cross_entropy(expected.flatten(0, 1), ids.flatten()))
    theirs = dict(hf.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[to_hf(name)].grad, rtol=0, atol=1e-5, msg=name)


def bounds(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Of rows of one sequence in reading order."""
    index = torch.arange(tokens, dtype=torch.int32).expand(rows, -1)
    return torch.zeros_like(index), index + 1


def test_a_window_is_that_of_transformers() -> None:
    """Mistral's over 24 tokens, of which each sees the last 7: logits and gradients to 1e-5."""
    model = build(replace(SHAPES["mistral"], sliding_window=7))
    hf = transformers_model(model)
    ids, positions = batch(model.config)
    logits = model.logits(model(ids, positions, model.model.prepare(*bounds(*ids.shape), visibility)))
    expected = hf(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    full = model.logits(model(ids, positions, causal(*ids.shape)))
    assert (logits - full)[:, 7:].abs().max() > 0.1
    torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    torch.autograd.backward(F.cross_entropy(expected.flatten(0, 1), ids.flatten()))
    theirs = dict(hf.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[to_hf(name)].grad, rtol=0, atol=1e-5, msg=name)


class LocalAndFull(DecoderConfig):
    """Every other layer has the window, as some families' models."""

    def window_of(self, layer: int) -> int | None:
        return None if layer % 2 else self.sliding_window


def test_layers_with_windows_of_their_own_get_bounds_of_their_own() -> None:
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> Tensor:
        seen.append(context)
        return attend(q, k, v, context)

    config = LocalAndFull(**vars(replace(TINY, num_hidden_layers=3, sliding_window=5)))
    model = Decoder(config, spy)
    ids, positions = batch(config, rows=1)
    model(ids, positions, model.model.prepare(*bounds(1, 24), visibility))
    full = causal(1, 24)
    local = full.triu(-4)
    assert [context.equal(local) for context in seen] == [True, False, True]
    assert seen[1].equal(full) and local.sum(-1).max() == 5


def test_positions_that_jump_equal_those_of_transformers() -> None:
    """Tokens far apart, so that low frequencies matter: those which llama3's scaling changes."""
    model = build(SHAPES["llama3 rope"])
    ids, _ = batch(model.config)
    positions = (torch.arange(ids.shape[1]) * 21).expand_as(ids)
    logits = model.logits(model(ids, positions, causal(*ids.shape)))
    mask = torch.zeros(1, 1, 24, 24).masked_fill(~causal(1, 24)[:, None], torch.finfo(torch.float32).min)
    expected = transformers_model(model)(ids, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    unscaled = Decoder(replace(model.config, rope_scaling=None), attend)
    unscaled.load_state_dict(model.state_dict())
    assert not torch.allclose(
        unscaled(ids, positions, causal(*ids.shape)), model(ids, positions, causal(*ids.shape))
    )


def test_llama3_frequencies_by_hand() -> None:
    """theta 10000, H 8: frequencies 1, 0.1, 0.01, 0.001; wavelengths 6.28, 62.8, 628, 6283 tokens.

    Context 400, low 1, high 4, factor 8. Below 400/4 = 100: kept (1, 0.1). Above 400/1: divided by
    8 (0.00125, 0.000125). With context 1000 the third lies between 250 and 1000:
    s = (1000/628.3 - 1) / 3 = 0.19718, 0.01 * ((1 - s)/8 + s) = 0.0029753.
    """
    config = replace(TINY, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 400))
    torch.testing.assert_close(inverse_frequencies(config), torch.tensor([1.0, 0.1, 0.00125, 0.000125]))
    blended = replace(TINY, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 1000))
    torch.testing.assert_close(inverse_frequencies(blended)[2], torch.tensor(0.0029753), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", ["grouped-query", "tied"])
def test_parameters_are_those_of_weight_shapes(shape: str) -> None:
    model = Decoder(SHAPES[shape], attend)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == weight_shapes(model.config)
    assert list(model.state_dict()) == list(weight_shapes(model.config))
    assert sum(p.numel() for p in model.parameters()) == parameter_count(model.config)
    assert model.head_weight.shape == (model.config.vocab_size, model.config.hidden_size)


def test_tied_head_is_the_embedding() -> None:
    model = Decoder(SHAPES["tied"], attend)
    assert model.head_weight is model.model.embed_tokens.weight
    assert copy.deepcopy(model).head_weight is not model.head_weight


def test_frequencies_survive_dtype_and_meta_device() -> None:
    expected = inverse_frequencies(SHAPES["llama3 rope"])
    with torch.device("meta"):
        model = Decoder(SHAPES["llama3 rope"], attend)
    assert model.head_weight.is_meta
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    draw_weights(model, 0)
    assert model.head_weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    ids, positions = batch(model.config)
    assert model(ids, positions, causal(*ids.shape)).dtype == torch.bfloat16


def test_bf16_stays_near_fp32() -> None:
    """bf16 has 8 bits: hidden states of size 1 differ by a few percent, not by a wrong cast."""
    model = build(TINY)
    ids, positions = batch(TINY)
    exact = model(ids, positions, causal(*ids.shape)).detach()
    low = copy.deepcopy(model).to(torch.bfloat16)(ids, positions, causal(*ids.shape)).detach()
    assert float((low.float() - exact).norm() / exact.norm()) < 0.03


def test_autocast_attends_in_one_dtype() -> None:
    """Under autocast q, k, v must agree in dtype although cos and sin are fp32."""
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, context)

    model = Decoder(TINY, spy)
    ids, positions = batch(TINY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, positions, causal(*ids.shape))
    assert set(seen) == {(torch.bfloat16,) * 3}


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    first, same, other = build(TINY, 3), build(TINY, 3), build(TINY, 4)
    wide = Decoder(replace(TINY, num_hidden_layers=3, initializer_range=0.2), attend)
    draw_weights(wide, 3)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first.state_dict()[name], same.state_dict()[name])
    assert torch.equal(first.state_dict()[name], wide.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert float(wide.head_weight.detach().std()) == pytest.approx(0.2, rel=0.05)
    assert torch.equal(wide.model.norm.weight, torch.ones(TINY.hidden_size))


class HalfHeads(nn.Module):
    """As a tensor-parallel rank's projection: the first half of the heads of q, k and v."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[..., : part.shape[-1] // 2] for part in self.whole(x))


def test_head_counts_come_from_the_projection() -> None:
    model = build(TINY)
    attention: Any = model.model.layers[0].self_attn
    ids, positions = batch(TINY)
    rotary = model.model.rotary_emb(positions)
    x = model.model.embed_tokens(ids)
    halves = copy.deepcopy(attention)
    halves.qkv_proj = HalfHeads(attention.qkv_proj)
    halves.o_proj = nn.Identity()
    attention.o_proj = nn.Identity()
    whole = attention(x, rotary, causal(*ids.shape))
    part = halves(x, rotary, causal(*ids.shape))
    torch.testing.assert_close(part, whole[..., : whole.shape[-1] // 2])


def gradients(model: Decoder) -> dict[str, Tensor]:
    model.zero_grad()
    ids, positions = batch(model.config)
    torch.autograd.backward(model.logits(model(ids, positions, causal(*ids.shape))).square().mean())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CHOICES: list[tuple[Any, list[str] | None]] = [
    ("full", None),
    *(("selective", [name]) for name in RECOMPUTABLE),
    ("selective", list(RECOMPUTABLE)),
]


@pytest.mark.parametrize(("granularity", "names"), CHOICES)
def test_checkpointing_recomputes_and_changes_no_gradient(granularity: Any, names: list[str] | None) -> None:
    model = build(TINY)
    expected = gradients(model)
    calls = []

    def count(function: Any, *args: Any) -> Tensor:
        calls.append(type(function.__self__))
        result: Tensor = checkpoint(function, *args, use_reentrant=False)
        return result

    model.set_checkpointing(granularity, names, count)
    found = gradients(model)
    assert set(calls) == ({RECOMPUTABLE[name] for name in names} if names else {DecoderLayer})
    assert all(torch.equal(found[name], expected[name]) for name in expected) and len(found) == len(expected)

    calls.clear()
    with torch.no_grad():
        model(*batch(model.config), causal(2, 24))
    assert calls == []

    model.set_checkpointing(granularity, names)
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_checkpointing_runs_attention_twice_and_not_without_gradients() -> None:
    calls = []

    def spy(q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> Tensor:
        calls.append(1)
        return attend(q, k, v, context)

    model = Decoder(TINY, spy)
    model.set_checkpointing("full")
    gradients(model)
    assert len(calls) == 2 * TINY.num_hidden_layers
    calls.clear()
    with torch.no_grad():
        ids, positions = batch(TINY)
        model(ids, positions, causal(*ids.shape))
    assert len(calls) == TINY.num_hidden_layers
    model.set_checkpointing(None)
    calls.clear()
    gradients(model)
    assert len(calls) == TINY.num_hidden_layers


@pytest.mark.parametrize(
    ("granularity", "names", "fault"),
    [
        ("half", None, "`activations_checkpoint_granularity` must be full, selective or null, but is 'half'"),
        ("selective", ["CoreAttention", "MixtralMLP"], r"out of CoreAttention, .*but is .*MixtralMLP"),
        ("selective", None, r"`activations_checkpoint_recompute` must name modules .*but is \[\]"),
    ],
)
def test_unknown_checkpointing_is_refused(granularity: Any, names: list[str] | None, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        Decoder(TINY, attend).set_checkpointing(granularity, names)
