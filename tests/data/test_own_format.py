"""A format of one's own by dotted path: what it gives, what it may not do, and what is stored of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import make_tokenizer

from nxdt_align.config.load import load_config
from nxdt_align.config.rules import own_parts
from nxdt_align.data.formats import Kind, named_format
from nxdt_align.data.reading import RecordSet, Source, load_records
from nxdt_align.data.records import BadRecord, DataError, record_id
from nxdt_align.data.token_sets import tokenize_records
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.errors import UserError

MODULE = """
NUMBER = 3

def debate(record):
    best, worst = sorted(record["answers"], key=lambda answer: -answer["votes"])
    turn = {"role": "user", "content": record["question"]}
    return {"prompt": [turn], "chosen": best["text"], "rejected": worst["text"]}

def single(record):
    return {"prompt": record["question"], "response": record["answers"][0]["text"]}

def labelled(record):
    return {"prompt": record["question"], "completion": record["answers"][0]["text"], "label": True}

def nothing(record):
    return None

def keyed_by_numbers(record):
    return {"prompt": [{"role": "user", "content": "q", "meta": {(1, 2): 3}}], "chosen": "a", "rejected": "b"}

def circular(record):
    turn = {"role": "user", "content": "q"}
    return {"prompt": [turn | {"before": turn}], "chosen": "a", "rejected": record.setdefault("self", record)}

def pair_for_labels(record):
    return {"prompt": "q?", "chosen": "yes", "rejected": "no"}

def incomplete(record):
    return {"prompt": record["question"], "chosen": "a"}

def two_arguments(record, settings):
    return record

leaves = int
"""
ROW = {"question": "q?", "answers": [{"votes": 1, "text": "no"}, {"votes": 5, "text": "yes"}]}
PROMPT = [{"role": "user", "content": "q?"}]


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``my_formats`` in the current folder, imported afresh."""
    (tmp_path / "my_formats.py").write_text(MODULE)
    (tmp_path / "broken_formats.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "script_formats.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    forget()
    yield
    forget()


def forget() -> None:
    sys.modules.pop("my_formats", None)


def load(name: str, rows: list[Any], kind: Kind = "pair", **options: Any) -> RecordSet:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records([Source("rows.jsonl")], kind, format=f"my_formats.{name}", **options)


def test_a_pair() -> None:
    found = load("debate", [ROW])
    (record,) = found.records
    assert (record.prompt, record.responses, record.source) == (PROMPT, ("yes", "no"), "rows.jsonl:1")
    assert record.id == record_id(PROMPT, ("yes", "no"))
    assert (found.format, found.unread) == ("my_formats.debate", {})


def test_single_responses_labelled_completions_and_the_preferred_of_pairs() -> None:
    assert load("single", [ROW], "response").records[0].responses == ("no",)
    assert load("debate", [ROW], "response").records[0].responses == ("yes",)
    labelled = load("labelled", [ROW], "unpaired").records[0]
    assert (labelled.responses, labelled.label) == (("no",), True)
    both = load("pair_for_labels", [ROW], "unpaired").records
    assert [(each.responses, each.label) for each in both] == [(("yes",), True), (("no",), False)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "no_such_module.f",
            r"no_such_module \(ModuleNotFoundError: .*looked up in",
        ),
        ("broken_formats.f", "cannot import the module broken_formats .*nothing_of_this_name"),
        ("script_formats.f", r"cannot import the module script_formats \(SystemExit: 3\)"),
        ("my_formats.f", "my_formats has no f; it has debate, single"),
        ("my_formats.NUMBER", "must be a class or a function, but is int 3"),
        (
            "my_formats.two_arguments",
            r"must be called as \(record\), but its signature is \(record, settings\)",
        ),
    ],
)
def test_what_cannot_be_used_is_told(path: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^data.format: {path}: .*{message}|^data.format: {path} {message}"):
        named_format(path, "pair")


@pytest.mark.parametrize(
    ("name", "row", "reason", "detail"),
    [
        ("debate", {"question": "q?"}, "format failed", "my_formats.debate raises KeyError: 'answers'"),
        (
            "nothing",
            ROW,
            "format failed",
            "my_formats.nothing must return a mapping with prompt, chosen, rejected, but returned NoneType",
        ),
        (
            "keyed_by_numbers",
            ROW,
            "format failed",
            "must return what JSON can hold, but TypeError: keys must",
        ),
        ("circular", dict(ROW), "format failed", "must return what JSON can hold, but ValueError: Circular"),
        (
            "incomplete",
            ROW,
            "missing key",
            "no `rejected`; .* prompt, chosen, as my_formats.incomplete returns",
        ),
    ],
)
def test_what_it_does_wrong_is_a_bad_record(name: str, row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(BadRecord, match=detail) as caught:
        named_format(f"my_formats.{name}", "pair").convert(row)
    assert caught.value.reason == reason


def test_a_bad_record_has_its_place_and_may_be_dropped() -> None:
    rows = [ROW, {"question": "none"}]
    with pytest.raises(
        DataError, match=r"1 bad of 2 records\n  format failed: 1\n    rows.jsonl:2: my_formats"
    ):
        load("debate", rows)
    assert len(load("debate", rows, on_bad_record="drop").records) == 1


def test_a_changed_function_meets_no_old_tokens(tmp_path: Path) -> None:
    """The token cache's name holds the records' contents, and no name of a function has to be in it."""
    tokenization = Tokenization(make_tokenizer(), Truncation(1000, 500))

    def lengths() -> list[int]:
        records = load("plain", [ROW]).records
        return [
            int(n) for n in tokenize_records(records, tokenization, tmp_path / "tokens").response_lengths[0]
        ]

    def write(chosen: str) -> None:
        text = f"def plain(record):\n    return dict(prompt='What', chosen={chosen!r}, rejected=' two')\n"
        Path("my_formats.py").write_text(text)
        forget()

    write(" two two")
    first = lengths()
    write(" two two two")
    second = lengths()
    assert second[0] > first[0] and second[1] == first[1]
    assert len(list((tmp_path / "tokens").glob("tokens-*.npz"))) == 2
    write(" two two")
    assert lengths() == first
    assert len(list((tmp_path / "tokens").glob("tokens-*.npz"))) == 2


def test_columns_do_not_go_with_it_and_the_configuration_imports_nothing() -> None:
    config = load_config("tiny_llama_DPO_config", ["data.format=my_formats.debate"])
    assert list(own_parts(config)) == []
    config = load_config(
        "tiny_llama_DPO_config", ["data.format=my_formats.debate", "data.columns={prompt: question}"]
    )
    (fault,) = own_parts(config)
    assert "data.columns: must be null, since data.format is a function" in str(fault)
    assert "my_formats" not in sys.modules
