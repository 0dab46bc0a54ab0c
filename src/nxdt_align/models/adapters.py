"""Adapters of a decoder: a low-rank term beside a frozen weight (LoRA, rsLoRA, DoRA), and weights that are
trained whole beside their frozen originals.

The base keeps its names and never changes, so that a model with its adapters off is the one that training
started from. Legend: ``r`` rank, ``I`` inputs, ``O`` outputs of a linear layer.

LoRA: https://arxiv.org/abs/2106.09685, rsLoRA: https://arxiv.org/abs/2312.03732, DoRA:
https://arxiv.org/abs/2402.09353. As PEFT computes them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nxdt_align.errors import UserError
from nxdt_align.models.config import LinearLayers, ModelShape, weight_shapes
from nxdt_align.models.nf4 import NF4Weight, linear
from nxdt_align.models.sharding import ADAPTER_PARTS, LORA_A, LORA_B, MAGNITUDE, START, TRAINED

Init = Literal["kaiming", "gaussian"]
Quantization = Literal["nf4"]
Drop = Callable[[Tensor, float], Tensor]

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
TRAINABLE = ("weight", "bias")
"""Parameters of a module that is trained whole."""
_SWITCH = "trained_switch"
"""Attribute of a module that is trained whole."""


@dataclass(frozen=True)
class AdapterSpec:
    """Which modules of a decoder have an adapter, and which.

    Made by ``adapter_spec``, which checks it against the model.
    """

    targets: tuple[str, ...]
    """Linear layers with factors, by the plain model's paths."""
    saved: tuple[str, ...] = ()
    """Modules whose weights are trained whole."""
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """Of a layer's input, in the factors' branch alone, while training."""
    rslora: bool = False
    dora: bool = False
    init: Init = "kaiming"
    from_adapter: bool = False
    """Training starts from an adapter, and the reference is the base with that: its factors are kept."""
    quantize: Quantization | None = None
    """How the frozen linear layers are held; None: as they are computed with."""
    transposed: tuple[str, ...] = ()
    """Targets whose weight is (I, O)."""

    @property
    def scale(self) -> float:
        """Of the low-rank term."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def trains(self, name: str) -> bool:
        """Whether the tensor ``name`` is trained."""
        return is_adapter(name) and not name.rpartition(".")[2].startswith(START)


def is_adapter(name: str) -> bool:
    """Whether ``name`` is a tensor that an adapter adds to the plain model."""
    return name.rpartition(".")[2].removeprefix(START) in ADAPTER_PARTS


# Which modules


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


def quantized_layers(config: ModelShape, spec: AdapterSpec) -> list[str]:
    """Paths of the linear layers whose frozen weights are quantised: all of the decoder's layers, with an
    adapter or not, but those trained whole. Embedding and head stay as they are, as in QLoRA."""
    if spec.quantize is None:
        return []
    return [path for path in config.linear_layers().sizes if path not in spec.saved]


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


# Their tensors


def adapter_shapes(config: ModelShape, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the adapters add, with its whole shape."""
    shapes, sizes = weight_shapes(config), config.linear_layers().sizes
    found: dict[str, tuple[int, ...]] = {}
    for path in spec.targets:
        rows, columns = sizes[path]
        own: dict[str, tuple[int, ...]] = {LORA_A: (spec.rank, columns), LORA_B: (rows, spec.rank)}
        if spec.dora:
            own[MAGNITUDE] = (rows,)
        found |= {f"{path}.{name}": shape for name, shape in own.items()}
        if spec.from_adapter:
            found |= {f"{path}.{START}{name}": shape for name, shape in own.items()}
    for path in spec.saved:
        for what in TRAINABLE:
            if f"{path}.{what}" in shapes:
                found[f"{path}.{TRAINED}{what}"] = shapes[f"{path}.{what}"]
    return found


