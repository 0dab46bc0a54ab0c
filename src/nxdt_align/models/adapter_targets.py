"""Which layers get adapters and which modules are trained whole, by the names that a configuration gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nxdt_align.errors import UserError
from nxdt_align.models.adapters import AdapterSpec, Init, Quantization
from nxdt_align.models.config import LinearLayers, ModelShape, weight_shapes

EXPANDED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""NxDT's names of what is one layer there; here each projection has factors of its own."""
ALL_LINEAR = "all-linear"
_ELSEWHERE = {
    "output_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
}
"""torchtune's and Meta's names of layers -> transformers'."""
_INNER = re.compile(r"\.(qkv_proj|gate_up_proj)(?=\.)")


def adapter_spec(
    config: ModelShape,
    *,
    target_modules: Sequence[str],
    modules_to_save: Sequence[str] = (),
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: Init = "kaiming",
    from_adapter: bool = False,
    quantize: Quantization | None = None,
) -> AdapterSpec:
    """The adapters of a model of this shape.

    Args:
        target_modules: names of linear layers as transformers has them (``q_proj``), ends of their paths
            (``layers.0.self_attn.q_proj``), patterns for whole paths (``model.layers.[0-7].*.q_proj``),
            NxDT's ``qkv_proj`` and ``gate_up_proj``, or ``all-linear``: those of all layers.
        modules_to_save: the same, for modules that are trained whole.

    Raises UserError for a name that no module has (the names that there are follow), a rank above a weight's
    size, and modules that are both or cannot be either.
    """
    shapes, linear = weight_shapes(config), config.linear_layers()
    layers = linear.sizes
    targets = _matching(target_modules, list(layers), linear, shapes, "target_modules")
    saved = _matching(modules_to_save, linear.modules, linear, shapes, "modules_to_save")
    both = [_hf_path(path) for path in targets if path in saved]
    if both:
        raise UserError(
            f"model_alignment_strategy.peft.modules_to_save: {_some(both)} is in target_modules too; a "
            "module is either trained whole or has an adapter"
        )
    if config.tie_word_embeddings and linear.embedding in saved:
        raise UserError(
            "model_alignment_strategy.peft.modules_to_save: must not name "
            f"{linear.embedding.rpartition('.')[2]} for a model whose head is tied to it, as merged weights "
            "and transformers could not tell the two apart; leave it out"
        )
    least = min((min(layers[path]) for path in targets), default=rank)
    if rank > least:
        small = [path for path in targets if min(layers[path]) == least]
        raise UserError(
            f"model_alignment_strategy.peft.lora_rank: must be at most {least}, the smaller side of the "
            f"weight of {_some([_hf_path(path) for path in small])}, but is {rank}"
        )
    if not targets and not saved:
        raise UserError("model_alignment_strategy.peft.target_modules: must name a layer; it is empty")
    odd = [path for path, shape in layers.items() if shape[1] % 2 and path not in saved]
    if quantize is not None and odd:
        raise UserError(
            f"model_alignment_strategy.peft.quantize_base: {quantize} packs two values of a row into a byte, "
            f"but rows of {_some([_hf_path(path) for path in odd])} have {layers[odd[0]][1]}; leave it out"
        )
    return AdapterSpec(
        *(targets, saved, rank, alpha, dropout, rslora, dora, init, from_adapter, quantize),
        transposed=tuple(path for path in targets if path in linear.transposed),
    )


def _hf_path(path: str) -> str:
    """A module's path as transformers has it, but for weights that a family has fused."""
    return _INNER.sub("", path)


def _matching(
    wanted: Sequence[str],
    among: Sequence[str],
    linear: LinearLayers,
    weights: Mapping[str, object],
    key: str,
) -> tuple[str, ...]:
    found: set[str] = set()
    for text in wanted:
        if text == ALL_LINEAR and key == "target_modules":
            found |= set(among)
            continue
        matches = _named(text, among)
        if not matches and not _named(text, list(weights)):
            matches = {path for name in EXPANDED.get(text, ()) for path in _named(name, among)}
        if not matches:
            raise _nothing(text, among, linear, weights, key)
        found |= matches
    return tuple(path for path in among if path in found)


def _named(text: str, paths: Sequence[str]) -> set[str]:
    return {path for path in paths if _is_named(_hf_path(path), text)}


def _is_named(path: str, name: str) -> bool:
    if path == name or path.endswith(f".{name}"):
        return True
    try:
        return re.fullmatch(name, path) is not None
    except re.error:
        return False


def _nothing(
    text: str, among: Sequence[str], linear: LinearLayers, weights: Mapping[str, object], key: str
) -> UserError:
    names = sorted({path.rpartition(".")[2] for path in among})
    where, there = f"model_alignment_strategy.peft.{key}", f"There are: {', '.join(names)}"
    is_target = key == "target_modules"
    expanded = EXPANDED.get(text, (text,))
    if is_target and any(_named(name, linear.modules) for name in expanded):
        return UserError(
            f"{where}: {text} is no linear layer of the decoder's layers and gets no adapter; "
            f"modules_to_save=[{text}] trains it whole. {there}, and {ALL_LINEAR}"
        )
    others = [name for name in weights if _named(text, [name, name.rpartition(".")[0]])]
    if others:
        what = "no linear layer of one weight and gets no adapter" if is_target else "not trained whole"
        alternative = f", and {ALL_LINEAR}" if is_target else ""
        return UserError(
            f"{where}: {text} ({_some(others, 1)}) is {what}; leave it out, and it stays as it is. "
            f"{there}{alternative}"
        )
    meant = _ELSEWHERE.get(text)
    hint = f"; did you mean {meant}?" if meant in names else ""
    more = f"{''.join(f', {name}' for name in _meant(among))}, and {ALL_LINEAR}" if is_target else ""
    return UserError(
        f"{where}: {text!r} names no module of this model{hint or '.'} {there}{more}; a pattern "
        f"must match a whole path, as {_hf_path(among[0])}"
    )


def _meant(among: Sequence[str]) -> list[str]:
    """Of NxDT's names those that mean layers that are there."""
    return [name for name, parts in EXPANDED.items() if any(_named(part, among) for part in parts)]


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
