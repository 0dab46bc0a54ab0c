"""What is wrong with data before a run: findings on records and their tokens, and what mends each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nxdt_align.data.records import BadRecords, Prompt, Record, content_of
from nxdt_align.data.tokenize import Encoded, Truncation
from nxdt_align.evaluation.near_duplicates import normalized, similar_pairs

Weight = Literal["fault", "warning", "note"]
_ORDER: Mapping[str, int] = {"fault": 0, "warning": 1, "note": 2}
_SHOWN = 3
_LENGTH_TELLS, _LENGTH_DECIDES = 0.65, 0.8
"""How well length alone tells the chosen response (0.5 is chance) that is worth a warning; a fault."""
_CUT, _MUCH_CUT = 0.03, 0.2
"""Share of records that truncation cuts that is worth a warning; a fault."""
_FEW = 0.01


@dataclass(frozen=True)
class Finding:
    """One thing to know about the data."""

    weight: Weight
    what: str
    says: str
    change: str
    """The key, and what to do with it."""
    share: float = 0.0
    """Of the records that it concerns, for the order of findings of one weight."""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """The records of data.train_dir or data.val_dir, and their tokens, in one order."""

    name: Literal["train", "val"]
    records: Sequence[Record]
    encoded: Sequence[Encoded]
    report: BadRecords
    """Unusable ones, of reading and of tokenizing."""

    @property
    def key(self) -> str:
        return f"data.{self.name}_dir"

    @property
    def is_pairs(self) -> bool:
        return bool(self.records) and len(self.records[0].responses) == 2


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer and its template put around a text, and the keys that a finding may name."""

    truncation: Truncation
    section: str
    """The objective's: ``model_alignment_strategy.dpo``."""
    levers: frozenset[str]
    """Keys of the section that its loss reads."""
    bos: int | None
    ends: frozenset[int]
    """EOS, and the token that ends a turn of the template."""
    has_template: bool
    model_length: int | None = None
    """``model.encoder_seq_length``, above which data.seq_length is refused."""

    @property
    def limit_key(self) -> str:
        """The key of the limit on prompts."""
        return f"{self.section}.max_prompt_length"

    def row_of(self, length: int) -> str:
        """What to set for rows of ``length`` tokens."""
        held = self.model_length is not None and length > self.model_length
        return f"data.seq_length={length}" + (f" with model.encoder_seq_length={length}" if held else "")


def examine(splits: Sequence[Split], tokens: Tokens, *, stops_at_bad: bool, batch_size: int) -> list[Finding]:
    """All findings, the gravest first.

    Args:
        stops_at_bad: whether one bad record stops the run (``data.on_bad_record: error``).
        batch_size: records per optimizer step.
    """
    found: list[Finding] = []
    for split in splits:
        found += _bad(split, stops_at_bad)
        if not split.records:
            continue
        found += _too_few(split, batch_size)
        found += _duplicates(split, tokens)
        found += _length_bias(split, tokens)
        found += _truncation(split, tokens)
        found += _template(split, tokens)
        found += _labels(split)
    if len(splits) == 2 and all(split.records for split in splits):
        found += _leakage(*splits)
    return sorted(found, key=lambda finding: (_ORDER[finding.weight], -finding.share))


def _bad(split: Split, stops: bool) -> Iterator[Finding]:
    report = split.report
    for reason, count in report.counts.most_common():
        share = count / max(report.read, 1)
        tie = reason == "chosen equal to rejected"
        yield Finding(
            "fault" if stops or share > 0.05 else "warning",
            "ties" if tie else "bad records",
            f"{split.key}: {count} of {report.read} records: {reason}",
            "fix them, or data.on_bad_record=drop trains without them"
            if stops
            else f"{split.key}: fix them; data.on_bad_record=drop leaves them out",
            share,
            tuple(report.examples[reason]),
        )


def _too_few(split: Split, batch_size: int) -> Iterator[Finding]:
    count = len(split.records)
    if split.name == "train" and count < 10 * batch_size:
        yield Finding(
            "fault" if count < batch_size else "warning",
            "few records",
            f"{split.key}: {count} records are {count / batch_size:.1f} optimizer steps of {batch_size}",
            "data.global_batch_size: lower it, or more data",
        )


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _whole(record: Record) -> str:
    return "\n".join((_text(record.prompt), *map(content_of, record.responses)))


