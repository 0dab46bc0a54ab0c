"""Chat templates of model families: which tokens are a prompt's and which a response's."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families_fixture import CONFIGS
from family_templates import FAMILIES, Family
from transformers import PreTrainedTokenizerFast

from nxdt_align.data.chat import TEMPLATE_DATE
from nxdt_align.data.records import BadRecord, Message, Record
from nxdt_align.data.token_columns import TokenColumns, write_tokens
from nxdt_align.data.token_sets import tokenize_records
from nxdt_align.data.tokenize import Encoded, Tokenization, Truncation
from nxdt_align.errors import UserError
from nxdt_align.weights.generation import generation_json

ROOMY = Truncation(4000, 2000)
SYSTEM: Message = {"role": "system", "content": "Be brief."}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdef123", "type": "function", "function": {"name": "look", "arguments": {"place": "Ulm"}}}
    ],
}
RESULT: Message = {"role": "tool", "content": "5", "tool_call_id": "abcdef123", "name": "look"}
WITH_TOOLS = [
    *("Qwen2.5", "Qwen3", "Qwen3 without thinking", "Qwen3 Instruct 2507", "Llama 3.1", "Llama 3.2"),
    *("Mistral v0.3", "Mistral v0.3, Unigram"),
]
NO_SYSTEM = ("Gemma 2",)
TODAY = {"Llama 3.1", "Llama 3.2", "SmolLM3", "SmolLM3 without thinking"}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def tokenization(name: str) -> Tokenization:
    return Tokenization(FAMILIES[name].tokenizer(), ROOMY, FAMILIES[name].variables)


def pieces(made: Tokenization, record: Record) -> list[str]:
    example = made(record)
    return [str(made.tokenizer.decode(ids.tolist())) for ids in (example.prompt, *example.responses)]


def by_transformers(
    family: Family, tokenizer: PreTrainedTokenizerFast, turns: list[Message], tools: Any, **how: Any
) -> list[int]:
    """``apply_chat_template``'s tokens on the fixed date, with BOS in front, and without white space behind
    the last special token."""
    template = str(tokenizer.chat_template)
    if "date_string" not in template:
        template = template.replace("strftime_now('%d %B %Y')", "'26 July 2024'")
    variables = {"date_string": TEMPLATE_DATE, "chat_template": template, **family.variables, **how}
    ids: Any = tokenizer.apply_chat_template(
        turns, tools=tools, tokenize=True, return_dict=False, **variables
    )
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    last = max(i for i, token in enumerate(ids) if token in tokenizer.added_tokens_decoder)
    return list(ids) if how or str(tokenizer.decode(ids[last + 1 :])).strip() else list(ids[: last + 1])


def conversations(seed: int, count: int, thinks: bool) -> list[tuple[list[Message], tuple[str, str]]]:
    """Turns and two answers that begin and end in every way, some after a thought."""
    rng = random.Random(seed)
    words = ["What", "is", "two", "plus", "five", "\n", "\n\n", "  ", "?", "! ", "<b>", ".", "(", "1"]
    starts = ["", " ", "\n", "\n\n", "  ", "?", "x", "1", "<", "<think"]

    def text() -> str:
        return rng.choice(starts) + rng.choice(["", " "]).join(rng.choices(words, k=rng.randint(1, 8))) + "o"

    def answer() -> str:
        thought = f"<think>\n{text()}\n</think>\n\n" if thinks and rng.random() < 0.5 else ""
        return thought + text()

    found = []
    for _ in range(count):
        turns = [SYSTEM] if rng.random() < 0.3 else []
        roles = itertools.cycle([user, say])
        for _ in range(rng.choice([1, 1, 3, 5])):
            make = next(roles)
            turns.append(make(answer() if make is say else text()))
        found.append((turns, (answer(), answer())))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_token_for_token_what_transformers_makes_of_the_conversation(name: str) -> None:
    family, made = FAMILIES[name], tokenization(name)
    tokenizer = made.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    # R1's own template leaves thinking out, which is a matter of its own, below.
    thinks = name != "DeepSeek-R1 distilled"
    for turns, answers in conversations(1, 30, thinks):
        if turns[0] is SYSTEM and name in NO_SYSTEM:
            turns = turns[1:]
        encoded = made.encode([Record(turns, answers)])[0]
        assert not isinstance(encoded, BadRecord), encoded
        prompt, responses, *_ = encoded
        found = [[*prompt, *response] for response in responses]
        if "Mistral" in name and turns[0] is SYSTEM:
            # Its template writes the system prompt before a last user turn alone.
            asked = by_transformers(family, tokenizer, turns, None, add_generation_prompt=True)
            assert prompt == asked
            turns = turns[1:]
            plain = by_transformers(family, tokenizer, turns, None, add_generation_prompt=True)
            found = [[*plain, *response] for response in responses]
        wanted = [by_transformers(family, tokenizer, [*turns, say(answer)], None) for answer in answers]
        assert found == wanted, (turns, answers)


OPENED = "<\uff5cAssistant\uff5c><think>\n"
QUESTION = [user("a"), say("<think>\nr\n</think>\n\nb"), user("c")]
WRITTEN: dict[str, tuple[str, str, str]] = {
    # The prompt's end, and what is written for "<think>\nso\n</think>\n\ntwo" and for "five".
    "Qwen2.5": (
        "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nso\n</think>\n\ntwo<|im_end|>",
        "five<|im_end|>",
    ),
    "Qwen3": (
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nso\n</think>\n\ntwo<|im_end|>",
        "<think>\n\n</think>\n\nfive<|im_end|>",
    ),
    "Qwen3 Thinking 2507": (
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "so\n</think>\n\ntwo<|im_end|>",
        "\n</think>\n\nfive<|im_end|>",
    ),
    "Llama 3": (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<think>\nso\n</think>\n\ntwo<|eot_id|>",
        "five<|eot_id|>",
    ),
    "Gemma 2": (
        "b<end_of_turn>\n<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
        "<think>\nso\n</think>\n\ntwo<end_of_turn>",
        "five<end_of_turn>",
    ),
    "DeepSeek-R1 distilled": (
        "<\uff5cUser\uff5c>a<\uff5cAssistant\uff5c>\n\nb<\uff5cend▁of▁sentence\uff5c><\uff5cUser\uff5c>c"
        "<\uff5cAssistant\uff5c>",
        "\n\ntwo<\uff5cend▁of▁sentence\uff5c>",
        "five<\uff5cend▁of▁sentence\uff5c>",
    ),
    "DeepSeek-R1 for training": (
        "b<\uff5cend▁of▁sentence\uff5c><\uff5cUser\uff5c>c<\uff5cAssistant\uff5c>",
        "<think>\nso\n</think>\n\ntwo<\uff5cend▁of▁sentence\uff5c>",
        "five<\uff5cend▁of▁sentence\uff5c>",
    ),
    "OLMo 2": (
        "b<|endoftext|>\n<|user|>\nc\n<|assistant|>\n",
        "<think>\nso\n</think>\n\ntwo<|endoftext|>",
        "five<|endoftext|>",
    ),
    "Phi-3": (
        "b<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n",
        "<think>\nso\n</think>\n\ntwo<|end|>\n<|endoftext|>",
        "five<|end|>\n<|endoftext|>",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_prompt_and_a_response_are(name: str) -> None:
    prompt, *answers = pieces(tokenization(name), Record(QUESTION, ("<think>\nso\n</think>\n\ntwo", "five")))
    end, *wanted = WRITTEN[name]
    assert prompt.endswith(end)
    assert answers == wanted


def test_a_default_system_prompt_is_the_prompts() -> None:
    for name, words in (("Qwen2.5", "You are Qwen, created"), ("SmolLM2", "named SmolLM, trained")):
        made = tokenization(name)
        assert words in pieces(made, Record([user("a")], ("b", "c")))[0]
        own = pieces(made, Record([SYSTEM, user("a")], ("b", "c")))[0]
        assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na")


def test_a_tokenizer_without_bos_gets_none_and_one_in_the_template_stands_once() -> None:
    for name, first in (("Qwen3", "<|im_start|>user"), ("Gemma 3", "<bos><start"), ("Llama 3", _bos())):
        assert pieces(tokenization(name), Record([user("a")], ("b", "c")))[0].startswith(first)


def _bos() -> str:
    return "<|begin_of_text|><|start_header_id|>"


@pytest.mark.parametrize("name", ["Qwen3 Thinking 2507", "DeepSeek-R1 for training"])
def test_a_prompt_that_opens_thinking_keeps_it_where_every_response_thinks(name: str) -> None:
    answers = ("<think>\nso\n</think>\n\ntwo", "<think>\nwell\n</think>\n\nfive")
    prompt, chosen, rejected = pieces(tokenization(name), Record([user("a")], answers))
    assert prompt.endswith("<think>\n")
    assert chosen.startswith("so\n</think>\n\ntwo<") and rejected.startswith("well\n</think>\n\nfive<")


@pytest.mark.parametrize("name", ["Qwen3 Thinking 2507", "DeepSeek-R1 distilled", "DeepSeek-R1 for training"])
def test_a_prompt_to_be_answered_opens_thinking(name: str) -> None:
    made = tokenization(name)
    (prompt,) = made.prompts([Record([user("a")], ())])
    assert not isinstance(prompt, BadRecord)
    assert str(made.tokenizer.decode(prompt)).endswith("<think>\n")


@pytest.mark.parametrize("name", ["Qwen3 without thinking", "SmolLM3 without thinking"])
def test_thinking_is_turned_off_by_the_templates_variable(name: str) -> None:
    prompt, chosen, rejected = pieces(tokenization(name), Record([user("a")], ("two", "five")))
    assert prompt.rstrip("\n").endswith("<|im_start|>assistant\n<think>\n\n</think>")
    assert (chosen, rejected) == ("two<|im_end|>", "five<|im_end|>")


def test_variables_are_a_part_of_the_fingerprint_and_must_be_the_templates() -> None:
    tokenizer = FAMILIES["Qwen3"].tokenizer()
    prints = {
        Tokenization(tokenizer, ROOMY, variables).fingerprint()
        for variables in (None, {}, {"enable_thinking": False}, {"enable_thinking": True})
    }
    assert len(prints) == 3
    with pytest.raises(UserError, match=r"chat_template_kwargs: .* does not read `enable_thinkin`"):
        Tokenization(tokenizer, ROOMY, {"enable_thinkin": False})


def test_thinking_that_the_template_leaves_out_is_told() -> None:
    made = tokenization("DeepSeek-R1 distilled")
    thinking = Record([user("a")], ("<think>\nso\n</think>\n\ntwo", "five"))
    alike = Record([user("a")], ("<think>\nso\n</think>\n\ntwo", "<think>\nwell\n</think>\n\ntwo"))
    nothing = Record([user("a")], ("<think>\nso\n</think>\n\n", "five"))
    found = made.encode([thinking, Record([user("a")], ("two", "five")), alike, nothing])
    assert [e.unread for e in found[:2] if not isinstance(e, BadRecord)] == [("<think>…</think>",), ()]
    assert [str(e) for e in found[2:]] == [
        "chosen equal to rejected: both are '\\n\\ntwo<\uff5cend▁of▁sentence\uff5c>': the chat template does "
        "not read `<think>…</think>`",
        "empty turn: a response has nothing but `<think>…</think>`, which the chat template does not read",
    ]
    # Where the template keeps it, nothing is told.
    for name in ("Qwen3", "DeepSeek-R1 for training", "Llama 3"):
        (kept,) = tokenization(name).encode([thinking])
        assert not isinstance(kept, BadRecord) and kept.unread == ()


@pytest.mark.parametrize(
    ("reason", "again"),
    [("no common beginning in the chat template", True), ("refused by the chat template", False)],
)
def test_what_an_earlier_version_refused_is_tokenized_again(tmp_path: Path, reason: str, again: bool) -> None:
    """Unless this one refuses it, too: then what is cached counts."""
    made = tokenization("DeepSeek-R1 distilled")
    records = [Record([user(words)], ("two", "five")) for words in ("a", "b")]
    tokenize_records(records, made, tmp_path)
    (cache,) = tmp_path.iterdir()
    encoded = made.encode(records)[0]
    assert isinstance(encoded, Encoded)
    earlier = TokenColumns.of([records[0].id], [encoded])
    write_tokens(cache, earlier.arrays(), {records[1].id: BadRecord(reason, "f:1")}, {})
    assert len(tokenize_records(records, made, tmp_path, on_bad_record="drop")) == (2 if again else 1)


def test_gemma_refuses_a_system_turn_with_what_to_do() -> None:
    (fault,) = tokenization("Gemma 2").encode([Record([SYSTEM, user("a")], ("b", "c"))])
    assert str(fault) == (
        "refused by the chat template: the tokenizer's chat template refuses the conversation: System role "
        "not supported; write the system turn's text at the start of the first user turn"
    )


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_and_calls(name: str) -> None:
    """A call as an answer, and an answer after a call's result."""
    family, made = FAMILIES[name], tokenization(name)
    tokenizer = made.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for turns, answers in (
        ([user("What is it?")], (CALL, "five")),
        ([user("What is it?"), CALL, RESULT], ("two", "five")),
    ):
        encoded = made.encode([Record(turns, answers, tools=TOOLS)])[0]
        assert not isinstance(encoded, BadRecord), encoded
        assert "tools" not in encoded.unread and "tool_calls" not in encoded.unread
        for answer, response in zip(answers, encoded.responses, strict=True):
            turn = say(answer) if isinstance(answer, str) else answer
            wanted = by_transformers(family, tokenizer, [*turns, turn], TOOLS)
            assert [*encoded.prompt, *response] == wanted
        assert '"place"' in str(tokenizer.decode(encoded.prompt))
    if name.startswith("Mistral"):
        prompt, call, _ = pieces(made, Record([user("a"), say("b"), user("c")], (CALL, "d"), tools=TOOLS))
        assert prompt.startswith("<s>[INST] a[/INST] b</s>[AVAILABLE_TOOLS] [{") and prompt.endswith(
            "[INST] c[/INST]"
        )
        assert call.startswith(
            '[TOOL_CALLS] [{"name": "look", "arguments": {"place": "Ulm"}'
        ) and call.endswith("]</s>")


