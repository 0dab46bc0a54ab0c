"""Rotary position embedding (https://arxiv.org/abs/2104.09864): frequencies, scalings, the turning."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nxdt_align.models.presets import DecoderConfig, RopeScaling

Rotary = tuple[Tensor, Tensor]
"""cos and sin, (B, S, 1, H) float32 each."""


def inverse_frequencies(config: DecoderConfig, *, local: bool = False) -> Tensor:
    """Rotary frequencies, radians per token: half as many as rotated entries, float32 on the CPU.

    Args:
        local: those of layers with a window, where these have a base of their own.

    Llama 3.1's scaling leaves wavelengths shorter than a context's ``high_freq_factor``-th part,
    divides those longer than its ``low_freq_factor``-th part, and blends between (transformers'
    ``_compute_llama3_parameters``).
    """
    size = config.rotary_dim
    steps = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")
    if local:
        assert config.local_rope_theta is not None
        return 1.0 / (config.local_rope_theta ** (steps / size))
    inv_freq = 1.0 / (config.rope_theta ** (steps / size))
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    if scaling.rope_type == "yarn":
        return _yarn_frequencies(inv_freq, scaling, config.rope_theta)
    low, high, context = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    assert low is not None and high is not None and context is not None
    wavelength = 2 * math.pi / inv_freq
    blend = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq


def _yarn_frequencies(inv_freq: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Frequencies that turn often within the pre-training's context stay, slow ones are divided, and those
    between blended (transformers' ``_compute_yarn_parameters``)."""
    context, count = scaling.original_max_position_embeddings, len(inv_freq)
    assert context is not None

    def entry(rotations: float) -> float:
        """The entry of a head that turns so often within the context."""
        return 2 * count * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = entry(scaling.beta_fast or 32.0), entry(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    steps = torch.arange(count, dtype=torch.float32, device="cpu")
    divided = ((steps - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)
    return inv_freq / scaling.factor * divided + inv_freq * (1 - divided)


def rotary_scale(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by: 1 but for yarn."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


class RotaryEmbedding(nn.Module):
    """The angles of all layers at once."""

    inv_freq: Tensor
    local_inv_freq: Tensor | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._config = config
        self._scale = rotary_scale(config.rope_scaling)
        # A meta-device context must not reach the values: they are never loaded.
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        local = None if config.local_rope_theta is None else inverse_frequencies(config, local=True)
        self.register_buffer("local_inv_freq", local, persistent=False)

    def reset_non_persistent(self, device: torch.device | str) -> None:
        """Compute the frequencies anew, on ``device``."""
        self.inv_freq = inverse_frequencies(self._config).to(device)
        if self.local_inv_freq is not None:
            self.local_inv_freq = inverse_frequencies(self._config, local=True).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # After .to(dtype) the frequencies are float32 still; after .to_empty() they have their values.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_non_persistent(self.inv_freq.device)
        return self

    def forward(self, position_ids: Tensor) -> Rotary | tuple[Rotary, Rotary]:
        """(B, S) -> cos and sin, (B, S, 1, H) float32 each; where layers with a window have a base of their
        own, a second time for those."""
        of_all = self._turned(position_ids, self.inv_freq, self._scale)
        if self.local_inv_freq is None:
            return of_all
        return of_all, self._turned(position_ids, self.local_inv_freq, 1.0)

    def _turned(self, position_ids: Tensor, inv_freq: Tensor, scale: float) -> Rotary:
        angles = position_ids[:, :, None, None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        if scale == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, rotary: Rotary, scale: float = 1.0) -> Tensor:
    """Turn each head's halves, (B, S, any, H), by their position's angle: in float32, ``x``'s dtype out.

    Entries beyond the angles' are not turned; ``scale`` is of all, before the rounding.
    """
    cos, sin = rotary
    size = cos.shape[-1]
    turning, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    if rest is not None:
        turned = torch.cat((turned, rest.to(turned.dtype)), dim=-1)
    return (turned if scale == 1 else turned * scale).to(x.dtype)
