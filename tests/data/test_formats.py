"""Each format, as its publishers write it, gives the prompt and the responses that it means."""

from __future__ import annotations

from typing import Any

import pytest

from nxdt_align.data.formats import FORMATS, Kind, detect_format, named_format
from nxdt_align.data.records import BadRecord, DataError, Record

USER, ASK = {"role": "user", "content": "hi"}, {"role": "user", "content": "why?"}
SYSTEM = {"role": "system", "content": "be brief"}


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
}


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why?\n\nAssistant:"
CASES: list[tuple[str, dict[str, Any], list[Record]]] = [
    ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b"}, [Record("p", ("a", "b"))]),
    (
        "pairs",
        {"prompt": [SYSTEM, USER], "chosen": [say("a")], "rejected": [say("b")]},
        [Record([SYSTEM, USER], ("a", "b"))],
    ),
    ("pairs", {"prompt": [USER], "chosen": say("a"), "rejected": "b"}, [Record([USER], ("a", "b"))]),
    (
        "pairs",
        {"prompt": [USER], "chosen": [USER, say("a")], "rejected": [USER, say("b")]},
        [Record([USER], ("a", "b"))],
    ),
    (
        "pairs",
        {"chosen": [USER, say("x"), ASK, say("a")], "rejected": [USER, say("x"), ASK, say("b")]},
        [Record([USER, say("x"), ASK], ("a", "b"))],
    ),
    # UltraFeedback: prompt repeats the first user turn as text.
    (
        "pairs",
        {"prompt": "hi", "chosen": [USER, say("a")], "rejected": [USER, say("b")], "score_chosen": 8.0},
        [Record([USER], ("a", "b"))],
    ),
    ("pairs", {"prompt": "hi", "chosen": [say("a")], "rejected": [say("b")]}, [Record([USER], ("a", "b"))]),
    # Further keys of messages are the chat template's to read; nulls and empty values say nothing.
    (
        "pairs",
        {
            "prompt": [USER, {**CALL, "content": None, "name": None}, {**USER, "tool_calls": [], "name": ""}],
            "chosen": [{**say("a"), "weight": 0}],
            "rejected": [{**say("b"), "weight": None}],
        },
        [Record([USER, CALL, USER], ({**say("a"), "weight": 0}, "b"))],
    ),
    (
        "pairs",
        {"chosen": [USER, CALL, say("a")], "rejected": [USER, CALL, CALL]},
        [Record([USER, CALL], ("a", CALL))],
    ),
    # The system turn stands in the prompt alone.
    (
        "pairs",
        {"prompt": [SYSTEM, USER], "chosen": [USER, say("a")], "rejected": [USER, say("b")]},
        [Record([SYSTEM, USER], ("a", "b"))],
    ),
    ("pairs", {"chosen": [USER, say("a")], "rejected": [USER, say("a")]}, [Record([USER], ("a", "a"))]),
    ("fairseq2", {"id": 3, "src": "p", "tgt_chosen": "a", "tgt_rejected": "b"}, [Record("p", ("a", "b"))]),
    (
        "orca",
        {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
        [
            Record(
                "<|im_start|>\nS<|im_end|>\n<|im_start|> Q<|im_end|>\n<|im_start|>assistant\n",
                ("A<|im_end|>\n", "B<|im_end|>\n"),
            )
        ],
    ),
    ("hh", {"chosen": HH + " a", "rejected": HH + " b"}, [Record(HH, (" a", " b"))]),
    (
        "alpaca",
        {"instruction": "Give the tide.", "input": "Port Ulm", "chosen": "2.1 m", "rejected": "no"},
        [Record("Give the tide.\nPort Ulm", ("2.1 m", "no"))],
    ),
    (
        "alpaca",
        {"instruction": "Hi", "input": "", "chosen": say("a"), "rejected": "b"},
        [Record("Hi", ("a", "b"))],
    ),
    ("alpaca", {"instruction": "Hi", "chosen": "a", "rejected": "b"}, [Record("Hi", ("a", "b"))]),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "yes?"},
                {"from": "human", "value": "why?"},
            ],
            "chosen": {"from": "gpt", "value": "a", "weight": 1},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [Record([SYSTEM, USER, say("yes?"), ASK], ({**say("a"), "weight": 1}, "b"))],
    ),
    # LLaMA-Factory's system and history.
    (
        "alpaca",
        {
            "instruction": "why?",
            "input": None,
            "system": "be brief",
            "history": [["hi", "yes?"]],
            "chosen": "a",
            "rejected": "b",
        },
        [Record([SYSTEM, USER, say("yes?"), ASK], ("a", "b"))],
    ),
    (
        "alpaca",
        {"instruction": "why?", "system": " ", "history": [], "chosen": "a", "rejected": "b"},
        [Record("why?", ("a", "b"))],
    ),
    (
        "sharegpt",
        {"system": "be brief", "conversations": [USER], "chosen": say("a"), "rejected": say("b")},
        [Record([SYSTEM, USER], ("a", "b"))],
    ),
    (
        "sharegpt",
        {
            "system": "be brief",
            "conversations": [SYSTEM, USER],
            "chosen": [SYSTEM, USER, say("a")],
            "rejected": [SYSTEM, USER, say("b")],
        },
        [Record([SYSTEM, USER], ("a", "b"))],
    ),
    (
        "openai",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [say("a")],
            "non_preferred_output": [say("b")],
        },
        [Record([USER], ("a", "b"))],
    ),
    (
        "openai",
        {
            "input": {"messages": [USER], "tools": [{"type": "function", "function": {"name": "look"}}]},
            "preferred_output": [say("a")],
            "non_preferred_output": [say("b")],
        },
        [Record([USER], ("a", "b"), tools=[{"type": "function", "function": {"name": "look"}}])],
    ),
    (
        "torchtune",
        {"chosen_conversations": [USER, say("a")], "rejected_conversations": [USER, say("b")]},
        [Record([USER], ("a", "b"))],
    ),
    (
        "shp",
        {
            "history": "why?",
            "human_ref_A": "a",
            "human_ref_B": "b",
            "labels": 0,
            "score_A": 2,
            "score_B": 4,
            "score_ratio": 2.0,
            "seconds_difference": 3.0,
        },
        [Record("\n\nHuman: why?\n\nAssistant:", (" b", " a"))],
    ),
    (
        "shp",
        {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        [Record("\n\nHuman: why?\n\nAssistant:", (" a", " b"))],
    ),
    (
        "stack_exchange",
        {"qid": 7, "question": "why?", "response_j": "a", "response_k": "b"},
        [Record("Question: why?\n\nAnswer: ", ("a", "b"))],
    ),
    (
        "responses",
        {"prompt": "p", "responses": ["a", "b", "c"], "pairs": [[0, 1], [2, 1]], "sft_target": "c"},
        [Record("p", ("a", "b")), Record("p", ("c", "b"))],
    ),
]


