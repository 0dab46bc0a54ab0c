"""Tokenizers of model families, trained here, with the families' own chat templates.

Those of Qwen, Llama, Gemma, Phi and DeepSeek are read from TRL, a test dependency that ships them as
published; the others are written here with the logic of the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Kind = Literal["bytes", "sentencepiece", "gemma", "unigram"]
TEXT = [
    "What is two plus three? It is five.",
    "Name a colour. Blue is a colour, and so is red.",
    "user system assistant model think tool name arguments parameters",
] * 5

OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] in ('system', 'user') %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM3 = (
    "{%- set on = enable_thinking | default(true) -%}{%- set today = strftime_now('%d %B %Y') -%}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + today + '\nReasoning Mode: ' + "
    "('/think' if on else '/no_think') + '\n<|im_end|>\n' }}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}{{ '<|im_start|>assistant\n' }}{%- if not on -%}"
    "{{ '<think>\n\n</think>\n' }}{%- endif -%}{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- if not on -%}"
    "{{ '<think>\n\n</think>\n' }}{%- endif -%}{%- endif -%}"
)
QWEN3_THINKING = (
    "{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- else %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}{{- '<|im_start|>assistant\n' }}{%- if loop.last %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- said + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}"
    "{%- endif %}{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{%- if tools is not none and m == asked[-1] %}"
    "{{- '[AVAILABLE_TOOLS] [' }}{%- for tool in tools %}{{- tool | tojson }}"
    "{{- ', ' if not loop.last else ']' }}{%- endfor %}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in m.tool_calls %}{%- if call.id is not defined or call.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    "{%- set out = call.function | tojson %}{{- out[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{{- ', ' if not loop.last else ']' + eos_token }}{%- endfor %}"
    "{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] | trim + eos_token }}"
    "{%- elif m['role'] == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + m['content'] + ', \"call_id\": \"' "
    "+ m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{%- else %}"
    "{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A family's tokenizer: how it splits text, its special tokens, and its template, a name of TRL's or
    text."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    kind: Kind = "bytes"
    added: tuple[str, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=Tokenizer.from_str(_trained(self.kind, self.special, self.added)),
            bos_token=self.bos,
            eos_token=self.eos,
        )
        made.chat_template = self.template if "{" in self.template else of_trl(self.template)
        return made


def of_trl(name: str) -> str:
    file = files("trl") / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"TRL of this environment has no {name}.jinja")
    return file.read_text(encoding="utf-8")


@cache
def _trained(kind: Kind, special: tuple[str, ...], added: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    trainer: trainers.Trainer
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
    else:
        if kind == "gemma":  # No space before a text, and merges over the whole of it.
            tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
        if kind == "unigram":
            trainer = trainers.UnigramTrainer(
                vocab_size=150,
                special_tokens=["<unk>", *special],
                unk_token="<unk>",
                initial_alphabet=[chr(i) for i in range(32, 127)] + ["\n"],
                show_progress=False,
            )
        else:
            alphabet = [chr(i) for i in range(32, 127)] + ["\n", "\u2581"]
            trainer = trainers.BpeTrainer(
                vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
            )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return str(tokenizer.to_str())


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA = ("<|begin_of_text|>", "<|eot_id|>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI3 = ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
_R1 = ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>")
_R1_ALL = (*_R1, "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
_MISTRAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
FAMILIES: dict[str, Family] = {
    "Qwen2.5": Family("qwen2_5", _CHATML, None, "<|im_end|>", added=_THINK[2:4]),
    "Qwen3": Family("qwen3", _CHATML, None, "<|im_end|>", added=_THINK),
    "Qwen3 without thinking": Family(
        "qwen3", _CHATML, None, "<|im_end|>", added=_THINK, variables={"enable_thinking": False}
    ),
    "Qwen3 Instruct 2507": Family("qwen3_instruct_2507", _CHATML, None, "<|im_end|>", added=_THINK),
    "Qwen3 Thinking 2507": Family(QWEN3_THINKING, _CHATML, None, "<|im_end|>", added=_THINK),
    "Llama 3": Family("llama3", _LLAMA3, *_LLAMA),
    "Llama 3.1": Family("llama3_1", _LLAMA3, *_LLAMA),
    "Llama 3.2": Family("llama3_2", _LLAMA3, *_LLAMA),
    "Gemma 2": Family("gemma", _GEMMA, "<bos>", "<eos>", "gemma"),
    "Gemma 3": Family("gemma3", _GEMMA, "<bos>", "<eos>", "gemma"),
    "DeepSeek-R1 distilled": Family("deepseek_r1_distill", _R1_ALL, *_R1, added=_THINK[:2]),
    "DeepSeek-R1 for training": Family("deepseek_r1_distill_training", _R1_ALL, *_R1, added=_THINK[:2]),
    "Phi-3": Family("phi3", _PHI3, "<s>", "<|endoftext|>", "sentencepiece"),
    "OLMo 2": Family(OLMO2, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "SmolLM2": Family(SMOLLM2, _CHATML, "<|im_start|>", "<|im_end|>"),
    "SmolLM3": Family(SMOLLM3, _CHATML, None, "<|im_end|>", added=_THINK[:2]),
    "SmolLM3 without thinking": Family(
        SMOLLM3, _CHATML, None, "<|im_end|>", added=_THINK[:2], variables={"enable_thinking": False}
    ),
    "Mistral v0.3": Family(MISTRAL, _MISTRAL, "<s>", "</s>", "sentencepiece"),
    "Mistral v0.3, Unigram": Family(MISTRAL, _MISTRAL, "<s>", "</s>", "unigram"),
}
