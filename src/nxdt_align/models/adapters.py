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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nxdt_align.models.config import ModelShape, weight_shapes
from nxdt_align.models.nf4 import NF4Weight, linear
from nxdt_align.models.sharding import ADAPTER_PARTS, LORA_A, LORA_B, MAGNITUDE, START, TRAINED

Init = Literal["kaiming", "gaussian"]
Quantization = Literal["nf4"]
Drop = Callable[[Tensor, float], Tensor]

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


def quantized_layers(config: ModelShape, spec: AdapterSpec) -> list[str]:
    """Paths of the linear layers whose frozen weights are quantised: all of the decoder's layers, with an
    adapter or not, but those trained whole. Embedding and head stay as they are, as in QLoRA."""
    if spec.quantize is None:
        return []
    return [path for path in config.linear_layers().sizes if path not in spec.saved]


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
