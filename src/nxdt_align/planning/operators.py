"""What is known of ATen's operators on TorchNeuron (trn2, trn3), as far as AWS's pages, and public tests and
reports of the beta, say. Its own table of operators could not be read. Nothing here was run on a chip."""

from __future__ import annotations

from typing import Literal

Status = Literal["lowered", "plain", "data-dependent", "fallback", "unknown"]
"""lowered: a source says that the compiler takes it; plain: computes element by element, or only moves, as
an instruction of StableHLO does; data-dependent: the shape of its result follows from values, so it is no
part of a graph; fallback: a source says that it is missing, so that it runs on the host, or stops the run
(TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION is 1); unknown: no source was found."""

_LOWERED = """
    _log_softmax _log_softmax_backward_data _safe_softmax _softmax _softmax_backward_data
    _scaled_dot_product_fused_attention_overrideable addmm amax bmm embedding
    embedding_dense_backward gather index_add index_copy index_select logsumexp max mean mm
    native_layer_norm rms_norm select_backward slice_backward split split_with_sizes sum topk
"""
_PLAIN = """
    _conj _to_copy _unsafe_view abs add alias all any arange bitwise_and bitwise_not bitwise_or cat
    ceil clamp clamp_max clamp_min clone constant_pad_nd copy cos detach diff div empty empty_like
    empty_strided eq erf exp expand expm1 fill flip floor full full_like ge gelu gelu_backward gt
    isfinite isnan le lift_fresh_copy log log1p log_sigmoid_backward log_sigmoid_forward logical_and
    logical_not logical_or lt maximum minimum mul ne neg new_empty new_empty_strided new_full
    new_ones new_zeros ones ones_like permute pow reciprocal relu remainder repeat rsqrt
    scalar_tensor select sigmoid sigmoid_backward sign silu silu_backward sin slice slice_scatter
    softplus softplus_backward sqrt squeeze stack sub t tan tanh tanh_backward threshold_backward
    transpose unbind unsqueeze view zeros zeros_like
"""
_DATA_DEPENDENT = """
    _local_scalar_dense item masked_select nonzero unique_consecutive unique_dim _unique2
    repeat_interleave
"""
_FALLBACK = """
    _scaled_mm native_dropout_backward
"""
OPERATORS: dict[str, Status] = {
    **dict.fromkeys(_LOWERED.split(), "lowered"),
    **dict.fromkeys(_PLAIN.split(), "plain"),
    **dict.fromkeys(_DATA_DEPENDENT.split(), "data-dependent"),
    **dict.fromkeys(_FALLBACK.split(), "fallback"),
}
"""Name of an ATen operator, without overload -> what is known of it."""
COLLECTIVES = {
    "all_gather_into_tensor": "all-gather",
    "all_reduce": "all-reduce",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "all-to-all",
}
"""torch's functional collectives -> HLO's names."""
FLASH = {"traced_flash": ("flash", 2), "traced_flash_backward": ("flash", 5)}
INTERVALS_BACKWARD = "traced_intervals_backward"
INTERVALS = {"traced_intervals": ("intervals", 2), INTERVALS_BACKWARD: ("intervals", 5)}
KERNELS = {**FLASH, **INTERVALS}
"""Attention kernels as they stand in the graphs -> which, and the products of all pairs that they compute."""
FLASH_TOKENS, FLASH_HEAD, FLASH_HEADS = 512, 128, 512
"""The flash kernel of ``scaled_dot_product_attention`` takes rows of a multiple of so many tokens, heads of
up to so many entries, and so many rows x heads at most; else scores are materialised."""
_FREE = """
    _conj _unsafe_view alias arange detach empty empty_like empty_strided expand full full_like
    lift_fresh_copy new_empty new_empty_strided new_full new_ones new_zeros ones ones_like permute
    scalar_tensor select split split_with_sizes squeeze t transpose unbind unsqueeze view
    wait_tensor zeros zeros_like
"""
FREE = frozenset(_FREE.split())
"""Views, and tensors of one value."""


def name_of(target: str) -> str:
    """``aten.mm.default`` -> ``mm``."""
    return target.split(".")[1] if "." in target else target


def status_of(target: str) -> Status:
    """Of an operator as torch prints it."""
    namespace, name = target.partition(".")[0], name_of(target)
    if name in KERNELS or (
        namespace == "_c10d_functional" and (name in COLLECTIVES or name == "wait_tensor")
    ):
        return "lowered"
    return OPERATORS.get(name, "unknown") if namespace in ("aten", "prims") else "unknown"
