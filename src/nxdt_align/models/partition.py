"""How NxD spreads a decoder over tensor-parallel ranks and pipeline stages: pure arithmetic on sizes.

A rank's share of a weight is a list of ranges along one dimension, in the order in which the rank
holds them; so one description serves both directions. The orders are those of NxD's own converter
for trn1 (neuronx-distributed, scripts/checkpoint_converter.py and pipeline/partition.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil
from typing import Literal, get_args

from nxdt_align.errors import UserError
from nxdt_align.models.adapters import AdapterSpec, adapter_shapes, is_adapter
from nxdt_align.models.presets import DecoderConfig, weight_shapes
from nxdt_align.models.sharding import KV_HEADS, VOCAB, Split, split_of

QKV = Literal["split", "fused", "separate", "coalesced"]
"""How an attention layer keeps its projections.

split: GQAQKVColumnParallelLinear's weight_q, weight_k, weight_v (``qkv_linear``); fused: its
weight_qkv (``fuse_qkv``); separate: q_proj, k_proj, v_proj; coalesced: one ColumnParallelLinear of
stride 3, which NxDT makes of as many kv heads as query heads.
"""
Range = tuple[int, int]
"""Start and stop along the split dimension."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LARGEST_TP = 1024
_shapes = lru_cache(maxsize=8)(weight_shapes)
_adapter_shapes = lru_cache(maxsize=8)(adapter_shapes)


class PartitionError(UserError):
    """Sizes that do not go together; the message says which would."""


