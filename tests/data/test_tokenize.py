"""Tokenization: BOS and EOS once, borders unmerged, one prompt a pair, sets and their cache."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizers import CHATML, LLAMA3, make_tokenizer
from transformers import PreTrainedTokenizerFast

from nxdt_align.data import token_sets
from nxdt_align.data.reading import Source, load_records
from nxdt_align.data.records import BadRecords, DataError, Prompt, Record
from nxdt_align.data.token_sets import TokenizedSet, WholeSequences, tokenize_records
from nxdt_align.data.tokenize import Example, Tokenization, Truncation
from nxdt_align.data.tokenizer import load_tokenizer
from nxdt_align.errors import UserError

ROOMY = Truncation(1000, 500)
CHAT: Prompt = [{"role": "user", "content": "why?"}]


def pair(prompt: Prompt = "What is", chosen: str = " two", rejected: str = " three") -> Record:
    return Record(prompt, (chosen, rejected), source="f:1")


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def assert_same(first: Example, second: Example) -> None:
    assert first.record_id == second.record_id
    np.testing.assert_array_equal(first.prompt, second.prompt)
    for a, b in zip(first.responses, second.responses, strict=True):
        np.testing.assert_array_equal(a, b)


# Text


def test_bos_and_eos_once() -> None:
    tokenizer = make_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    example = Tokenization(tokenizer, ROOMY)(pair())
    assert example.prompt.dtype == np.int32 and example.responses[0].dtype == np.int32
    assert example.prompt.tolist() == [bos, *ids(tokenizer, "What is")]
    assert example.responses[1].tolist() == [*ids(tokenizer, " three"), eos]
    written_out = Tokenization(tokenizer, ROOMY)(pair("<s>What is", " two</s>", " three</s>"))
    np.testing.assert_array_equal(written_out.prompt, example.prompt)
    assert [r.tolist() for r in written_out.responses] == [r.tolist() for r in example.responses]


TOOLS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>"
    "{% if m.tool_calls %}<|im_start|>{{ m.tool_calls }}<|im_end|>"
    "{% else %}{{ m['content'] }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CHATML, ["<|im_end|>"]), (LLAMA3, ["<|eot|>"]), (PLAIN, ["</s>"]), (TOOLS, ["<|im_end|>", "<|eot|>"])],
    ids=["newline behind it", "token alone", "no token", "another for tools"],
)
def test_ends_are_the_tokens_that_responses_were_closed_with(template: str, ends: list[str]) -> None:
    """Of a response that was cut, the last token is none."""
    tokenizer = make_tokenizer(template=template)
    calls: Any = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    records = [pair(CHAT, "two", "three"), pair(CHAT, "five", "two " * 40 + "<|start|>" + " two" * 40)]
    if template is TOOLS:
        records.append(Record(CHAT, ("two", calls), source="f:2"))
    for length in (1000, 60):
        found = tokenize_records(records, Tokenization(tokenizer, Truncation(length, 30)), None)
        assert tokenizer.convert_ids_to_tokens(found.ends(length)) == ends
        assert found.truncated == (1 if length == 60 else 0)


def test_ends_of_text_are_eos_and_of_whole_sequences_too() -> None:
    tokenizer = make_tokenizer()
    single = Record("What is", (" two",), source="f:1")
    for found in (
        tokenize_records([pair()], Tokenization(tokenizer, ROOMY), None),
        WholeSequences(tokenize_records([single], Tokenization(tokenizer, ROOMY), None)),
    ):
        assert found.ends(1000) == [tokenizer.eos_token_id]
        assert found.ends(3) == [], "all of them may be cut"


def test_without_bos() -> None:
    tokenizer = make_tokenizer(bos=False)
    assert Tokenization(tokenizer, ROOMY)(pair()).prompt.tolist() == ids(tokenizer, "What is")


def test_the_border_is_not_merged() -> None:
    """ "' plus' is one token; cut inside, its halves stay apart, and the prompt is what it is alone."""
    tokenizer = make_tokenizer()
    assert len(ids(tokenizer, " plus")) == 1
    example = Tokenization(tokenizer, ROOMY)(pair("two p", "lus", "uts"))
    assert example.prompt.tolist()[1:] == ids(tokenizer, "two p")
    assert example.responses[0].tolist()[:-1] == ids(tokenizer, "lus")
    joined = ids(tokenizer, "two plus")
    assert [*example.prompt[1:], *example.responses[0][:-1]] != joined