@pytest.mark.parametrize(("name", "row", "records"), CASES)
def test_pairs(name: str, row: dict[str, Any], records: list[Record]) -> None:
    found = detect_format(row, "pair")
    assert found is not None and found.name == name
    assert list(found.convert(row)) == records
    assert list(found.convert({**row, "unused": None})) == records


@pytest.mark.parametrize(("name", "row", "records"), CASES)
def test_the_preferred_response_of_pairs(name: str, row: dict[str, Any], records: list[Record]) -> None:
    """For single responses, chosen is taken; of the reference implementation's form, sft_target."""
    found = detect_format(row, "response")
    assert found is not None and found.name == name
    wanted = ["c"] if name == "responses" else [record.responses[0] for record in records]
    assert list(found.convert(row)) == [
        Record(records[0].prompt, (text,), tools=records[0].tools) for text in wanted
    ]


@pytest.mark.parametrize(("name", "row", "records"), CASES)
def test_pairs_as_labelled_responses(name: str, row: dict[str, Any], records: list[Record]) -> None:
    """KTO from pairs, as TRL's unpair_preference_dataset: chosen is desirable, rejected is not; each once."""
    found = detect_format(row, "unpaired")
    assert found is not None and found.name == name
    made = list(found.convert(row))
    if records[0].responses[0] == records[0].responses[1]:
        assert [str(fault) for fault in made] == ["chosen equal to rejected: 'a'"]
        return
    both = {(repr(r), label) for record in records for r, label in zip(record.responses, "+-", strict=True)}
    assert len(made) == len(both)
    assert {(repr(r.responses[0]), "-+"[bool(r.label)]) for r in made if isinstance(r, Record)} == both


