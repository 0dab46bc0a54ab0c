"""Two models on one file: ``compare`` is public. What is compared and shown is in evaluation/compare.py."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nxdt_align.config.alignment import OBJECTIVES
from nxdt_align.config.fields import is_dotted
from nxdt_align.data.formats import Format, Kind, detect_format, format_names, named_format
from nxdt_align.data.reading import ROWS_TO_DETECT, Source, load_records
from nxdt_align.data.records import BadRecord, DataError, Record, Row, content_of
from nxdt_align.data.sources import read_raw
from nxdt_align.data.token_sets import tokenize_records
from nxdt_align.errors import UserError
from nxdt_align.evaluation.compare import Answer, Compared, Comparison, write_comparison
from nxdt_align.evaluation.generate import NotFiniteError, Sampling, complete
from nxdt_align.evaluation.scorers import SCORERS, Score, Scored, choose_scorer, scored
from nxdt_align.run.conversion import DTYPES, Dtype
from nxdt_align.run.generation import (
    FORMAT_OPTION,
    Backend,
    device_of,
    hf_folder,
    open_generator,
    open_tokenization,
    require_backend,
    require_limit,
    settings_of_run,
    variables_of_run,
)
from nxdt_align.run.places import require_page
from nxdt_align.run.policy import load_policy
from nxdt_align.weights.hf_writer import CONFIG

__all__ = ["compare"]

_KINDS: tuple[Kind, ...] = ("pair", "unpaired", "response", "prompt")
"""The first that a file's records fit is taken."""
DEFAULT_BETA = 0.1