def test_an_eos_that_truncation_cuts_is_not_put_back() -> None:
    tokenizer = make_tokenizer()
    example = Tokenization(tokenizer, Truncation(12, 4))(pair("What is two plus three?", "blue " * 9, "red"))
    assert len(example.prompt) == 4 and len(example.responses[0]) == 8
    assert example.responses[0][-1] != tokenizer.eos_token_id
    assert example.responses[1][-1] == tokenizer.eos_token_id
    assert example.prompt[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_eos() -> None:
    with pytest.raises(UserError, match="has no eos_token"):
        Tokenization(make_tokenizer(eos=None), ROOMY)


def test_a_prompt_without_tokens() -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    with pytest.raises(DataError, match=r"f:1: the tokenizer makes no token of the prompt '\?\?'"):
        Tokenization(tokenizer, ROOMY)(pair("??"))


# Chat


@pytest.mark.parametrize("eos", ["</s>", "<|eot|>"])
def test_chat_with_bos_in_the_template(eos: str) -> None:
    """BOS is not doubled; the answer ends with its end of turn, whether or not that is EOS."""
    tokenizer = make_tokenizer(template=LLAMA3, eos=eos)
    example = Tokenization(tokenizer, ROOMY)(pair(CHAT, "two", "three"))
    text = "<s><|start|>user<|stop|>\n\nwhy?<|eot|><|start|>assistant<|stop|>\n\n"
    assert example.prompt.tolist() == ids(tokenizer, text)
    assert example.responses[0].tolist() == ids(tokenizer, "two<|eot|>")


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_chatml_ends_at_its_end_of_turn(eos: str) -> None:
    """The template's line end behind <|im_end|> is never generated, so it is not trained on."""
    tokenizer = make_tokenizer(template=CHATML, eos=eos)
    example = Tokenization(tokenizer, ROOMY)(pair(CHAT, "two", "three"))
    text = "<s><|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert example.prompt.tolist() == ids(tokenizer, text)
    assert example.responses[0].tolist() == ids(tokenizer, "two<|im_end|>")


def test_a_template_without_end_of_turn_gets_eos() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    example = Tokenization(tokenizer, ROOMY)(pair(CHAT, "two", "three"))
    # ' two' is one token, of the template's space and the response's word.
    assert example.responses[0].tolist() == [*ids(tokenizer, " two\n"), tokenizer.eos_token_id]
    assert example.prompt.tolist()[1:] == ids(tokenizer, "user: why?\nassistant:")


def test_chat_without_a_template() -> None:
    with pytest.raises(DataError, match=r"f:1: .* no chat template"):
        Tokenization(make_tokenizer(), ROOMY)(pair(CHAT))


# Fingerprint


def test_fingerprint() -> None:
    """Equal for equal content, whatever was tokenized before; another for each thing that decides tokens."""
    first, again = (Tokenization(make_tokenizer(), ROOMY) for _ in range(2))
    before = first.fingerprint()
    first.tokenizer(["a", "b c"], truncation=True, max_length=1)
    first.tokenizer.backend_tokenizer.enable_padding()
    assert Tokenization(first.tokenizer, ROOMY).fingerprint() == before == again.fingerprint()
    added = make_tokenizer()
    added.add_tokens(["<new>"])
    others = [
        Tokenization(make_tokenizer(bos=False), ROOMY),
        Tokenization(make_tokenizer(eos="<|eot|>"), ROOMY),
        Tokenization(make_tokenizer(template=CHATML), ROOMY),
        Tokenization(added, ROOMY),
        Tokenization(make_tokenizer(), Truncation(1000, 499)),
        Tokenization(make_tokenizer(), Truncation(999, 500)),
        Tokenization(make_tokenizer(), Truncation(1000, 500, "keep_end")),
    ]
    assert len({before, *(t.fingerprint() for t in others)}) == len(others) + 1


# Sets


def random_pairs(count: int) -> list[Record]:
    rng = random.Random(0)
    words = ["What", "is", "two", "plus", "three", "five", "a", "colour", "Blue", "red", "and", "so"]

    def text(longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    return [pair(text(40), " " + text(30), " " + text(30) + "!") for _ in range(count)]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_set_holds_what_single_records_give(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sets, "CHUNK", 7)
    tokenizer = make_tokenizer()
    tokenization = Tokenization(tokenizer, Truncation(30, 20, mode))
    records = random_pairs(60)
    examples = tokenize_records(records, tokenization, None)
    assert len(examples) == 60 and examples.record_ids == [r.id for r in records]
    assert examples.prompt_lengths.shape == (60,) and examples.response_lengths.shape == (60, 2)
    cut = 0
    for i, record in enumerate(records):
        example = examples[i]
        assert_same(example, tokenization(record))
        assert len(example.prompt) == examples.prompt_lengths[i]
        assert [len(r) for r in example.responses] == examples.response_lengths[i].tolist()
        assert len(example.prompt) + examples.response_lengths[i].max() <= 30
        assert example.prompt[0] == tokenizer.bos_token_id
        whole = Tokenization(tokenizer, ROOMY)(record)
        cut += any(
            len(a) != len(b)
            for a, b in zip(
                (whole.prompt, *whole.responses), (example.prompt, *example.responses), strict=True
            )
        )
    assert 0 < cut == examples.truncated < 60


def test_single_responses() -> None:
    record = Record("What is", (" two",), source="f:1")
    examples = tokenize_records([record], Tokenization(make_tokenizer(), ROOMY), None)
    assert examples.response_lengths.shape == (1, 1) and len(examples[0].responses) == 1
    assert examples.identical_after_truncation == 0


def test_equal_records_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenization = Tokenization(make_tokenizer(), ROOMY)
    seen: list[str] = []
    encode = tokenization.encode

    def remember(records: Any) -> Any:
        seen.extend(record.id for record in records)
        return encode(records)

    monkeypatch.setattr(tokenization, "encode", remember)
    one, two = random_pairs(2)
    examples = tokenize_records([one, two, one, one], tokenization, None)
    assert seen == [one.id, two.id]
    assert examples.record_ids == [one.id, two.id, one.id, one.id]
    assert_same(examples[3], examples[0])
    assert_same(examples[-3], examples[1])


def test_pairs_that_truncation_makes_equal_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    records = [pair("What is", " two two two", " two two red"), pair("What is", " two", " red")]
    records.append(records[0])
    with caplog.at_level(logging.WARNING):
        examples = tokenize_records(records, Tokenization(make_tokenizer(), Truncation(5, 4)), None)
    assert len(examples) == 3 and examples.identical_after_truncation == 2
    assert "2 of 3 pairs have the same tokens" in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_what_truncation_takes_is_told_with_the_length_that_would_do(tmp_path: Path, cached: bool) -> None:
    """Of 100 examples, prompts of 1 to 100 words and BOS; responses of 3 tokens and EOS, or of 30."""
    tokenizer = make_tokenizer()
    word, key = " plus", "model_alignment_strategy.dpo.max_prompt_length"
    assert len(ids(tokenizer, word)) == 1

    def told(seq_length: int, limit: int, mode: Any = "keep_start", long: int = 0) -> list[str]:
        records = [pair(word * (i + 1), word * (30 if i < long else 3), word * 2 + "!") for i in range(100)]
        truncation = Truncation(seq_length, limit, mode)
        for _ in range(1 + cached):
            tokenization = Tokenization(tokenizer, truncation)
            examples = tokenize_records(records, tokenization, tmp_path if cached else None)
        return examples.warnings_of_truncation(truncation, key)

    assert told(200, 101) == told(200, 98) == []
    assert told(200, 21) == [
        f"{key} (21) cuts the prompts of 80 of 100 examples (80%): 100 would do for 99% of them"
    ]
    (prompts,) = told(64, 21)
    assert prompts.endswith("100 would do for 99% of them, and data.seq_length above it (it is 64)")
    seq = "data.seq_length (44) cuts the {} of 10 of 100 examples (10%): 53 would do for 99% of them"
    assert told(44, 40, long=22)[1] == seq.format("responses")
    assert told(44, 40, "keep_end", long=22)[1] == seq.format("prompts, or the responses,")


def test_no_records() -> None:
    with pytest.raises(DataError, match="no records to tokenize"):
        tokenize_records([], Tokenization(make_tokenizer(), ROOMY), None)


# Records without tokens

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% endfor %}" + CHATML
)
"""Refuses what Gemma's template refuses."""


