"""Attention by intervals in nki-library's flash kernels on Trainium2 and 3, forward and backward.

The kernels (``attention_cte``, ``attention_bwd``) take for each query the first and one past the last key, as
every layout here has them. With such bounds ``attention_cte`` scales no scores: queries come scaled. They are
a torch operator with its own gradient, so that eager steps and compiled graphs call them alike.
``PlainKernels`` says in plain torch what they compute, in their layouts: it runs where ``nki`` is not, for
tests. Signatures and limits as of nki-library d2ad3a5 (April 2026); not run on a device.
https://github.com/aws-neuron/nki-library

Legend as in ``attention.py``; ``P`` = 128 queries of a tile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from nxdt_align.errors import UserError

QUERIES, KEYS, LARGEST_HEAD = 128, 512, 128
"""Rows are a multiple of both, the kernels' tiles; a head has at most so many entries."""
INSTALL = "AWS's torch-neuronx for trn2 and trn3 brings nki, and neuronx-cc brings nki-library as nkilib"


class Kernels(Protocol):
    """The two kernels, for the heads of one row, whose scores are q k: ``start`` and ``stop`` are (S,)
    float32, for all heads; all other inputs have one dtype."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """q (N, S, H), k and v (K, S, H) -> (N, S, H), and each query's logarithm of the sum of its
        exponentials, (N, P, S / P) float32."""
        ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        sums: Tensor,
        start: Tensor,
        stop: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All of (1, heads, H, S), ``sums`` (1, N, P, S / P) -> the gradients of q, k and v."""
        ...


class LibraryKernels:
    """nki-library's. Raises UserError where its packages are not there.

    Args:
        cores: physical cores of a logical one (LNC), which share a call's heads.
        library: stands for ``nkilib.core.attention`` in tests.
    """

    def __init__(self, cores: int = 2, library: Any = None) -> None:
        if library is None:
            forward, backward = (_module(f"nkilib.core.attention.{name}") for name in _KERNELS)
        else:
            forward = backward = library
        self._forward, self._backward = forward.attention_cte[cores], backward.attention_bwd[cores]
        self._cores = cores

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        out, negative_max, reciprocal = self._forward(
            q,
            k,
            v,
            scale=1.0,  # the only one that it takes with bounds
            causal_mask=False,
            tp_q=True,
            tp_k=True,
            tp_out=False,
            cache_softmax=True,
            bound_min=start[:, None],
            bound_max=stop[:, None],
        )
        return out, -(negative_max + torch.log(reciprocal))

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        sums: Tensor,
        start: Tensor,
        stop: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads = k.shape[1]
        copies = copies_of_keys(q.shape[1], kv_heads, self._cores)
        if copies > 1:
            k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
        of_q, of_k, of_v = self._backward(
            q,
            k,
            v,
            out,
            grad,
            sums,
            bound_min=start,
            bound_max=stop,
            use_causal_mask=False,
            mixed_precision=True,
            softmax_scale=1.0,  # else the kernel takes the root of the head's size
        )
        if copies > 1:
            of_k, of_v = (x.unflatten(1, (kv_heads, copies)).sum(2) for x in (of_k, of_v))
        return of_q, of_k, of_v


def copies_of_keys(heads: int, kv_heads: int, cores: int) -> int:
    """How many copies of each key-value head ``attention_bwd`` gets, each with its share of the query heads:
    it deals key-value heads out to the physical cores of a logical one, and one without its share waits.
    1 where they come out even, or query heads cannot be shared evenly."""
    return cores if kv_heads % cores and (heads // kv_heads) % cores == 0 else 1


_KERNELS = ("attention_cte", "attention_bwd")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"data.attention: nki needs the package nki and nki-library, but {error}; {INSTALL}. "
            "data.attention=dense runs without them"
        ) from error


class PlainKernels:
    """What the kernels compute, in float32 products of any device, of inputs that they take."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0).float() for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            scores = _masked(q.float() @ k.mT, start, stop)
            sums = scores.logsumexp(-1)
            out = (scores - sums[..., None]).exp() @ v
        return out.to(q.dtype), sums.view(len(sums), -1, QUERIES).mT.contiguous()

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        sums: Tensor,
        start: Tensor,
        stop: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert q.dtype == k.dtype == v.dtype == out.dtype == grad.dtype
        kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(groups, 1).float() for x in (k, v))
        given = q.float(), out.float(), grad.float()
        q32, out32, grad32 = given
        scores = _masked(q32.mT @ wide_k, start, stop)
        weights = (scores - sums.mT.flatten(-2)[..., None]).exp()
        of_v = grad32 @ weights
        of_scores = weights * (grad32.mT @ wide_v - (grad32 * out32).sum(2)[..., None])
        of_q = wide_k @ of_scores.mT
        of_k = q32 @ of_scores
        shape = (1, kv_heads, groups, *of_k.shape[2:])
        of_k, of_v = of_k.view(shape).sum(2), of_v.view(shape).sum(2)
        return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype)


def _masked(scores: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    index = torch.arange(scores.shape[-1], dtype=torch.float32, device=scores.device)
    seen = (index >= start[:, None]) & (index < stop[:, None])
    return torch.where(seen, scores, torch.finfo(torch.float32).min)


Register = Callable[..., Callable[[Callable[..., Any]], Any]]
"""torch.library.custom_op, or TorchNeuron's nki_op, whose operators its compiler knows."""


