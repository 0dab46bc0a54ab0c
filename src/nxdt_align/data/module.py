"""ModelAlignmentDataModule: records in, micro-batches out. The only file of this folder that uses
Lightning."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from nxdt_align.batch import Batch, Topology
from nxdt_align.config.fields import is_dotted
from nxdt_align.config.schema import Config
from nxdt_align.data.layouts import LayoutChoice, LayoutOptions, RowOption
from nxdt_align.data.mismatched import with_mismatched
from nxdt_align.data.packing import RowPlanner
from nxdt_align.data.preparation import Settings
from nxdt_align.data.prepared import is_large, prepared_examples, prepared_mismatched
from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.records import BadRecords, DataError
from nxdt_align.data.steps import (
    UNPAIRED_ROLES,
    DryRunDataset,
    Split,
    StepDataset,
    StepSampler,
    dry_run_steps,
    look_up_reference,
)
from nxdt_align.data.token_sets import TokenizedSet, WholeSequences, tokenize_records
from nxdt_align.data.tokenize import Tokenization
from nxdt_align.errors import UserError
from nxdt_align.record_ids import spans

log = logging.getLogger(__name__)


def _identity(item: list[Batch]) -> list[Batch]:
    return item


class StepLoader(DataLoader[Any]):
    """A loader of steps. Its position follows from the optimizer steps done, so its state only identifies the
    data, to refuse a checkpoint of other data."""

    VERSION = 1

    def state_dict(self) -> dict[str, int]:
        assert isinstance(self.sampler, StepSampler)
        return {
            "version": self.VERSION,
            "examples": self.sampler.examples,
            "examples_per_step": self.sampler.examples_per_step,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        wanted = self.state_dict()
        if state != wanted:
            raise UserError(
                f"the checkpoint was written by a run over {state}, but this run's data are {wanted}: resume "
                "with the same data and data.global_batch_size, or set model.weight_init_only=True to start "
                "from the checkpoint's weights alone"
            )


class ModelAlignmentDataModule(LightningDataModule):
    """Train and validation data of a run.

    Args:
        config: the whole configuration.
        tokenization: tokenizer, template and truncation.
        topology: this process's ranks and the parallel sizes.
        cache_dir: where tokens are cached between runs; None caches none.
        min_micro_batches: minimum per rank and training step, as a pipeline schedule needs.
        round_size: see RowPlanner; for training steps.
        with_prompts: the loss needs the prompts' log-probabilities too.
        fixed_micro_batches: the same number at every step of a bucket, see RowPlanner.
        window: tokens that the model's local layers see; None for a model without such layers.
        only_local: no layer sees more than the window.
        layouts: those that rows may have; None: that of ``config``, as a CPU takes it.
    """

    def __init__(
        self,
        config: Config,
        tokenization: Tokenization,
        topology: Topology,
        *,
        cache_dir: Path | None,
        min_micro_batches: int = 1,
        round_size: int = 1,
        with_prompts: bool = False,
        fixed_micro_batches: bool = False,
        window: int | None = None,
        only_local: bool = True,
        layouts: LayoutOptions | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._tokenization = tokenization
        self._topology = topology
        self._cache_dir = cache_dir
        self._min_micro_batches = min_micro_batches
        self._round_size = round_size
        self._with_prompts = with_prompts
        self._fixed_micro_batches = fixed_micro_batches
        self._window, self._only_local = window, only_local
        self._layouts = layouts or LayoutOptions([RowOption(config.layout)])
        self.choice: LayoutChoice | None = None
        """Of the layout, where there are several options."""
        self._references: dict[Split, npt.NDArray[Any]] = {}
        self.splits: dict[Split, StepDataset] = {"train": self._load(sources(config.data.train_dir), "train")}
        if config.data.val_dir is not None and config.validates:
            self.splits["val"] = self._load(sources(config.data.val_dir), "val")
        self._train_sampler = self._sampler("train", steps_done=self._steps_done)
        self._dry_runs: dict[Split, DryRunDataset] = {}

    @property
    def _tail_weight(self) -> float | None:
        dpo = self._config.model_alignment_strategy.dpo
        return None if dpo is None else dpo.ld_alpha

    def _examples(self, sources: list[Source], split: Split) -> tuple[TokenizedSet, BadRecords]:
        data, strategy = self._config.data, self._config.model_alignment_strategy
        # What a function of the user's own reads is not known ahead, and N records of a file are soon read.
        by_content = data.dev_choose_samples is None and not _is_own(data.format)
        try:
            if self._cache_dir is not None and by_content and is_large(sources):
                prepare = prepared_examples if strategy.kto is None else prepared_mismatched
                return prepare(
                    sources,
                    Settings(
                        strategy.examples, data.format, data.columns, self._tokenization, data.verify_cache
                    ),
                    self._cache_dir,
                    on_bad_record=data.on_bad_record,
                    seed=self._config.seed,
                )
            found = load_records(
                sources,
                strategy.examples,
                format=data.format,
                columns=data.columns,
                on_bad_record=data.on_bad_record,
                limit=data.dev_choose_samples,
                seed=self._config.seed,
            )
            records = found.records if strategy.kto is None else with_mismatched(found.records)
        except DataError as error:
            raise DataError(f"data.{split}_dir: {error}") from error
        examples = tokenize_records(
            *(records, self._tokenization, self._cache_dir),
            report=found.report,
            on_bad_record=data.on_bad_record,
        )
        return examples, found.report

    def _load(self, sources: list[Source], split: Split) -> StepDataset:
        examples, report = self._examples(sources, split)
        if report.total:
            log.warning("%s", report.summary())
        strategy = self._config.model_alignment_strategy
        key = f"model_alignment_strategy.{strategy.objective}.max_prompt_length"
        for told in examples.warnings_of_truncation(self._tokenization.truncation, key):
            log.warning("data.%s_dir: %s", split, told)
        sft = strategy.sft
        if sft is not None and sft.train_on_prompt:
            examples = WholeSequences(examples)
        planner = self._planner(examples, split)
        roles = None if self._config.model_alignment_strategy.kto is None else UNPAIRED_ROLES
        return StepDataset(
            *(examples, planner, planner.layout, self._topology),
            tail_weight=self._tail_weight,
            roles=roles,
            with_prompts=self._with_prompts,
        )

    def _planner(self, examples: TokenizedSet, split: Split) -> RowPlanner:
        """Training data choose the layout."""
        planner, choice = self._layouts.choose(lambda option: self._plan(examples, split, option))
        if choice is not None:
            self.choice = choice
            option = next(each for each in self._layouts.options if each.layout == choice.layout)
            self._layouts = LayoutOptions([option])
        return planner

    def _plan(self, examples: TokenizedSet, split: Split, option: RowOption) -> RowPlanner:
        data = self._config.data
        return RowPlanner(
            examples,
            option.layout,
            examples_per_step=data.global_batch_size,
            seq_length=data.seq_length,
            buckets=data.buckets,
            ranks=self._topology.data_parallel_size,
            micro_batch_size=data.micro_batch_size,
            min_micro_batches=self._min_micro_batches if split == "train" else 1,
            round_size=self._round_size if split == "train" else 1,
            with_prompts=self._with_prompts,
            fixed_micro_batches=self._fixed_micro_batches,
            window=self._window,
            only_local=self._only_local,
            row_multiple=option.row_multiple,
            row_cost=option.row_cost,
            name=f"data.{split}_dir",
        )

    # Queries of the run

    def consumed_samples(self, steps: int) -> int:
        """Training examples seen in the first ``steps`` steps."""
        return self._train_sampler.consumed(steps)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._train_sampler)

    def record_ids(self, split: Split) -> list[str]:
        return self.splits[split].examples.record_ids

    def ids(self, split: Split) -> npt.NDArray[Any]:
        """(N, 16) uint8: ``record_ids`` as bytes, mapped where each record of one source occurs once."""
        return self.splits[split].examples.ids()

    def fingerprint(self, split: Split) -> str:
        """A hash of the records' ids in their order: 32 hex digits."""
        examples = self.splits[split].examples
        # JSON of {"records": the ids, parted by spaces}, made piece by piece; it must never change, or runs
        # would no longer resume.
        digest = hashlib.blake2b(b'{"records":"', digest_size=16)
        for span in spans(len(examples)):
            digest.update((" " * bool(span.start) + examples.text_of_ids(span)).encode())
        digest.update(b'"}')
        return digest.hexdigest()

    def first_micro_batches(self, split: Split = "train") -> list[Batch]:
        """This rank's share of the next step."""
        batches = self.splits[split][next(iter(self._train_sampler))]
        return self._attach(batches, split)

    def start_dry_run(self, steps: int) -> None:
        """Make the loaders yield the ``dry_run_steps`` of a run of ``steps`` steps; -1: of one epoch."""
        self._dry_runs = self.shapes_of_run(steps)

    def shapes_of_run(self, steps: int) -> dict[Split, DryRunDataset]:
        """This rank's micro-batches of a step of each shape that a run of ``steps`` steps meets, and of the
        first; -1: of one epoch."""
        train = self._train_sampler
        epochs = 1 if steps < 0 else -(-steps // len(train))
        every = itertools.chain.from_iterable(train.steps(epoch) for epoch in range(epochs))
        met: dict[Split, Iterable[tuple[int, ...]]] = {
            "train": itertools.islice(every, None if steps < 0 else steps)
        }
        if "val" in self.splits:
            met["val"] = self._sampler("val")
        datasets = {split: self.splits[split] for split in met}
        return {s: DryRunDataset(d, dry_run_steps(d.planner, met[s])) for s, d in datasets.items()}

    # The reference

    def set_reference(self, split: Split, table: npt.NDArray[Any]) -> None:
        """(N, k) float32 log-probs in data-set order, of which each later batch gets its records'; may be
        mapped."""
        wanted = self.splits[split].examples.response_lengths.shape
        if table.shape != wanted:
            raise ValueError(f"reference table of {split} must have shape {wanted}, but has {table.shape}")
        self._references[split] = table

    def _attach(self, batches: list[Batch], split: Split) -> list[Batch]:
        table = self._references.get(split)
        if table is None:
            return batches
        return [b.with_reference(look_up_reference(table, b)) for b in batches]

    # Lightning

    def _steps_done(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    def _sampler(self, split: Split, steps_done: Callable[[], int] = lambda: 0) -> StepSampler:
        return StepSampler(
            len(self.splits[split].examples),
            self._config.data.global_batch_size,
            self._config.seed,
            shuffle=split == "train",
            steps_done=steps_done,
        )

    def _loader(self, split: Split, sampler: StepSampler) -> DataLoader[Any]:
        if split in self._dry_runs:
            return DataLoader(self._dry_runs[split], batch_size=None, collate_fn=_identity)
        workers = self._config.data.num_workers
        return StepLoader(
            self.splits[split],
            sampler=sampler,
            batch_size=None,
            collate_fn=_identity,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", self._train_sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("val", self._sampler("val")) if "val" in self.splits else []

    def on_before_batch_transfer(self, batch: list[Batch], dataloader_idx: int) -> list[Batch]:
        training = self.trainer is None or self.trainer.training
        return self._attach(batch, "train" if training else "val")

    def transfer_batch_to_device(
        self, batch: list[Batch], device: torch.device, dataloader_idx: int
    ) -> list[Batch]:
        return [b.to(device) for b in batch]


def _is_own(format: str | None) -> bool:
    return format is not None and is_dotted(format)


def sources(value: Any) -> list[Source]:
    """``data.train_dir``: one path, or a mixture of {path, weight}."""
    if isinstance(value, str):
        return [Source(value, None)]
    return [Source(item, None) if isinstance(item, str) else Source(item.path, item.weight) for item in value]
