"""Chat templates: where the response begins, where its turn ends, what a template cannot do."""

from __future__ import annotations

import pytest
from small_tokenizers import CHATML, LLAMA3, make_tokenizer

from nxdt_align.data.chat import TEMPLATE_DATE, ChatTemplate
from nxdt_align.data.records import BadRecord, DataError

QUESTION = [{"role": "system", "content": "brief"}, {"role": "user", "content": "why?"}]


def test_split() -> None:
    prompt, answers = ChatTemplate(make_tokenizer(template=CHATML)).split(QUESTION, ["a", "b"], "f:1")
    assert prompt == (
        "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answers == ["a<|im_end|>\n", "b<|im_end|>\n"]


def test_turn_end() -> None:
    tokenizer = make_tokenizer(template=CHATML)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert ChatTemplate(tokenizer).turn_end == (tokenizer.convert_tokens_to_ids("<|im_end|>"), newline)
    tokenizer = make_tokenizer(template=LLAMA3)
    assert ChatTemplate(tokenizer).turn_end == (tokenizer.convert_tokens_to_ids("<|eot|>"), [])
    plain = make_tokenizer(
        template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    assert ChatTemplate(plain).turn_end == (None, [])


def test_the_date_stands_still() -> None:
    """Llama 3's way of asking for it; today's date would change the tokens from day to day."""
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}" + LLAMA3
    )
    prompt, _ = ChatTemplate(make_tokenizer(template=dated)).split(QUESTION, [], "f:1")
    assert prompt.startswith(TEMPLATE_DATE + "<s>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "f:7: the record holds chat messages, but the tokenizer has no chat template"),
        ("{{ raise_exception('no system turn') }}", "refuses the conversation: no system turn"),
        ("{{ messages[0]['content'] + 1 }}", "refuses the conversation: can only concatenate str"),
        (
            "{% for k, v in messages[0]['content'] | items %}{% endfor %}",
            "refuses the conversation: Can only get item pairs",
        ),
        ("{{ messages | length }}", "differently from the prompt alone"),
        ("{{ messages[0]['content'] }}", "differently from the prompt alone"),
    ],
)
def test_unusable_templates(template: str | None, message: str) -> None:
    with pytest.raises((DataError, BadRecord), match=message):
        ChatTemplate(make_tokenizer(template=template)).split(QUESTION, ["a"], "f:7")
