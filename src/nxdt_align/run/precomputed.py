"""Reference values apart from training: computed ahead, compared, and looked for in a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nxdt_align.batch import Topology
from nxdt_align.config.check import CheckedConfig
from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config
from nxdt_align.data.module import ModelAlignmentDataModule
from nxdt_align.engines.base import together
from nxdt_align.errors import UserError
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.reference.cache import ReferenceStoreError
from nxdt_align.reference.precompute import PassSummary, Share, compute_missing
from nxdt_align.reference.stores import StoreReport, examine, find_stores, other_precision_alone
from nxdt_align.reference.verify import Verified, verify
from nxdt_align.run import assemble, computing, in_run
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode
from nxdt_align.run.places import Places
from nxdt_align.run.reference import find_origin, open_store, require_stored_reference
from nxdt_align.run.rows import row_needs, with_possible_layout
from nxdt_align.run.run import Run
from nxdt_align.run.settle import settle
from nxdt_align.training.hooks import PREFLIGHT_TOLERANCE
from nxdt_align.weights.peft import MergedWeights


class ReferenceAlone(RunMode):
    """Computes reference values and writes nothing but the caches of ``data.cache_dir``."""

    def check_places(self, places: Places) -> None:
        places.require_writable_cache()

    def check_experiment(self, config: Config) -> None:
        """There is none."""


def precompute_ahead(checked: CheckedConfig, env: RunEnv, share: Share = Share()) -> dict[str, Any]:  # noqa: B008 (a tuple)
    """Fill the store that a run of this configuration will look for, or a share of it, on all ranks.

    Returns plain values: the store's folder, and of each split what was computed. Raises UserError as
    ``train`` does, and where a run would read no stored value.
    """

    def act(run: Run) -> dict[str, Any]:
        own, store, is_new = run.reference_alone()
        found: dict[str, PassSummary] = {}
        with own.model(is_new=is_new) as reference:
            for split in run.data.splits:
                found[split] = own.of_split(split, compute_missing, reference=reference, share=share)
                if found[split].left:
                    continue
                with together(run.engine.gather_objects, ReferenceStoreError):
                    if run.topology.rank == 0:
                        store.table(run.data.ids(split))  # which training then maps
        return {"store": str(store.folder), "splits": {split: asdict(done) for split, done in found.items()}}

    return in_run(checked, env, ReferenceAlone(), act)


def verify_stored(checked: CheckedConfig, env: RunEnv, records: int) -> dict[str, Any]:
    """Compute about ``records`` stored values of each split again, on all ranks.

    Returns plain values: the store's folder, the tolerance in nats per token (the preflight's), and how each
    split compares. Raises UserError as ``train`` does, and where the store has no value of this data.
    """

    def act(run: Run) -> dict[str, Any]:
        own, store, is_new = run.reference_alone()
        found: dict[str, Verified] = {}
        with own.model(is_new=is_new, always=True) as reference:
            for split, data in run.data.splits.items():
                tokens = data.examples.response_lengths
                more = {"tokens": tokens, "sample": records}
                found[split] = own.of_split(split, verify, reference=reference, **more)
        if not any(each.compared for each in found.values()):
            raise UserError(
                f"{store.folder} has no value of these data: nxdt-align reference precompute computes them"
            )
        precisions = (run.parts.precision, run.parts.reference_precision)
        return {
            "store": str(store.folder),
            "tolerance": max(PREFLIGHT_TOLERANCE[each.coarsest] for each in precisions),
            "splits": {split: asdict(each) for split, each in found.items()},
        }

    return in_run(checked, env, ReferenceAlone(), act)


# What a store holds


def inspect(path: Path) -> list[StoreReport]:
    """The stores at ``path``. Raises UserError where there is none."""
    return [examine(store) for store in find_stores(path)]


def completeness(config: Config, engine: Engine, path: Path) -> dict[str, Any]:
    """How much of what a run of ``config`` would read is in the stores at ``path``: builds no engine, reads
    data and start weights.

    Returns plain values: the wanted fingerprint and what it is made from, whether such a store is there, the
    stores there that tell the same number format in other words, and of each split the records and those
    without a value.
    """
    settled = settle(config, engine).config
    model = assemble.model_config(settled)
    settled = with_possible_layout(settled, model)
    objective = GlobalMeanObjective(assemble.loss(settled, engine))
    require_stored_reference(settled, needed=objective.needs_reference)
    tokenization = assemble.tokenization(settled, model)
    data = ModelAlignmentDataModule(
        settled,
        tokenization,
        Topology(),
        cache_dir=RunMode().token_cache(Places(settled)),
        with_prompts=objective.needs_prompts,
        # Which records there are does not depend on how they are laid out.
        **row_needs(settled, engine, model, "cpu", needs_reference=objective.needs_reference),
    )
    origin = find_origin(settled, model, assemble.start_weights(settled, model), None)
    stores = find_stores(path)
    store = open_store(
        settled,
        RunMode(),
        stores[0].parent,
        weights=origin.source.fingerprint(),
        model=str(model),
        tokenization=tokenization.fingerprint(),
        precision=computing.precision_of_reference(settled, engine),
        has_adapter=isinstance(origin.source, MergedWeights),
    )
    return {
        "fingerprint": store.folder.name,
        "made_from": dict(store.description),
        "is_there": store.folder in stores,
        "in_other_precision": [
            str(each)
            for each in stores
            if each != store.folder and other_precision_alone(each, store.description)
        ],
        "splits": {
            split: {"records": len(data.ids(split)), "missing": len(store.missing(data.ids(split)))}
            for split in data.splits
        },
    }
