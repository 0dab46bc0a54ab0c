"""Meta's original download: ``consolidated.NN.pth`` shards with ``params.json``.

The shards split weights over model-parallel ranks as fairscale does. Rows of q and k are ordered for
rotary pairs (2i, 2i+1) and are permuted to pairs (i, i + head_dim/2), as in Hugging Face's
conversion (transformers, models/decoder/convert_llama_weights_to_hf.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nxdt_align.models.partition import EMBEDDING, HEAD
from nxdt_align.models.presets import DecoderConfig, RopeScaling, from_hf_dict
from nxdt_align.named_tensors import WeightSource, require_fit, summary
from nxdt_align.weights.extents import Extent, WeightsError, read_tensor
from nxdt_align.weights.tensor_files import read_index, tensors_of

PARAMS = "params.json"
_SHARD = re.compile(r"^consolidated\.(\d\d)\.pth$")

# Meta                              plain model                               dimension split over shards
_TABLE = {
    "tok_embeddings.weight":         ("model.embed_tokens.weight",                   None),
    "layers.*.attention_norm.weight": ("model.layers.*.input_layernorm.weight",      None),
    "layers.*.attention.wq.weight":  ("model.layers.*.self_attn.qkv_proj.q_proj.weight", 0),
    "layers.*.attention.wk.weight":  ("model.layers.*.self_attn.qkv_proj.k_proj.weight", 0),
    "layers.*.attention.wv.weight":  ("model.layers.*.self_attn.qkv_proj.v_proj.weight", 0),
    "layers.*.attention.wo.weight":  ("model.layers.*.self_attn.o_proj.weight",      1),
    "layers.*.ffn_norm.weight":      ("model.layers.*.post_attention_layernorm.weight", None),
    "layers.*.feed_forward.w1.weight": ("model.layers.*.mlp.gate_up_proj.gate_proj.weight", 0),
    "layers.*.feed_forward.w2.weight": ("model.layers.*.mlp.down_proj.weight",       1),
    "layers.*.feed_forward.w3.weight": ("model.layers.*.mlp.gate_up_proj.up_proj.weight", 0),
    "norm.weight":                   ("model.norm.weight",                           None),
    "output.weight":                 ("lm_head.weight",                              0),
}  # fmt: skip
_LAYER = re.compile(r"^layers\.(\d+)\.")
_RECOMPUTED = "rope.freqs"


class MetaFolder(WeightSource):
    """The weights of a folder of Meta's download; whole tensors are assembled on demand.

    Args:
        config: the model's shape, if params.json is not sufficient; by default derived from it.

    Raises WeightsError naming the file or tensor that is missing, surplus, damaged or misshapen.
    """

    path: Path

    def __init__(self, path: str | Path, config: DecoderConfig | None = None) -> None:
        self.path = Path(path)
        params = _read_params(self.path)
        self._shards = _read_shards(self.path)
        self._names, unknown = _names(self._shards[0])
        if unknown:
            raise WeightsError(f"{self.path} holds tensors that no Llama has: {', '.join(summary(unknown))}")
        self.config = config or self._config(params)
        if HEAD in self._names and self.config.tie_word_embeddings:
            self._drop_tied_head()
        self._require_shards_alike()

    def __str__(self) -> str:
        return f"Meta's folder {self.path}"

    def names(self) -> list[str]:
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        theirs = self._names[name]
        shape, dim = list(self._shards[0][theirs].shape), self._dim(name)
        if dim is not None:
            shape[dim] *= len(self._shards)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[0][self._names[name]].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, its rows in Hugging Face's order."""
        parts, dim = [shard[self._names[name]] for shard in self._shards], self._dim(name)
        if dim is None:
            whole = read_tensor(parts[0])
        else:
            whole = torch.cat([read_tensor(part) for part in parts], dim)
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            return _to_half_pairs(whole, self.config.head_dim)
        return whole

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        """Sliced from the whole tensor, as the rows of q and k are stored in another order."""
        return self.read(name)[tuple(region)].clone()

    def _dim(self, name: str) -> int | None:
        """The dimension along which shards split a weight."""
        if len(self._shards) == 1:
            return None
        if name == EMBEDDING:
            # Llama 3 splits the embedding by rows (VocabParallelEmbedding), Llama 2 by columns; the head is
            # always split by rows, so equal row counts tell.
            rows = self._shards[0][self._names[name]].shape[0]
            head = self._shards[0].get("output.weight")
            is_by_rows = head is not None and head.shape[0] == rows
            return 0 if is_by_rows else 1
        return _TABLE[_LAYER.sub("layers.*.", self._names[name])][1]

    def _config(self, params: Mapping[str, Any]) -> DecoderConfig:
        try:
            values = _hf_values(params)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise WeightsError(
                f"{self.path / PARAMS} has no usable {error}: give the model's config.json with --config"
            ) from error
        gate = "model.layers.0.mlp.gate_up_proj.gate_proj.weight"
        for name in (EMBEDDING, gate):
            if name not in self._names:
                raise WeightsError(f"{self.path} does not fit its {PARAMS}: missing: {name}")
        values["vocab_size"] = self.shape(EMBEDDING)[0]
        values["intermediate_size"] = self.shape(gate)[0]
        config = from_hf_dict(values, where=str(self.path / PARAMS))
        # Llama 3.2 1B and 3B: their rope scaling factor is 32, that of Llama 3.1 is 8.
        is_small = (config.hidden_size, config.num_hidden_layers) in ((2048, 16), (3072, 28))
        if params.get("use_scaled_rope"):
            factor = float(params.get("rope_scaling_factor") or (32 if is_small else 8))
            scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
            config = replace(config, rope_scaling=scaling, max_position_embeddings=131072)
        return replace(config, tie_word_embeddings=self._is_tied())

    def _drop_tied_head(self) -> None:
        if not self._is_tied():
            raise WeightsError(
                f"{self}: the model configuration ties the head to the embedding, but output.weight and "
                "tok_embeddings.weight differ: set tie_word_embeddings to false"
            )
        del self._names[HEAD]

    def _is_tied(self) -> bool:
        if HEAD not in self._names:
            return True
        if self.shape(HEAD) != self.shape(EMBEDDING):
            return False
        return torch.equal(self.read(HEAD), self.read(EMBEDDING))

    def _require_shards_alike(self) -> None:
        """Shards of one download hold the same tensors in the same shapes."""
        kept = [{n: e for n, e in shard.items() if n != _RECOMPUTED} for shard in self._shards]
        first, *others = [{n: (e.shape, e.dtype) for n, e in shard.items()} for shard in kept]
        for i, shard in enumerate(others, 1):
            require_fit(
                self.path / f"consolidated.{i:02d}.pth",
                shard,
                first,
                to="consolidated.00.pth",
                error=WeightsError,
                hint="Shards of one download have equal shapes: copy or download it again",
            )


