"""Long texts: tokenized no further than truncation needs, with the tokens that tokenizing all of it gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from small_tokenizers import CHATML, LLAMA2, make_sentencepiece, make_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nxdt_align.data import long_texts
from nxdt_align.data.long_texts import LongTexts
from nxdt_align.data.records import BadRecord, Record
from nxdt_align.data.tokenize import Encoded, Tokenization, Truncation

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def words(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


SPLITS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": lambda: words(LLAMA3_WORDS),
    "qwen": lambda: words(QWEN_WORDS),
    "gpt4o": lambda: words(GPT4O_WORDS),
    "starcoder": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "words": lambda: pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES]),
}


def splitting(name: str, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(**settings)
    tokenizer.backend_tokenizer.pre_tokenizer = SPLITS[name]()
    if name in ("llama3", "qwen"):
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def random_text(rng: random.Random, count: int) -> str:
    pieces = [
        "What",
        "is",
        "two",
        " plus",
        "'s",
        "'ll",
        " ",
        "\n",
        "\n\n",
        "  \n ",
        "!",
        ". ",
        "\uff1f",
        "色",
        "\u3001",
    ]
    pieces += [
        "é",
        "e\u0301",
        "12",
        "3456",
        "\t",
        "</s>",
        "<|eot|>",
        "_",
        "-",
        "\r\n",
        "x" * 30,
        " " * 40,
        "👍",
    ]
    return "".join(rng.choice(pieces) for _ in range(count)) + "o"


def encode(tokenization: Tokenization, record: Record) -> Encoded | BadRecord:
    (found,) = tokenization.encode([record])
    return found


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("name", SPLITS)
def test_the_same_tokens_as_tokenizing_all_and_cutting(
    name: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random texts, cut at every few words: as text and as chats, on either side of each limit."""
    tokenizer = splitting(name, template=CHATML)
    rng = random.Random(name)
    shortened = 0
    for at in range(40):
        truncation = Truncation(rng.choice([12, 40]), rng.choice([3, 8]), mode)
        cutting, all_at_once = Tokenization(tokenizer, truncation), Tokenization(tokenizer, truncation)
        assert cutting._tokens.long.splits
        cutting._tokens.long.piece, all_at_once._tokens.long.piece = rng.choice([20, 60, 200]), 10**9
        prompt, *responses = (random_text(rng, rng.choice([5, 100])) for _ in range(3))
        record = Record(
            prompt if at % 2 else [{"role": "user", "content": prompt}], tuple(responses), source="f:1"
        )
        asked: list[str] = []
        ids = cutting._tokens.ids
        monkeypatch.setattr(
            cutting._tokens, "ids", lambda texts, ids=ids, asked=asked: asked.extend(texts) or ids(texts)
        )
        found, wanted = encode(cutting, record), encode(all_at_once, record)
        assert isinstance(found, Encoded) and isinstance(wanted, Encoded)
        assert found[:3] == wanted[:3] and found.changed == wanted.changed
        assert all(a <= b for a, b in zip(found.whole, wanted.whole, strict=True))
        shortened += sum(map(len, asked)) < 0.8 * len(prompt + "".join(responses))
    assert shortened > 5


DIGITS = "0123456789\u0661\u0967\uff11\u00b2\u2167"
SPACES = " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\u200d\ufeff"


