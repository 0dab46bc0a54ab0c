"""A chat template is a program: one that does not end, or wants all memory, stops with a message."""

from __future__ import annotations

import resource
import signal
import threading

import pytest
from small_tokenizers import CHATML, make_tokenizer

from nxdt_align.data import chat, rendering
from nxdt_align.data.records import BadRecord, DataError, Record
from nxdt_align.data.tokenize import Tokenization, Truncation

RECORD = Record([{"role": "user", "content": "why?"}], ("two", "three"), source="f.jsonl:7")
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}TEXT{% endfor %}{% endfor %}"


def tokenization(template: str) -> Tokenization:
    return Tokenization(make_tokenizer(template=template), Truncation(100, 50))


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    monkeypatch.setattr(rendering, "_TICK", 0.05)


@pytest.mark.parametrize(
    "template",
    [
        FOR_EVER.replace("TEXT", ""),
        FOR_EVER.replace("TEXT", "{{ i }}"),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=100000000) }}",
        "{{ 7 ** (messages | length * 99999999) }}",
    ],
)
@pytest.mark.usefixtures("limits")
def test_time(template: str) -> None:
    with pytest.raises(
        DataError, match=r"^f.jsonl:7: the chat template of .* takes more than \d+ s .*mend its"
    ):
        tokenization(template).encode([RECORD])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 3000000000 }}",
        "{{ 'x' | center(3000000000) }}",
        "{{ '{:3000000000}'.format(3) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ [1] * 1000000000 }}",
    ],
)
def test_memory(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MEMORY", 2**28)
    with pytest.raises(DataError, match=r"^f.jsonl:7: the chat template of .* GiB of memory for this one"):
        tokenization(template).encode([RECORD])


def test_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "LONGEST_TEXT", 1000)
    (fault,) = tokenization("{% for i in range(500) %}{{ i }}{% endfor %}").encode([RECORD])
    assert isinstance(fault, BadRecord) and fault.reason == "too long"
    assert "writes 1,390 characters for the conversation, more than 1,000" in fault.detail


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% include 'other' %}", "includes, imports or extends another template"),
        ("{% import 'other' as o %}", "includes, imports or extends another template"),
        ("{% from 'other' import o %}", "includes, imports or extends another template"),
        ("{% extends 'other' %}", "includes, imports or extends another template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
        ("{% for", "unexpected 'end of template'"),
        ("{% break %}", "'break' outside loop"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ messages[0].content.__class__.mro() }}", "unsafe"),
        ("{{ raise_exception('') }}", "refuses the conversation: TemplateError"),
    ],
)
def test_faults_are_the_records(template: str, told: str) -> None:
    """One bad record each, with the template's words, and no traceback."""
    (fault,) = tokenization(template).encode([RECORD])
    assert isinstance(fault, BadRecord) and fault.reason == "refused by the chat template"
    assert told in fault.detail and fault.detail.startswith("the tokenizer's chat template")


def test_memory_that_earlier_records_took_is_not_this_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for one record: a chunk of large ones passes."""
    monkeypatch.setattr(rendering, "MEMORY", 2**27)
    big = "two plus three. " * 1_000_000
    records = [Record([{"role": "user", "content": f"{i}{big}"}], ("two",)) for i in range(9)]
    found = tokenization(CHATML)._texts.render(records)
    assert len(found) == 9 and not any(isinstance(each, BadRecord) for each in found)


@pytest.mark.usefixtures("limits")
def test_what_was_set_is_set_again() -> None:
    """Another's alarm goes on, and the memory limit is what it was."""
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    memory = resource.getrlimit(resource.RLIMIT_AS)
    try:
        signal.setitimer(signal.ITIMER_REAL, 300)
        with pytest.raises(DataError):
            tokenization(FOR_EVER).encode([RECORD])
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 200
        signal.raise_signal(signal.SIGALRM)
        assert heard and resource.getrlimit(resource.RLIMIT_AS) == memory
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_tokenize_too() -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(tokenization(CHATML).encode([RECORD])))
    thread.start()
    thread.join()
    assert len(found) == 1 and not isinstance(found[0], BadRecord)
