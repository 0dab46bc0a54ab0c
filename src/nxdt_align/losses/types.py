"""What a loss receives and returns.

Legend: ``N`` slots of a micro-batch (B * R, row by row), ``P`` examples: pairs (N / 2) for
preference losses, completions with a mismatched one (N / 2) for KTO, single responses (N) for SFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL, TOKEN_STATISTICS, Batch, TokenStatistic

Normaliser = Literal["pairs", "tokens"]


class SupportsArray(Protocol):
    """A numpy array, or an object that converts to one."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


ArrayLike = Tensor | Sequence[float] | SupportsArray


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """(P,) and (P,) -> (2P,), alternating, ``first`` at even positions."""
    return torch.stack((first, second), 1).flatten()


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities of a micro-batch's responses, one entry per slot.

    An empty slot has sum -1 and count 1, without gradient: finite in every loss, so that masking it
    afterwards cannot produce a NaN gradient.
    """

    sums: Tensor
    """(N,) float32, nats: sum of the response's token log-probabilities, weighted by the batch's token
    weights if it has any (LD-DPO)."""
    counts: Tensor
    """(N,) float32: the response's tokens, EOS included; at least 1."""
    valid: Tensor
    """(N,) bool."""
    desirable: Tensor
    """(N,) bool: KTO's label."""
    roles: Tensor
    """(N,) int64, a SlotRole."""
    plain_sums: Tensor | None = None
    """(N,) float32, nats: the unweighted sums, if ``sums`` are weighted."""
    collisions: Tensor | None = None
    """(N,) float32: sum over the response's tokens of log(sum of squared probabilities), on request
    (WPO, https://arxiv.org/abs/2406.11827)."""
    statistics: Mapping[TokenStatistic, Tensor] = field(default_factory=dict)
    """(N,) float32 each: sums of the logged token statistics over the response, on request."""
    token_logps: Tensor | None = None
    """(B, T) float32, nats: a value per response position, on request (LD-DPO)."""
    token_logits: Tensor | None = None
    """(B, T, V) float32: the logits that predict each response token, on request."""
    token_slots: Tensor | None = None
    """(B, T) int64: the slot in 0..N-1 of each of ``token_logps``; -1 for none."""
    prompt_sums: Tensor | None = None
    """(N,) float32, nats: sum of the log-probabilities of the prompt's tokens from the second on, on request;
    0 for slots other than an example's first."""
    prompt_counts: Tensor | None = None
    """(N,) float32: number of tokens in ``prompt_sums``."""
    counts_are_known: bool = True
    """False if ``of_pairs`` got none; ``counts`` are then 1, and ``lengths`` raises."""

    @classmethod
    def of_pairs(
        cls,
        chosen: ArrayLike,
        rejected: ArrayLike,
        chosen_counts: ArrayLike | None = None,
        rejected_counts: ArrayLike | None = None,
    ) -> ResponseLogps:
        """Log-probabilities of P pairs, to compute any loss of pairs in a notebook.

            loss = DPOLoss(DPOConfig(kl_beta=0.1))
            loss(ResponseLogps.of_pairs([-12.0], [-15.0]), ResponseLogps.of_pairs([-13.0], [-14.0])).losses

        Args:
            chosen: (P,) nats: each chosen response's summed log-probability; a tensor keeps its gradient.
            rejected: (P,), of the rejected responses.
            chosen_counts: (P,) tokens of each chosen response, required by losses that divide by the length
                (ORPO, CPO, SimPO, IPO, any ``nll_scale``), which otherwise raise ValueError.
            rejected_counts: (P,), of the rejected responses.

        Raises ValueError if the shapes differ, if only one of the counts is given, or if a count is below 1.
        """
        if (chosen_counts is None) != (rejected_counts is None):
            raise ValueError("chosen_counts and rejected_counts: give both, or neither")
        given = {"chosen": chosen, "rejected": rejected}
        if chosen_counts is not None and rejected_counts is not None:
            given |= {"chosen_counts": chosen_counts, "rejected_counts": rejected_counts}
        # Lists and arrays become float32, in which losses compute; a tensor keeps its dtype and gradient.
        tensors = {
            name: v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=torch.float32)
            for name, v in given.items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if len(set(shapes.values())) > 1 or tensors["chosen"].dim() != 1:
            shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"all must have one shape (P,), one value per pair, but have: {shown}")
        ones = torch.ones_like(tensors["chosen"], dtype=torch.float32)
        counts = interleave(tensors.get("chosen_counts", ones), tensors.get("rejected_counts", ones)).float()
        if bool((counts < 1).any()):
            raise ValueError(
                f"counts are tokens per response, at least 1, but one is {counts.min().item():g}"
            )
        sums = interleave(tensors["chosen"], tensors["rejected"])
        return cls(
            sums=sums,
            counts=counts,
            valid=torch.ones_like(counts, dtype=torch.bool),
            desirable=torch.ones_like(counts, dtype=torch.bool),
            roles=torch.arange(len(counts), device=sums.device) % 2,  # SlotRole: chosen, rejected
            counts_are_known=chosen_counts is not None,
        )

    @classmethod
    def from_tokens(
        cls,
        batch: Batch,
        token_logps: Tensor,
        statistics: Mapping[TokenStatistic, Tensor] = {},
        keep_tokens: bool = False,
        with_prompts: bool = False,
        logits: Tensor | None = None,
    ) -> ResponseLogps:
        """Reduce per-position values, (B, T), to slots. ``statistics``: further ones, by name.

        ``keep_tokens`` passes the per-position values to a loss that declares ``needs_tokens``,
        ``with_prompts`` the prompts' sums to one that declares ``needs_prompts``, ``logits`` to one that
        declares ``needs_logits``.
        """
        valid = batch.slot_valid.reshape(-1)
        has_label = batch.labels != IGNORE_LABEL
        counts = batch.sum_per_slot(has_label.to(torch.float32)).reshape(-1)
        is_response = has_label & (batch.slot_index < batch.slot_valid.shape[1])
        row_offset = torch.arange(batch.num_rows, device=valid.device)[:, None] * batch.slot_valid.shape[1]

        def reduce(values: Tensor) -> Tensor:
            return torch.where(valid, batch.sum_per_slot(values.float()).reshape(-1), -1.0)

        return cls(
            sums=torch.where(valid, batch.sum_logps(token_logps.float()).reshape(-1), -1.0),
            counts=torch.where(valid, counts, 1.0),
            valid=valid,
            desirable=batch.desirable.reshape(-1),
            roles=batch.slot_role.reshape(-1),
            plain_sums=None if batch.token_weights is None else reduce(token_logps),
            collisions=reduce(statistics["collisions"]) if "collisions" in statistics else None,
            statistics={name: reduce(statistics[name]) for name in TOKEN_STATISTICS if name in statistics},
            token_logps=token_logps if keep_tokens else None,
            token_logits=logits,
            token_slots=torch.where(is_response, batch.slot_index + row_offset, -1)
            if keep_tokens or logits is not None
            else None,
            prompt_sums=batch.sum_per_prompt(token_logps.float()).reshape(-1) if with_prompts else None,
            prompt_counts=batch.sum_per_prompt(has_label.float()).reshape(-1) if with_prompts else None,
        )

    def with_sums(self, sums: Tensor) -> ResponseLogps:
        """The same slots with other log-probabilities, e.g. the reference's, (N,) or (B, R)."""
        flat = sums.reshape(-1).float()
        return ResponseLogps(
            sums=torch.where(self.valid, flat, -1.0),
            counts=self.counts,
            valid=self.valid,
            desirable=self.desirable,
            roles=self.roles,
            counts_are_known=self.counts_are_known,
        )

    @property
    def lengths(self) -> Tensor:
        """(N,) float32: ``counts``, for a loss to divide by. Raises ValueError if they are unknown: with a
        count of 1, a sum would pass for a mean."""
        if not self.counts_are_known:
            raise ValueError(
                "this loss divides by the responses' tokens, but their counts are not known: give "
                "ResponseLogps.of_pairs chosen_counts and rejected_counts"
            )
        return self.counts.float()

    @property
    def mean_logps(self) -> Tensor:
        """(N,) nats per token: each response's mean, every token counted once."""
        sums = self.sums if self.plain_sums is None else self.plain_sums
        return sums.float() / self.lengths

    # The names of torchtune's ChosenRejectedOutputs, so that a loss written for it reads the same.

    @property
    def chosen_logps(self) -> Tensor:
        """(P,) sums of the chosen responses."""
        return self.sums[0::2]

    @property
    def rejected_logps(self) -> Tensor:
        """(P,) sums of the rejected responses."""
        return self.sums[1::2]

    @property
    def chosen_counts(self) -> Tensor:
        """(P,) tokens of the chosen responses."""
        return self.lengths[0::2]

    @property
    def rejected_counts(self) -> Tensor:
        """(P,) tokens of the rejected responses."""
        return self.lengths[1::2]

    # Unpaired examples: completions at even slots, mismatched completions (another prompt's) at odd ones.

    @property
    def completion_logps(self) -> Tensor:
        """(P,) sums of the completions."""
        return self.sums[0::2]

    @property
    def mismatched_logps(self) -> Tensor:
        """(P,) sums of the other prompts' completions."""
        return self.sums[1::2]

    @property
    def labels(self) -> Tensor:
        """(P,) bool: whether the completion is desirable."""
        return self.desirable[0::2]

    @property
    def chosen_logits(self) -> Tensor:
        """(P, L, V) logits of the chosen responses' tokens, ``chosen_counts`` of each, 0 after them."""
        return self._logits("chosen_logits")[0::2]

    @property
    def rejected_logits(self) -> Tensor:
        """(P, L, V), as ``chosen_logits``."""
        return self._logits("rejected_logits")[1::2]

    @property
    def response_logits(self) -> Tensor:
        """(N, L, V) logits of every slot's tokens; L is the longest response's."""
        return self._logits("response_logits")

    def _logits(self, name: str) -> Tensor:
        if self.token_logits is None or self.token_slots is None:
            raise AttributeError(
                f"a loss read {name}, but log-probabilities are computed in chunks, and logits are kept only "
                "for a loss that declares needs_logits = True, of the policy, not of the reference. Declare "
                "it, or use chosen_logps / rejected_logps, the responses' summed log-probabilities"
            )
        slots = self.token_slots.reshape(-1)
        places = (slots >= 0).nonzero().squeeze(1)
        slots = slots[places]
        # A response's tokens are contiguous, so a token's index is its distance from the response's first.
        numbers = torch.arange(len(slots), device=slots.device)
        is_first = torch.cat([slots.new_ones(1), slots[1:] != slots[:-1]]).bool()[: len(slots)]
        within = numbers - torch.where(is_first, numbers, 0).cummax(0).values
        longest = int(within.max()) + 1 if len(slots) else 1
        flat = self.token_logits.flatten(0, 1)
        whole = flat.new_zeros((len(self.sums), longest, flat.shape[-1]))
        return whole.index_put((slots, within), flat[places])