RANKINGS = [
    (
        "stack_exchange",
        {
            "question": "why?",
            "answers": [
                {"answer_id": 1, "text": "a", "pm_score": 1, "selected": False},
                {"answer_id": 2, "text": "b", "pm_score": 4, "selected": True},
                {"answer_id": 3, "text": "c", "pm_score": 1, "selected": False},
            ],
        },
        "\n\nHuman: why?\n\nAssistant:",
        [(" b", " a"), (" b", " c")],
        [(" b", True), (" a", False), (" c", False)],
    ),
    (
        "nectar",
        {
            "prompt": HH,
            "answers": [
                {"answer": "a", "rank": 2.0, "model": "m"},
                {"answer": "b", "rank": 1.0, "model": "n"},
                {"answer": "c", "rank": 3.0, "model": "o"},
            ],
            "turns": 1,
        },
        HH,
        [("b", "a"), ("a", "c"), ("b", "c")],
        [("b", True), ("c", False)],
    ),
    (
        "ultrafeedback",
        {
            "instruction": "why?",
            "completions": [
                {"response": "a", "overall_score": 5.5},
                {"response": "b", "overall_score": 8, "model": "m"},
            ],
        },
        "why?",
        [("b", "a")],
        [("b", True), ("a", False)],
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "pairs", "labelled"), RANKINGS)
def test_ranked_answers(
    name: str, row: dict[str, Any], prompt: str, pairs: list[Any], labelled: list[Any]
) -> None:
    """Any two of different scores are a pair, the best is the single response; labels as pairs have them,
    but for the answers that are better than one and worse than another."""
    found = {kind: named_format(name, kind).convert(row) for kind in FORMATS}
    assert found["pair"] == [Record(prompt, pair) for pair in pairs]
    assert found["response"] == [Record(prompt, (pairs[0][0],))]
    assert found["unpaired"] == [Record(prompt, (text,), label) for text, label in labelled]
    assert all(detect_format(row, kind).name == name for kind in FORMATS)  # type: ignore[union-attr]


def test_a_pair_of_messages_and_a_rejected_response() -> None:
    """ms-swift's form; a single response is the last message of it."""
    row = {"messages": [USER, say("a")], "rejected_response": "b", "system": "be brief"}
    assert named_format("swift", "pair").convert(row) == [Record([SYSTEM, USER], ("a", "b"))]
    names = {kind: f.name for kind in FORMATS if (f := detect_format(row, kind))}
    assert names == {"pair": "swift", "response": "messages", "unpaired": "swift", "prompt": "messages"}


def prompt_of(row: dict[str, Any]) -> Any:
    format = detect_format(row, "prompt")
    assert format is not None
    (record,) = format.convert(row)
    assert isinstance(record, Record) and record.responses == ()
    return record.prompt


