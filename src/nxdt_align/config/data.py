"""The section ``data``: files, formats, batches, layout. Part of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nxdt_align.config.fields import AUTO, PATH, number, reads_as

Packing = Literal["none", "packed", "shared_prompt"]
PACKING = "data.packing"
"""The key that may stay auto until the data's lengths are known."""
Attention = Literal["auto", "dense", "blocks", "flex", "causal", "nki"]

_PAIRS = (
    *("pairs", "fairseq2", "responses", "sharegpt", "orca", "hh", "alpaca", "openai", "torchtune", "swift"),
    *("shp", "stack_exchange", "nectar", "ultrafeedback", "common_beginning"),
)
_SINGLE = ("input_output", "messages", "question_answer")
TEMPLATE_ARGUMENTS = frozenset(
    (
        *("messages", "conversation", "conversations", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "tokenizer_kwargs", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        "sanitize_control_tokens",
    )
)
"""What a template gets from the data, or apply_chat_template takes itself: no variables of a template."""
FORMATS: dict[str, tuple[str, ...]] = {
    "pair": _PAIRS,
    "response": ("prompt_response", "prompt_completion", *_PAIRS, *_SINGLE),
    "unpaired": ("unpaired", *_SINGLE, *_PAIRS),
    "prompt": ("prompt", "unpaired", "prompt_response", "prompt_completion", *_PAIRS, *_SINGLE),
}
"""An objective's examples -> names of the formats that hold them; a test compares them with the formats."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer."""

    type: str = field(default="", metadata=PATH)
    """Folder of a Hugging Face tokenizer, or its name on the Hub; empty: that of the model, in
    exp_manager.resume_from_checkpoint or model.model_config."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One source of a mixture."""

    path: str = field(default="", metadata=PATH)
    """File, or name of a data set on the Hub."""
    weight: float = 1.0
    """How often its records occur per epoch: 2 is twice, 0.5 a random half."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data, batches and the layout of examples in rows."""

    train_dir: str | tuple[DataSource, ...] = field(default="", metadata=PATH)
    """Training data: .jsonl, .json, .arrow or .parquet (also .gz), or the name of a data set on the
    Hub, owner/name or owner/name:split; a list of {path, weight} is a mixture. Required."""
    val_dir: str | tuple[DataSource, ...] | None = field(default=None, metadata=PATH)
    """Validation data, as train_dir; null for none."""
    dev_choose_samples: int | None = number(None, at_least=1)
    """Take the first N records of each file; null for all."""
    seq_length: int = number(4096, AUTO, at_least=2)
    """Maximum tokens of an example, prompt and response. If not set: model.encoder_seq_length, if that is
    set. auto (ours): that or 4096, or what the model was made for (max_position_embeddings, a sliding window
    of all layers), if that is less."""
    micro_batch_size: int = number(1, at_least=1)
    """Pairs (packing none) or rows (otherwise) per micro-batch."""
    global_batch_size: int = number(8, at_least=1)
    """Pairs per optimizer step over all ranks; for sft and kto, responses."""
    packing: Packing | None = field(default=None, metadata={**AUTO, **reads_as(true="packed", false="none")})
    """(ours) Layout of examples in rows. none: a row per response, padded; packed: several responses
    per row, each with its prompt; shared_prompt: packed, chosen and rejected sharing their prompt's tokens;
    null: shared_prompt, for sft as model_alignment_strategy.sft.packing says; auto: of those
    that are possible, the one that takes the least time on paper on Trainium, and elsewhere the fewest
    tokens, for the data's lengths (docs/packing.md). Affects only the speed. True and False, as in NxDT's
    Megatron YAMLs, mean packed and none."""
    buckets: tuple[int, ...] | None = None
    """(ours) Row lengths in ascending order, each one compiled graph; null: chosen from the data."""
    attention: Attention = "auto"
    """(ours) Attention kernel for rows. dense: an (S, S) mask, for any device; blocks: one example at a time,
    without padding, for cpu; flex: PyTorch's compiled FlexAttention, for cuda; causal: the device's flash
    kernel without a mask, for packing none alone; nki: nki-library's flash kernels with each token's bounds,
    for neuron (engine native) in bf16, not run on a chip yet; auto: blocks on cpu, flex on cuda, causal on
    neuron (engine native) where packing is none and its kernel takes the model's heads and the buckets, else
    dense. Affects only the speed."""
    format: str | None = None
    """(ours) Format of the records, e.g. pairs, fairseq2, orca, hh, sharegpt; or a custom function,
    module.function, from a record of the file to a mapping with prompt, chosen and rejected; null: detected
    from the keys."""
    columns: Mapping[str, str] | None = None
    """(ours) Our key to the files' key, e.g. {prompt: question, chosen: good, rejected: bad}."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """(ours) Variables of the tokenizer's chat template, e.g. {enable_thinking: false}; as TRL's
    chat_template_kwargs."""
    on_bad_record: Literal["error", "drop"] = "error"
    """(ours) error: stop with a report of all bad records; drop: leave them out and log the report."""
    cache_dir: str | None = field(default=None, metadata=PATH)
    """(ours) Folder of tokens and reference log-probabilities; null: cache in the experiments' folder."""
    verify_cache: bool = False
    """(ours) True: hash all of each large data file before its stored tokens are used; False: trust its size,
    its time of change and a sample of its content."""
    num_workers: int = number(0, at_least=0)
    """Processes that prepare batches; 0: the training process itself. The order is the same."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