def is_meta_folder(path: Path) -> bool:
    return path.is_dir() and ((path / PARAMS).is_file() or any(path.glob("consolidated.*.pth")))


def _read_params(folder: Path) -> dict[str, Any]:
    try:
        params = json.loads((folder / PARAMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / PARAMS} cannot be read: {error}") from error
    if not isinstance(params, dict):
        raise WeightsError(f"{folder / PARAMS} must hold a JSON object")
    return params


def _read_shards(folder: Path) -> list[dict[str, Extent]]:
    found = {int(match[1]): f for f in sorted(folder.iterdir()) if (match := _SHARD.match(f.name))}
    missing = [f"consolidated.{i:02d}.pth" for i in range(max(found, default=0) + 1) if i not in found]
    if missing:
        raise WeightsError(f"{folder} has no {', '.join(missing)}: copy or download it again")
    shards = []
    for file in found.values():
        tensors = tensors_of(file, read_index(file))
        shards.append({name: held for name, held in tensors.items() if isinstance(held, Extent)})
    return shards


def _names(shard: Mapping[str, Extent]) -> tuple[dict[str, str], list[str]]:
    """The plain model's name -> Meta's, and Meta's names without an equivalent."""
    names, unknown = {}, []
    for theirs in shard:
        match = _LAYER.match(theirs)
        entry = _TABLE.get(_LAYER.sub("layers.*.", theirs))
        if entry is not None:
            names[entry[0].replace("*", match[1]) if match else entry[0]] = theirs
        elif theirs != _RECOMPUTED and not theirs.endswith(".inner_attention.rope.freqs"):
            unknown.append(theirs)
    return names, unknown


def _hf_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that follows from params.json; lengths and ids are those of the releases."""
    dim, heads = int(params["dim"]), int(params["n_heads"])
    theta = float(params.get("rope_theta") or 10000.0)
    # params.json does not name the release; Llama 3's rope_theta is 500,000.
    is_llama3 = theta >= 5e5
    return {
        "hidden_size": dim,
        "num_hidden_layers": int(params["n_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "head_dim": dim // heads,
        "rms_norm_eps": float(params["norm_eps"]),
        "rope_theta": theta,
        "max_position_embeddings": 8192 if is_llama3 else 4096,
        "bos_token_id": 128000 if is_llama3 else 1,
        "eos_token_id": 128001 if is_llama3 else 2,
    }


def _to_half_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (2i, 2i+1) of each head to (i, i + head_dim/2)."""
    rows, columns = weight.shape
    pairs = weight.view(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
