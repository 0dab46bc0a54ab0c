"""Records as a whole: detection, the report of bad ones, column maps, limits, mixtures, real data."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nxdt_align.data.formats import Kind
from nxdt_align.data.reading import RecordSet, Source, load_records
from nxdt_align.data.records import DataError, Record, as_answer, as_messages, record_id
from nxdt_align.errors import UserError


def row(i: int, **other: Any) -> dict[str, Any]:
    return {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} | other


def write(path: Path, rows: list[Any]) -> Source:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Source(str(path))


def load(*sources: Source, **options: Any) -> RecordSet:
    return load_records(sources, "pair", **options)


def test_a_pair(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [row(1), row(2)])
    result = load(source)
    assert result.records[1] == Record("p2", ("good 2", "bad 2"), source=f"{source.path}:2")
    assert result.records[1].id == record_id("p2", ("good 2", "bad 2"))
    assert (result.format, result.report.total, result.report.read) == ("pairs", 0, 2)


def test_the_id_is_the_content(tmp_path: Path) -> None:
    """Other keys, place, file and format do not count; each of the three contents does."""
    first = load(write(tmp_path / "a.jsonl", [row(1), row(1, id=7)])).records
    fairseq2 = {"src": "p1", "tgt_chosen": "good 1", "tgt_rejected": "bad 1"}
    second = load(write(tmp_path / "b.jsonl", [fairseq2])).records
    assert len({r.id for r in [*first, *second]}) == 1
    assert len(first[0].id) == 32 and int(first[0].id, 16) >= 0
    chat = [{"role": "user", "content": "p"}]
    variants = [
        record_id("p", ("a", "b")),
        record_id("q", ("a", "b")),
        record_id("p", ("b", "a")),
        record_id("p", ("a",)),
        record_id(chat, ("a", "b")),
    ]
    assert len(set(variants)) == 5


BAD = [
    row(0),
    {"prompt": "p", "chosen": "a"},
    row(2, chosen=" "),
    row(3, rejected="good 3"),
    row(4, prompt=""),
    [1, 2],
    row(6),
    *[row(i, rejected="") for i in range(7, 12)],
]


def test_bad_records_stop_with_the_whole_report(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", BAD)
    with pytest.raises(DataError, match=r"leave them out$"):
        load(source)
    with pytest.raises(DataError) as caught:
        load(source, on_bad_record="error")
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "10 bad of 12 records" in message
    assert "empty response: 6" in message and "and 3 more" in message
    assert f"{source.path}:2: no `rejected`" in message
    assert f"{source.path}:3: the chosen response to 'p2' is ' '" in message
    assert f"{source.path}:4: 'good 3'" in message
    assert f"{source.path}:6: a record must be an object" in message
    assert "data.on_bad_record=drop" in message


def test_drop_goes_on_and_reports(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", BAD)
    result = load(source, on_bad_record="drop")
    assert [r.prompt for r in result.records] == ["p0", "p6"]
    assert result.report.counts == {
        "empty response": 6,
        "missing key": 1,
        "chosen equal to rejected": 1,
        "empty prompt": 1,
        "wrong type": 1,
    }
    assert len(result.report.examples["empty response"]) == 3
    assert result.report.summary().startswith("10 bad of 12 records\n  empty response: 6\n")


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(row(1)).encode()
    path.write_bytes(b"\n".join([b"{", good, b'{"prompt": "\xff"}', good]))
    result = load(Source(str(path)), on_bad_record="drop")
    assert len(result.records) == 2
    assert result.report.counts == {"bad JSON": 1, "not UTF-8": 1}


def test_a_lone_surrogate_in_a_key_is_a_bad_record(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [row(1), row(2) | {"sys\ud800tem": "s"}])
    result = load(source, on_bad_record="drop")
    assert (len(result.records), result.report.counts, result.unread) == (1, {"not UTF-8": 1}, {})
    assert r"a.jsonl:2: a key is 'sys\ud800tem'" in result.report.summary()


def test_odd_columns_are_told_on_one_line(tmp_path: Path) -> None:
    odd = {"a\x00b": 1, "k" * 5000: 2} | {f"c{i}": i for i in range(30)}
    with pytest.raises(
        DataError, match=r"'a\\x00b', 'kkk.*\.\.\., c0, .* and 12 more\) fit no known"
    ) as caught:
        load(write(tmp_path / "a.jsonl", [odd]))
    assert "nearest" not in str(caught.value) and "\n" not in str(caught.value)


def test_not_utf8_inside_an_array(tmp_path: Path) -> None:
    """Other than a syntax error, it costs its own record only."""
    path = tmp_path / "a.json"
    text = json.dumps([row(1), row(2), row(3)], indent=0)
    path.write_bytes(text.encode().replace(b"good 2", b"caf\xe9"))
    result = load(Source(str(path)), on_bad_record="drop")
    assert [r.prompt for r in result.records] == ["p1", "p3"]
    assert result.report.counts == {"not UTF-8": 1}
    assert result.report.examples["not UTF-8"][0].startswith(f"{path}:7: ")


@pytest.mark.parametrize("rows", [[row(1, chosen="")], ["text", 2]])
def test_all_bad_is_an_error_even_when_dropping(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match=r"1 bad of 1|2 bad of 2"):
        load(write(tmp_path / "a.jsonl", rows), on_bad_record="drop")


@pytest.mark.parametrize("content", ["\n\n", "[]"])
def test_no_records(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match="holds no records"):
        load(Source(str(tmp_path / "a.json")))


def test_unknown_keys_name_the_nearest_format(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "refused": "b"}])
    with pytest.raises(
        DataError, match=r"a.jsonl:1: .*prompt, chosen, refused.*nearest is pairs, which needs rejected"
    ):
        load(source)


def test_chosen_and_rejected_alone_name_the_prompt(tmp_path: Path) -> None:
    """The message names what is missing, and the format to set where nothing is."""
    rows = [{"chosen": f"Q: {i}? A: yes", "rejected": f"Q: {i}? A: yes no"} for i in range(3)]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"a.jsonl:1: .* nearest is pairs, which needs prompt too. .*=common_beginning"
    ):
        load(source)
    records = load(source, format="common_beginning").records
    assert records[2].id == record_id("Q: 2? A:", (" yes", " yes no"))


def test_a_bad_first_record_does_not_hide_the_format(tmp_path: Path) -> None:
    result = load(write(tmp_path / "a.jsonl", [{"prompt": "p"}, row(1)]), on_bad_record="drop")
    assert (len(result.records), result.format, dict(result.report.counts)) == (
        1,
        "pairs",
        {"missing key": 1},
    )


def test_a_named_format_is_taken(tmp_path: Path) -> None:
    """The same keys mean the tutorial's recipe or plain text; the name decides."""
    source = write(tmp_path / "a.jsonl", [row(1, system="s", question="q")])
    assert load(source).records[0].prompt == "p1"
    assert load(source, format="orca").records[0].prompt.startswith("<|im_start|>\ns<|im_end|>")  # type: ignore[union-attr]