def chat(*turns: str) -> Prompt:
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


def refused_among(good: int) -> list[Record]:
    """``good`` records, then two that NO_SYSTEM refuses, at lines good + 1 and good + 2."""
    prompts = [chat(f"user: {i}?") for i in range(good)]
    prompts += [chat("system: brief", "user: why?"), chat("user: a", "user: b")]
    return [Record(p, ("two", "three"), source=f"f.jsonl:{i}") for i, p in enumerate(prompts, start=1)]


def test_records_that_the_template_refuses_stop_with_all_of_them() -> None:
    tokenization = Tokenization(make_tokenizer(template=NO_SYSTEM), ROOMY)
    with pytest.raises(DataError) as caught:
        tokenize_records(refused_among(8), tokenization, None)
    message = str(caught.value)
    assert message.startswith("2 bad of 10 records\n  refused by the chat template: 2\n")
    assert (
        "f.jsonl:9: the tokenizer's chat template refuses the conversation: no system role; write" in message
    )
    assert "f.jsonl:10: the tokenizer's chat template refuses the conversation: roles must" in message
    assert "data.on_bad_record=drop" in message


@pytest.mark.parametrize("cached", [False, True])
def test_drop_goes_on_without_refused_records(tmp_path: Path, cached: bool) -> None:
    """The others are what they are alone; a second run reports the same from the cache, tokenizing none."""
    records = refused_among(8)
    alone = tokenize_records(records[:8], Tokenization(make_tokenizer(template=NO_SYSTEM), ROOMY), None)
    for run in range(2):
        tokenization = Counting(make_tokenizer(template=NO_SYSTEM), ROOMY)
        report = BadRecords(read=11)
        cache = tmp_path if cached else None
        # A mixture repeats records: each is one bad record all the same.
        mixed = [*records, records[8], records[0]]
        examples = tokenize_records(mixed, tokenization, cache, report=report, on_bad_record="drop")
        assert examples.record_ids == [*alone.record_ids, alone.record_ids[0]]
        for i in range(8):
            assert_same(examples[i], alone[i])
        assert report.summary().startswith("2 bad of 11 records\n  refused by the chat template: 2\n    f.js")
        assert tokenization.calls == (0 if cached and run else 10)
    with pytest.raises(DataError, match=r"2 bad of 12[^§]*f.jsonl:9: .*no system role"):
        tokenize_records(mixed, tokenization, cache)


