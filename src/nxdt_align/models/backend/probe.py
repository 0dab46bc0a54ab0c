"""The check at the start: whether transformers' class takes our layouts, and what stands above its head.

A small copy of the model (fewer layers, a small vocabulary, small windows; fresh float32 weights of which
each counts) computes rows as our layouts write them, with our attention, and each response by itself, with
its own. Its windows and chunks are a few tokens there, so that rows are longer than all of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from logging import ERROR
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils import logging

from nxdt_align.errors import UserError
from nxdt_align.models.backend.attention import ARGUMENT, NAME, Intervals, NotCarriedError
from nxdt_align.models.backend.config import TransformersConfig, type_name
from nxdt_align.models.backend.model import body, build, kind_of_path
from nxdt_align.models.decoder import HeadForm

TOLERANCE = 1e-4
"""Largest difference of hidden states and logits, by the largest of them: float32's own is near 1e-6, what a
wrong key changes near 1e-1."""
WINDOW = 6
"""Tokens of the small copy's windows and chunks."""
VOCABULARY = 320
LAYERS = 4
"""Of the copy, where it does not take more to have each kind of layer."""
WIDTH = 64
"""Of the copy's MLPs and experts at most."""

_WINDOW_KEY = re.compile(r"(^|_)(window(_size)?|chunk_size)$")
_WIDTH_KEY = re.compile(r"(^|_)intermediate_size$")
_TOKEN_KEY = re.compile(r"_token_id$|^(bos|eos|pad)_token_id$")


@dataclass(frozen=True)
class Findings:
    """What the check found."""

    head: HeadForm
    refusal: str | None
    """Why our layouts do not work with the model; None where they do."""
    called: frozenset[str] = frozenset()
    """Modules that the model's forward pass calls, by ``kind_of_path``."""
    windows: tuple[int | None, ...] = ()
    """Of its layers' attention, in tokens; empty with ``refusal``."""
    attention_softcap: float | None = None

    @property
    def carries_layouts(self) -> bool:
        return self.refusal is None


@lru_cache(maxsize=8)
def probe(config: TransformersConfig) -> Findings:
    """Raises UserError for a model that cannot be run by itself either, that is no causal model, or whose
    logits are no product of its last hidden states and its head."""
    small, sizes = _small(config)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(0)
        stock = build(config, None, small, device="cpu")
        _draw(stock)
        texts = _texts(int(small.vocab_size))
        try:
            with torch.no_grad():
                alone = [_alone(stock, text) for text in texts]
                _require_causal(stock, texts[0], type_name(config))
                with _noting_calls(stock) as called:
                    head = _head_form(stock, texts[0], type_name(config))
        except UserError:
            raise
        except Exception as error:  # of many types: whatever the model's own code meets
            raise UserError(
                f"transformers' {type_name(config)} does not run on a small copy of this model: "
                f"{type(error).__name__}: {_one_line(error)}"
            ) from error
        try:
            windows, softcaps = _compared(config, small, stock, texts, alone)
        except NotCarriedError as error:
            return Findings(head, str(error), frozenset(called))
    layers = _windows_of_layers(windows, sizes, config.hf)
    return Findings(head, None, frozenset(called), layers, max(softcaps, default=None))


def _compared(
    config: TransformersConfig, small: Any, stock: Any, texts: Sequence[Tensor], alone: Sequence[Tensor]
) -> tuple[list[int | None], set[float]]:
    """``_compare`` of ``stock``'s weights under our attention. Raises NotCarriedError, also for whatever the
    model's own code meets."""
    try:
        ours = _with_our_attention(config, small)
        ours.load_state_dict(stock.state_dict())
        with torch.no_grad():
            return _compare(ours, texts, alone)
    except NotCarriedError:
        raise
    except Exception as error:
        raise NotCarriedError(f"{type(error).__name__}: {_one_line(error)}") from error


def _with_our_attention(config: TransformersConfig, small: Any) -> Any:
    try:
        return build(config, NAME, small, device="cpu")
    except UserError as error:
        raise NotCarriedError("its class takes no attention but its own") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


# The small copy


