"""A model that transformers' own class computes, as an engine trains it.

It is built without values, on any device: weights are loaded, so that drawing them would be wasted. Dropout
is never on: layouts, the reference and what a checkpoint resumes would all be other numbers.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from nxdt_align.errors import UserError
from nxdt_align.models.adapters import in_use, weight_in_use
from nxdt_align.models.backend.attention import ARGUMENT, NAME, Intervals
from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.config import LinearLayers, config_error
from nxdt_align.models.decoder import Attend, CausalModel, Granularity, HeadForm, Prepare, Recompute

RECOMPUTABLE = "CoreAttention"
"""The one name of ``model.activations_checkpoint_recompute`` that every model has a place for."""


def read_config(config: TransformersConfig) -> Any:
    """transformers' configuration. Raises ModelConfigError for values that its class refuses."""
    try:
        if config.remote_folder is not None:
            found = AutoConfig.from_pretrained(config.remote_folder, trust_remote_code=True)
        else:
            found = CONFIG_MAPPING[config.model_type].from_dict(copy.deepcopy(config.values))
    except Exception as error:  # of many types, its checks of each field included
        text = " ".join(str(error).split())
        raise config_error("config.json", [f"transformers cannot read it: {text}"]) from error
    found.dtype = torch.float32
    return found


def model_class(config: TransformersConfig) -> type[PreTrainedModel]:
    if config.remote_folder is not None:
        return type(build(config, None))
    found: Any = AutoModelForCausalLM._model_mapping[type(config.hf)]
    return found  # type: ignore[no-any-return]


def build(
    config: TransformersConfig, attention: str | None, hf: Any = None, *, device: str = "meta"
) -> PreTrainedModel:
    """transformers' model in float32, without dropout.

    Args:
        attention: its name in the attention interface; None takes the model's own choice.
        hf: a changed configuration instead of the model's.

    Raises UserError where its class cannot be built.
    """
    own = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device(device):
            auto: Any = AutoModelForCausalLM
            made: Any = auto.from_config(
                copy.deepcopy(config.hf if hf is None else hf),
                trust_remote_code=config.remote_folder is not None,
                **own,
            )
    except Exception as error:  # of many types: whatever the model's own code meets
        text = " ".join(str(error).split())
        raise UserError(
            f"transformers cannot build a {config.model_type} of this config.json: {text}"
        ) from error
    return made.eval()  # type: ignore[no-any-return]


def body(model: Any) -> Any:
    """What of a model gives the hidden states that its head takes."""
    places = (model.base_model, model.get_decoder(), getattr(model, "model", model))
    return next((place for place in places if place is not model), model)


