"""What training adapters instead of every weight changes in a step's memory: frozen weights need no gradient,
so that their inputs are not kept, and factors keep their own.

``workload.py`` has the legend.
"""

from __future__ import annotations

from math import prod

from nxdt_align.models.adapters import AdapterSpec, adapter_shapes, quantized_layers
from nxdt_align.models.config import weight_shapes
from nxdt_align.models.nf4 import quantized_shapes
from nxdt_align.models.sharding import KV_HEADS, split_of
from nxdt_align.planning.workload import FLOAT, Workload

_QKV, _GATE_UP, _OUT, _DOWN = (".qkv_proj.", ".gate_up_proj.", ".o_proj", ".down_proj")


def factor_count(work: Workload, layers: range, *, trained: bool) -> int:
    """Values of a tensor-parallel rank's adapters in ``layers``, and in embedding and head where those are
    among them, trained or kept for the reference."""
    spec = work.adapters
    if spec is None:
        return 0
    total = 0
    for name, shape in adapter_shapes(work.model, spec).items():
        if spec.trains(name) != trained or not _is_of(name, layers, work.model.num_hidden_layers):
            continue
        split, size = split_of(name), prod(shape)
        if split == KV_HEADS:
            size = size // work.model.num_key_value_heads * (work.kv_heads or work.own_kv_heads)
        elif not split.replicated:
            size //= work.tensor_parallel
        total += size
    return total


def _is_of(name: str, layers: range, count: int) -> bool:
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) in layers
    return (layers.start == 0) if name.startswith("model.embed_tokens.") else (layers.stop == count)


def unkept_of_layer(work: Workload, *, whole: bool = False) -> int:
    """Of what a layer would keep if its weights were trained: what no factor's gradient needs either.

    Args:
        whole: of a layer that recomputes nothing.
    """
    spec, formats = work.adapters, work.formats
    if spec is None:
        return 0
    recomputed = () if whole else work.recompute
    residual = work.residual_positions * work.model.hidden_size
    gathered = (work.positions if work.keeps_gathered else work.residual_positions) * work.model.hidden_size
    unkept = 0
    if "LlamaRMSNorm" not in recomputed:
        unkept += (4 if work.model.norms == "both" else 2) * residual * formats.residual
        if work.model.qk_norm is not None:
            heads = work.heads + work.own_kv_heads
            unkept += work.positions * heads * work.model.head_dim * formats.activation
    if not _adapts(spec, _QKV):
        unkept += gathered * formats.activation
    if not _adapts(spec, _OUT):
        unkept += work.positions * work.heads * work.model.head_dim * formats.activation
    if "LlamaMLP" not in recomputed:
        unkept += 0 if _adapts(spec, _GATE_UP) else gathered * formats.activation
        unkept += 0 if _adapts(spec, _DOWN) else work.positions * work.width * formats.activation
    return unkept


def kept_by_factors(work: Workload, *, whole: bool = False) -> int:
    """Of a layer: what lies between its factors; with dropout their inputs and masks; DoRA's two products.

    Args:
        whole: of a layer that recomputes nothing.
    """
    spec = work.adapters
    if spec is None:
        return 0
    size, kept = work.formats.activation, 0
    for path in spec.targets:
        if "LlamaMLP" in work.recompute and not whole and ".mlp." in path:
            continue
        inputs, outputs = _sizes(work, path)
        kept += spec.rank * size
        kept += inputs * (size + 1) if spec.dropout else 0
        kept += 2 * outputs * size if spec.dora else 0
    return work.positions * kept // work.model.num_hidden_layers


def _sizes(work: Workload, path: str) -> tuple[int, int]:
    """Inputs and outputs of a rank's part of a layer."""
    hidden, head = work.model.hidden_size, work.model.head_dim
    if path.endswith(_OUT):
        return work.heads * head, hidden
    if path.endswith(_DOWN):
        return work.width, hidden
    if _GATE_UP in path:
        return hidden, work.width
    return hidden, (work.heads if path.endswith("q_proj") else work.own_kv_heads) * head


def dequantised_weight(work: Workload, largest: int) -> int:
    """Of a frozen weight that is computed with: its values, where it is held in 4 bits."""
    is_quantised = work.adapters is not None and work.adapters.quantize is not None
    return largest * work.formats.activation if is_quantised else 0


def norms_scratch(work: Workload, largest: int) -> int:
    """Of DoRA's forward pass: float32 rows of a weight with its factors, whose norm is taken, and their
    squares."""
    return 3 * largest * FLOAT if work.adapters is not None and work.adapters.dora else 0


def saved_by_quantizing(work: Workload, layers: range) -> int:
    """Bytes that the weights in ``layers`` take less for being held in 4 bits, with their scales.

    With FSDP of what a rank holds, whose scales are whole on each, and of the two layers that are gathered.
    """
    spec = work.adapters
    if spec is None or spec.quantize is None:
        return 0
    shapes, saved, scales = weight_shapes(work.model), 0, 0
    for path in quantized_layers(work.model, spec):
        if int(path.split(".")[2]) in layers:
            rows, columns = shapes[f"{path}.weight"]
            sizes = {n: prod(s) * d.itemsize for n, (s, d) in quantized_shapes(rows, columns).items()}
            packed = sizes.pop("weight")
            saved += rows * columns * work.formats.weight - packed
            scales += sum(sizes.values())
    if work.fsdp and work.data_parallel > 1:
        saved = saved // work.data_parallel + 2 * saved // len(layers)
    return saved - scales


def _adapts(spec: AdapterSpec, part: str) -> bool:
    return any(part in path for path in spec.targets)