def _small(config: TransformersConfig) -> tuple[Any, dict[int, int]]:
    """A configuration of the same kind, and the model's own windows by the copy's."""
    small = copy.deepcopy(config.hf)
    layers = small.num_hidden_layers
    kept = min(layers, _pattern(small, layers))
    windows: dict[int, int] = {}
    for key, value in list(vars(small).items()):
        if isinstance(value, list | tuple) and len(value) == layers and kept < layers:
            setattr(small, key, value[:kept])
        elif not isinstance(value, int) or isinstance(value, bool):
            continue
        elif _WINDOW_KEY.search(key):
            # Each window a size of its own, so that it is known again.
            size = next((s for s, own in windows.items() if own == value), WINDOW + len(windows))
            windows[size] = value
            setattr(small, key, size)
        elif _WIDTH_KEY.search(key):
            setattr(small, key, min(value, WIDTH))
        elif _TOKEN_KEY.search(key):
            setattr(small, key, None)
    small.num_hidden_layers = kept
    small.vocab_size = min(int(small.vocab_size), VOCABULARY)
    return small, windows


def _pattern(config: Any, layers: int) -> int:
    """So many first layers have every kind of layer in them."""
    needed = 2
    for value in vars(config).values():
        if isinstance(value, list | tuple) and len(value) == layers:
            kinds = {repr(kind): index for index, kind in reversed(list(enumerate(value)))}
            needed = max(needed, 1 + max(kinds.values()))
    dense = getattr(config, "first_k_dense_replace", None)
    if isinstance(dense, int):
        needed = max(needed, dense + 1)
    return max(needed, LAYERS)


@torch.no_grad()
def _draw(model: Any) -> None:
    """Values of which each counts: hidden states and scores around 1, norms and biases around their own."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter.shape[-1] ** 0.5))
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if (
                buffer is not None
                and key not in module._non_persistent_buffers_set
                and buffer.is_floating_point()
            ):
                buffer.add_(torch.randn_like(buffer) * 0.1)


def _texts(vocabulary: int) -> list[Tensor]:
    """Token ids of texts, (1, S) each: a prompt of 2 tokens with two responses, and a longer text. The two
    first are shorter than every window, the last longer than all."""
    prompt, chosen, rejected = (torch.randint(1, vocabulary, (1, size)) for size in (2, 3, 2))
    long = torch.randint(1, vocabulary, (1, 5 * WINDOW + 3))
    return [torch.cat((prompt, chosen), 1), torch.cat((prompt, rejected), 1), long]


@contextmanager
def _noting_calls(model: Any) -> Iterator[set[str]]:
    """The modules of ``model`` that are called meanwhile."""
    called: set[str] = set()

    def note(kind: str) -> Callable[..., None]:
        return lambda *_: called.add(kind)

    hooks = [module.register_forward_hook(note(kind_of_path(path))) for path, module in model.named_modules()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


# What is compared


def _alone(model: Any, text: Tensor) -> Tensor:
    """The hidden states that the head takes, (S, D), by the model's own forward pass."""
    return body(model)(input_ids=text, use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]


def _head_form(model: Any, text: Tensor, name: str) -> HeadForm:
    """What the model's forward pass makes of the head's products, told from known products.

    Raises UserError where it is not of that form, or where the head takes other hidden states.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{name} has no head over the vocabulary: it predicts no tokens")
    taken: list[Tensor] = []
    # From values that no cap shows at to values that show nothing but the cap.
    ramp = torch.cat([s * torch.logspace(-3, 6, model.config.vocab_size // 2) for s in (-1, 1)])

    def known(module: Any, inputs: Any, output: Tensor) -> Tensor:
        taken.append(inputs[0])
        products = torch.zeros_like(output)
        products[..., : len(ramp)] = ramp
        return products

    hidden = _alone(model, text)
    hook = head.register_forward_hook(known)
    try:
        logits = model(input_ids=text, use_cache=False).logits[0, -1, : len(ramp)].double()
    finally:
        hook.remove()
    if len(taken) != 1 or not _close(taken[0][0, -1], hidden[-1]):
        raise UserError(
            f"{name} changes its last hidden states before the head, which is not supported: choose another "
            "model"
        )
    x = ramp.double()
    scale = float((logits / x)[x.abs() < 1e-2].mean())
    cap = float(logits.abs().max())
    for form in (HeadForm(), HeadForm(scale), HeadForm(1.0, cap), HeadForm(scale, cap)):
        exact = HeadForm(_round(form.scale), None if form.softcap is None else _round(form.softcap))
        if torch.allclose(exact.applied(x), logits, rtol=1e-5, atol=0.0):
            return exact
    raise UserError(
        f"{name} makes something else of its head's products than a scale and a soft cap, which is not "
        "supported: choose another model"
    )


def _round(value: float) -> float:
    """As a configuration would have it: float32's error of the measurement taken away."""
    for number in (value, 1 / value):
        short = float(f"{number:.6g}")
        if abs(short - number) < 1e-6 * abs(number):
            return short if number is value else 1 / short
    return value


