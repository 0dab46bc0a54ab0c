"""A custom loss by dotted path, in this package's signature or in torchtune's.

Ours: ``loss(policy, reference) -> LossOutput``. torchtune's: ``forward(policy, reference) -> (losses,
chosen_rewards, rejected_rewards)``, both arguments with ``chosen_logps`` and ``rejected_logps``, (P,).
A class is constructed with the keyword settings; a function gets them at each call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from nxdt_align.config.alignment import Examples
from nxdt_align.losses.types import Loss, LossOutput, Normaliser, ResponseLogps
from nxdt_align.own_parts import OwnPartError, describe, find, make, require_call

_PROBE_PAIRS = 2
_PROBE_VOCABULARY = 8
_ARGUMENTS = ("policy", "reference")
_WANTED = "it must be called as (policy, reference)"


class CustomLossError(OwnPartError):
    """A custom loss that cannot be found or used; the message says what was found."""


class CustomLoss:
    """Wraps a custom callable as a Loss. Needs that it does not declare default to DPO's.

    Declared as attributes of the callable: ``needs_reference`` (True unless said), ``needs_tokens``,
    ``needs_prompts``, ``needs_collisions``, ``needs_logits``, ``couples_examples`` (False unless said),
    ``normaliser`` ("pairs" unless said).
    """

    def __init__(self, function: Callable[..., Any], path: str, examples: Examples = "pair") -> None:
        paired = examples != "response"
        # functools.partial does not pass attributes of its function through.
        declared = function.func if isinstance(function, functools.partial) else function
        self._function = function
        self._path = path
        self._examples = examples
        self.paired = paired
        self.needs_reference = bool(getattr(declared, "needs_reference", paired))
        self.needs_tokens = bool(getattr(declared, "needs_tokens", False))
        self.needs_prompts = bool(getattr(declared, "needs_prompts", False))
        self.needs_collisions = bool(getattr(declared, "needs_collisions", False))
        self.needs_logits = bool(getattr(declared, "needs_logits", False))
        self.couples_examples = bool(getattr(declared, "couples_examples", False))
        normaliser = getattr(declared, "normaliser", "pairs" if paired else "tokens")
        if normaliser not in ("pairs", "tokens"):
            raise CustomLossError(f"{path}: normaliser must be pairs or tokens, but is {normaliser!r}")
        self.normaliser: Normaliser = cast(Literal["pairs", "tokens"], normaliser)

    def __repr__(self) -> str:
        return self._path

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput:
        if isinstance(self._function, nn.Module):
            self._function.to(policy.sums.device)  # its buffers
        result = self._function(policy, reference)
        if self._examples == "unpaired" and getattr(result, "chosen_rewards", result) is not None:
            raise CustomLossError(
                f"{self._path} must return a LossOutput without rewards for labelled completions, which are "
                f"neither chosen nor rejected (extras take metrics), but returned {describe(result)}"
            )
        if isinstance(result, LossOutput):
            return result
        # torchtune's losses return this triple; its rewards are detached already, a user's may not be.
        is_triple = isinstance(result, tuple) and len(result) == 3
        if is_triple and all(isinstance(item, Tensor) for item in result):
            losses, chosen, rejected = result
            return LossOutput(losses, chosen.detach(), rejected.detach())
        raise CustomLossError(
            f"{self._path} must return a LossOutput, or (losses, chosen_rewards, rejected_rewards) as three "
            f"tensors, but returned {describe(result)}"
        )


def load_loss(path: str, settings: Mapping[str, Any] | None = None, examples: Examples = "pair") -> Loss:
    """The loss at ``path``, constructed with ``settings`` and tested on two made-up pairs.

    Modules are looked up as Python does, and in the current folder. ``examples``: pairs, labelled completions
    with a mismatched one beside each (unpaired), or single responses.

    Raises OwnPartError if the path does not import, the settings do not fit, or the callable does not take
    (policy, reference), reads logits that it does not declare, or does not return one value per example. What
    does not name these two arguments is not called, and no object of its class is made.
    """
    return _tried(_make(find(path), path, dict(settings or {})), path, examples)


def given_loss(loss: Loss | Callable[..., Any], examples: Examples = "pair") -> Loss:
    """A loss object from a script: one of this package's as it is, any other tested as by ``load_loss``.
    Raises CustomLossError."""
    if isinstance(loss, Loss):
        return loss
    kind = loss if inspect.isfunction(loss) else type(loss)
    # Its plain settings too: this text is part of the run's identity.
    plain = {
        name: value
        for name, value in sorted(getattr(loss, "__dict__", {}).items())
        if isinstance(value, bool | int | float | str) and not name.startswith("_") and name != "training"
    }
    settings = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    path = f"{kind.__module__}.{kind.__qualname__}{f'({settings})' if settings else ''}"
    called = loss.forward if isinstance(loss, nn.Module) else loss
    require_call(called, path, *_ARGUMENTS, is_users_own=True)
    return _tried(loss, path, examples)


def _tried(function: Callable[..., Any], path: str, examples: Examples) -> Loss:
    _check_parameters_of_its_own(function, path)
    loss = CustomLoss(function, path, examples)
    _try_out(loss, path)
    return loss


def _make(found: Callable[..., Any], path: str, settings: dict[str, Any]) -> Callable[..., Any]:
    if not inspect.isclass(found):
        require_call(found, path, *_ARGUMENTS, settings=settings)
        return functools.partial(found, **settings) if settings else found
    called = _method_called(found)
    if called is None:
        raise CustomLossError(
            f"{path}: {_WANTED}, but objects of this class cannot be called; "
            "give it __call__, or forward in an nn.Module"
        )
    require_call(called, path, *_ARGUMENTS)
    return cast(Callable[..., Any], make(found, path, settings, "loss_settings"))


def _method_called(found: type) -> Callable[..., Any] | None:
    """What a call of an object of this class runs, without ``self``; None if it cannot be called."""
    name = "forward" if issubclass(found, nn.Module) else "__call__"
    method = next((vars(base)[name] for base in found.__mro__ if name in vars(base)), None)
    if method is None or not hasattr(method, "__get__"):
        return cast("Callable[..., Any] | None", method)
    # Any object will do as self: it is asked for its arguments and not called.
    bound: Callable[..., Any] = method.__get__(object(), found)
    return bound


def _try_out(loss: CustomLoss, path: str) -> None:
    """Call the loss once on harmless numbers, so that a broken one fails before the model is built."""
    policy = _probe(with_logits=loss.needs_logits)
    reference = policy.with_sums(policy.sums.detach() - 0.5) if loss.needs_reference else None
    try:
        output = loss(policy, reference)
    except CustomLossError:
        raise
    except Exception as error:
        # User code may raise anything; the message quotes it.
        raise CustomLossError(
            f"{path} fails on log-probabilities of {_PROBE_PAIRS} pairs: {type(error).__name__}: {error}"
        ) from error
    wanted = (_PROBE_PAIRS if loss.paired else 2 * _PROBE_PAIRS,)
    if tuple(output.losses.shape) != wanted:
        raise CustomLossError(
            f"{path} must return one loss per example, shape {wanted} for {_PROBE_PAIRS} pairs, but "
            f"returned shape {tuple(output.losses.shape)}"
        )
    if not output.losses.requires_grad or not _reaches(output.losses, policy):
        raise CustomLossError(f"{path} returns losses without a gradient; they must depend on the policy's")


def _reaches(losses: Tensor, policy: ResponseLogps) -> bool:
    """Whether the losses' gradient reaches the policy's log-probabilities or logits."""
    leaves = [leaf for leaf in (policy.token_logps, policy.token_logits) if leaf is not None]
    return any(found is not None for found in torch.autograd.grad(losses.sum(), leaves, allow_unused=True))


def _probe(*, with_logits: bool) -> ResponseLogps:
    count = 2 * _PROBE_PAIRS
    # Log-probabilities of -1 nat and distinct sums: nothing overflows, no two pairs tie.
    tokens = -torch.ones(_PROBE_PAIRS, 4, requires_grad=True)
    return ResponseLogps(
        sums=tokens.reshape(count, 2).sum(1) * torch.arange(1.0, count + 1),
        counts=torch.full((count,), 2.0),
        valid=torch.ones(count, dtype=torch.bool),
        desirable=torch.arange(count) < 2,
        roles=torch.arange(count) % 2,
        collisions=-torch.ones(count),
        token_logps=tokens,
        token_logits=torch.zeros(_PROBE_PAIRS, 4, _PROBE_VOCABULARY, requires_grad=True)
        if with_logits
        else None,
        token_slots=torch.arange(count).repeat_interleave(2).reshape(_PROBE_PAIRS, 4),
        prompt_sums=-(torch.arange(count) % 2 == 0).float(),
        prompt_counts=(torch.arange(count) % 2 == 0).float(),
    )


def _check_parameters_of_its_own(function: Callable[..., Any], path: str) -> None:
    """Refuse trainable parameters: the optimizer only has the model's."""
    names = [name for name, _ in function.named_parameters()] if isinstance(function, nn.Module) else []
    if names:
        raise CustomLossError(
            f"{path} has trainable parameters ({', '.join(names)}), which no optimizer would update; make "
            "them settings or buffers"
        )