def _duplicates(split: Split, tokens: Tokens) -> Iterator[Finding]:
    records, count = split.records, len(split.records)
    places: dict[tuple[str, bool | None], list[int]] = {}
    for at, record in enumerate(records):
        places.setdefault((normalized(_whole(record)), record.label), []).append(at)
    groups = [group for group in places.values() if len(group) > 1]
    again = sum(len(group) - 1 for group in groups)
    if again:
        yield Finding(
            "warning" if again / count > _FEW else "note",
            "duplicates",
            f"{split.key}: {again} of {count} records repeat another, but for case and punctuation",
            f"{split.key}: leave repeats out, or weigh the source on purpose ({{path, weight}})",
            again / count,
            _places(records, groups),
        )
    firsts = [group[0] for group in places.values()]
    near = similar_pairs([_whole(records[at]) for at in firsts])
    nearly = {firsts[j] for _, j in near}
    if nearly:
        yield Finding(
            "warning" if len(nearly) / count > 0.05 else "note",
            "near-duplicates",
            f"{split.key}: {len(nearly)} of {count} records share 80% of their word triples with another",
            f"{split.key}: leave them out, or count on fewer records than there are",
            len(nearly) / count,
            _places(records, [[firsts[i], firsts[j]] for i, j in near]),
        )
    yield from _contradictions(split, tokens)


def _contradictions(split: Split, tokens: Tokens) -> Iterator[Finding]:
    """The same responses of one prompt, preferred one way and the other; a completion with both labels."""
    seen: dict[tuple[str, str], list[tuple[object, int]]] = {}
    for at, record in enumerate(split.records):
        answers = [normalized(content_of(response)) for response in record.responses]
        if len(answers) == 2:
            side: object = answers[0] < answers[1]
        elif record.label is not None:
            side = record.label
        else:
            continue
        key = (normalized(_text(record.prompt)), "\n".join(sorted(answers)))
        seen.setdefault(key, []).append((side, at))
    groups = [[at for _, at in each] for each in seen.values() if len({side for side, _ in each}) > 1]
    concerned = sum(map(len, groups))
    if concerned:
        count, smoothing = len(split.records), "label_smoothing"
        allows = f"; {tokens.section}.{smoothing} allows for some" if smoothing in tokens.levers else ""
        yield Finding(
            "fault" if concerned / count > 0.05 else "warning",
            "contradictions",
            f"{split.key}: {concerned} of {count} records contradict another: the same responses, preferred "
            "the other way",
            f"{split.key}: decide them{allows}",
            concerned / count,
            _places(split.records, groups),
        )


