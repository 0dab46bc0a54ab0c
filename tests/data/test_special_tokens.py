"""BOS, EOS and the end of a turn count once, however often and wherever the data write them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHATML, LLAMA2, LLAMA3, make_sentencepiece, make_tokenizer
from transformers import PreTrainedTokenizerBase

from nxdt_align.data.records import Record
from nxdt_align.data.special_tokens import SpecialTexts, ends_at
from nxdt_align.data.token_sets import tokenize_records
from nxdt_align.data.tokenize import Example, Tokenization, Truncation

ROOMY = Truncation(1000, 500)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def texts(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[str]:
    example = Tokenization(tokenizer, ROOMY)(record)
    return [str(tokenizer.decode(ids.tolist())) for ids in (example.prompt, *example.responses)]


def same_tokens(first: Example, second: Example) -> bool:
    both = zip((first.prompt, *first.responses), (second.prompt, *second.responses), strict=True)
    return all(a.tolist() == b.tolist() for a, b in both)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (("What", "two</s>\n", "no</s> \n"), ["<s>What", "two</s>", "no</s>"]),
        (("What", "two</s></s>", "no</s>\n</s>\n"), ["<s>What", "two</s>", "no</s>"]),
        (("What", "two </s><s>", "no\n"), ["<s>What", "two </s>", "no\n</s>"]),
        (("<s><s>What", "<s>two", " <s> <s>no"), ["<s>What", "two</s>", "no</s>"]),
        (("\n<s> <s>What", "two", "no"), ["<s>What", "two</s>", "no</s>"]),
        # Elsewhere they are the data's: turns of a conversation that was written out as text.
        (("a</s> <s>b", "a</s>b", "<s>"), ["<s>a</s> <s>b", "a</s>b</s>", "</s>"]),
    ],
)
def test_text(written: tuple[str, str, str], found: list[str]) -> None:
    prompt, *responses = written
    assert texts(make_tokenizer(), Record(prompt, tuple(responses))) == found
    for response, one in zip(responses, found[1:], strict=True):
        assert texts(make_tokenizer(), Record(prompt, (response,))) == [found[0], one]
        assert texts(make_tokenizer(), Record(prompt, (response,), label=True)) == [found[0], one]


def test_text_where_one_token_is_both_or_there_is_no_bos() -> None:
    both = make_tokenizer(eos="<s>")
    assert texts(both, Record("<s><s>What", ("<s>two<s>\n", "no<s><s>"))) == ["<s>What", "two<s>", "no<s>"]
    without = make_tokenizer(bos=False)
    assert texts(without, Record("What", ("two</s>\n", "no"))) == ["What", "two</s>", "no</s>"]
    padded = make_tokenizer()
    padded.pad_token = "<|eot|>"
    assert texts(padded, Record("What", ("two</s><|eot|><|eot|>", "no"))) == ["<s>What", "two</s>", "no</s>"]
    padded.pad_token = padded.eos_token
    assert texts(padded, Record("What", ("two</s></s>", "no"))) == ["<s>What", "two</s>", "no</s>"]


CHATS = [(CHATML, "</s>"), (CHATML, "<|im_end|>"), (LLAMA3, "</s>"), (LLAMA3, "<|eot|>")]


@pytest.mark.parametrize(("template", "eos"), CHATS)
def test_chats(template: str, eos: str) -> None:
    """Contents that end with their turn's token, or EOS, or begin with BOS, are what they are without."""
    end = "<|im_end|>" if template == CHATML else "<|eot|>"
    tokenization = Tokenization(make_tokenizer(template=template, eos=eos), ROOMY)

    def chat(before: str, after: str) -> Record:
        turns = [("user", "why?"), ("assistant", "so"), ("user", "two plus")]
        prompt = [{"role": role, "content": f"{before}{text}{after}"} for role, text in turns]
        return Record(prompt, (f"{before}two{after}", f"{before}five{after}"))

    plain = tokenization(chat("", ""))
    assert plain.record_id == chat("", "").id
    for before, after in itertools.product(
        ("", "<s>", "<s><s>"), ("", end, f"{end}\n", end * 2, eos, eos + end)
    ):
        record = chat(before, after)
        example = tokenization(record)
        assert same_tokens(example, plain), (before, after)
        assert (example.record_id == record.id) == (before + after == "")
    kept = texts(
        tokenization.tokenizer, Record([{"role": "user", "content": f"a{end}b"}], (f"a{end}b", "c "))
    )
    assert f"a{end}b{end}" in kept[0] and kept[1] == f"a{end}b{end}"