def test_dates_stand_still_however_a_template_asks_for_them() -> None:
    for name, written in (("Llama 3.1", "26 Jul 2024"), ("SmolLM3", "26 July 2024")):
        made = tokenization(name)
        assert f"Today Date: {written}\n" in pieces(made, Record([user("a")], ("b", "c")))[0]


ENDS = {
    "Gemma 2": "<end_of_turn>",
    "Gemma 3": "<end_of_turn>",
    "Llama 3.1": "<|eot_id|>",
    "Phi-3": "<|endoftext|>",
    "OLMo 2": "<|endoftext|>",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_response_ends_where_generation_stops(name: str) -> None:
    """An export stops at the end of a turn, whatever eos its start names, which stays."""
    made = tokenization(name)
    tokenizer = made.tokenizer
    end = tokenizer.convert_tokens_to_ids(ENDS.get(name, str(tokenizer.eos_token)))
    examples = tokenize_records([Record([user("a")], ("b", "c"))], made, None)
    assert [response.tolist()[-1] for response in examples[0].responses] == [end, end]
    ends = examples.ends(ROOMY.seq_length)
    assert ends == [end]
    own = tokenizer.eos_token_id
    for start, wanted in (
        (None, [own] if own == end else [own, end]),
        ({"eos_token_id": [end, own]}, [end, own]),
        ({"eos_token_id": 99}, [99, end]),
    ):
        said = generation_json(replace(CONFIGS["qwen2"], eos_token_id=own), start, ends)["eos_token_id"]
        assert ([said] if isinstance(said, int) else said) == wanted