def _places(records: Sequence[Record], groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
    return tuple(" = ".join(records[at].source for at in group[:_SHOWN]) for group in groups[:_SHOWN])


def _leakage(train: Split, val: Split) -> Iterator[Finding]:
    prompts = {normalized(_text(record.prompt)) for record in train.records}
    wholes = {normalized(_whole(record)) for record in train.records}
    exact = [r for r in val.records if normalized(_whole(r)) in wholes]
    same = [r for r in val.records if normalized(_text(r.prompt)) in prompts and r not in exact]
    count = len(val.records)
    for what, those, says in (
        ("leakage", exact, "are in data.train_dir, too"),
        ("shared prompts", same, "have a prompt of data.train_dir, with other responses"),
    ):
        if those:
            yield Finding(
                "fault" if what == "leakage" and len(those) / count > _FEW else "warning",
                what,
                f"data.val_dir: {len(those)} of {count} records {says}: validation looks better than it is",
                "data.val_dir: hold whole prompts out of data.train_dir",
                len(those) / count,
                tuple(record.source for record in those[:_SHOWN]),
            )
    rest = [r for r in val.records if normalized(_text(r.prompt)) not in prompts]
    near = similar_pairs([_text(r.prompt) for r in rest], [_text(r.prompt) for r in train.records])
    nearly = sorted({i for i, _ in near})
    if nearly:
        yield Finding(
            "warning" if len(nearly) / count > _FEW else "note",
            "near leakage",
            f"data.val_dir: {len(nearly)} of {count} prompts are nearly one of data.train_dir",
            "data.val_dir: hold them out of data.train_dir, unless all prompts have a common form",
            len(nearly) / count,
            tuple(f"{rest[i].source} ~ {train.records[j].source}" for i, j in near[:_SHOWN]),
        )


def _length_bias(split: Split, tokens: Tokens) -> Iterator[Finding]:
    """How well a rule that knows lengths alone would tell the chosen response."""
    if not split.is_pairs:
        return
    lengths = np.array([each.whole[1:3] for each in split.encoded])
    longer, shorter = (lengths[:, 0] > lengths[:, 1]).mean(), (lengths[:, 0] < lengths[:, 1]).mean()
    tells = max(longer, shorter) + (1 - longer - shorter) / 2
    # Beyond what chance gives so few pairs (two standard errors).
    if tells < max(_LENGTH_TELLS, 0.5 + 1 / np.sqrt(len(lengths))):
        return
    ways = {"ld_alpha": "ld_alpha (0 to 0.5)", "length_normalization": "length_normalization=True"}
    keys = [f"{tokens.section}.{said}" for key, said in ways.items() if key in tokens.levers]
    which = "longer" if longer > shorter else "shorter"
    yield Finding(
        "fault" if tells >= _LENGTH_DECIDES else "warning",
        "length bias",
        f"{split.key}: the chosen response is the {which} one in {max(longer, shorter):.0%} of the pairs "
        f"(means {lengths[:, 0].mean():.0f} and {lengths[:, 1].mean():.0f} tokens); length alone tells "
        f"{tells:.0%} of them",
        "; ".join(filter(None, (" or ".join(keys), f"{split.key}: balance the pairs"))),
        float(tells) - 0.5,
    )


def _truncation(split: Split, tokens: Tokens) -> Iterator[Finding]:
    count, truncation = len(split.encoded), tokens.truncation
    needed = quantile([each.whole[0] + max(each.whole[1:]) for each in split.encoded], 99)
    over = [each.whole[0] > truncation.prompt_limit for each in split.encoded]
    if any(over):
        longest = quantile([each.whole[0] for each in split.encoded], 99)
        change = f"{tokens.limit_key}={longest}"
        if longest >= truncation.seq_length:  # the limit has to be below it
            change += f" with {tokens.row_of(max(needed, longest + 1))}"
        yield Finding(
            _weight_of_cut(sum(over) / count),
            "cut prompts",
            f"{split.key}: {sum(over)} of {count} prompts lose their beginning after BOS: they are longer "
            f"than {truncation.prompt_limit} tokens",
            f"{change} serves 99% of them",
            sum(over) / count,
            _sources(split, over),
        )
    cut = [sum(map(len, each.responses)) < sum(each.whole[1:]) for each in split.encoded]
    if any(cut):
        yield Finding(
            _weight_of_cut(sum(cut) / count),
            "cut responses",
            f"{split.key}: the end of a response is cut in {sum(cut)} of {count} records; it then has no end "
            "token, and the model does not learn to stop there",
            f"{tokens.row_of(needed)} serves 99% of them",
            sum(cut) / count,
            _sources(split, cut),
        )
    alike = [split.is_pairs and each.responses[0] == each.responses[1] for each in split.encoded]
    if any(alike):
        yield Finding(
            "fault" if sum(alike) / count > _FEW else "warning",
            "ties after truncation",
            f"{split.key}: in {sum(alike)} of {count} pairs chosen and rejected have the same tokens once "
            "they are cut: nothing can be learnt from them",
            "data.seq_length: raise it, or leave these pairs out",
            sum(alike) / count,
            _sources(split, alike),
        )


def _weight_of_cut(share: float) -> Weight:
    return "fault" if share > _MUCH_CUT else "warning" if share > _CUT else "note"


def quantile(values: Sequence[int], percent: int) -> int:
    return int(np.percentile(values, percent, method="higher"))


def _sources(split: Split, those: Sequence[bool]) -> tuple[str, ...]:
    found = (record.source for record, is_one in zip(split.records, those, strict=True) if is_one)
    return tuple(source for _, source in zip(range(_SHOWN), found, strict=False))


def _template(split: Split, tokens: Tokens) -> Iterator[Finding]:
    count = len(split.encoded)
    if tokens.bos is not None:
        twice = [each.prompt[1:].count(tokens.bos) > 0 for each in split.encoded]
        if any(twice):
            yield Finding(
                "warning",
                "BOS within prompts",
                f"{split.key}: {sum(twice)} of {count} prompts have BOS within, too",
                "data.tokenizer.type: its chat template, or the text of the data, writes it",
                sum(twice) / count,
                _sources(split, twice),
            )
    open_ended = [
        not each.truncated and any(answer[-1] not in tokens.ends for answer in each.responses)
        for each in split.encoded
    ]
    if any(open_ended):
        yield Finding(
            "warning",
            "responses without an end",
            f"{split.key}: responses of {sum(open_ended)} of {count} records end with neither EOS nor the "
            "template's end of turn",
            "data.tokenizer.type: a chat template that closes the assistant's turn",
            sum(open_ended) / count,
            _sources(split, open_ended),
        )
    texts = sum(isinstance(record.prompt, str) for record in split.records)
    if texts and tokens.has_template:
        marks = ("<|", "[INST]", "<start_of_turn>", "Human:", "### ")
        bare = [isinstance(r.prompt, str) and not any(m in r.prompt for m in marks) for r in split.records]
        if any(bare):
            yield Finding(
                "note",
                "text beside a chat template",
                f"{split.key}: {sum(bare)} of {count} prompts are plain text, so the tokenizer's chat "
                "template is not used: a chat model then trains on another form than it is asked in",
                f"{split.key}: give prompts as messages, [{{role: user, content: ...}}]",
                sum(bare) / count,
                _sources(split, bare),
            )


def _labels(split: Split) -> Iterator[Finding]:
    labels = [record.label for record in split.records if record.label is not None]
    share = sum(labels) / len(labels) if labels else 0.5
    if not 0.2 <= share <= 0.8:
        yield Finding(
            "fault" if share in (0, 1) else "warning",
            "unbalanced labels",
            f"{split.key}: {share:.0%} of {len(labels)} completions are desirable",
            "model_alignment_strategy.kto.desirable_weight and undesirable_weight: so that weight times "
            "number is within 1 to 4/3 of each other (https://arxiv.org/abs/2402.01306)",
            abs(share - 0.5),
        )