def test_a_source_of_refused_records_stops() -> None:
    records = [*refused_among(2)[2:], Record(CHAT, ("two", "three"), source="other.jsonl:1")]
    tokenization = Tokenization(make_tokenizer(template=NO_SYSTEM), ROOMY)
    with pytest.raises(DataError, match=r"2 bad of 3 [^§]*no record of f.jsonl can be used"):
        tokenize_records(records, tokenization, None, on_bad_record="drop")
    with pytest.raises(DataError, match=r"2 bad of 2 [^§]*no record of f.jsonl can be used"):
        tokenize_records(records[:2], tokenization, None, on_bad_record="drop")


def test_a_prompt_without_tokens_is_a_bad_record() -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    report, records = BadRecords(read=2), [pair("??"), pair("?a")]
    examples = tokenize_records(
        records, Tokenization(tokenizer, ROOMY), None, report=report, on_bad_record="drop"
    )
    assert examples.record_ids == [records[1].id]
    assert report.counts == {"prompt without tokens": 1}


# Keys of messages beside role and content

REASONS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}why: {{ m.reasoning_content }}\n{% endif %}"
    "{% for c in m.tool_calls or [] %}call {{ c.name }}{% endfor %}{{ m.content }}"
    "{{ '<|eot|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def says(text: str, **further: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **further}


def test_the_template_reads_every_key(caplog: pytest.LogCaptureFixture) -> None:
    """Prompt and responses are what apply_chat_template writes of the whole conversation."""
    tokenizer = make_tokenizer(template=REASONS)
    asks: Any = [*CHAT, says("", tool_calls=[{"name": "red"}]), {"role": "tool", "content": "five"}]
    chosen, rejected = says("two", reasoning_content="is so"), says("", tool_calls=[{"name": "blue"}])
    record = Record(asks, (chosen, rejected), source="f:1")
    examples = tokenize_records([record], Tokenization(tokenizer, ROOMY), None)
    assert not caplog.records
    prompt, *responses = (e.tolist() for e in (examples[0].prompt, *examples[0].responses))
    for answer, response, stop in ((chosen, responses[0], "<|im_end|>"), (rejected, responses[1], "<|eot|>")):
        whole = tokenizer.apply_chat_template([*asks, answer], tokenize=False)
        assert tokenizer.decode([*prompt, *response]) == "<s>" + whole.removesuffix("\n")
        assert response[-1] == tokenizer.convert_tokens_to_ids(stop)
    plain = Record(asks, ("two", rejected))
    assert len({record.id, plain.id, Record(CHAT, record.responses).id, Record(asks, ("two", "")).id}) == 4