@dataclass(frozen=True)
class LossOutput:
    """A loss's result for one micro-batch, one entry per example."""

    losses: Tensor
    """(P,) float32. The objective drops the entries of empty slots."""
    chosen_rewards: Tensor | None = None
    """(P,) without gradient; None if the objective has no rewards."""
    rejected_rewards: Tensor | None = None
    """(P,) without gradient."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further metrics, (P,) each without gradient, reported as means over the global batch's examples."""


@runtime_checkable
class Loss(Protocol):
    """A preference or supervised loss: a pure function of log-probabilities.

    ``policy`` carries gradients; ``reference`` is None where ``needs_reference`` is False.
    """

    @property
    def needs_reference(self) -> bool:
        """Whether ``reference`` must be given."""
        ...

    @property
    def paired(self) -> bool:
        """True if slots 2k and 2k+1 are one example; False if every slot is one."""
        ...

    @property
    def needs_tokens(self) -> bool:
        """Whether per-position values are wanted (``token_logps``)."""
        ...

    @property
    def needs_collisions(self) -> bool:
        """Whether ``collisions`` is wanted."""
        ...

    @property
    def needs_prompts(self) -> bool:
        """Whether ``prompt_sums`` and ``prompt_counts`` are wanted."""
        ...

    @property
    def needs_logits(self) -> bool:
        """Whether ``token_logits`` are wanted, which only a model that is not split over ranks has."""
        ...

    @property
    def couples_examples(self) -> bool:
        """Whether an example's loss depends on the other examples of the global batch."""
        ...

    @property
    def normaliser(self) -> Normaliser:
        """Whether the mean is over the global batch's examples, or over its response tokens."""
        ...

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None) -> LossOutput: ...