def test_columns(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", [{"instr": "p", "better": "a", "worse": "b"}, {"instr": "q", "better": "c"}]
    )
    columns = {"prompt": "instr", "chosen": "better", "rejected": "worse"}
    with pytest.raises(DataError, match=r"a.jsonl:2: no `rejected` \(column `worse`\)"):
        load(source, columns=columns)
    result = load(source, columns=columns, on_bad_record="drop")
    assert result.records[0].id == record_id("p", ("a", "b"))


def test_columns_may_swap(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [row(1)])
    result = load(source, columns={"chosen": "rejected", "rejected": "chosen"})
    assert result.records[0].responses == ("bad 1", "good 1")


def test_columns_of_no_format(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data.columns: 'promt' is not a key of any format; known are prompt, chosen"
    ):
        load(write(tmp_path / "a.jsonl", [row(1)]), columns={"promt": "instr"})


def test_columns_that_nothing_reads_are_told(tmp_path: Path) -> None:
    """By any record, with the number of them; a null or an empty value counts as missing, and a mapped column
    is read."""
    rows = [
        row(1, score=0.5, other=None, system=""),
        row(2, later=0, system="s"),
        row(3, system="t", history=[], tools={}),
    ]
    told = write(tmp_path / "a.jsonl", rows)
    plain = write(tmp_path / "b.jsonl", [{"prompt": "p", "better": "a", "rejected": "b"}])
    assert load(told).unread == {told.path: {"score": 1, "later": 1, "system": 2}}
    assert load(plain, columns={"chosen": "better"}).unread == {}
    turns = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]}
    chat = write(tmp_path / "c.jsonl", [turns])
    assert load_records([chat], "response", format="messages").unread == {}


