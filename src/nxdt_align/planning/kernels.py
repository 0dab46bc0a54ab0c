"""Which attention engine native takes on a device, and what that asks of rows."""

from __future__ import annotations

from nxdt_align.config.schema import Config
from nxdt_align.models.config import DecoderConfig, ModelShape
from nxdt_align.ops.attention_nki import copies_of_keys
from nxdt_align.planning.operators import FLASH_HEAD, FLASH_TOKENS

ATTENTION_OF_DEVICE = {"cpu": "blocks", "cuda": "flex"}
"""Backends that run on one type of device alone, where they are the default."""
FLASH_MULTIPLE = {"neuron": FLASH_TOKENS}
"""Device type -> row lengths are multiples of this for its flash kernel."""


def attention_kind(config: Config, device_type: str, model: ModelShape) -> str:
    """A value of ``data.attention``; where that is auto, the one that is taken."""
    if config.data.attention != "auto":
        return config.data.attention
    if (
        device_type in FLASH_MULTIPLE
        and why_not_causal(config, model) is None
        and why_not_flash(config, device_type, model) is None
    ):
        return "causal"
    if config.distributed_strategy.compile == "blocks" and device_type == "cpu":
        return "dense"  # blocks' shapes follow the data
    return ATTENTION_OF_DEVICE.get(device_type, "dense")


def why_not_causal(config: Config, model: ModelShape) -> str | None:
    """What attention needs bounds for, and what would do; None where each token may see all before it."""
    if config.layout != "none":
        return (
            f"which rows of several sequences need, but the layout is {config.layout}: set "
            "data.packing=none, the one layout that it computes, or data.attention=dense for any layout"
        )
    if model.attention_softcap is not None:
        return (
            "and this model's capped scores need a backend that caps them: set data.attention=dense, or "
            "leave it to auto"
        )
    window, longest = model.sliding_window, config.data.seq_length
    if window is not None and window < longest:
        return (
            f"which a window needs: sliding_window is {window}, but data.seq_length {longest}; set "
            f"data.seq_length to {window} at most, or data.attention=dense"
        )
    return None


def why_not_flash(config: Config, device_type: str, model: ModelShape) -> str | None:
    """What rows or heads the flash kernel of engine native's device does not take, which would compute them
    as a mask does; None where it takes these, and on devices whose kernel takes any."""
    multiple = FLASH_MULTIPLE.get(device_type)
    if multiple is None:
        return None
    head_size = model.head_dim if isinstance(model, DecoderConfig) else 0  # others do not run there
    if head_size > FLASH_HEAD:
        return f"takes heads of up to {FLASH_HEAD} entries, but this model's have {head_size}"
    others = [bucket for bucket in config.data.buckets or () if bucket % multiple]
    if others:
        return f"takes rows of a multiple of {multiple} tokens, but data.buckets has {others}"
    return None


def flash_multiple(config: Config, device_type: str, model: ModelShape) -> int:
    """Row lengths must be multiples of this on engine native."""
    is_flash = attention_kind(config, device_type, model) in ("causal", "nki")
    return FLASH_MULTIPLE.get(device_type, 1) if is_flash else 1


def share_at_work(heads: int, kv_heads: int, cores: int) -> float:
    """Of a device's physical cores, in attention ``nki``'s backward pass of a rank's heads: each takes whole
    key-value heads, or copies of them, and waits for the one with the most."""
    handed = kv_heads * copies_of_keys(heads, kv_heads, cores)
    return handed / (-(-handed // cores) * cores)
