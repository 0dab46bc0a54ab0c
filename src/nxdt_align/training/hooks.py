"""Callbacks around the training loop: the reference pass, the preflight, the export."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nxdt_align.batch import Batch
from nxdt_align.engines.base import Engine, WeightSource, together
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.reference.cache import ReferenceStore, ReferenceStoreError
from nxdt_align.reference.precompute import PassSummary, precompute
from nxdt_align.training.finite import FiniteCheck
from nxdt_align.training.stopping import StopOnSignal

log = logging.getLogger(__name__)
Split = Literal["train", "val"]
T = TypeVar("T")

PREFLIGHT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest |policy - reference| per token, in nats, that identical weights may give in each dtype."""


class ReferencePlan(Protocol):
    """The part of a tokenized split that the reference pass uses."""

    def reference_plan(self) -> Any: ...

    def collate_planned(self, planned: Any) -> Batch: ...


class AlignmentData(Protocol):
    """The part of the data module that the hooks use."""

    @property
    def splits(self) -> Mapping[Split, ReferencePlan]: ...

    def ids(self, split: Split) -> npt.NDArray[Any]: ...

    def set_reference(self, split: Split, table: npt.NDArray[Any]) -> None: ...

    def first_micro_batches(self, split: Split = "train") -> list[Batch]: ...


@dataclass(frozen=True)
class ReferenceOrigin:
    """Where reference values come from.

    ``is_start``: the reference is the policy before its first step. ``is_loaded``: it is what the engine was
    filled from, so that one that keeps its start has it.
    """

    source: WeightSource
    is_start: bool
    is_loaded: bool = False

    def kept_by(self, engine: Engine) -> bool:
        """Whether ``engine`` has these weights at any time."""
        return self.is_loaded and engine.keeps_start


class ReferencePass(Callback):
    """Before the first step: the reference log-probs of train and validation data.

    Stored values are reused. In a new run whose reference is its start weights in the policy's precision
    (``like_policy``), the policy itself computes them; otherwise the reference's weights are loaded for the
    pass and freed after it. ``compute`` fills a split's table. ``beside`` is called before they are freed,
    with whether they were loaded: stored values need no reference.
    """

    def __init__(
        self,
        engine: Engine,
        data: AlignmentData,
        store: ReferenceStore,
        origin: ReferenceOrigin,
        *,
        compute: Callable[..., tuple[npt.NDArray[Any], PassSummary]] = precompute,
        like_policy: bool = True,
        beside: Callable[[bool], None] | None = None,
    ) -> None:
        self._engine = engine
        self._data = data
        self._store = store
        self._origin = origin
        self._compute = compute
        self._like_policy = like_policy
        self._beside, self._is_loaded = beside, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.model(is_new=trainer.ckpt_path is None) as reference:
            for split in self._data.splits:
                self._run(split, reference=reference)
            if self._beside is not None:
                self._beside(self._is_loaded)

    @contextmanager
    def model(self, *, is_new: bool, always: bool = False) -> Iterator[bool]:
        """What the values are computed with is there in the block. Yields whether it is the engine's frozen
        reference, and not its policy, that is to be asked.

        Args:
            is_new: the policy is at its start.
            always: also where no value is missing.
        """
        use_policy = self._like_policy and self._origin.is_start and is_new
        absent = 0
        # Rank 0 decides for all: another rank might read the store while it is being written.
        with together(self._engine.gather_objects, ReferenceStoreError):
            if self._engine.topology.rank == 0:
                absent = sum(len(self._store.missing(self._data.ids(split))) for split in self._data.splits)
        absent = self._engine.broadcast_object(absent)
        if (absent or always) and not use_policy:
            log.info("loading the reference model %s; %d records have no value", self._origin.source, absent)
            kept = self._origin.kept_by(self._engine)
            self._engine.load_reference(None if kept else self._origin.source)
            self._is_loaded = True
        yield not use_policy
        self._engine.drop_reference()
        self._is_loaded = False

    def of_split(self, split: Split, compute: Callable[..., T], *, reference: bool, **more: Any) -> T:
        """``compute``, such as ``reference.precompute.precompute``, of a split's records, with ``more``
        arguments; ``reference`` is what ``model`` yields."""
        data = self._data.splits[split]
        return compute(
            self._engine,
            data.reference_plan(),
            data.collate_planned,
            self._data.ids(split),
            self._store,
            records_of=lambda planned: planned.records,
            reference=reference,
            **more,
        )

    def _run(self, split: Split, *, reference: bool) -> None:
        table, summary = self.of_split(split, self._compute, reference=reference)
        log.info("reference log-probs of %s: %s", split, summary)
        self._data.set_reference(split, table)