def _require_causal(model: Any, text: Tensor, name: str) -> None:
    changed = text.clone()
    changed[0, -1] = text[0, -1] % (model.config.vocab_size - 1) + 1
    first, second = _alone(model, text), _alone(model, changed)
    if not _close(first[:-1], second[:-1]):
        raise UserError(
            f"{name} is no causal model: what it computes for a token depends on later ones; only models "
            "that continue a text are trained here"
        )


def _compare(
    model: Any, texts: Sequence[Tensor], alone: Sequence[Tensor]
) -> tuple[list[int | None], set[float]]:
    """The windows and caps of its attention. Raises NotCarriedError where a row's results are others than
    each text's by itself."""
    (first, second, long), prompt = texts, 2
    a, b, tail = first.shape[1] - prompt, second.shape[1] - prompt, long.shape[1]
    # [chosen, reversed | prompt | rejected | a longer text], as ``data.collate`` lays pairs and packs rows.
    ids = torch.cat((first[:, prompt:].flip(1), first[:, :prompt], second[:, prompt:], long), 1)
    whole = a + prompt + b
    positions = [*range(a + prompt - 1, prompt - 1, -1), *range(prompt), *range(prompt, prompt + b)]
    start = [*range(a), *[a] * (prompt + b), *[whole] * tail]
    stop = [*[a + prompt] * a, *range(a + 1, whole + 1), *range(whole + 1, whole + tail + 1)]
    key_start, key_stop = (torch.tensor([bound], dtype=torch.int32) for bound in (start, stop))
    rows = Intervals(_plain_attention, _mask, key_start, key_stop)
    position_ids = torch.tensor([[*positions, *range(tail)]])
    output = body(model)(input_ids=ids, position_ids=position_ids, use_cache=False, **{ARGUMENT: rows})
    hidden = output.last_hidden_state[0]
    if not rows.windows:
        raise NotCarriedError("its layers do not call transformers' attention interface")
    chosen = torch.cat((hidden[a : a + prompt], hidden[:a].flip(0)))
    found = [chosen, hidden[a:whole], hidden[whole:]]
    for got, want in zip(found, alone, strict=True):
        if not _close(got, want):
            error = float((got - want).abs().max() / want.abs().max())
            raise NotCarriedError(
                f"rows of several texts give other results than each text by itself (by {error:.0%})"
            )
    return rows.windows, rows.softcaps


def _close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())


def _mask(key_start: Tensor, key_stop: Tensor) -> Tensor:
    index = torch.arange(key_start.shape[1])
    return ((index >= key_start[:, :, None]) & (index < key_stop[:, :, None]))[:, None]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, context: Any, softcap: float | None = None) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    q = q.transpose(1, 2)
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    if softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=context).transpose(1, 2)
    scores = torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap) * softcap
    return (scores.masked_fill(~context, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def _windows_of_layers(found: Sequence[int | None], sizes: dict[int, int], hf: Any) -> tuple[int | None, ...]:
    """The model's own windows of all its layers; those that the copy left out are of kinds that it has."""
    own = [None if window is None else sizes.get(window, window) for window in found]
    layers = int(hf.num_hidden_layers)
    kinds = list(getattr(hf, "layer_types", None) or [])
    if len(kinds) != layers:
        kinds = [layer % len(own) for layer in range(layers)]
    by_kind = dict(zip(reversed(kinds[: len(own)]), reversed(own), strict=True))
    return tuple(own[i] if i < len(own) else by_kind[kind] for i, kind in enumerate(kinds))


@contextmanager
def _quiet() -> Iterator[None]:
    """The copy's sizes are no news to a user."""
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