@pytest.mark.parametrize("cached", [False, True])
def test_keys_that_the_template_does_not_read_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cached: bool
) -> None:
    tokenizer = make_tokenizer(template=REASONS)
    heavy = [
        Record([{"role": "user", "content": f"{i}?", "name": "Ann"}], (says("two", weight=i), "three"))
        for i in range(3)
    ]
    heavy.append(Record(CHAT, (says("two", weight=1, reasoning_content="so"), "three")))
    heavy.append(Record("text", (says("two", weight=1), "three")))
    for run in range(2):
        caplog.clear()
        tokenization = Counting(tokenizer, ROOMY)
        examples = tokenize_records(heavy, tokenization, tmp_path if cached else None)
        assert tokenization.calls == (0 if cached and run else 5)
        told = sorted(r.getMessage().partition(", is not read")[0] for r in caplog.records)
        assert told == [
            "`name`, which messages of 3 records have",
            "`weight`, which messages of 5 records have",
        ]
    plain = Tokenization(tokenizer, ROOMY)(Record([{"role": "user", "content": "1?"}], ("two", "three")))
    assert examples[1].prompt.tolist() == plain.prompt.tolist()
    assert examples[1].responses[0].tolist() == plain.responses[0].tolist()


def test_tools_are_the_templates_to_read(caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"type": "function", "function": {"name": "red"}}]
    plain, record = (Record(CHAT, ("two", "three"), tools=each) for each in (None, tools))
    reads = "{% if tools %}call {{ tools[0].function.name }} {% endif %}" + CHATML
    first, second = (Tokenization(make_tokenizer(template=t), ROOMY) for t in (CHATML, reads))
    assert tokenize_records([record], second, None) and not caplog.records
    prompts = [str(second.tokenizer.decode(second(each).prompt)) for each in (plain, record)]
    assert prompts[1] == prompts[0].replace("<s>", "<s>call red ")
    assert_same(tokenize_records([record], first, None)[0], first(record))
    assert "`tools`, which 1 records have, is not read: the chat template's output is the same" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "responses", "reason"),
    [
        ([*CHAT, says("", tool_calls=[{"name": "f"}])], ("two", "three"), "empty turn"),
        (CHAT, (says(" ", weight=1), "three"), "empty turn"),
        ("text", ("two", says("", reasoning_content="so")), "empty turn"),
        (
            *(CHAT, (says("two", reasoning_content="a"), says("two", reasoning_content="b"))),
            "chosen equal to rejected",
        ),
    ],
)
def test_records_that_say_nothing_without_an_unread_key_are_bad(
    prompt: Any, responses: Any, reason: str
) -> None:
    report, records = BadRecords(read=2), [Record(prompt, responses, source="f:1"), pair(CHAT)]
    tokenization = Tokenization(make_tokenizer(template=CHATML), ROOMY)
    examples = tokenize_records(records, tokenization, None, report=report, on_bad_record="drop")
    assert report.counts == {reason: 1} and "template does not read `" in report.summary().replace(
        ", which the chat template does not read", " template does not read `"
    )
    assert examples.record_ids == [records[1].id]
    if reason != "empty turn":
        assert Tokenization(make_tokenizer(template=REASONS), ROOMY)(records[0]).record_id == records[0].id


# The cache


class Counting(Tokenization):
    """Counts the records that it tokenizes."""

    calls = 0

    def encode(self, records: Any) -> Any:
        self.calls += len(records)
        return super().encode(records)


def run_with_cache(
    records: list[Record], cache: Path, max_prompt_length: int = 20
) -> tuple[int, TokenizedSet]:
    """How many records were tokenized, and the set."""
    tokenization = Counting(make_tokenizer(), Truncation(30, max_prompt_length))
    examples = tokenize_records(records, tokenization, cache)
    return tokenization.calls, examples


def assert_same_sets(first: TokenizedSet, second: TokenizedSet) -> None:
    assert len(first) == len(second)
    assert (first.truncated, first.identical_after_truncation) == (
        second.truncated,
        second.identical_after_truncation,
    )
    for i in range(len(first)):
        assert_same(first[i], second[i])


def test_a_second_run_reads_the_cache(tmp_path: Path) -> None:
    records, cache = random_pairs(20), tmp_path / "new" / "cache"
    calls, first = run_with_cache(records, cache)
    again, second = run_with_cache(records, cache)
    assert (calls, again) == (20, 0)
    assert_same_sets(first, second)
    assert [p.suffix for p in cache.iterdir()] == [".npz"]