def fresh_factor(name: str, shape: Sequence[int], spec: AdapterSpec, seed: int) -> Tensor:
    """The untrained factor ``name``, float32 on the CPU: B is 0, so that nothing changes; A is drawn from
    ``seed`` and ``name`` alone, so that no layout changes it."""
    factor = torch.zeros(tuple(shape), dtype=torch.float32, device="cpu")
    if name.endswith(f".{LORA_B}"):
        return factor
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    if spec.init == "gaussian":
        return factor.normal_(0.0, 1 / spec.rank, generator=generator)
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5)
    return factor.uniform_(-bound, bound, generator=generator)


def merged_weight(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor | None,
    scale: float,
    *,
    transposed: bool = False,
) -> Tensor:
    """(O, I) float32: the weight that computes what ``weight`` does with its adapter.

    Args:
        transposed: ``weight`` is (I, O), and so is what is returned.
    """
    rows = weight.float().T if transposed else weight.float()
    merged: Tensor = rows + scale * (b.float() @ a.float())
    if magnitude is not None:
        merged = merged * (magnitude.float() / row_norms(merged))[:, None]
    return merged.T.contiguous() if transposed else merged


def row_norms(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """(O,) float32 of a weight (O, I); ``transposed``: (I, O)."""
    norms: Tensor = torch.linalg.vector_norm(weight.float(), dim=0 if transposed else 1)
    return norms


# In a decoder


class Switch:
    """Of all adapters of one decoder."""

    def __init__(self) -> None:
        self.on = True
        self.training = False

    @contextmanager
    def set(self, *, on: bool, training: bool = False) -> Iterator[None]:
        before = self.on, self.training
        self.on, self.training = on, training
        try:
            yield
        finally:
            self.on, self.training = before


class AdaptedLinear(nn.Linear):
    """A frozen linear layer and its factors: y = x W' + scale * B A drop(x).

    Its tensors are its own, not of modules below it, so that what spreads a linear layer over ranks finds
    them: ``lora_A`` (r, I), ``lora_B`` (O, r), with DoRA ``magnitude`` (O,); each with ``start_`` before its
    name for the frozen one of the reference.
    """

    is_transposed = False

    def __init__(self, base: Any, spec: AdapterSpec, switch: Switch) -> None:
        nn.Module.__init__(self)
        shape = base.weight.shape
        self.out_features, self.in_features = reversed(shape) if self.is_transposed else shape
        self.weight, self.bias = base.weight, base.bias
        self.spec, self.switch = spec, switch
        self.drop: Drop = F.dropout
        """Replaced where a rank has a part of the inputs."""
        device, r = base.weight.device, spec.rank
        for prefix in ("", START) if spec.from_adapter else ("",):
            trains = not prefix

            def add(name: str, *shape: int, prefix: str = prefix, trains: bool = trains) -> None:
                tensor = torch.empty(shape, device=device, dtype=base.weight.dtype)
                self.register_parameter(prefix + name, nn.Parameter(tensor, requires_grad=trains))

            add(LORA_A, r, self.in_features)
            add(LORA_B, self.out_features, r)
            if spec.dora:
                add(MAGNITUDE, self.out_features)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A, B and magnitude of what counts now; None for the base alone."""
        if not self.switch.on and not self.spec.from_adapter:
            return None
        prefix = "" if self.switch.on else START
        magnitude = getattr(self, prefix + MAGNITUDE) if self.spec.dora else None
        return getattr(self, prefix + LORA_A), getattr(self, prefix + LORA_B), magnitude

    def frozen(self) -> Tensor | NF4Weight:
        """The base's weight."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors()
        if factors is None:
            return linear(x, self.frozen(), self.bias)
        return self.adapted(x, self.frozen(), self.bias, *factors)

    def adapted(
        self,
        x: Tensor,
        weight: Tensor | NF4Weight,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None,
    ) -> Tensor:
        """With these tensors, a rank's rows of the module's or all of them."""
        if magnitude is None:
            return self.added(linear(x, weight, bias), x, weight, a, b)
        result = self.added(linear(x, weight), x, weight, a, b, magnitude)
        return result if bias is None else result + bias

    def added(
        self,
        plain: Tensor,
        x: Tensor,
        weight: Tensor | NF4Weight,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None = None,
    ) -> Tensor:
        """``plain``, x W', with what these factors add to it."""
        scale, drops = self.spec.scale, self.spec.dropout > 0 and self.switch.training
        dropped = self.drop(x, self.spec.dropout) if drops else x
        delta = F.linear(F.linear(dropped, a), b) * scale
        if magnitude is None:
            return plain + delta
        with torch.no_grad():  # a constant of the gradient, as in section 4.3 of the paper
            whole = weight.dequantized(x.dtype) if isinstance(weight, NF4Weight) else weight
            rows = whole.float() + scale * (b.float() @ a.float())
            norm = self.row_squares(rows).sqrt()
        share = (magnitude / norm).to(x.dtype)
        # The dropped input, where there is one, is what the magnitude's share is of: as PEFT computes it.
        own = linear(dropped, weight) if drops else plain
        return plain + (share - 1) * own + share * delta

    def row_squares(self, rows: Tensor) -> Tensor:
        """(O, I) -> (O,): an engine sums over the ranks that have other columns."""
        return rows.pow(2).sum(1)


class AdaptedConv1D(AdaptedLinear):
    """The same of a layer whose weight is (I, O)."""

    is_transposed = True

    def frozen(self) -> Tensor:
        return self.weight.T


def add_adapters(decoder: nn.Module, spec: AdapterSpec, switch: Switch) -> None:
    """Give ``decoder``, whole or some of its layers, the adapters that belong to what is there; freezes all
    else. Its values are not looked at.

    Args:
        decoder: the module in which the spec's paths are.
    """
    decoder.requires_grad_(False)
    modules = dict(decoder.named_modules())
    for path in spec.targets:
        module = modules.get(path)
        if isinstance(module, nn.Linear) or path in spec.transposed:
            parent, _, name = path.rpartition(".")
            kind = AdaptedConv1D if path in spec.transposed else AdaptedLinear
            setattr(modules[parent], name, kind(module, spec, switch))
    for path in spec.saved:
        if path in modules:
            for name, parameter in list(modules[path].named_parameters(recurse=False)):
                if name not in TRAINABLE:
                    continue
                trained = nn.Parameter(torch.empty_like(parameter), requires_grad=True)
                modules[path].register_parameter(TRAINED + name, trained)


def use_trained(decoder: nn.Module, spec: AdapterSpec, switch: Switch) -> None:
    """Have modules that are trained whole compute with their trained weights while the adapters are on.

    Called when their forward passes are what they stay: engines replace them.
    """
    modules = dict(decoder.named_modules())
    for path in spec.saved:
        module = modules.get(path)
        if module is None:
            continue
        setattr(module, _SWITCH, switch)
        # A norm that is recomputed is called again by its ``compute``.
        entry = "compute" if hasattr(module, "compute") else "forward"
        setattr(module, entry, partial(_with_trained, module, getattr(module, entry), switch))


def _with_trained(
    module: nn.Module, function: Callable[..., Any], switch: Switch, *args: Any, **kwargs: Any
) -> Any:
    held = module._parameters
    names = [name for name in held if f"{TRAINED}{name}" in held]
    if not switch.on:
        return function(*args, **kwargs)
    frozen = {name: held[name] for name in names}
    held.update({name: held[f"{TRAINED}{name}"] for name in names})
    try:
        return function(*args, **kwargs)
    finally:
        held.update(frozen)


def in_use(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` of ``module``, or what is trained in its place and counts now; None where there
    is none."""
    switch = getattr(module, _SWITCH, None)
    is_trained = switch is not None and switch.on
    return getattr(module, f"{TRAINED}{name}" if is_trained else name, None)


def weight_in_use(module: nn.Module) -> Tensor:
    """``in_use`` of its weight."""
    chosen = in_use(module, "weight")
    assert chosen is not None
    return chosen