def any_text(rng: random.Random) -> str:
    """Characters of all planes, runs of digits, of white space and of letters of several scripts, words."""

    def character() -> str:
        most = rng.choice([0x7F, 0x2FF, 0x3000, 0xD7FF, 0x2FFFF])
        found = chr(rng.randint(0x20, most))
        return " " if "\ud800" <= found <= "\udfff" else found

    makers: list[Callable[[], str]] = [
        character,
        lambda: "".join(
            rng.choice("0123456789\u0661\u0967\uff11\u00b2\u2167") for _ in range(rng.randint(1, 9))
        ),
        lambda: "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 6))),
        lambda: rng.choice("aZ\u00e9\u01c5\u05d0\u0e01\uac00\u4e00") * rng.randint(1, 12),
        lambda: rng.choice(
            [" the", "plus ", "it's", "WE'LL", "don\u2019t", "e\u0301", "\u0345", "a\u0300\u0316"]
        ),
        lambda: rng.choice([". ", ", ", "!\n", ":\n\n", "\u3002", "\uff1f", "...", "?!", "_", "--"]),
    ]
    return "".join(rng.choice(makers)() for _ in range(rng.randint(1, 120)))


@pytest.mark.parametrize("name", SPLITS)
def test_pieces_have_the_tokens_of_the_whole(name: str) -> None:
    """Of any text: all of its pieces', the first ones and the last ones."""
    rng = random.Random(f"{name} pieces")
    tokens = Tokenization(splitting(name), Truncation(16, 8))._tokens
    cuts = 0
    for _ in range(150):
        text = any_text(rng)
        (whole,) = tokens.ids([text])
        long = LongTexts(tokens._tokenizer, lambda part: tokens.ids([part])[0], rng.choice([4, 30, 10**6]))
        long.piece = rng.choice([2, 10, 50, 200])
        first, last = long.first(text), long.last(text)
        assert first == whole[: len(first)] and last == whole[len(whole) - len(last) :], ascii(text)
        enough = min(len(whole), long._tokens)
        assert len(first) >= enough and len(last) >= enough
        cuts += len(first) < len(whole)
    assert cuts > 5


def test_ten_million_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pieces of them are tokenized."""
    tokenization = Tokenization(make_tokenizer(template=CHATML), Truncation(256, 128))
    asked: list[str] = []
    ids = tokenization._tokens.ids

    def remember(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return ids(texts)

    monkeypatch.setattr(tokenization._tokens, "ids", remember)
    long = "What is two plus three? " * 420_000
    for prompt in (long, [{"role": "user", "content": long}]):
        encoded = encode(tokenization, Record(prompt, (long, "two")))
        assert isinstance(encoded, Encoded) and encoded.truncated
        assert len(encoded.prompt) == len(encoded.responses[0]) == 128
    assert sum(map(len, asked)) < 300_000


@pytest.mark.parametrize(
    "tokenizer",
    [make_tokenizer(), make_sentencepiece(), make_sentencepiece("split"), make_sentencepiece("never")],
    ids=["bytes", "sentencepiece", "split", "never"],
)
def test_what_cannot_be_cut_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenization = Tokenization(tokenizer, Truncation(64, 32))
    word = "x" * (long_texts.LONGEST + 1)
    for prompt, response in ((word, "two"), ("What is", word)):
        fault = encode(tokenization, Record(prompt, (response,)))
        assert isinstance(fault, BadRecord) and fault.reason == "too long"
        assert fault.detail.startswith("of a text of 200,0") and "xxx" in fault.detail
        assert "in a row cannot be tokenized in parts; the limit is 200,000: '" in fault.detail
    assert isinstance(encode(tokenization, Record("What is", (word[:20_000],))), Encoded)


def test_tokenizers_whose_texts_are_not_cut() -> None:
    """Each for a reason of its own."""
    plain = make_tokenizer()
    dropout, spaced, replaced, unsplit = (make_tokenizer() for _ in range(4))
    dropout.backend_tokenizer.model.dropout = 0.1
    spaced.add_tokens(["tool call"])
    replaced.backend_tokenizer.normalizer = normalizers.Replace(" ", "_")
    unsplit.backend_tokenizer.pre_tokenizer = BYTES
    others = [dropout, spaced, replaced, unsplit, make_sentencepiece(template=LLAMA2)]
    splits = [Tokenization(each, Truncation(64, 32))._tokens.long.splits for each in (plain, *others)]
    assert splits == [True, False, False, False, False, False]
