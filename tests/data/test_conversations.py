"""A conversation has the tokens of its whole text; its prompt are those that all responses share."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from small_tokenizers import (
    CHATML,
    LLAMA2,
    LLAMA3,
    ZEPHYR,
    Prefix,
    make_sentencepiece,
    make_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from nxdt_align.data.records import Message, Record
from nxdt_align.data.tokenize import Example, Tokenization, Truncation

ROOMY = Truncation(1000, 500)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Without a special token; byte-level BPE merges the space before an answer with its first word."""
PREFIXES: list[Prefix] = ["normalizer", "always", "first", "never", "split"]


def of_example(example: Example) -> tuple[list[int], list[list[int]]]:
    return example.prompt.tolist(), [response.tolist() for response in example.responses]


def whole(tokenizer: PreTrainedTokenizerFast, turns: list[Message]) -> list[int]:
    """What transformers makes of a conversation, with BOS in front and no white space behind its end."""
    found: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    ids: list[int] = found if found[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *found]
    special = [i for i, token in enumerate(ids) if token in tokenizer.added_tokens_decoder]
    if special[-1] > 0 and not str(tokenizer.decode(ids[special[-1] + 1 :])).strip():
        return ids[: special[-1] + 1]
    return [*ids, tokenizer.eos_token_id]


def conversations(count: int) -> list[tuple[list[Message], tuple[str, str]]]:
    """Turns and two answers that begin and end in every way: alike, with white space, or punctuation."""
    rng = random.Random(0)
    pieces = ["What", "is", "two", "plus", "five", "\n", "\n\n", "  ", "?", "! ", "é", "色", ".", "(", "1"]
    starts = ["", " ", "\n", "\n\n", "  ", "?", "x", "1"]

    def text() -> str:
        words = rng.choices(pieces, k=rng.randint(1, 8))
        return rng.choice(starts) + rng.choice(["", " "]).join(words) + "o"

    found = []
    for _ in range(count):
        roles = itertools.cycle(["user", "assistant"])
        turns = [{"role": next(roles), "content": text()} for _ in range(rng.choice([1, 1, 3]))]
        found.append((turns, (text(), text())))
    return found


TOKENIZERS = {
    **{f"{prefix} {name}": (prefix, name) for prefix in PREFIXES for name in ("LLAMA2", "ZEPHYR", "PLAIN")},
    **{f"bytes {name}": (None, name) for name in ("CHATML", "LLAMA3", "PLAIN", "ZEPHYR")},
    "unigram LLAMA2": ("unigram", "LLAMA2"),
}
TEMPLATES = {"LLAMA2": LLAMA2, "ZEPHYR": ZEPHYR, "PLAIN": PLAIN, "CHATML": CHATML, "LLAMA3": LLAMA3}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_for_token_what_transformers_makes_of_the_conversation(name: str) -> None:
    prefix, template = TOKENIZERS[name]
    if prefix is None:
        tokenizer = make_tokenizer(template=TEMPLATES[template])
    elif prefix == "unigram":
        tokenizer = make_sentencepiece(unigram=True, template=TEMPLATES[template])
    else:
        tokenizer = make_sentencepiece(prefix, template=TEMPLATES[template])  # type: ignore[arg-type]
    records, wholes = [], []
    for turns, answers in conversations(25):
        records.append(Record(turns, answers))
        wholes.append([whole(tokenizer, [*turns, {"role": "assistant", "content": a}]) for a in answers])
    tokenization = Tokenization(tokenizer, ROOMY)
    for record, wanted, encoded in zip(records, wholes, tokenization.encode(records), strict=True):
        prompt, responses, *_ = encoded  # type: ignore[misc]
        assert [[*prompt, *response] for response in responses] == wanted, record
        assert isinstance(record.prompt, list)
        head: Any = tokenizer.apply_chat_template(record.prompt, tokenize=False, add_generation_prompt=True)
        for response, ids in zip(responses, wanted, strict=True):
            # Not one token more is the response's than those that differ or reach into it.
            before = str(tokenizer.decode(ids[: len(prompt) + 1])).removeprefix("<s>")
            one_more = {tuple(each[: len(prompt) + 1]) for each in wanted}
            assert len(one_more) > 1 or not head.removeprefix("<s>").startswith(before), (record, response)


