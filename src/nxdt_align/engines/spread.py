"""What every engine does alike that spreads a model over ranks: ``steps`` on its runner, its reference and
its master weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.engines import steps, xla
from nxdt_align.engines.base import Engine, Objective, StepOutput
from nxdt_align.engines.greedy import RowsOf, Texts, continue_prompts, rows_to_continue
from nxdt_align.engines.masters import MasterWeights
from nxdt_align.engines.ranks import Group, Ranks


class SpreadEngine(Engine):
    """A model over ranks. An engine sets these in its ``__init__``."""

    _runner: steps.Runner
    """Sends micro-batches through the policy."""
    _reference: steps.Runner | None = None
    """Through the frozen reference, where there is one."""
    _masters: MasterWeights | None = None
    """Of the policy, where the weights that are computed with are copies."""
    _stale: bool = True
    """Whether the masters may have moved since they were copied."""
    _data: Group
    """Ranks that see other rows of the global batch."""
    _ranks: Ranks
    """All processes."""

    def drop_reference(self) -> None:
        self._reference = None

    def _sync_from_masters(self) -> None:
        """Bring the weights that are computed with up to the masters, where those may have moved."""
        if self._masters is not None and self._stale:
            self._masters.sync_weights()
        self._stale = False

    def evaluate(self, micro_batches: Sequence[Batch], objective: Objective) -> StepOutput:
        self._computes("validation step", micro_batches)
        self._sync_from_masters()
        batches = steps.with_reference(self._reference, micro_batches, objective)
        return steps.evaluate(self._runner, self._data, batches, objective)

    def response_logps(self, batch: Batch, *, reference: bool = False) -> Tensor:
        self._computes("log-probabilities without gradients", [batch])
        self._sync_from_masters()
        return steps.slot_logps(self._reference if reference else self._runner, [batch])[0]

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        length: int,
        max_tokens: int,
        ends: Collection[int],
        draw: Callable[[Tensor], Tensor] | None = None,
        reference: bool = False,
    ) -> list[list[int]]:
        assert max(map(len, prompts)) + max_tokens <= length
        runner = self._reference if reference else self._runner
        assert runner is not None, "no reference has been loaded"
        self._sync_from_masters()

        def next_tokens(texts: Texts) -> list[int]:
            batch = rows(texts).to(self.device)
            self._computes("tokens of completions", [batch])
            (found,) = runner.forward([batch], wanted=("top1",) if draw is None else ("logits",))
            if draw is None:
                chosen = found.statistics[0][:, 0].long()
            else:
                assert found.logits is not None
                chosen = draw(found.logits[:, 0].float().cpu())
            # One rank's, so that all stop together whatever a device's last digits are.
            tokens: list[int] = self._ranks.broadcast(chosen.tolist())
            return tokens

        with self._rows_of_texts(length, reference=reference) as rows:
            return continue_prompts(prompts, max_tokens=max_tokens, ends=ends, next_tokens=next_tokens)

    def _rows_of_texts(self, length: int, *, reference: bool = False) -> AbstractContextManager[RowsOf]:
        """Around the forward passes of ``greedy``: what gives the rows of each. Here whole texts, all in one
        shape; an engine may have the model keep what it has computed of them."""
        return nullcontext(partial(rows_to_continue, length=length))

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """On a lazy device without a graph of its own, where ``mark_step`` came before."""
        return xla.fetch(values) if self.lazy else super().fetch(values)

    def all_gather(self, value: Tensor) -> Tensor:
        return self._data.gather(value)

    def broadcast_object(self, value: Any) -> Any:
        return self._ranks.broadcast(value)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._ranks.gather(value)

    def barrier(self) -> None:
        self._ranks.barrier()