def compare(
    before: str | Path,
    after: str | Path,
    data: str | Path,
    *,
    out: str | Path | None = None,
    score: str = "auto",
    beta: float | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    format: str | None = None,
    limit: int | None = None,
    backend: Backend = "auto",
    device: str | None = None,
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    tensor_parallel: int = 1,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What two models make of the same records: their answers, and by how much the log-probabilities of the
    data's responses differ.

    Args:
        before: as ``generate`` takes a model.
        after: the same.
        data: a file of pairs, of labelled completions, of single responses or of prompts, in any format that
            training reads.
        out: a page (.html) to write, with the same as JSON beside it; replaced if it is there.
        score: ``exact``, ``gsm8k``, ``none``, the dotted path of a function (completion, record) -> number,
            or ``auto``, see ``evaluation.scorers.choose_scorer``.
        beta: scale of the implicit rewards; None: that of the run that ``after`` is of, else 0.1.
        chat_template_kwargs: of both models; None: those of the run that each is of, else of ``after``'s.

    The others are those of ``generate``. Both models answer in turn, so that one is in memory at a time.

    Returns ``before``, ``after``, ``data``, ``beta``, ``scorer``, ``verdict``, ``summary`` and ``records``,
    as the JSON has them. Raises UserError.
    """
    page = None if out is None else Path(out)
    if page is not None:
        require_page(page)
    sampling = Sampling(temperature, top_p, max_tokens, batch_size, seed)
    require_backend(backend, device, dtype, tensor_parallel)
    scale = _beta(Path(after)) if beta is None else beta
    if not scale > 0:
        raise UserError(f"beta: must be above 0, but is {scale}")
    require_limit(limit)
    kind = _kind(str(data), format)
    source = Source(str(data))
    records = load_records([source], kind, format=format, limit=limit, format_key=FORMAT_OPTION).records
    texts = [tuple(content_of(response) for response in record.responses) for record in records]
    scorer, judge = choose_scorer(score, _answers_to_match(records))
    _try_scorer(scorer, judge, records)
    answers = []
    for name, model in (("before", Path(before)), ("after", Path(after))):
        variables = chat_template_kwargs
        if variables is None:
            variables = variables_of_run(model) or variables_of_run(Path(after))
        with hf_folder(model) as folder:
            tokenization = open_tokenization(folder, tokenizer, variables, model)
            logps: list[tuple[float, ...]] = [()] * len(records)
            if records[0].responses:
                policy = load_policy(folder, device=device_of(device), dtype=_dtype(folder, device, dtype))
                # Whatever its label says, a completion's log-probability is the same.
                unlabelled = [replace(record, label=None) for record in records]
                tokens = tokenize_records(unlabelled, tokenization, None)
                logps = [tuple(each) for each in policy.response_sums(tokens, batch_size).tolist()]
                del policy
                _free_memory()
                _require_finite(logps, records, model)
            made = open_generator(folder, backend, device, dtype, tensor_parallel)
            try:
                rows = complete(records, tokenization, made, sampling)
            except NotFiniteError as error:
                raise UserError(f"{model}: {error}") from error
            del made
            _free_memory()
        answers.append(_answers(name, records, rows, logps, scorer, judge))
    found = Comparison(
        str(before),
        str(after),
        str(data),
        scale,
        scorer,
        tuple(
            Compared(record.source, record.prompt, of_record, first, second, scale, record.label)
            for record, of_record, first, second in zip(records, texts, *answers, strict=True)
        ),
    )
    if page is not None:
        write_comparison(found, page)
    return found.to_dict()


def _require_finite(logps: Sequence[tuple[float, ...]], records: Sequence[Record], model: Path) -> None:
    bad = [record for record, each in zip(records, logps, strict=True) if not all(map(math.isfinite, each))]
    if bad:
        raise UserError(
            f"{model}: its log-probabilities are not finite on {len(bad)} of {len(records)} records, first "
            f"{bad[0].source}; its weights are damaged, or overflow in their dtype, which --dtype fp32 rules "
            "out"
        )


def _answers(
    name: str,
    records: Sequence[Record],
    rows: Sequence[Mapping[str, Any]],
    logps: Sequence[tuple[float, ...]],
    scorer: str,
    judge: Score | None,
) -> list[Answer]:
    found = []
    for record, row, sums in zip(records, rows, logps, strict=True):
        told = _told(record)
        score = None
        if judge is not None and (told["answer"] is not None or scorer not in SCORERS):
            score = scored(scorer, judge, row["completion"], told, name)
        tokens, reason = row["completion_tokens"], row["finish_reason"]
        found.append(Answer(row["completion"], tokens, reason, sums, score))
    return found


def _told(record: Record) -> Scored:
    """What a scorer is told."""
    texts = [content_of(response) for response in record.responses]
    has_rejected = len(texts) == 2 or record.label is False
    return {
        "prompt": record.prompt,
        "answer": _answer(record),
        "rejected": texts[-1] if has_rejected else None,
        "source": record.source,
    }


def _try_scorer(scorer: str, judge: Score | None, records: Sequence[Record]) -> None:
    """Let the user's own score the data's first answer, if there is one. Raises UserError, before a model has
    been loaded and answers."""
    told = next((_told(record) for record in records if _answer(record) is not None), None)
    if judge is not None and scorer not in SCORERS and told is not None:
        scored(scorer, judge, told["answer"], told, "the data")


def _answer(record: Record) -> str | None:
    """What a right completion says: the chosen or only response, unless its label calls it undesirable."""
    return content_of(record.responses[0]) if record.responses and record.label is not False else None


def _answers_to_match(records: Sequence[Record]) -> list[str | None]:
    """Of all records but the undesirable completions, which have no answer and are not scored; where that is
    all, of them."""
    return [_answer(record) for record in records if record.label is not False] or [None] * len(records)


def _kind(data: str, format: str | None) -> Kind:
    """The richest kind that the file's records fit. Raises DataError."""
    possible = [k for k in _KINDS if format is None or is_dotted(format) or format in format_names(k)]
    if not possible:
        known = dict.fromkeys(name for kind in _KINDS for name in format_names(kind))
        raise DataError(f"{FORMAT_OPTION}: {format!r} is no format; known are {', '.join(known)}")
    head = [row.value for row in islice(read_raw(data), ROWS_TO_DETECT) if isinstance(row.value, dict)]
    for kind in possible:
        named = None if format is None else named_format(format, kind, FORMAT_OPTION)
        if any(_fits(row, kind, named) for row in head):
            return kind
    return "prompt" if format is None else possible[0]  # whose reader says what is wrong


def _fits(row: Row, kind: Kind, named: Format | None) -> bool:
    """By its keys; where the format is named, and of labels, which may be a class's name, by its values."""
    found = named or detect_format(row, kind)
    if found is None or (named is None and kind != "unpaired"):
        return found is not None
    try:
        return any(isinstance(made, Record) for made in found.convert(row))
    except BadRecord:
        return False


def _beta(model: Path) -> float:
    strategy = settings_of_run(model).get("model_alignment_strategy", {})
    for name in OBJECTIVES:
        section = strategy.get(name) or {}
        for key in ("kl_beta", "beta"):
            if isinstance(section.get(key), int | float):
                return float(section[key])
    return DEFAULT_BETA


def _dtype(folder: Path, device: str | None, dtype: Dtype | None) -> torch.dtype:
    """Of weights and activations, as the models that answer have it."""
    if dtype is not None:
        return DTYPES[dtype]
    if device_of(device).type == "cpu":
        return torch.float32
    shape = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    found = getattr(torch, str(shape.get("dtype") or shape.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _free_memory() -> None:
    """Of a model that is no longer needed, before the next is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
