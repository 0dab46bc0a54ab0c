"""A run's reference: the origin of its weights, their record in checkpoints, and what computes its values.

A resumed run keeps the reference that it started with. NxDT recomputes it from the resumed policy, so DPO's
target silently changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.engines.base import Engine, WeightSource
from nxdt_align.engines.native.checkpoint import read_extra
from nxdt_align.engines.nxd import checkpoint as nxd_checkpoint
from nxdt_align.engines.settings import Precision
from nxdt_align.errors import UserError
from nxdt_align.models.presets import ModelShape
from nxdt_align.reference.cache import ReferenceStore, fingerprint_of
from nxdt_align.run import assemble
from nxdt_align.run.mode import RunMode
from nxdt_align.run.resume import RUN_RECORD
from nxdt_align.training.hooks import (
    PREFLIGHT_TOLERANCE,
    ReferenceDuringTraining,
    ReferenceOrigin,
    ReferencePass,
)
from nxdt_align.weights.detect import fresh_weights
from nxdt_align.weights.hf import FreshWeights

ORIGIN = "reference_origin"


def find_origin(
    config: Config, model: ModelShape, start: WeightSource, recorded: Path | None
) -> ReferenceOrigin:
    """The reference's weights.

    Args:
        start: what the policy starts from.
        recorded: another run's checkpoint that this one goes on from, optimizer state included, or one of
            this run's own after that.

    ``reference_model`` if set; else the reference of ``recorded``, which is the start of the first run; else
    ``start``. Raises UserError if those weights are missing or changed.
    """
    chosen = config.model_alignment_strategy.reference_model
    if chosen is not None:
        source = assemble.weights_at(Path(chosen), model, "model_alignment_strategy.reference_model")
        return ReferenceOrigin(source, is_start=False)
    record = None if recorded is None else _extra(recorded).get(RUN_RECORD, {}).get(ORIGIN)
    if record is None:
        return ReferenceOrigin(start, is_start=True, is_loaded=True)
    return ReferenceOrigin(_recorded(record, model, recorded), is_start=True)


def _extra(checkpoint: Path) -> dict[str, Any]:
    written_by_nxd = nxd_checkpoint.is_checkpoint(checkpoint)
    return nxd_checkpoint.read_extra(checkpoint) if written_by_nxd else read_extra(checkpoint)


def origin_record(source: WeightSource, fingerprint: str) -> dict[str, Any]:
    """A checkpoint's record of its reference, in plain values."""
    seed = source.seed if isinstance(source, FreshWeights) else None
    return {
        "path": None if source.path is None else str(source.path.absolute()),
        "seed": seed,
        "fingerprint": fingerprint,
    }


def _recorded(record: dict[str, Any], model: ModelShape, checkpoint: Path | None) -> WeightSource:
    if record["path"] is None:
        return fresh_weights(model, record["seed"])
    folder = Path(record["path"])
    if not folder.is_dir():
        raise _lost(checkpoint, folder, "does not exist")
    source = assemble.weights_at(folder, model, "the checkpoint's reference")
    # A folder of the same name may hold another download, or an export written later.
    if source.fingerprint() != record["fingerprint"]:
        raise _lost(checkpoint, folder, "holds other weights now")
    return source


def _lost(checkpoint: Path | None, folder: Path, what: str) -> UserError:
    return UserError(
        f"exp_manager.resume_from_checkpoint: {checkpoint} was trained against the reference {folder}, which "
        f"{what}; set model_alignment_strategy.reference_model to a folder of those weights"
    )


def reference_callbacks(
    config: Config,
    mode: RunMode,
    engine: Engine,
    data: ModelAlignmentDataModule,
    origin: ReferenceOrigin,
    precisions: tuple[Precision, Precision],
    store: ReferenceStore | None,
    beside: Callable[[bool], None] | None = None,
) -> list[Callback]:
    """Callbacks that compute the reference's values and, unless disabled, check them before step 1.

    Args:
        precisions: of policy and reference.
        store: for values computed before training; None computes them at each step.
        beside: called once, with whether the engine has the reference then.
    """
    alike = precisions[0] == precisions[1]
    first: Callback = ReferenceDuringTraining(engine, origin, like_policy=alike, beside=beside)
    if store is not None:
        compute = mode.compute_reference
        first = ReferencePass(engine, data, store, origin, compute=compute, like_policy=alike, beside=beside)
    if not config.exp_manager.preflight:
        return [first]
    tolerance = max(PREFLIGHT_TOLERANCE[precision.coarsest] for precision in precisions)
    folder = None if store is None else store.folder
    return [
        first,
        mode.preflight(engine, data, tolerance, by_intent=not origin.is_start, store=folder),
    ]


def require_stored_reference(config: Config, *, needed: bool) -> None:
    """Raise UserError where a run of ``config`` would read no stored reference values."""
    strategy = config.model_alignment_strategy
    if not needed:
        raise UserError(
            f"model_alignment_strategy: {strategy.objective} as it is configured needs no reference, so that "
            "there is nothing to compute ahead"
        )
    if not strategy.precompute_ref_log_probs:
        raise UserError(
            f"model_alignment_strategy.{strategy.objective}.precompute_ref_log_probs: is False, so that a "
            "run computes the reference at each step and reads no stored value; set it to True"
        )


def open_store(
    config: Config,
    mode: RunMode,
    folder: Path,
    *,
    weights: str,
    model: str,
    tokenization: str,
    precision: str,
    has_adapter: bool,
) -> ReferenceStore:
    """The store of the values of a reference with these ``weights``.

    The keyword arguments form the store's fingerprint, so that no value is used for another model, tokenizer,
    truncation or precision. ``has_adapter``: the weights are a base's with an adapter added in, beside which
    that base is quantised where it is.
    """
    made_from = {"weights": weights, "model": model, "tokenization": tokenization, "precision": precision}
    dpo = config.model_alignment_strategy.dpo
    if dpo is not None and dpo.ld_alpha is not None:
        # Only where it is set, so that stores of runs without it keep their fingerprint.
        made_from["ld_alpha"] = str(dpo.ld_alpha)
    settings = config.model_alignment_strategy
    if settings.reference_model is None and settings.peft is not None and settings.peft.quantize_base:
        # The policy's base is the reference, of which modules that are trained whole are not quantised.
        whole = ", ".join(sorted(settings.peft.modules_to_save))
        beside = " beside an adapter" if has_adapter else ""
        made_from["quantized"] = settings.peft.quantize_base + beside + (f" but {whole}" if whole else "")
    # Two values per record: chosen and rejected, or KTO's completion and the mismatched one.
    return mode.reference_store(folder, fingerprint_of(made_from), 2, made_from)
