"""Labelled completions, and the mismatched completions that they get."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nxdt_align.data import mismatched as mismatched_module
from nxdt_align.data.mismatched import NoCandidateError, mismatched, with_mismatched
from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.records import DataError, Record


def load(tmp_path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> list[Record]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records([Source(str(path))], "unpaired", **settings).records


def row(prompt: Any, completion: Any, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_text_and_messages_are_read(tmp_path: Path) -> None:
    chat = row([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "no"}], 0)
    first, second = load(tmp_path, [row("a", "yes", True), chat])
    assert (first.prompt, first.responses, first.label) == ("a", ("yes",), True)
    assert (second.responses, second.label) == (("no",), False)
    assert first.id != load(tmp_path, [row("a", "yes", False)])[0].id


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("a", "yes", "true"), "`label` must be true or false, but is 'true'"),
        (row("a", "", True), "empty response"),
        ({"prompt": "a", "completion": "b"}, "nearest is unpaired, which needs label too"),
        ({"prompt": "a", "chosen": "b"}, "nearest is pairs, which needs rejected too"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, [bad])


def test_each_gets_the_completion_before_it(tmp_path: Path) -> None:
    """The first gets the last one's; an equal completion is passed over."""
    records = load(tmp_path, [row(p, c, True) for p, c in ("ax", "by", "cy", "dz")])
    mixed = with_mismatched(records)
    assert [record.responses for record in mixed] == [("x", "z"), ("y", "x"), ("y", "x"), ("z", "y")]
    assert len({record.id for record in [*records, *mixed]}) == 8


def test_a_completion_of_the_same_prompt_is_passed_over(tmp_path: Path) -> None:
    """As in data made of pairs, where both responses of a prompt are neighbours."""
    records = load(tmp_path, [row(*r) for r in (("a", "x", True), ("a", "y", False), ("b", "z", True))])
    assert [record.responses for record in with_mismatched(records)] == [("x", "z"), ("y", "z"), ("z", "y")]


@pytest.mark.parametrize("rows", [("ax", "bx"), ("ax", "ay"), ("ax", "bx", "ay")])
def test_a_record_that_finds_no_other_prompts_completion_is_named(
    tmp_path: Path, rows: Sequence[str]
) -> None:
    records = load(tmp_path, [row(p, c, True) for p, c in rows])
    with pytest.raises(DataError, match=r"rows.jsonl:1: KTO needs another prompt's completion beside each"):
        with_mismatched(records)


def test_the_search_is_short_however_long_a_run_of_one_prompt_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the search through all records before each, on draws with few prompts and completions; of
    records that are held and of those that are not."""

    def by_search(records: list[Record], i: int) -> object:
        before = (records[i - k] for k in range(1, len(records)))
        own = records[i]
        fits = (r for r in before if r.prompt != own.prompt and r.responses != own.responses)
        return next((r.responses[0] for r in fits), None)

    rng = random.Random(0)
    for _ in range(2000):
        prompts, completions = rng.randint(1, 4), rng.randint(1, 4)
        records = []
        for _ in range(rng.randint(1, 12)):
            words, completion = str(rng.randrange(prompts)), str(rng.randrange(completions))
            prompt = rng.choice([words, [{"role": "user", "content": words}]])
            records.append(Record(prompt, (completion,), True))
        wanted = [by_search(records, i) for i in range(len(records))]
        codes = [
            np.unique([json.dumps(value) for value in values], return_inverse=True)[1]
            for values in ([r.prompt for r in records], [r.responses[0] for r in records])
        ]
        monkeypatch.setattr(mismatched_module, "_ROUNDS", rng.choice([1, 2, 64]))
        if None in wanted:
            with pytest.raises(DataError, match="another prompt's completion"):
                with_mismatched(records)
            with pytest.raises(NoCandidateError) as error:
                mismatched(*codes)
            assert error.value.position == wanted.index(None)
        else:
            assert [record.responses[1] for record in with_mismatched(records)] == wanted
            assert [records[i].responses[0] for i in mismatched(*codes)] == wanted
    run = [Record("a", (str(i),), True) for i in range(20_000)]
    begun = time.process_time()
    mixed = with_mismatched([*run, Record("b", ("x",), True)])
    assert time.process_time() - begun < 10  # 0.3 s; the search through them takes minutes.
    assert {record.responses[1] for record in mixed[:-1]} == {"x"} and mixed[-1].responses[1] == "19999"