@pytest.mark.parametrize(("name", "row", "records"), CASES)
def test_prompts_of_pairs_are_those_of_training(
    name: str, row: dict[str, Any], records: list[Record]
) -> None:
    if name != "responses" and (format := detect_format(row, "prompt")) and format.name == name:
        assert prompt_of(row) == records[0].prompt


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "why?"}, "why?"),
        ({"prompt": [USER], "answer": "42"}, [USER]),
        ({"prompt": "why?", "responses": ["a", "b"], "pairs": [[0, 1]]}, "why?"),
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER, say("a"), ASK, say("b")]}, [USER, say("a"), ASK]),
        ({"conversations": [{"from": "human", "value": "hi"}], "system": "be brief"}, [SYSTEM, USER]),
        ({"instruction": "Add.", "input": "2 3"}, "Add.\n2 3"),
        ({"instruction": "Add.", "input": "2 3", "output": None}, "Add.\n2 3"),
        ({"prompt": "p", "completion": "c", "label": True}, "p"),
        ({"src": "p"}, "p"),
    ],
)
def test_prompts_need_no_response(row: dict[str, Any], prompt: Any) -> None:
    assert prompt_of(row) == prompt


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completion": "a", "kto_tag": 1},
        {"prompt": "p", "response": "a", "label": True},
        {"instruction": "p", "input": "", "output": "a", "kto_tag": True},
        {"instruction": "p", "output": "a", "label": True},
        {"input": "p", "output": "a", "label": True},
    ],
)
def test_labels_of_text(row: dict[str, Any]) -> None:
    found = detect_format(row, "unpaired")
    assert found is not None and found.convert(row) == [Record("p", ("a",), True)]


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_labels_of_chat(name: str, label: str) -> None:
    """As LLaMA-Factory's KTO data."""
    row = {name: [USER, say("yes?"), ASK, say("a")], label: False}
    assert named_format("messages", "unpaired").convert(row) == [
        Record([USER, say("yes?"), ASK], ("a",), False)
    ]


@pytest.mark.parametrize(
    ("name", "row", "record"),
    [
        ("prompt_response", {"prompt": "p", "response": "a"}, Record("p", ("a",))),
        ("prompt_completion", {"prompt": [USER], "completion": [say("a")]}, Record([USER], ("a",))),
        ("input_output", {"input": "p", "output": "a"}, Record("p", ("a",))),
        ("alpaca", {"instruction": "t", "input": "p", "output": "a"}, Record("t\np", ("a",))),
        ("alpaca", {"instruction": "t", "input": "", "output": "a"}, Record("t", ("a",))),
        ("input_output", {"instruction": "", "input": "p", "output": "a"}, Record("p", ("a",))),
        (
            "messages",
            {"instruction": "t", "output": "b", "messages": [USER, say("a")]},
            Record([USER], ("a",)),
        ),
        ("alpaca", {"instruction": "t", "output": "a"}, Record("t", ("a",))),
        ("messages", {"messages": [USER, say("a")]}, Record([USER], ("a",))),
        (
            "messages",
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]},
            Record([USER], ("a",)),
        ),
    ],
)
def test_single_responses(name: str, row: dict[str, Any], record: Record) -> None:
    found = detect_format(row, "response")
    assert found is not None and found.name == name
    assert list(found.convert(row)) == [record]


def test_an_empty_instruction_of_alpaca() -> None:
    row = {"instruction": "", "input": "p", "output": "a"}
    assert named_format("alpaca", "response").convert(row) == [Record("p", ("a",))]


def gpt(text: str, role: str = "gpt") -> dict[str, str]:
    return {"from": role, "value": text}