def test_a_token_that_the_template_does_not_write_stays() -> None:
    """Where the template ends no turn, a conversation's own EOS stands there once, and is not lost."""
    record = Record(
        [
            {"role": "user", "content": "why"},
            {"role": "assistant", "content": "so</s>"},
            {"role": "user", "content": "b"},
        ],
        ("two</s>\n", "no</s></s>"),
    )
    assert texts(make_tokenizer(template=PLAIN), record) == [
        "<s>user: why\nassistant: so</s>\nuser: b\nassistant:",
        " two</s>",
        " no</s>",
    ]
    llama2 = make_sentencepiece(template=LLAMA2)
    asked = [{"role": "user", "content": "What</s>"}]
    assert "What</s>" in texts(llama2, Record(asked, ("two</s>", "no")))[0]
    assert (
        texts(llama2, Record(asked, ("two</s>", "no")))[1] == texts(llama2, Record(asked, ("two", "no")))[1]
    )


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "both"])
def test_once_is_once(kind: str) -> None:
    """Whatever the texts: they count as written when they are seen to, and no more is then to do; the tokens
    begin with one BOS and end with one EOS, nothing behind it and none before it."""
    tokenizer = make_sentencepiece() if kind == "sentencepiece" else make_tokenizer()
    if kind == "both":
        tokenizer = make_tokenizer(eos="<s>")
    special, rng = SpecialTexts.of(tokenizer), random.Random(kind)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces = ["<s>", "</s>", " ", "\n", "two", "x", "\u3000"]
    tokenization = Tokenization(tokenizer, ROOMY)
    for _ in range(300):
        prompt, response = ("".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(2))
        once = (special.prompt(prompt), special.response(response))
        assert (special.prompt(once[0]), special.response(once[1])) == once
        example = tokenization(Record(prompt, (response,)))
        cleaned = tokenization(Record(once[0], (once[1],)))
        assert same_tokens(example, cleaned)
        assert cleaned.record_id == Record(once[0], (once[1],)).id or kind == "sentencepiece"
        ids = [*example.prompt.tolist(), *example.responses[0].tolist()]
        assert ids[0] == bos and (len(example.prompt) == 1 or ids[1] != bos)
        assert ids[-1] == eos and (len(example.responses[0]) == 1 or ids[-2] != eos)
        assert len(example.responses[0]) == 1 or example.responses[0][0] != bos


def test_the_run_of_tokens_at_the_end() -> None:
    assert ends_at("two", ["</s>"], ["</s>"]) is None and ends_at("", ["</s>"], ["</s>"]) is None
    assert ends_at("two <p></s> \n", ["</s>", "<p>"], ["</s>"]) == 4
    assert ends_at("two <p>", ["</s>", "<p>"], ["</s>"]) is None
    assert ends_at("</s>" * 20_000 + "x", ["</s>"], ["</s>"]) is None


def test_a_token_cache_is_of_its_rules(tmp_path: Path) -> None:
    """What all rules tokenize alike is cached under the first ones' name, which earlier versions read and
    wrote; other records never are, nor are their reference values looked up under an old id."""

    class Refusing(Tokenization):
        def encode(self, records: Any) -> Any:
            raise AssertionError("the cache was there to be read")

    tokenizer = make_tokenizer(template=CHATML)
    alike = [Record("What", ("two</s>", "no\n")), Record("<s>is", ("a", "b"))]
    chats = [Record([{"role": "user", "content": "why?"}], ("two", "no"))]
    other = [Record("What", ("two</s>\n", "no"))]
    names: set[str] = set()
    for records, first in ((alike, True), (chats, False), ([*alike, *other], False)):
        folder = tmp_path / str(len(names))
        made = tokenize_records(records, Tokenization(tokenizer, ROOMY), folder)
        again = tokenize_records(records, Refusing(tokenizer, ROOMY), folder)
        assert again.record_ids == made.record_ids
        assert all(same_tokens(again[i], made[i]) for i in range(len(made)))
        (file,) = folder.iterdir()
        names.add(file.name)
        assert first == all(map(Tokenization(tokenizer, ROOMY).as_before, records))
        ids = [record.id for record in records]
        assert made.record_ids[:-1] == ids[:-1] and (made.record_ids[-1] == ids[-1]) == (len(ids) < 3)
    assert len(names) == 3
