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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nxdt_align.errors import UserError
from nxdt_align.models.config import DecoderConfig, weight_shapes
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
_INNER = re.compile(r"\.(qkv_proj|gate_up_proj)(?=\.)")
_EMBEDDING = "model.embed_tokens"
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
    config: DecoderConfig,
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
    shapes = weight_shapes(config)
    modules = {name.rpartition(".")[0]: shape for name, shape in shapes.items() if name.endswith(".weight")}
    layers = {path: modules[path] for path in _linear_layers(config)}
    targets = _matching(target_modules, layers, modules, "target_modules")
    saved = _matching(modules_to_save, modules, modules, "modules_to_save")
    both = [_hf_path(path) for path in targets if path in saved]
    if both:
        raise UserError(
            f"model_alignment_strategy.peft.modules_to_save: {_some(both)} is in target_modules too; a "
            "module is either trained whole or has an adapter"
        )
    if config.tie_word_embeddings and _EMBEDDING in saved:
        raise UserError(
            "model_alignment_strategy.peft.modules_to_save: must not name embed_tokens for a model whose "
            "head is tied to it, as merged weights and transformers could not tell the two apart; leave it "
            "out"
        )
    small = [path for path in targets if rank > min(layers[path])]
    if small:
        least = min(min(layers[path]) for path in small)
        raise UserError(
            f"model_alignment_strategy.peft.lora_rank: must be at most {least}, the smaller side of the "
            f"weight of {_some([_hf_path(path) for path in small])} ({list(layers[small[0]])}), but is {rank}"
        )
    if not targets and not saved:
        raise UserError("model_alignment_strategy.peft.target_modules: must name a layer; it is empty")
    odd = [path for path, shape in layers.items() if shape[1] % 2 and path not in saved]
    if quantize is not None and odd:
        raise UserError(
            f"model_alignment_strategy.peft.quantize_base: {quantize} packs two values of a row into a byte, "
            f"but rows of {_some([_hf_path(path) for path in odd])} have {layers[odd[0]][1]}; leave it out"
        )
    return AdapterSpec(targets, saved, rank, alpha, dropout, rslora, dora, init, from_adapter, quantize)


def _linear_layers(config: DecoderConfig) -> list[str]:
    """Paths of the linear layers of the decoder's layers."""
    weights = [name for name, shape in weight_shapes(config).items() if len(shape) == 2]
    return [name.removesuffix(".weight") for name in weights if name.startswith("model.layers.")]


def quantized_layers(config: DecoderConfig, spec: AdapterSpec) -> list[str]:
    """Paths of the linear layers whose frozen weights are quantised: all of the decoder's layers, with an
    adapter or not, but those trained whole. Embedding and head stay as they are, as in QLoRA."""
    if spec.quantize is None:
        return []
    return [path for path in _linear_layers(config) if path not in spec.saved]


def _hf_path(path: str) -> str:
    """A module's path as transformers has it, but for weights that a family has fused."""
    return _INNER.sub("", path)


def _matching(
    wanted: Sequence[str], among: dict[str, tuple[int, ...]], modules: dict[str, tuple[int, ...]], key: str
) -> tuple[str, ...]:
    found: set[str] = set()
    for text in wanted:
        if text == ALL_LINEAR and key == "target_modules":
            found |= set(among)
            continue
        names = EXPANDED.get(text, (text,))
        matches = {path for path in among if any(_is_named(_hf_path(path), name) for name in names)}
        if not matches:
            others = any(_is_named(_hf_path(path), name) for path in modules for name in names)
            raise _nothing(text, among, key, is_module=others)
        found |= matches
    return tuple(path for path in among if path in found)


def _is_named(path: str, name: str) -> bool:
    if path == name or path.endswith(f".{name}"):
        return True
    try:
        return re.fullmatch(name, path) is not None
    except re.error:
        return False


def _nothing(text: str, among: dict[str, tuple[int, ...]], key: str, *, is_module: bool) -> UserError:
    names = sorted({path.rpartition(".")[2] for path in among})
    where = f"model_alignment_strategy.peft.{key}"
    if is_module:
        return UserError(
            f"{where}: {text} is no linear layer of the decoder's layers and gets no adapter; "
            f"modules_to_save=[{text}] trains it whole. There are: {', '.join(names)}, and {ALL_LINEAR}"
        )
    more = f", {', '.join(EXPANDED)}, and {ALL_LINEAR}" if key == "target_modules" else ""
    return UserError(
        f"{where}: {text!r} names no module of this model. There are: {', '.join(names)}{more}; a pattern "
        f"must match a whole path, as {_hf_path(next(iter(among)))}"
    )


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


# Their tensors


def adapter_shapes(config: DecoderConfig, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the adapters add, with its whole shape."""
    shapes = weight_shapes(config)
    found: dict[str, tuple[int, ...]] = {}
    for path in spec.targets:
        rows, columns = shapes[f"{path}.weight"]
        own: dict[str, tuple[int, ...]] = {LORA_A: (spec.rank, columns), LORA_B: (rows, spec.rank)}
        if spec.dora:
            own[MAGNITUDE] = (rows,)
        found |= {f"{path}.{name}": shape for name, shape in own.items()}
        if spec.from_adapter:
            found |= {f"{path}.{START}{name}": shape for name, shape in own.items()}
    for path in spec.saved:
        for what in ("weight", "bias"):
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


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    """(O, I) float32: the weight that computes what ``weight`` does with its adapter."""
    merged: Tensor = weight.float() + scale * (b.float() @ a.float())
    if magnitude is None:
        return merged
    norm: Tensor = torch.linalg.vector_norm(merged, dim=1)
    return merged * (magnitude.float() / norm)[:, None]


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

    def __init__(self, base: nn.Linear, spec: AdapterSpec, switch: Switch) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
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


def add_adapters(decoder: nn.Module, spec: AdapterSpec, switch: Switch) -> None:
    """Give ``decoder``, whole or some of its layers, the adapters that belong to what is there; freezes all
    else. Its values are not looked at."""
    decoder.requires_grad_(False)
    modules = dict(decoder.named_modules())
    for path in spec.targets:
        module = modules.get(path)
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, AdaptedLinear(module, spec, switch))
    for path in spec.saved:
        if path in modules:
            for name, parameter in list(modules[path].named_parameters(recurse=False)):
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
    module: nn.Module, function: Callable[..., Tensor], switch: Switch, *args: Tensor
) -> Tensor:
    held = module._parameters
    names = [name for name in held if f"{TRAINED}{name}" in held]
    if not switch.on:
        return function(*args)
    frozen = {name: held[name] for name in names}
    held.update({name: held[f"{TRAINED}{name}"] for name in names})
    try:
        return function(*args)
    finally:
        held.update(frozen)


def weight_in_use(module: nn.Module) -> Tensor:
    """``module.weight``, or what is trained in its place and counts now."""
    switch = getattr(module, _SWITCH, None)
    is_trained = switch is not None and switch.on
    chosen: Tensor = getattr(module, f"{TRAINED}weight" if is_trained else "weight")
    return chosen