def test_no_stray_space_starts_a_response() -> None:
    """Llama-2's: ' two' behind '[/INST]' is one word, and no space and a word."""
    tokenizer = make_sentencepiece(template=LLAMA2)
    record = Record([{"role": "user", "content": "What is it?"}], ("two", "five"))
    prompt, (chosen, rejected) = of_example(Tokenization(tokenizer, ROOMY)(record))
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in (chosen, rejected)]
    assert ["".join(each) for each in pieces] == ["\u2581two\u2581</s>", "\u2581five\u2581</s>"]
    assert tokenizer.decode(prompt) == "<s> [INST] What is it? [/INST]"


def test_a_token_across_the_border_is_the_responses() -> None:
    """'assistant: ' and 'two' are ':' and ' two'; before '1' the space is a token, but no common one."""
    tokenizer = make_tokenizer(template=PLAIN)
    turns = [{"role": "user", "content": "What"}]
    prompt, responses = of_example(Tokenization(tokenizer, ROOMY)(Record(turns, ("two", "1"))))
    assert tokenizer.decode(prompt) == "<s>user: What\nassistant:"
    assert [tokenizer.convert_ids_to_tokens(r)[0] for r in responses] == ["Ġtwo", "Ġ"]
    (alone,) = of_example(Tokenization(tokenizer, ROOMY)(Record(turns, ("1",))))[1]
    assert tokenizer.convert_ids_to_tokens(alone)[0] == "1"


@pytest.mark.parametrize("prefix", [prefix for prefix in PREFIXES if prefix != "never"])
def test_text_of_a_tokenizer_that_adds_a_space(prefix: Prefix) -> None:
    tokenizer = make_sentencepiece(prefix)
    prompt, responses = of_example(Tokenization(tokenizer, ROOMY)(Record("What is two?", (" two", " five."))))
    for answer, response in zip((" two", " five."), responses, strict=True):
        text: Any = tokenizer(f"What is two?{answer}", add_special_tokens=False)["input_ids"]
        assert [*prompt, *response] == [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]


@pytest.mark.parametrize("prefix", [prefix for prefix in PREFIXES if prefix != "never"])
def test_the_space_of_the_tokenizer_parts_texts_that_have_none(prefix: Prefix) -> None:
    """As the demo's data: what an earlier version trained on keeps its tokens and its id."""
    tokenizer = make_sentencepiece(prefix)
    record = Record("What is two?", ("two", "five."))
    example = Tokenization(tokenizer, ROOMY)(record)
    alone: Any = tokenizer(["two", "five."], add_special_tokens=False)["input_ids"]
    assert of_example(example)[1] == [[*ids, tokenizer.eos_token_id] for ids in alone]
    assert example.record_id == record.id


def test_records_of_other_tokens_have_other_ids() -> None:
    """A response behind a special token has the tokens that it has alone: its id stays."""
    turns = [{"role": "user", "content": "What"}]
    record = Record(turns, ("two", "five"))
    ids = {
        name: Tokenization(tokenizer, ROOMY)(record).record_id
        for name, tokenizer in {
            "chatml": make_tokenizer(template=CHATML),
            "llama3": make_tokenizer(template=LLAMA3),
            "never": make_sentencepiece("never", template=LLAMA2),
            "plain": make_tokenizer(template=PLAIN),
            "llama2": make_sentencepiece(template=LLAMA2),
        }.items()
    }
    assert ids["chatml"] == ids["llama3"] == record.id
    assert ids["plain"] == ids["llama2"] != record.id