def operator(
    kernels: Kernels, name: str, register: Register = torch.library.custom_op
) -> Callable[..., Tensor]:
    """``kernels`` as the torch operator ``name`` (namespace::name) with gradients.

    It takes scaled q (B, S, N, H), k and v (B, S, K, H), all of one dtype, and (B, S) float32 bounds ->
    (B, S, N, H). The kernels have one pair of vectors for all heads of a call, so each row is a call.
    """

    @register(name, mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for row, (a, b) in enumerate(zip(start, stop, strict=True)):
            of_q, of_k, of_v = (x[row].transpose(0, 1).contiguous() for x in (q, k, v))
            rows.append(kernels.forward(of_q, of_k, of_v, a, b))
        outs, sums = zip(*rows, strict=True)
        return torch.stack(outs).transpose(1, 2).contiguous(), torch.stack(sums)

    @register(f"{name}_backward", mutates_args=())
    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        sums: Tensor,
        start: Tensor,
        stop: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = []
        for row, (a, b) in enumerate(zip(start, stop, strict=True)):
            turned = [x[row : row + 1].permute(0, 2, 3, 1).contiguous() for x in (q, k, v, out, grad)]
            found = kernels.backward(
                turned[0], turned[1], turned[2], turned[3], turned[4], sums[row : row + 1], a, b
            )
            rows.append([x.permute(0, 3, 1, 2) for x in found])
        of_q, of_k, of_v = (torch.cat(parts).contiguous() for parts in zip(*rows, strict=True))
        return of_q, of_k, of_v

    @forward.register_fake  # type: ignore[untyped-decorator]
    def _(q: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        rows, size, heads, _ = q.shape
        sums = q.new_empty((rows, heads, QUERIES, size // QUERIES), dtype=torch.float32)
        return torch.empty_like(q, memory_format=torch.contiguous_format), sums

    @backward.register_fake  # type: ignore[untyped-decorator]
    def _(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, start, stop = inputs
        ctx.save_for_backward(q, k, v, *output, start, stop)

    def gradient(ctx: Any, grad: Tensor, _sums: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, start, stop = ctx.saved_tensors
        return *backward(q, k, v, out, grad.contiguous(), sums, start, stop), None, None

    forward.register_autograd(gradient, setup_context=keep)
    return lambda *given: forward(*given)[0]


@cache
def _device_operator(cores: int) -> Callable[..., Tensor]:
    return operator(LibraryKernels(cores), "nxdt_align::interval_attention", _module("torch_neuronx").nki_op)


class NkiAttention:
    """Attention by intervals in nki-library's kernels. Raises UserError where its packages are not there.

    Args:
        attend: an ``operator``; that of the device's kernels where None.
        cores: physical cores of a logical one.
    """

    static_shapes = True

    def __init__(self, attend: Callable[..., Tensor] | None = None, *, cores: int = 2) -> None:
        self._attend = _device_operator(cores) if attend is None else attend

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) float32 each, as the kernels take them. Raises UserError for rows that they do not take."""
        tokens = key_start.shape[1]
        if tokens % KEYS:
            raise UserError(
                f"data.attention: nki needs rows of a multiple of {KEYS} tokens, but a row has {tokens}; set "
                "data.buckets and data.seq_length to such multiples, or data.attention=dense"
            )
        return key_start.float(), key_stop.float()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any, softcap: float | None = None) -> Tensor:
        fault = misfit(q.shape[-1], softcap)
        if fault is not None:
            raise UserError(f"data.attention: nki {fault}; set data.attention=dense")
        # One dtype, as attention_bwd asks for: under autocast head norms leave q and k in float32.
        q = (q * q.shape[-1] ** -0.5).to(v.dtype)
        return self._attend(q, k.to(v.dtype), v, *context)


def misfit(head_size: int, softcap: float | None) -> str | None:
    """What of a model the kernels do not take; None where they take it."""
    if softcap is not None:
        return f"does not cap scores, as this model does (at {softcap:g})"
    if head_size > LARGEST_HEAD:
        return f"takes heads of up to {LARGEST_HEAD} entries, but this model's have {head_size}"
    return None