def test_a_changed_input_never_meets_an_old_cache(tmp_path: Path) -> None:
    records = random_pairs(20)
    run_with_cache(records, tmp_path)
    assert run_with_cache(records, tmp_path, max_prompt_length=19)[0] == 20
    assert run_with_cache(records[::-1], tmp_path)[0] == 20
    assert run_with_cache([*records[:-1], pair("new")], tmp_path)[0] == 20
    assert run_with_cache(records[:-1], tmp_path)[0] == 19
    assert len(list(tmp_path.iterdir())) == 5


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def _encrypted(path: Path) -> None:
    """By a flag in the archive's directory: 8 bytes behind its signature."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] ^= 1 << 6
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other_arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, record_ids=np.array(["a"]))


def _swapped_arrays(path: Path) -> None:
    with np.load(path) as arrays:
        values = dict(arrays)
    values["prompt_offsets"] = values["response_offsets"]
    with path.open("wb") as file:
        np.savez(file, **values)


@pytest.mark.parametrize("damage", [_cut, _flip, _encrypted, _empty, _other_arrays, _swapped_arrays])
def test_a_broken_cache_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    records = random_pairs(20)
    _, first = run_with_cache(records, tmp_path)
    (file,) = tmp_path.iterdir()
    damage(file)
    with caplog.at_level(logging.WARNING):
        calls, second = run_with_cache(records, tmp_path)
    assert calls == 20 and f"the token cache {file} is broken" in caplog.text
    assert_same_sets(first, second)
    assert run_with_cache(records, tmp_path)[0] == 0


def test_a_cache_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the token cache .* cannot be written \(data\.cache_dir\)"):
        run_with_cache(random_pairs(2), tmp_path / "file" / "cache")


# Loading a tokenizer


def test_load_tokenizer(tmp_path: Path) -> None:
    """The same fingerprint from disk as in memory, wherever the folder lies."""
    tokenizer = make_tokenizer(template=CHATML)
    fingerprints = {Tokenization(tokenizer, ROOMY).fingerprint()}
    for name in ("a", "b"):
        tokenizer.save_pretrained(str(tmp_path / name))
        loaded = load_tokenizer(str(tmp_path / name))
        assert loaded.chat_template == CHATML and loaded.bos_token == "<s>"
        fingerprints.add(Tokenization(loaded, ROOMY).fingerprint())
    assert len(fingerprints) == 1


def test_load_tokenizer_errors(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')
    (tmp_path / "broken" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    for name, message in {
        str(tmp_path / "file.json"): "is a file",
        str(tmp_path / "model"): "is not a tokenizer's folder: it holds none of tokenizer.json",
        str(tmp_path / "broken"): "holds a tokenizer that cannot be read",
        str(tmp_path / "none"): "does not exist",
        "org/none": "org/none is neither a folder here nor a model id that can be reached",
    }.items():
        with pytest.raises(UserError, match=r"^data\.tokenizer\.type") as caught:
            load_tokenizer(name)
        assert message in str(caught.value) and "\n" not in str(caught.value)


# Real data


def test_real_chats(shared_data: Path) -> None:
    """All 240 chats tokenize; every uncut answer ends with its end of turn; BOS is there once."""
    tokenizer = make_tokenizer(template=LLAMA3)
    records = load_records([Source(str(shared_data / "dpo_mix_en_sharegpt.json.gz"))], "pair").records
    examples = tokenize_records(records, Tokenization(tokenizer, Truncation(60_000, 30_000)), None)
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert examples.truncated == 0 and examples.identical_after_truncation == 0
    for i in range(len(examples)):
        example = examples[i]
        assert (example.prompt == tokenizer.bos_token_id).sum() == 1
        for response in example.responses:
            assert response[-1] == eot and (response == tokenizer.eos_token_id).sum() == 0


def test_real_transcripts(shared_data: Path) -> None:
    """Of the HH pairs nothing is lost: prompt and response decode to the transcript."""
    tokenizer = make_tokenizer()
    source = Source(str(shared_data / "hh_harmless_base.jsonl.gz"))
    records = load_records([source], "pair", on_bad_record="drop", limit=200).records
    examples = tokenize_records(records, Tokenization(tokenizer, Truncation(20_000, 10_000)), None)
    for i, record in enumerate(records):
        for text, response in zip(record.responses, examples[i].responses, strict=True):
            joined = tokenizer.decode([*examples[i].prompt, *response])
            assert joined == f"<s>{record.prompt}{text}</s>"