@pytest.mark.parametrize("first", [{}, {"system": None}, {"system": ""}])
def test_a_part_of_the_prompt_in_a_later_record_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: dict[str, Any]
) -> None:
    rows = [row(0, **first), row(1, System="s", score=1), row(2, System="t")]
    source = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO):
        load(source)
    told = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in told] == ["NOTICE", "WARNING"]
    assert told[0][1].endswith("have them: System (2), score (1)")
    assert told[1][1].startswith(f"{source.path}: `System`, which 2 records have, is not read")
    caplog.clear()
    load(source, limit=1)
    assert not caplog.records


def test_an_empty_response_is_named(tmp_path: Path) -> None:
    single = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": " ", "label": True}])
    with pytest.raises(DataError, match="1: the response to 'p' is ' '"):
        load_records([single], "unpaired")
    with pytest.raises(DataError, match="1: the rejected response to 'p1' is ''"):
        load(write(tmp_path / "b.jsonl", [row(1, rejected="")]))


def test_an_instruction_is_not_lost(tmp_path: Path) -> None:
    """Alpaca's records have the task in ``instruction`` and its material, often empty, in ``input``."""
    pair = {"instruction": "Translate.", "input": "house", "chosen": "casa", "rejected": "perro"}
    both = load(
        write(tmp_path / "c.jsonl", [{"t": pair.pop("instruction"), **pair}]), columns={"instruction": "t"}
    )
    assert both.records[0].prompt == "Translate.\nhouse" and both.unread == {}
    alpaca = {"instruction": "Translate.", "input": "house", "output": "casa"}
    source = write(tmp_path / "a.jsonl", [alpaca])
    assert load_records([source], "response").records[0].prompt == "Translate.\nhouse"
    with pytest.raises(
        DataError, match=r"`instruction` is 'Translate\.' beside `input` .*; set data.format=alp"
    ):
        load_records([source], "response", format="input_output")
    no_input = write(tmp_path / "b.jsonl", [{**alpaca, "input": ""}])
    mapped = load_records([no_input], "response", columns={"input": "instruction"})
    assert mapped.records[0].prompt == "Translate."


ALPACA = {"instruction": "Translate.", "input": "house"}


@pytest.mark.parametrize("column", ["instruction", "input"])
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("pair", {"chosen": "casa", "rejected": "perro"}),
        ("response", {"chosen": "casa", "rejected": "perro"}),
        ("response", {"output": "casa"}),
        ("unpaired", {"completion": "casa", "label": True}),
    ],
)
def test_half_of_an_alpaca_prompt_is_refused(
    tmp_path: Path, column: str, kind: Kind, row: dict[str, Any]
) -> None:
    """However data.columns names it; where the other half is empty, it is the whole prompt."""
    other = "input" if column == "instruction" else "instruction"
    columns = {"prompt": column} | ({"response": "output"} if "output" in row else {})
    both = write(tmp_path / "a.jsonl", [ALPACA | row])
    with pytest.raises(
        DataError, match=f"`{other}` is '.*' beside `{column}` and would not be read; set data"
    ):
        load_records([both], kind, columns=columns)
    alone = write(tmp_path / "b.jsonl", [{**ALPACA, other: ""} | row])
    assert load_records([alone], kind, columns=columns).records[0].prompt == ALPACA[column]


