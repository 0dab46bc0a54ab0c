"""The data of a configuration, examined before a run: reads and tokenizes, builds no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from nxdt_align.config.alignment import ModelAlignmentStrategyConfig
from nxdt_align.config.custom import refuse_own_parts
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.config.engines import Engine
from nxdt_align.config.schema import Config
from nxdt_align.data.module import sources
from nxdt_align.data.reading import load_records
from nxdt_align.data.records import BadRecord, Record
from nxdt_align.data.tokenize import Encoded, Tokenization, Truncation
from nxdt_align.errors import UserError
from nxdt_align.evaluation import diagnosis, doctor, show_tokens
from nxdt_align.evaluation.doctor import Finding, Split, Tokens
from nxdt_align.planning.workload import device_kind
from nxdt_align.run import assemble
from nxdt_align.run.settle import settle

_AT_A_TIME = 1000


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    splits: tuple[Split, ...]
    findings: tuple[Finding, ...]
    tokens: Tokens
    tokenization: Tokenization
    template_variables: Mapping[str, Any]
    """What ``tokenization`` gives its chat template."""

    @property
    def is_fit(self) -> bool:
        """Whether there is no fault; warnings and notes are allowed."""
        return not any(finding.weight == "fault" for finding in self.findings)

    def to_text(self) -> str:
        return diagnosis.to_text(self.splits, self.findings, self.tokens)

    def to_json(self) -> str:
        return diagnosis.as_json(self.splits, self.findings)

    def show(self, count: int, *, colours: bool) -> str:
        """The first records of the training data as tokens."""
        split, truncation = self.splits[0], self.tokenization.truncation
        uncut = Truncation(2**20, 2**19, truncation.mode)
        whole = Tokenization(self.tokenization.tokenizer, uncut, self.template_variables)
        records = split.records[:count]
        shown = []
        for record, kept, full in zip(records, split.encoded[:count], whole.encode(records), strict=True):
            assert isinstance(full, Encoded)
            tokenizer = self.tokenization.tokenizer
            shown.append(show_tokens.show(record, kept, full, tokenizer, colours=colours))
        return "\n".join(shown)


def diagnose(config: Config, engine: Engine, *, import_own_parts: bool = False) -> Diagnosis:
    """Examine training and validation data as a run would read them, and report bad records instead of
    stopping at them. Raises UserError where nothing of a split can be used, and for a tokenizer that does not
    fit.

    Args:
        import_own_parts: import the function that ``data.format`` may name, as train does.
    """
    config = settle(config, engine, device=device_kind(config), weights=False).config
    if not import_own_parts:
        refuse_own_parts(config, ("data.format",))
    tokenization = assemble.tokenization(config, assemble.model_config(config))
    splits = [_split(config, "train", tokenization)]
    if config.data.val_dir is not None:
        splits.append(_split(config, "val", tokenization))
    tokens = _tokens(config, tokenization, splits)
    findings = doctor.examine(
        splits,
        tokens,
        stops_at_bad=config.data.on_bad_record == "error",
        batch_size=config.data.global_batch_size,
    )
    return Diagnosis(tuple(splits), tuple(findings), tokens, tokenization, config.data.chat_template_kwargs)


def _split(config: Config, name: Literal["train", "val"], tokenization: Tokenization) -> Split:
    data = config.data
    places = data.train_dir if name == "train" else data.val_dir
    try:
        found = load_records(
            # Each record once: a weight repeats them on purpose.
            [replace(source, weight=None) for source in sources(places)],
            config.model_alignment_strategy.examples,
            format=data.format,
            columns=data.columns,
            on_bad_record="drop",
            limit=data.dev_choose_samples,
        )
    except UserError as error:
        raise UserError(f"data.{name}_dir: {error}") from error
    records: list[Record] = []
    encoded: list[Encoded] = []
    for begin in range(0, len(found.records), _AT_A_TIME):
        part = found.records[begin : begin + _AT_A_TIME]
        for record, each in zip(part, tokenization.encode(part), strict=True):
            if isinstance(each, BadRecord):
                found.report.add(record.source, each)
            else:
                records.append(record)
                encoded.append(each)
    return Split(name, records, encoded, found.report)


def _tokens(config: Config, tokenization: Tokenization, splits: list[Split]) -> Tokens:
    tokenizer = tokenization.tokenizer
    chats = any(not isinstance(record.prompt, str) for split in splits for record in split.records)
    end = tokenization.turn_end() if chats else None
    strategy = config.model_alignment_strategy
    return Tokens(
        truncation=tokenization.truncation,
        section=f"model_alignment_strategy.{strategy.objective}",
        levers=_levers(strategy),
        bos=tokenizer.bos_token_id,
        ends=frozenset((tokenizer.eos_token_id, *(() if end is None else (end,)))),
        has_template=bool(tokenizer.chat_template),
        model_length=config.model.encoder_seq_length,
    )


def _levers(strategy: ModelAlignmentStrategyConfig) -> frozenset[str]:
    """Keys of the objective's section that its loss reads."""
    if strategy.loss is not None:
        # A custom loss: what is left is what the data's rows are weighed by.
        return frozenset(("ld_alpha",)) if strategy.dpo is not None else frozenset()
    unread = set()
    if strategy.dpo is not None:
        forms = [FORMS[name] for name in strategy.dpo.loss_types]
        unread = {key for form in FORMS.values() for key in form.reads}
        unread -= {key for form in forms for key in form.reads}
        if strategy.dpo.length_normalization or all(form.normalised for form in forms):
            unread.add("length_normalization")  # which is done already
    return frozenset(field.name for field in fields(strategy.active)) - unread