class ReferenceDuringTraining(Callback):
    """``precompute_ref_log_probs: False``: a frozen reference beside the policy, evaluated at each step.
    ``beside`` is called once it is loaded, as ReferencePass's."""

    def __init__(
        self,
        engine: Engine,
        origin: ReferenceOrigin,
        *,
        like_policy: bool = True,
        beside: Callable[[bool], None] | None = None,
    ) -> None:
        self._engine = engine
        self._origin = origin
        self._like_policy = like_policy
        self._beside = beside

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A copy of the policy has the policy's precision; a reference in another dtype reads its weights
        # anew.
        copies_policy = self._like_policy and self._origin.is_start and trainer.ckpt_path is None
        kept = self._origin.kept_by(self._engine)
        self._engine.load_reference(None if copies_policy or kept else self._origin.source)
        if self._beside is not None:
            self._beside(True)


class Preflight(Callback):
    """Before the first step, stops a new run whose policy and reference disagree.

    At step 0 policy and reference are the same, so each margin is 0 and DPO's loss is ln 2. If they differ,
    the values belong to other weights, another tokenizer or another order, and training would be silently
    wrong. An intentionally different reference is only reported.
    """

    def __init__(
        self,
        engine: Engine,
        data: AlignmentData,
        tolerance: float,
        *,
        by_intent: bool,
        store: Path | None,
    ) -> None:
        self._engine = engine
        self._data = data
        self._tolerance = tolerance
        self._by_intent = by_intent
        self._store = store

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != 0:
            return
        self.judge(self._worst_difference())

    def judge(self, worst: float) -> None:
        """Raise UserError where ``worst``, the largest difference in nats per token, is too large."""
        if not math.isfinite(worst):
            raise UserError(
                "preflight: the policy's or the reference's log-probabilities are not finite before the "
                "first step; check the start weights, and precision.type (fp32 rules out overflow)"
            )
        if self._by_intent:
            differs = "preflight: reference_model differs from the policy by up to %.3g nats per token"
            log.log(NOTICE, differs, worst)
        elif worst > self._tolerance:
            raise UserError(
                f"preflight: policy and reference differ by {worst:.3g} nats per token before the first "
                f"step, but start from the same weights (tolerance {self._tolerance:g}). {self._advice()}, "
                "or set exp_manager.preflight=False if this is intended"
            )
        else:
            log.log(NOTICE, "preflight: policy and reference agree to %.3g nats per token", worst)

    def _advice(self) -> str:
        if self._store is None:
            return "Compute them in fp32 (precision.type=fp32)"
        return (
            f"The stored values belong to other weights or other data: remove {self._store} and start again"
        )

    def _worst_difference(self) -> float:
        """Over the first step's responses, the same on every rank."""
        worst = torch.zeros(())
        for batch in self._data.first_micro_batches():
            # Compared on the host, so that a lazy device needs no graph beyond the reference pass's.
            on_device = batch.to(self._engine.device)
            policy = self._engine.response_logps(on_device).cpu()
            reference = batch.reference_logps
            if reference is None:
                reference = self._engine.response_logps(on_device, reference=True).cpu()
            counts = batch.sum_per_slot(torch.ones_like(batch.labels, dtype=torch.float32))
            difference = (policy - reference).abs() / counts.clamp(min=1.0)
            # NaN must not pass as agreement.
            difference = torch.where(difference.isfinite(), difference, torch.inf)
            worst = torch.maximum(worst, torch.where(batch.slot_valid, difference, 0.0).max())
        if self._engine.topology.data_parallel_size == 1:
            return float(worst)
        return float(self._engine.all_gather(worst.to(self._engine.device)).max())


class FinishRun(Callback):
    """At the end: save the last step if it has no checkpoint yet, and write the Hugging Face export.

    Args:
        export: writes the policy to a folder; called on every rank.
        folder: where to; None exports nothing.
        finite: stops an export of weights that are not finite in ``dtype``; None checks nothing.
        dtype: of the exported weights.
        stop: stops before the export where a signal has come; None where signals are not handled.
    """

    def __init__(
        self,
        engine: Engine,
        export: Callable[[Path], None],
        folder: Path | None,
        finite: FiniteCheck | None,
        dtype: torch.dtype,
        stop: StopOnSignal | None = None,
    ) -> None:
        self._engine = engine
        self._finite, self._dtype = finite, dtype
        self._stop = stop
        self._export = export
        self._folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callback: Any = trainer.checkpoint_callback
        is_saved = callback is None or callback._last_global_step_saved == trainer.global_step
        if not is_saved and trainer.global_step > 0:
            # NeMo's save_last writes a second copy named -last; this saves under the usual name and ranking.
            callback._save_topk_checkpoint(trainer, callback._monitor_candidates(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also runs if a resumed run has no steps left, e.g. after an export that ran out of disk space."""
        self._engine.finish_saving()
        if self._stop is not None:
            self._stop.before_export(trainer)
        if self._folder is not None:
            if self._finite is not None:
                what, optimizer = f"export {self._folder}", trainer.optimizers[0]
                self._finite.check_weights(what, trainer.global_step, optimizer, dtype=self._dtype)
            self._export(self._folder)