@dataclass(frozen=True)
class Partition:
    """Raises PartitionError naming every size at fault, and the sizes that would fit."""

    config: DecoderConfig
    tp: int = 1
    pp: int = 1
    kv_multiplier: int = 1
    qkv: QKV = "split"
    vocab: int | None = None
    """Rows of embedding and head, padded to; None: the next multiple of tp. The rows added are 0."""
    cuts: tuple[int, ...] | None = None
    """Layers after which a stage ends, but for the last stage's; None: as NxD cuts by itself."""
    adapters: AdapterSpec | None = None
    """Of a model that has some beside its weights."""

    def __post_init__(self) -> None:
        faults = [*_size_faults(self), *(_head_faults(self) if self.tp > 0 < self.kv_multiplier else ())]
        if faults:
            raise PartitionError("\n".join(faults))

    @property
    def padded_vocab(self) -> int:
        return self.vocab or ceil(self.config.vocab_size / self.tp) * self.tp

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The numbers of the stages' last layers, but for the last stage's."""
        return even_cuts(self.config.num_hidden_layers, self.pp) if self.cuts is None else self.cuts

    def stage_of(self, name: str) -> list[int]:
        """The pipeline stages that hold the weight ``name``; a tied embedding is in the first and last."""
        if name.startswith("model.layers."):
            return [bisect_left(self.stage_ends, int(name.split(".")[2]))]
        is_embedding = name.rpartition(".")[0] == EMBEDDING.rpartition(".")[0]
        return [0] if is_embedding else [self.pp - 1]

    def ranges(self, name: str, rank: int) -> tuple[int, list[Range]]:
        """The dimension along which ``name`` is cut, and what ``rank`` holds of it, in its order.

        For a weight that every rank holds whole: dimension 0, all of it.
        """
        split = split_of(name)
        whole = self.whole_shape(name)
        if split.dim is None:
            return 0, [(0, whole[0])]
        if split.unit in ("query_head", "kv_head"):
            return split.dim, list(_joined(self._heads(split, rank)))
        size = whole[split.dim] // self.tp
        return split.dim, [(rank * size, (rank + 1) * size)]

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor that the adapters add, whole."""
        return {} if self.adapters is None else _adapter_shapes(self.config, self.adapters)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole weight, vocabulary padded."""
        shape = self.adapter_shapes[name] if is_adapter(name) else weight_shape(self.config, name)
        return (self.padded_vocab, *shape[1:]) if split_of(name) == VOCAB else shape

    def local_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one rank's share; the same on every rank."""
        shape = list(self.whole_shape(name))
        dim, ranges = self.ranges(name, 0)
        shape[dim] = sum(stop - start for start, stop in ranges)
        return tuple(shape)

    def _heads(self, split: Split, rank: int) -> Iterator[Range]:
        """KV heads repeat as a whole, (K0 K1 ...)(K0 K1 ...); each takes its share of its query heads
        along, and the ranks cut the row of them evenly."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        size, group = self.config.head_dim, heads // kv_heads
        share = group // self.kv_multiplier
        slots = [(copy, kv) for copy in range(self.kv_multiplier) for kv in range(kv_heads)]
        each = len(slots) // self.tp
        for copy, kv in slots[rank * each : (rank + 1) * each]:
            first, count = (kv, 1) if split == KV_HEADS else (kv * group + copy * share, share)
            yield first * size, (first + count) * size


def weight_shape(config: DecoderConfig, name: str) -> tuple[int, ...]:
    """The shape of one weight; a tied head's is the embedding's. Raises KeyError."""
    if name == HEAD:
        return config.vocab_size, config.hidden_size
    return _shapes(config)[name]


def even_cuts(layers: int, pp: int) -> tuple[int, ...]:
    """The last layer of each stage but the last: evenly many a stage, and one more in each of the last
    ``layers % pp``."""
    return tuple(end - 1 for end in accumulate(even_stages(layers, pp)))[:-1]


def default_multiplier(config: DecoderConfig, tp: int) -> int:
    """The fewest copies of the kv heads that can be dealt to ``tp`` ranks; 1 where none fits."""
    fits = fitting_multipliers(config, tp)
    return min(fits, default=1)


def default_qkv(config: DecoderConfig, tp: int, kv_multiplier: int) -> QKV:
    """What NxDT's shipped configurations use at these sizes; copies of kv heads are ``split``'s alone."""
    if kv_multiplier > 1:
        return "split"
    if config.num_attention_heads == config.num_key_value_heads:
        return "coalesced"
    return "split" if tp == config.num_key_value_heads else "separate"


def fitting_multipliers(config: DecoderConfig, tp: int) -> list[int]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        m
        for m in range(1, heads // kv_heads + 1)
        if heads % (kv_heads * m) == 0 and kv_heads * m % tp == 0 and tp % m == 0
    ]


def fitting_tp(config: DecoderConfig) -> list[int]:
    """Every tensor-parallel size for which some multiplier fits."""
    sizes = range(1, min(config.num_attention_heads, _LARGEST_TP) + 1)
    return [tp for tp in sizes if config.intermediate_size % tp == 0 and fitting_multipliers(config, tp)]


def local_names(qkv: QKV, name: str) -> str:
    """NxD's name of the local tensor that holds (its part of) the plain model's ``name``."""
    what = name.rpartition(".")[2]  # weight or bias
    if ".gate_up_proj." in name:
        return f"{name.rpartition('.gate_up_proj.')[0]}.gate_up_proj.{what}"
    layer, found, projection = name.partition(".qkv_proj.")
    if not found:
        return name
    kind = projection[0]
    if qkv == "separate":
        return f"{layer}.{projection}"
    suffix = {"split": f"{what}_{kind}", "fused": f"{what}_qkv", "coalesced": what}[qkv]
    return f"{layer}.qkv_proj.{suffix}"


def local_tensors(partition: Partition, stage: int) -> dict[str, list[str]]:
    """NxD's names on a stage, and the plain model's weights stacked on dimension 0 in each, in order.

    An adapter's tensors, which come first, keep the plain model's names.
    """
    names = list(weight_shapes(partition.config))
    if partition.config.tie_word_embeddings:
        names.append(HEAD)
    added = partition.adapter_shapes
    found = {name: [name] for name in added if stage in partition.stage_of(name)}
    for name in names:
        if stage in partition.stage_of(name):
            found.setdefault(local_names(partition.qkv, name), []).append(name)
    return found


def _joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """Neighbours in one piece, so that they are read and written in one go."""
    last: Range | None = None
    for start, stop in ranges:
        if last is not None and last[1] == start:
            last = last[0], stop
            continue
        if last is not None:
            yield last
        last = start, stop
    if last is not None:
        yield last


def _size_faults(p: Partition) -> Iterator[str]:
    layers, vocab = p.config.num_hidden_layers, p.config.vocab_size
    for what, value in (("tensor-parallel size", p.tp), ("kv multiplier", p.kv_multiplier)):
        if value < 1:
            yield f"the {what} must be at least 1, but is {value}"
    if not 1 <= p.pp <= layers:
        yield f"the pipeline-parallel size must be 1 to num_hidden_layers ({layers}), but is {p.pp}"
    elif p.cuts is not None and not _are_cuts(p.cuts, layers, p.pp):
        yield (
            f"pipeline_cuts must be {p.pp - 1} layers below the last ({layers - 1}) in ascending order, but "
            f"are {list(p.cuts)}"
        )
    if p.qkv not in get_args(QKV):
        yield f"qkv must be one of {', '.join(get_args(QKV))}, but is {p.qkv!r}"
    if p.vocab is not None and p.tp > 0 and (p.vocab < vocab or p.vocab % p.tp):
        yield (
            f"the padded vocabulary must be a multiple of the tensor-parallel size ({p.tp}) and at least "
            f"vocab_size ({vocab}), but is {p.vocab}; {ceil(vocab / p.tp) * p.tp} fits"
        )


def _are_cuts(cuts: tuple[int, ...], layers: int, pp: int) -> bool:
    """Whether each of ``pp`` stages then holds a layer."""
    bounds = [-1, *cuts, layers - 1]
    return len(cuts) == pp - 1 and all(a < b for a, b in pairwise(bounds))


def _head_faults(p: Partition) -> Iterator[str]:
    config, tp, multiplier = p.config, p.tp, p.kv_multiplier
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.intermediate_size % tp:
        yield (
            f"the tensor-parallel size must divide intermediate_size ({config.intermediate_size}), but is "
            f"{tp}; sizes that fit this model: {_listed(fitting_tp(config))}"
        )
    multipliers = fitting_multipliers(config, tp)
    if not multipliers:
        yield (
            f"a tensor-parallel size of {tp} does not fit {heads} query heads and {kv_heads} kv heads; "
            f"sizes that fit this model: {_listed(fitting_tp(config))}"
        )
    elif multiplier not in multipliers:
        only = "" if p.qkv in ("split", "fused") else " with qkv_linear, as other layers have no copies"
        yield (
            f"a kv multiplier of {multiplier} does not spread {kv_heads} kv heads, and {heads} query heads "
            f"with them, over {tp} ranks; multipliers that fit{only}: {_listed(multipliers)}"
        )
    if p.qkv in ("separate", "coalesced") and multiplier != 1 and multiplier in multipliers:
        yield (
            f"separate q, k and v layers have no replicated kv heads, but the kv multiplier is {multiplier}; "
            "use qkv_linear"
        )
    if p.qkv == "coalesced" and heads != kv_heads:
        yield (
            f"one coalesced qkv layer needs as many kv heads as query heads ({heads}), but there are "
            f"{kv_heads}; use qkv_linear, with fuse_qkv where q, k and v are to be one tensor"
        )


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"


def even_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage. Where they do not come out even, the last ones have one more, as in NxD:
    they keep the activations of fewer micro-batches."""
    return tuple(layers // stages + (i >= stages - layers % stages) for i in range(stages))