class StockAttention:
    """Stands for the model's own attention, of layout none: every token sees those before it in its row."""

    static_shapes = True

    def prepare(self, key_start: Tensor, key_stop: Tensor) -> None:
        """Nothing: a row is one text, and padding comes last."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: Any, softcap: float | None = None) -> Tensor:
        raise AssertionError("the model's own attention is called by the model")


class TransformersModel(CausalModel):
    """A model of transformers for causal language modelling.

    Its weights have transformers' names. Those that the class keeps as buffers, and its checkpoints hold, are
    parameters here that no gradient reaches. A tied head is not there a second time.

    Args:
        config: what it is.
        attend: the attention over (q, k, v, context), or a StockAttention.
    """

    config: TransformersConfig

    def __init__(self, config: TransformersConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self._attend = attend
        self.is_stock = isinstance(attend, StockAttention)
        self.causal: Any = build(config, None if self.is_stock else NAME)
        self.fixed = _buffers_as_parameters(self.causal)
        self._buffer_dtypes = {name: buffer.dtype for name, buffer in self.causal.named_buffers()}
        self._recompute_attention: Recompute | None = None
        self._router_logits: tuple[Tensor, ...] | None = None
        self._balance: Callable[..., Tensor]
        self._is_tied = _drop_tied_head(self.causal)

    # Names and dtypes of weights

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Under transformers' names."""
        return self.causal.named_parameters(*args, **kwargs)  # type: ignore[no-any-return]

    @property
    def tree(self) -> nn.Module:
        return self.causal  # type: ignore[no-any-return]

    def requires_grad_(self, requires_grad: bool = True) -> TransformersModel:
        super().requires_grad_(requires_grad)
        for name in self.fixed:
            self.causal.get_parameter(name).requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> TransformersModel:
        """Without effect: dropout is never on."""
        super().train(False)
        return self

    def to(self, *args: Any, **kwargs: Any) -> TransformersModel:
        super().to(*args, **kwargs)
        for name in self.fixed:  # as transformers keeps them
            fixed = self.causal.get_parameter(name)
            fixed.data = fixed.data.float()
        return self

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Compute what follows from the configuration alone, such as rotary frequencies, in their dtypes."""
        for name, dtype in self._buffer_dtypes.items():
            path, _, leaf = name.rpartition(".")
            owner = self.causal.get_submodule(path)
            buffer = owner._buffers[leaf]
            owner._buffers[leaf] = torch.empty_like(buffer, dtype=dtype)
        # transformers' way to values of buffers: of what it initialises, weights count as done.
        for module in self.causal.modules():
            module._is_hf_initialized = False
        for parameter in self.causal.parameters():
            parameter._is_hf_initialized = True
        self.causal.initialize_weights()

    # Computing

    def prepare(self, key_start: Tensor, key_stop: Tensor, prepare: Prepare) -> Any:
        if self.is_stock:
            return None
        return Intervals(self._attend, prepare, key_start, key_stop, self._recompute_attention)

    @property
    def takes_cache(self) -> bool:
        """With our attention: the check at the start has seen that rows of several texts give each text's own
        results, so tokens meet there alone."""
        return not self.is_stock

    def set_attention(self, attend: Attend) -> None:
        assert not self.is_stock, "the model has its own attention"
        self._attend = attend

    def forward(self, input_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        """(B, S), (B, S) integers -> the hidden states that the head takes, (B, S, D)."""
        own: dict[str, Any] = {}
        if not self.is_stock:
            own = {"position_ids": position_ids, ARGUMENT: context}
        balances = self.router_weight > 0 and torch.is_grad_enabled()
        if balances:
            own["output_router_logits"] = True
        output = body(self.causal)(input_ids=input_ids, use_cache=False, **own)
        self._router_logits = output.router_logits if balances else None
        hidden: Tensor = output.last_hidden_state
        return hidden

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the embedding's where the head is tied to it."""
        owner = self.causal.get_input_embeddings() if self._is_tied else self.causal.get_output_embeddings()
        return weight_in_use(owner)

    @property
    def head_bias(self) -> Tensor | None:
        return in_use(self.causal.get_output_embeddings(), "bias")

    @property
    def head_form(self) -> HeadForm:
        return self.config.findings.head

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)."""
        return self.head_form.applied(F.linear(hidden, self.head_weight, self.head_bias))

    def balance_router(self, weight: float) -> None:
        """By transformers' own ``load_balancing_loss_func`` of the model."""
        function = getattr(sys.modules[type(self.causal).__module__], "load_balancing_loss_func", None)
        sizes = [getattr(self.causal, name, None) for name in ("num_experts", "num_experts_per_tok")]
        if function is None or None in sizes:
            raise UserError(
                f"model.router_aux_loss_coef: is {weight:g}, but transformers' {type(self.causal).__name__} "
                "has no balancing loss of a router; set it to 0"
            )
        self.router_weight = weight
        self._balance = partial(function, num_experts=sizes[0], top_k=sizes[1])

    def router_loss(self, weights: Tensor) -> Tensor:
        # Kept for this alone: the graph must not outlive the step.
        logits, self._router_logits = self._router_logits, None
        return self._balance(logits, attention_mask=weights)

    def layers(self) -> list[nn.Module]:
        kinds = tuple(getattr(self.causal, "_no_split_modules", None) or ())
        return [module for module in self.causal.modules() if type(module).__name__ in kinds]

    def set_checkpointing(
        self,
        granularity: Granularity | None,
        modules: Sequence[str] | None = None,
        recompute: Recompute | None = None,
    ) -> None:
        """As a Decoder's; ``selective`` knows CoreAttention alone. Raises UserError."""
        how = recompute or partial(checkpoint, use_reentrant=False)
        for layer in self.layers():
            vars(layer).pop("forward", None)
        self._recompute_attention = None
        if granularity == "full":
            for layer in self.layers():
                # Inside forward, so that FSDP's hooks run outside of what is recomputed.
                layer.forward = _Recomputed(layer.forward, how)
        elif granularity == "selective":
            unknown = [name for name in modules or () if name != RECOMPUTABLE]
            if unknown or not modules or self.is_stock:
                raise UserError(
                    "`activations_checkpoint_recompute` must be [CoreAttention] where the granularity is "
                    "selective and transformers computes the model, which has modules of its own"
                    f"{' and here its own attention' if self.is_stock else ''}, but is "
                    f"{list(modules or ())}; full works with every model"
                )
            self._recompute_attention = how