def test_records_that_say_nothing_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Comments whose scores are close and answers of one score: told, and no bad records."""
    shp = {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    rows = [{**shp, "score_A": 39, "score_B": 20}, {**shp, "score_A": 40, "score_B": 20}]
    ratio = [{**shp, "score_ratio": 1.9}]
    source = write(tmp_path / "a.jsonl", rows + ratio)
    with caplog.at_level(logging.INFO):
        found = load(source)
    assert (len(found.records), found.report.total, found.unread) == (1, 0, {})
    assert f"{source.path}: 2 of 3 records are left out: the better score is below 2 times" in caplog.text
    answers = [{"text": "a", "score": 1}, {"text": "b", "score": 1}]
    with pytest.raises(
        DataError, match=r"b.jsonl: 1 of 1 records are left out: all their answers have the s"
    ):
        load(write(tmp_path / "b.jsonl", [{"question": "why?", "answers": answers}]))
    contrary = {"prompt": "p", "responses": ["a", "b"], "pairs": [[0, 1], [1, 0]]}
    with pytest.raises(DataError, match="is chosen in one pair and rejected in another; name a function"):
        load_records([write(tmp_path / "c.jsonl", [contrary])], "unpaired")


def test_text_beside_chat_messages_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat = [{"role": "user", "content": "q"}]
    load(write(tmp_path / "a.jsonl", [row(0), row(1, prompt=chat), row(2)]))
    assert "the prompts of 2 records are text, those of 1 are chat messages" in caplog.text


def test_limit_takes_the_head(tmp_path: Path) -> None:
    """What comes behind it is not even looked at; several pairs of one record count each."""
    source = write(tmp_path / "a.jsonl", [row(0), row(1), {"broken": 1}])
    assert [r.prompt for r in load(source, limit=2).records] == ["p0", "p1"]
    many = {"prompt": "p", "responses": ["a", "b", "c"], "pairs": [[0, 1], [1, 2], [0, 2]]}
    assert len(load(write(tmp_path / "b.jsonl", [many]), limit=2).records) == 2
    with pytest.raises(DataError, match="dev_choose_samples must be at least 1, but is 0"):
        load(source, limit=0)


def test_responses(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [row(1)])
    record = load_records([source], "response").records[0]
    assert record.responses == ("good 1",) and record.id == record_id("p1", ("good 1",))


def test_mixture(tmp_path: Path) -> None:
    """10 records at weight 2.5 and 4 at 0.5: each of the 10 twice, 5 of them thrice, and 2 of the 4."""
    first = write(tmp_path / "a.jsonl", [row(i) for i in range(10)])
    fairseq2 = [{"src": f"q{i}", "tgt_chosen": "a", "tgt_rejected": "b"} for i in range(4)]
    second = write(tmp_path / "b.jsonl", fairseq2)
    sources = [Source(first.path, 2.5), Source(second.path, 0.5)]
    result = load(*sources, seed=3)
    counts = Counter(str(r.prompt) for r in result.records)
    assert sorted(n for p, n in counts.items() if p.startswith("p")) == [2] * 5 + [3] * 5
    assert sorted(n for p, n in counts.items() if p.startswith("q")) == [1] * 2
    assert result.format == "pairs, fairseq2"
    assert load(*sources, seed=3) == result
    assert any(load(*sources, seed=seed).records != result.records for seed in range(4, 8))


def test_sources_without_weights_are_joined(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", [row(1)]), write(tmp_path / "b.jsonl", [row(2)])
    assert [r.prompt for r in load(one, two).records] == ["p1", "p2"]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 0.1])
def test_bad_weights(tmp_path: Path, weight: float) -> None:
    source = write(tmp_path / "a.jsonl", [row(1)])
    with pytest.raises(DataError, match=r"weight of a source must be above 0|leaves none"):
        load(Source(source.path, weight))


def test_a_source_without_a_usable_record_stops(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.jsonl", [row(1)]), write(tmp_path / "b.jsonl", [row(2, chosen="")])
    with pytest.raises(DataError, match="a source has no usable record"):
        load(good, bad, on_bad_record="drop")


def test_hh_records(shared_data: Path) -> None:
    """Every record loads or is reported: two have an empty answer, two differ before the last turn."""
    source = Source(str(shared_data / "hh_harmless_base.jsonl.gz"))
    result = load(source, on_bad_record="drop")
    assert result.format == "hh" and result.report.read == 1800
    assert result.report.counts == {"empty response": 2, "no common prompt": 2}
    assert len(result.records) == 1796
    for record in result.records:
        assert isinstance(record.prompt, str) and record.prompt.endswith("\n\nAssistant:")
        assert not any("\n\nHuman:" in text for text in record.responses)


def test_sharegpt_records(shared_data: Path) -> None:
    result = load(Source(str(shared_data / "dpo_mix_en_sharegpt.json.gz")))
    assert result.format == "sharegpt" and len(result.records) == 240
    assert all(r.prompt[-1]["role"] == "user" for r in result.records)  # type: ignore[index]


# Roles, parts and tools


def chat_row(prompt: Any, chosen: Any, **columns: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": chosen}]
    return {"prompt": turns[0], "chosen": turns[1], "rejected": "no", **columns}


def read_rows(folder: Path, *rows: dict[str, Any], **options: Any) -> RecordSet:
    return load(write(folder / "rows.jsonl", list(rows)), **options)


def test_sharegpt_names_as_role() -> None:
    turns = [{"role": role, "content": "so"} for role in ("human", "gpt", "tool")]
    assert [turn["role"] for turn in as_messages(turns, "prompt")] == ["user", "assistant", "tool"]
    assert as_answer({"role": "gpt", "content": "so"}, "chosen") == "so"


def test_parts_of_type_text_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "why", "image": None}, {"type": "text", "text": " so?"}]
    rows = chat_row("why so?", "a"), chat_row(parts, [{"type": "text", "text": "a"}])
    plain, of_parts = read_rows(tmp_path, *rows).records
    assert of_parts == replace(plain, source=of_parts.source) and of_parts.id == plain.id
    for other, told in (
        (
            {"type": "image", "image": "x"},
            "is a part of type 'image'; only parts of type text can be trained",
        ),
        ({"text": "why"}, "is a part of type None"),
        (5, "must be text, but is int"),
        ({"type": "text"}, "no `text`"),
    ):
        found = read_rows(tmp_path, chat_row("a", "b"), chat_row([*parts, other], "b"), on_bad_record="drop")
        assert found.report.counts.total() == 1 and told in found.report.summary()


def test_tools_go_with_chat_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a list or as JSON text; a record without any keeps its id, and text has no use for them."""
    tools = [{"type": "function", "function": {"name": "red"}}]
    rows = [chat_row("a", "b"), chat_row("a", "b", tools=tools), chat_row("a", "b", tools=json.dumps(tools))]
    rows += [chat_row("a", "b", tools=[]), chat_row("a", "b", tools=None)]
    records = read_rows(tmp_path, *rows).records
    assert [record.tools for record in records] == [None, tools, tools, None, None]
    assert records[0].id == records[3].id == records[4].id == record_id(records[0].prompt, ("b", "no"))
    assert records[1].id == records[2].id != records[0].id
    assert records[1].further_keys == ["tools"] and not caplog.records
    text = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": tools}
    assert read_rows(tmp_path, text).records[0].tools is None
    assert "`tools`, which 1 records have, is not read" in caplog.text
    kinds: tuple[tuple[Any, str], ...] = (
        ("[{", "`tools` is no JSON"),
        ({"a": 1}, "must be a list of JSON schemas"),
        (["a"], "must be a list of JSON schemas"),
    )
    for bad, told in kinds:
        with pytest.raises(DataError, match=rf"wrong type: 1[^§]*{told}"):
            read_rows(tmp_path, chat_row("a", "b", tools=bad))


@pytest.mark.parametrize(
    ("format", "row", "kind", "words"),
    [
        (
            "input_output",
            {"instruction": "i", "input": "j", "output": "o"},
            "prompt",
            "set --format alpaca to join them",
        ),
        ("prompt", {"prompt": 3}, "prompt", "no usable record; check --format"),
        (None, {"a": 1}, "prompt", "or name the format in --format."),
    ],
)
def test_a_verb_with_an_option_names_the_option(
    tmp_path: Path, format: str | None, row: dict[str, Any], kind: Kind, words: str
) -> None:
    """And no key of a YAML, which it does not have."""
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        load_records([Source(str(tmp_path / "data.jsonl"))], kind, format=format, format_key="--format")
    assert words in str(error.value) and "data." not in str(error.value).replace("data.jsonl", "")