@pytest.mark.parametrize(
    ("name", "row", "reason", "detail"),
    [
        (
            "pairs",
            {"prompt": "p", "chosen": "a"},
            "missing key",
            "no `rejected`; the record has prompt, chosen",
        ),
        ("pairs", {"prompt": None, "chosen": "a", "rejected": "b"}, "missing key", "no `prompt`"),
        ("pairs", {"prompt": "p", "chosen": 7, "rejected": "b"}, "wrong type", "`chosen` must be .* 7"),
        ("pairs", {"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "not UTF-8", "`chosen` holds"),
        (
            "pairs",
            {"chosen": [USER, say("x"), ASK, say("a")], "rejected": [USER, say("y"), ASK, say("b")]},
            "no common prompt",
            "`chosen` continues with 3 turns",
        ),
        ("pairs", {"chosen": [say("a")], "rejected": [say("b")]}, "no common prompt", "chosen begins"),
        (
            "pairs",
            {"prompt": "other", "chosen": [USER, say("a")], "rejected": [USER, say("b")]},
            "no common prompt",
            "`prompt` is 'other'",
        ),
        (
            "pairs",
            {"prompt": [USER], "chosen": [ASK, say("a")], "rejected": [ASK, say("b")]},
            "no common prompt",
            "but chosen begins",
        ),
        ("pairs", {"chosen": [USER, ASK], "rejected": [USER, say("b")]}, "no final assistant turn", "'user'"),
        ("pairs", {"prompt": [USER], "chosen": [], "rejected": []}, "no final assistant turn", "no turn"),
        (
            "pairs",
            {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"},
            "missing key",
            "no `content`",
        ),
        (
            "pairs",
            {"prompt": [USER], "chosen": [{**say("a"), "name": "\ud800"}], "rejected": [say("b")]},
            "not UTF-8",
            r"`chosen\[0\]` holds",
        ),
        (
            "hh",
            {"chosen": HH + " a", "rejected": HH.replace("why", "how") + " b"},
            "no common prompt",
            r"chosen has 'why.* rejected has 'how",
        ),
        (
            "hh",
            {"chosen": HH + " a", "rejected": "\n\nHuman: hi"},
            "no final assistant turn",
            "`rejected` ends",
        ),
        (
            "hh",
            {"chosen": HH + " a\n\nHuman: ok", "rejected": HH + " b"},
            "no final assistant turn",
            "`chosen` ends",
        ),
        (
            "sharegpt",
            {"conversations": [gpt("hi", "tool")], "chosen": gpt("a"), "rejected": gpt("b")},
            "unknown role",
            r"`conversations\[0\].from` is 'tool'",
        ),
        (
            "sharegpt",
            {"conversations": [gpt("hi", "human")], "chosen": gpt("a", "human"), "rejected": gpt("b")},
            "no final assistant turn",
            "`chosen` is a turn of 'user'",
        ),
        (
            "orca",
            {"system": "", "question": " ", "chosen": "a", "rejected": "b"},
            "empty prompt",
            "`question`",
        ),
        (
            "orca",
            {"system": "", "question": "q", "chosen": "", "rejected": "b"},
            "empty response",
            "`chosen`",
        ),
        (
            "alpaca",
            {"instruction": "p", "history": [["q"]], "chosen": "a", "rejected": "b"},
            "wrong type",
            "`history` must list",
        ),
        (
            "sharegpt",
            {"system": "be long", "conversations": [SYSTEM, USER], "chosen": say("a"), "rejected": say("b")},
            "two system prompts",
            "`system` is 'be long', the first turn 'be brief'",
        ),
        (
            "openai",
            {
                "input": {"messages": [USER], "tools": [1]},
                "preferred_output": "a",
                "non_preferred_output": "b",
            },
            "wrong type",
            "`input.tools` must be a list of JSON schemas",
        ),
        (
            "openai",
            {"input": [USER], "preferred_output": "a", "non_preferred_output": "b"},
            "wrong type",
            "`input` must be {messages}",
        ),
        (
            "shp",
            {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": "A"},
            "wrong type",
            "`labels` must be 1",
        ),
        ("stack_exchange", {"question": "p", "answers": ["a"]}, "wrong type", "{text, pm_score or score}"),
        (
            "nectar",
            {"prompt": "p", "answers": [{"answer": "a", "rank": float("nan")}]},
            "wrong type",
            r"`answers\[0\].rank` must be a number, but is nan",
        ),
        (
            "shp",
            {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 10**4000},
            "wrong type",
            r"`score_ratio` must be a number, but is 1000.*\.\.\.$",
        ),
        (
            "openai",
            {"input": {"\ud800": 1}, "preferred_output": "a", "non_preferred_output": "b"},
            "missing key",
            r"no `messages`; the record has '\\ud800'",
        ),
        (
            "nectar",
            {"prompt": "p", "answers": [{"answer": "a", "rank": 1}] * 201},
            "too many answers",
            "`answers` has 201, above 200",
        ),
        ("responses", {"prompt": "p", "responses": "a", "pairs": [[0, 1]]}, "wrong type", "list of texts"),
        ("responses", {"prompt": "p", "responses": ["a"], "pairs": []}, "wrong type", "`pairs`"),
    ],
)
def test_bad_records(name: str, row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(BadRecord, match=detail) as caught:
        named_format(name, "pair").convert(row)
    assert caught.value.reason == reason


def test_a_bad_pair_leaves_the_others() -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "pairs": [[0, 2], [1, 0], [-1, 0], [0], [True, 0]]}
    outcomes = named_format("responses", "pair").convert(row)
    reasons = [o.reason if isinstance(o, BadRecord) else o.responses for o in outcomes]
    out_of_range, wrong = "pair index out of range", "wrong type"
    assert reasons == [out_of_range, ("b", "a"), out_of_range, wrong, wrong]


@pytest.mark.parametrize("kind", ["pair", "response"])
def test_unknown_format(kind: Kind) -> None:
    with pytest.raises(DataError, match=r"data\.format: 'dolly' is no format .* known are .*hh"):
        named_format("dolly", kind)


def test_explicit_prompt_wins_over_other_keys() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "system": "s", "question": "q"}
    found = detect_format(row, "pair")
    assert found is not None and found.name == "pairs"


@pytest.mark.parametrize("kind", ["pair", "response"])
def test_plain_chosen_and_rejected_fit_nothing(kind: Kind) -> None:
    """Even where they begin alike: answers whose prompt is in a column of another name do, too."""
    assert detect_format({"chosen": "a", "rejected": "b"}, kind) is None
    assert detect_format({"chosen": "Q: why? A: a", "rejected": "Q: why? A: b"}, kind) is None


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Question: Tide in Ulm? Answer:", " 2.1 m", " 2.1 m or so"),
        ("Question: Tide? Answer:", " The tide is high.", " The tide is low."),
        ("### Input:\nwhy\n\n### Response:\n", "Because so.", "Because of it."),
        ("[INST] why [/INST]", "Because so.", "Because of it."),
        ("<|user|> why <|assistant|>", "yes", "yes no"),
        ("Say hi.", " Hello you", " Hello there"),
        ("Is it 10:30?", " It is", " It's"),
    ],
)
def test_a_common_beginning(prompt: str, chosen: str, rejected: str) -> None:
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    assert named_format("common_beginning", "pair").convert(row) == [Record(prompt, (chosen, rejected))]
    assert named_format("common_beginning", "response").convert(row) == [Record(prompt, (chosen,))]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("The tide", "The time"), ("Why? a", "How? b"), ("Why?", "Why? no"), ("", "a"), (" \n a", " \n b")],
)
def test_no_common_beginning(chosen: str, rejected: str) -> None:
    with pytest.raises(BadRecord, match="chosen begins") as caught:
        named_format("common_beginning", "pair").convert({"chosen": chosen, "rejected": rejected})
    assert caught.value.reason == "no common prompt"


def test_a_long_common_beginning() -> None:
    """A border per line costs no copy of the text each."""
    prompt = "word\n" * 50_000
    row = {"chosen": prompt + "a", "rejected": prompt + "b"}
    assert named_format("common_beginning", "pair").convert(row) == [Record(prompt, ("a", "b"))]
