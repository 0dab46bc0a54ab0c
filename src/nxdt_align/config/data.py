"""The section ``data``: files, formats, batches, layout. Part of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nxdt_align.config.fields import PATH, number, reads_as

Packing = Literal["none", "packed", "shared_prompt"]
Attention = Literal["auto", "dense", "blocks", "flex"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer."""

    type: str = field(default="", metadata=PATH)
    """Folder of a Hugging Face tokenizer, or its name on the Hub. Required."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of a mixture."""

    path: str = field(default="", metadata=PATH)
    """File, or name of a data set on the Hub."""
    weight: float = 1.0
    """How often its records come in an epoch: 2 twice, 0.5 every other one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data, batches and how examples are laid into rows."""

    train_dir: str | tuple[DataSource, ...] = field(default="", metadata=PATH)
    """Training data: .jsonl, .json, .arrow or .parquet (also .gz), or the name of a data set on the
    Hub; a list of {path, weight} is a mixture. Required."""
    val_dir: str | tuple[DataSource, ...] | None = field(default=None, metadata=PATH)
    """Validation data, as train_dir; null for none."""
    dev_choose_samples: int | None = number(None, at_least=1)
    """Take the first so many records of each file; null for all."""
    seq_length: int = number(4096, at_least=2)
    """Most tokens of an example: prompt and response. Where it is not given, model.encoder_seq_length
    if that is."""
    micro_batch_size: int = number(1, at_least=1)
    """Pairs (with packing none) or rows (else) that a rank computes at once."""
    global_batch_size: int = number(8, at_least=1)
    """Pairs of an optimizer step, over all ranks; for sft and kto, responses."""
    packing: Packing | None = field(default=None, metadata=reads_as(true="packed", false="none"))
    """(ours) Layout of examples in rows. none: a row per response, padded; packed: several responses a
    row, each with its prompt; shared_prompt: packed, chosen and rejected sharing their prompt's tokens;
    null: shared_prompt, and for sft what model_alignment_strategy.sft.packing says. It changes the
    speed and nothing else. True and False, as in NxDT's Megatron YAMLs, are packed and none."""
    buckets: tuple[int, ...] | None = None
    """(ours) Row lengths in ascending order, each one compiled graph; null: chosen from the data."""
    attention: Attention = "auto"
    """(ours) How packed rows are attended over. dense: a mask of all pairs of tokens, for any device;
    blocks: an example at a time, padding left out, for cpu; flex: PyTorch's FlexAttention, compiled, for
    cuda; auto: blocks on cpu, flex on cuda, else dense. It changes the speed and nothing else."""
    format: str | None = None
    """(ours) Format of the records, e.g. pairs, fairseq2, orca, hh, sharegpt; or a function of your own,
    module.function, from a record of the file to a mapping with prompt, chosen and rejected; null: found by
    their keys."""
    columns: Mapping[str, str] | None = None
    """(ours) Our key to the files' key, e.g. {prompt: question, chosen: good, rejected: bad}."""
    on_bad_record: Literal["error", "drop"] = "error"
    """(ours) error: stop with a report of all bad records; drop: leave them out and log the report."""
    cache_dir: str | None = field(default=None, metadata=PATH)
    """(ours) Folder of tokens and reference log-probabilities; null: cache in the experiments' folder."""
    num_workers: int = number(0, at_least=0)
    """Processes that prepare batches; 0: the training process itself. The order is the same."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
