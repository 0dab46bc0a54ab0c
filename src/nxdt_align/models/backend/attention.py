"""Our attention by key intervals as a function of transformers' attention interface.

The rows' intervals go through a model as an argument of its forward pass, which its layers hand to their
attention with all the others: what is recomputed in the backward pass gets those of its own micro-batch.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from nxdt_align.models.decoder import Attend, Prepare, Recompute, first_keys_in_window

NAME = "nxdt_align_intervals"
ARGUMENT = "nxdt_align_rows"
"""Of a model's forward pass."""

_IGNORED = (
    # What says nothing about who sees whom: positions are in queries and keys already.
    *("position_ids", "cache_position", "position_embeddings", "use_cache", "layer_idx", "seq_idx"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    "num_items_in_batch",
)


class NotCarriedError(Exception):
    """A model does not say to its attention what our layouts need, or asks it for what ours does not do."""


class Intervals:
    """The rows that a forward pass runs over: which keys each token sees.

    Args:
        attend: over (q, k, v, context); see ``models.decoder.Attend``.
        prepare: bounds, (B, S) int32 each -> context.
        key_start, key_stop: the first and one past the last key that each token sees.
        recompute: of the attention in the backward pass; None keeps what it keeps.
    """

    def __init__(
        self,
        attend: Attend,
        prepare: Prepare,
        key_start: Tensor,
        key_stop: Tensor,
        recompute: Recompute | None = None,
    ) -> None:
        self._attend, self._prepare, self._recompute = attend, prepare, recompute
        self._bounds = key_start, key_stop
        self._contexts: dict[int | None, Any] = {}
        self.windows: list[int | None] = []
        """Of the attention calls so far."""
        self.softcaps: set[float] = set()

    def context(self, window: int | None) -> Any:
        """Made once for each window that the layers have."""
        if window not in self._contexts:
            start, stop = self._bounds
            start = start if window is None else first_keys_in_window(start, window)
            self._contexts[window] = self._prepare(start, stop)
        return self._contexts[window]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> Tensor:
        self.windows.append(window)
        context = self.context(window)
        settings = {} if softcap is None else {"softcap": softcap}
        self.softcaps.update(settings.values())

        def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(q, k, v, context, **settings)

        return compute(q, k, v) if self._recompute is None else self._recompute(compute, q, k, v)


def interval_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' own: query (B, N, S, H), key and value (B, K, S, H) -> (B, S, N, H).

    Raises NotCarriedError for a model that did not hand on the rows' intervals, that asks for a mask of its
    own, and for an argument that is not known here.
    """
    rows = others.pop(ARGUMENT, None)
    if not isinstance(rows, Intervals):
        raise NotCarriedError("its layers do not hand on to attention what the model is given")
    asked = [
        name
        for name, given in others.items()
        if name not in _IGNORED and given is not None and given is not False
    ]
    if attention_mask is not None:
        asked.append("attention_mask")
    if is_causal is False:
        asked.append("is_causal=False")
    if dropout:
        asked.append("dropout")
    if asked:
        raise NotCarriedError(f"its attention asks for {', '.join(sorted(asked))}, which ours does not do")
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    own, size = scaling, query.shape[-1]
    # Backends scale by 1 / sqrt(H); another scale is the queries'.
    if own is not None and abs(own * size**0.5 - 1.0) > 1e-12:
        query = query * (own * size**0.5)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return rows.attend(q, k, v, window, softcap).contiguous(), None


# Without a function for masks of this name, transformers makes none, and hands None to attention.
AttentionInterface.register(NAME, interval_attention)
