"""Frozen weights in 4 bits: NF4 with double quantisation (QLoRA, https://arxiv.org/abs/2305.14314).

The values are bitsandbytes' own, on a CPU and on CUDA: nothing here quantises or dequantises by itself.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nxdt_align.errors import UserError

KEY = "model_alignment_strategy.peft.quantize_base"
BLOCK, NESTED_BLOCK = 64, 256
"""Values of a weight under one scale, and scales under one scale of their own: the paper's."""
DEVICES = ("cpu", "cuda")
"""Types of devices on which bitsandbytes' kernels are tested here."""
_PACKED, _SCALES, _NESTED, _OFFSET, _CODE = "weight", "nf4_scales", "nf4_nested", "nf4_offset", "nf4_code"
SCALE_PARTS = (_SCALES, _NESTED, _OFFSET, _CODE)
"""Tensors of a quantised linear layer beside its ``weight``, which holds two values per byte."""


def require_library(device: torch.device) -> None:
    """Raise UserError where no base can be quantised on ``device``."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{KEY}: nf4 needs bitsandbytes, which is not installed: pip install 'nxdt-align[qlora]', or "
            "leave the key out"
        )
    if device.type not in DEVICES:
        raise UserError(
            f"{KEY}: nf4 runs on {' and '.join(DEVICES)}, for which bitsandbytes has kernels, but this run's "
            f"device is {device.type}; leave it out"
        )


def _library() -> Any:
    # Its import warns that an optional faster kernel, which is not used here, is not installed.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes

        return bitsandbytes
    finally:
        log.setLevel(level)


class NF4Weight(NamedTuple):
    """A weight (O, I) as bitsandbytes quantises it."""

    packed: Tensor
    """(O, I / 2) uint8: two values per byte, row by row."""
    scales: Tensor
    """(ceil(O I / 64),) uint8: each block's largest absolute value, less ``offset``, quantised."""
    nested: Tensor
    """(ceil(len(scales) / 256),) float32: scales of the scales."""
    offset: Tensor
    """(1,) float32."""
    code: Tensor
    """(256,) float32: what a byte of ``scales`` stands for."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in ``dtype``, a new tensor."""
        ops: Any = torch.ops.bitsandbytes
        scales = ops.dequantize_blockwise(self.scales, self.nested, self.code, NESTED_BLOCK, torch.float32)
        rows, columns = self.packed.shape[0], 2 * self.packed.shape[1]
        size = rows * columns
        # As rows of one block: bitsandbytes 0.50 on a CPU takes wrong scales where blocks cross rows.
        blocks = [size // BLOCK, BLOCK] if size % BLOCK == 0 else [1, size]
        packed = self.packed.reshape(-1, 1)
        whole: Tensor = ops.dequantize_4bit(packed, scales + self.offset, BLOCK, "nf4", blocks, dtype)
        return whole.view(rows, columns)


def quantized(weight: Tensor) -> dict[str, Tensor]:
    """What a quantised linear layer holds of its ``weight`` (O, I), by the names of its tensors."""
    functional = _library().functional
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return {
        _PACKED: packed.reshape(weight.shape[0], -1),
        _SCALES: state.absmax,
        _NESTED: state.state2.absmax,
        _OFFSET: state.offset.reshape(1),
        _CODE: state.state2.code,
    }


def quantized_shapes(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what ``quantized`` gives of a weight (rows, columns)."""
    blocks = -(-rows * columns // BLOCK)
    return {
        _PACKED: ((rows, columns // 2), torch.uint8),
        _SCALES: ((blocks,), torch.uint8),
        _NESTED: ((-(-blocks // NESTED_BLOCK),), torch.float32),
        _OFFSET: ((1,), torch.float32),
        _CODE: ((256,), torch.float32),
    }


def is_scale(name: str) -> bool:
    """Whether the tensor ``name`` is one of ``SCALE_PARTS``."""
    return name.rpartition(".")[2] in SCALE_PARTS


def weight_of(parts: Mapping[str, Any]) -> NF4Weight:
    """Of what ``quantized`` gave, or a quantised module's parameters."""
    return NF4Weight(parts[_PACKED], *(parts[part] for part in SCALE_PARTS))


def hold_quantized(module: nn.Linear) -> None:
    """Replace the weight of ``module`` by the tensors of a quantised one, frozen and without values."""
    _library()  # its operations are torch's from here on
    rows, columns = module.weight.shape
    for name, (shape, dtype) in quantized_shapes(rows, columns).items():
        tensor = torch.empty(shape, dtype=dtype, device=module.weight.device)
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class NF4Linear(nn.Linear):
    """A frozen linear layer, made of another by ``hold_quantized`` and its class."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, weight_of(self._parameters), self.bias)


def linear(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., I) W' + bias -> (..., O). Of a quantised weight nothing but its 4 bits is kept for the backward
    pass, which dequantises it again."""
    if not isinstance(weight, NF4Weight):
        return F.linear(x, weight, bias)
    product: Tensor = _Product.apply(x, *weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    # Not bitsandbytes' own, whose kernels multiply with weights that they round otherwise on each device.

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weight: Tensor) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.dtype = x.dtype
        return F.linear(x, NF4Weight(*weight).dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight = NF4Weight(*ctx.saved_tensors)  # read once, as recomputing gives them out once
        return (gradient @ weight.dequantized(gradient.dtype)).to(ctx.dtype), *[None] * len(weight)
