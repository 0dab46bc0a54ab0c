"""How each weight of the plain model is split over tensor-parallel ranks: one table, pure data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["query_head", "kv_head", "head_dim", "row", "vocab"]


@dataclass(frozen=True)
class Split:
    """``dim`` is cut into whole ``unit``s: heads of head_dim entries, or single rows.

    None for ``dim``: every rank holds the whole weight.
    """

    dim: int | None
    unit: Unit | None

    @property
    def replicated(self) -> bool:
        return self.dim is None


QUERY_HEADS = Split(0, "query_head")
KV_HEADS = Split(0, "kv_head")
HEAD_INPUTS = Split(1, "query_head")
"""The columns that take the query heads' outputs: same order and ranks as QUERY_HEADS."""
COLUMN = Split(0, "row")
ROW = Split(1, "row")
"""The columns that take COLUMN's outputs: same order and ranks."""
VOCAB = Split(0, "vocab")
REPLICATED = Split(None, None)
EACH_HEAD = Split(None, "head_dim")
"""Whole on every rank, and applied to each of that rank's heads: every rank has a part of its gradient."""

SPLITS: dict[str, Split] = {
    "model.embed_tokens.weight":                         VOCAB,
    "model.layers.*.input_layernorm.weight":             REPLICATED,
    "model.layers.*.self_attn.qkv_proj.q_proj.weight":   QUERY_HEADS,
    "model.layers.*.self_attn.qkv_proj.k_proj.weight":   KV_HEADS,
    "model.layers.*.self_attn.qkv_proj.v_proj.weight":   KV_HEADS,
    "model.layers.*.self_attn.qkv_proj.q_proj.bias":     QUERY_HEADS,
    "model.layers.*.self_attn.qkv_proj.k_proj.bias":     KV_HEADS,
    "model.layers.*.self_attn.qkv_proj.v_proj.bias":     KV_HEADS,
    "model.layers.*.self_attn.o_proj.weight":            HEAD_INPUTS,
    "model.layers.*.self_attn.o_proj.bias":              REPLICATED,
    "model.layers.*.self_attn.q_norm.weight":            EACH_HEAD,
    "model.layers.*.self_attn.k_norm.weight":            EACH_HEAD,
    "model.layers.*.self_attn.q_projection_norm.weight": QUERY_HEADS,
    "model.layers.*.self_attn.k_projection_norm.weight": KV_HEADS,
    "model.layers.*.attention_output_norm.weight":       REPLICATED,
    "model.layers.*.post_attention_layernorm.weight":    REPLICATED,
    "model.layers.*.mlp.gate_up_proj.gate_proj.weight":  COLUMN,
    "model.layers.*.mlp.gate_up_proj.up_proj.weight":    COLUMN,
    "model.layers.*.mlp.gate_up_proj.gate_proj.bias":    COLUMN,
    "model.layers.*.mlp.gate_up_proj.up_proj.bias":      COLUMN,
    "model.layers.*.mlp.down_proj.weight":               ROW,
    "model.layers.*.mlp.down_proj.bias":                 REPLICATED,
    "model.layers.*.mlp_output_norm.weight":             REPLICATED,
    "model.norm.weight":                                 REPLICATED,
    "lm_head.weight":                                    VOCAB,
}  # fmt: skip

LORA_A, LORA_B, MAGNITUDE, TRAINED, START = "lora_A", "lora_B", "magnitude", "trained_", "start_"
"""An adapter's tensors beside a module's ``weight``: the low-rank factors, (rank, inputs) and (outputs,
rank); DoRA's norms of rows, (outputs,); what stands before the name of a weight that is trained whole; and
before that of a factor that the reference keeps."""
ADAPTER_PARTS = (LORA_A, LORA_B, MAGNITUDE, f"{TRAINED}weight", f"{TRAINED}bias")

_FACTORS = (LORA_A, LORA_B, MAGNITUDE)

_LAYER = re.compile(r"^model\.layers\.\d+\.")


def split_of(name: str) -> Split:
    """How the weight ``name`` is split, an adapter's too: a factor that lies across the split is split with
    the weight. Raises KeyError for a weight the plain model does not have."""
    path, _, what = name.rpartition(".")
    part = what.removeprefix(START)
    if part not in ADAPTER_PARTS:
        return SPLITS[_LAYER.sub("model.layers.*.", name)]
    if part.startswith(TRAINED):
        return split_of(f"{path}.{part.removeprefix(TRAINED)}")
    split = split_of(f"{path}.weight")
    across = 1 if part == LORA_A else 0
    return split if split.dim == across else REPLICATED


def is_factor(name: str) -> bool:
    """Whether ``name`` is an adapter's tensor beside a linear layer's weight, which stays frozen."""
    return name.rpartition(".")[2].removeprefix(START) in _FACTORS