class _Recomputed:
    """A layer's forward pass, whose activations are recomputed in the backward pass."""

    def __init__(self, forward: Any, recompute: Recompute) -> None:
        self._forward, self._recompute = forward, recompute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return self._recompute(partial(self._forward, **kwargs), *args)


def _buffers_as_parameters(model: PreTrainedModel) -> list[str]:
    """Make parameters of the buffers that checkpoints hold, as a router's balancing bias; their names."""
    made = []
    for path, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            is_kept = name not in module._non_persistent_buffers_set
            if buffer is None or not is_kept or not buffer.is_floating_point():
                continue
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
            made.append(f"{path}.{name}" if path else name)
    return made


def _drop_tied_head(model: Any) -> bool:
    """Leave one of a head and an embedding that are the same parameter; whether they are."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no head over the vocabulary: it predicts no tokens")
    if head.weight is not embedding.weight:
        return False
    del head.weight
    return True


@lru_cache(maxsize=8)
def weight_shapes(config: TransformersConfig) -> dict[str, tuple[int, ...]]:
    """Every weight, by transformers' name of it in the model, with its whole shape."""
    made = TransformersModel(config, StockAttention())
    return {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}


@lru_cache(maxsize=8)
def fixed_weights(config: TransformersConfig) -> frozenset[str]:
    """Names of weights that no gradient reaches, which the class keeps as buffers."""
    return frozenset(TransformersModel(config, StockAttention()).fixed)


@lru_cache(maxsize=8)
def linear_layers(config: TransformersConfig) -> LinearLayers:
    """The layers that PEFT's ``all-linear`` means, and the modules with a ``weight``: both without those that
    the model does not call, as an adapter beside a weight that another module reads would count for nothing.
    """
    model: Any = TransformersModel(config, StockAttention()).causal
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    called = config.findings.called
    sizes, modules, transposed, place = {}, [], set(), ""
    for path, module in model.named_modules():
        place = path if module is embedding else place
        if "weight" not in module._parameters or kind_of_path(path) not in called:
            continue
        modules.append(path)
        is_conv = isinstance(module, Conv1D)
        if module is not head and (is_conv or _is_linear(module)):
            rows, columns = module.weight.shape
            sizes[path] = (columns, rows) if is_conv else (rows, columns)
            transposed |= {path} if is_conv else set()
    return LinearLayers(sizes, tuple(modules), place, frozenset(transposed))


def kind_of_path(path: str) -> str:
    """A module's path without the numbers of its layer and expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an nn.Linear, or of a class of its own that computes as one."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    x, plain = torch.linspace(-1, 1, 6).view(2, 3), nn.Linear(3, 4)
    with torch.no_grad():
        wanted, plain.__class__ = plain(x), type(module)
        try:
            return torch.allclose(plain(x), wanted)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # it wants more than a weight
            return False
