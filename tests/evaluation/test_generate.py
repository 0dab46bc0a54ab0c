"""Completions are those of transformers' own greedy search, with log-probabilities of the model itself; every
kind of weights and of prompts is taken; what cannot be answered is told."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import torch
from checkpoint_fixture import fresh
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from small_tokenizers import CHATML, make_tokenizer
from training_fixture import Project

import nxdt_align as na
from nxdt_align.cli import main
from nxdt_align.data.records import Record
from nxdt_align.data.tokenize import Tokenization, Truncation
from nxdt_align.errors import UserError
from nxdt_align.evaluation.compare import Answer, Compared, Comparison, write_comparison
from nxdt_align.evaluation.generate import Sampling
from nxdt_align.evaluation.transformers_model import TransformersModel
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.run import comparison
from nxdt_align.run.generation import chat
from nxdt_align.weights.hf_writer import write_hf_folder

PROMPTS: list[Any] = ["What is two plus three?", "Name", "Name a colour. Blue is a colour, and so is"]
EOT = "<|im_end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, large enough that its texts differ, and a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    tokenizer = make_tokenizer(template=CHATML)
    shape = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    tokenizer.save_pretrained(folder.parent / "tokenizer")
    write_hf_folder(folder, shape, fresh(shape), tokenizer_dir=folder.parent / "tokenizer")
    # Settings of its own that must not change what was asked for.
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 5.0, "max_length": 3}))
    return folder


def tokens_of(texts: Sequence[str]) -> list[list[int]]:
    tokenizer = make_tokenizer()
    return [[0, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_greedy_is_that_of_transformers(model: Path) -> None:
    """Prompts of three lengths in one batch, each against ``generate`` of transformers on it alone."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    theirs: Any = AutoModelForCausalLM.from_pretrained(model)
    theirs.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)  # type: ignore[no-untyped-call]
    found = TransformersModel(model, torch.device("cpu")).generate(
        tokens_of(PROMPTS), Sampling(max_tokens=20), {1}
    )
    for prompt, completion in zip(tokens_of(PROMPTS), found, strict=True):
        made = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert list(completion.tokens) == made[0, len(prompt) :].tolist()
        assert completion.finish_reason == ("stop" if completion.tokens[-1] == 1 else "length")


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=12), Sampling(0.7, 0.8, 12, 2, seed=3)])
def test_logprobs_are_those_of_the_model_itself(model: Path, sampling: Sampling) -> None:
    """Whatever temperature and top-p the tokens were drawn with: a forward pass over prompt and completion
    gives the same sum, to 1e-4 of float32. Some end early here: every token below 40 is an end."""
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(model)
    ends = set(range(40))
    found = TransformersModel(model, torch.device("cpu")).generate(tokens_of(PROMPTS), sampling, ends)
    assert {each.finish_reason for each in found} == {"stop", "length"}
    for prompt, completion in zip(tokens_of(PROMPTS), found, strict=True):
        whole = torch.tensor([[*prompt, *completion.tokens]])
        logprobs = theirs(whole).logits[0].double().log_softmax(-1)
        chosen = logprobs[torch.arange(len(prompt) - 1, whole.shape[1] - 1), whole[0, len(prompt) :]]
        assert completion.logprob == pytest.approx(chosen.sum().item(), abs=1e-4)
        assert (completion.tokens[-1] in ends) == (completion.finish_reason == "stop")
        assert not ends & set(completion.tokens[:-1])


def test_a_seed_repeats_its_draws(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS])
    draws = [
        na.generate(model, file, temperature=1.0, max_tokens=8, seed=seed, backend="transformers")
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_prompts_have_the_tokens_of_training() -> None:
    tokenization = Tokenization(make_tokenizer(template=CHATML), Truncation(200))
    chat = [{"role": "user", "content": "Name a colour."}]
    records = [Record("What is two?", ("It", "five")), Record(chat, ("Blue.", "red"))]
    assert tokenization.prompts(records) == [list(tokenization(record).prompt) for record in records]
    assert tokenization.turn_end() == make_tokenizer().convert_tokens_to_ids(EOT)


def test_a_chat_stops_at_the_end_of_its_turn(model: Path, tmp_path: Path) -> None:
    """Though neither config nor generation config names it; and a text does not."""
    tokenizer = make_tokenizer(template=CHATML)
    seen: list[frozenset[int]] = []

    class Spy(TransformersModel):
        def generate(self, prompts: Any, sampling: Any, ends: Any) -> Any:
            seen.append(frozenset(ends))
            return super().generate(prompts, sampling, ends)

    from nxdt_align.evaluation.generate import complete

    tokenization = Tokenization(tokenizer, Truncation(64))
    spy = Spy(model, torch.device("cpu"))
    for prompt in ("Name", [{"role": "user", "content": "Name"}]):
        complete([Record(prompt, ())], tokenization, spy, Sampling(max_tokens=2))
    assert seen == [{1}, {1, tokenizer.convert_tokens_to_ids(EOT)}]


def test_every_kind_of_weights_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder, its checkpoint and its export answer alike; so does a file of pairs, and one of their
    prompts alone."""
    project = Project.create(tmp_path, pairs=4)
    assert project.train("trainer.max_steps=2", "data.val_dir=null") == 0
    run = project.only_run()
    (checkpoint,) = (run / "checkpoints").iterdir()
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    alone = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    labelled = [{"prompt": prompt, "completion": "x", "label": False} for prompt in prompts]
    write(tmp_path / "kto.jsonl", labelled)
    answers = []
    for place, file in (
        (run, "train.jsonl"),
        (checkpoint, "train.jsonl"),
        (run / "hf_export", "train.jsonl"),
        (run / "hf_export", alone.name),
        (run / "hf_export", "kto.jsonl"),
    ):
        capsys.readouterr()
        command = ["generate", str(place), "--prompts", str(tmp_path / file), "--max-tokens", "5"]
        given = ["--format", "unpaired"] if file == "kto.jsonl" else []
        assert main([*command, "--device", "cpu", *given]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["prompt"] for row in rows] == prompts
        assert rows[1].pop("source") == f"{tmp_path / file}:2"
        answers.append([(row["completion"], row["logprob"]) for row in rows])
    assert all(each == answers[0] for each in answers)
    (row, *_) = rows
    assert row["finish_reason"] in ("stop", "length") and row["completion_tokens"] <= 5
    assert row["logprob"] < 0 and math.isfinite(row["logprob"])


def test_a_file_is_written_once_and_whole(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "Näme"}]}])
    out = tmp_path / "new" / "out.jsonl"
    rows = na.generate(model, file, out=out, max_tokens=3)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert rows[0]["prompt"] == [{"role": "user", "content": "Näme"}]
    with pytest.raises(UserError, match="exists already"):
        na.generate(model, file, out=out)
    with pytest.raises(UserError, match=r"exists already"):
        na.generate(model, file, out=tmp_path)
    with pytest.raises(UserError, match=r"x.jsonl cannot be written, where .*p.jsonl is a file"):
        na.generate("no model", "no prompts", out=file / "x.jsonl")


def test_a_message_with_a_date(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Parquet has it: text in the JSON of generate and compare, in files and on standard output."""
    turn = {"role": "user", "content": "Name", "at": datetime(2024, 5, 6, 7, 8)}
    parquet.write_table(pa.Table.from_pylist([{"prompt": [turn]}]), tmp_path / "p.parquet")
    out, page, data = (tmp_path / name for name in ("out.jsonl", "page.html", "p.parquet"))
    generate = ["generate", str(model), "--prompts", str(data), "--max-tokens", "1", "--device", "cpu"]
    assert main(generate) == main([*generate, "--out", str(out)]) == 0
    answer = Answer("t", 1, "stop", (), None)
    found = Comparison("b", "a", "d", 0.1, "none", (Compared("f:1", [turn], (), answer, answer, 0.1),))
    write_comparison(found, page)
    monkeypatch.setattr(comparison, "compare", lambda **_: found.to_dict())
    assert main(["compare", str(model), str(model), "--data", str(data), "--json"]) == 0
    texts = [capsys.readouterr().out, *(f.read_text() for f in tmp_path.glob("*.json*"))]
    assert [text.count("2024-05-06 07:08:00") for text in texts] == [2, 1, 1]


def test_a_long_prompt_is_cut_as_in_training(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """128 positions: beside 4 new tokens 124 are left."""
    file = write(tmp_path / "p.jsonl", [{"prompt": "Name"}, {"prompt": "a colour " * 100}])
    caplog.set_level("INFO", "nxdt_align")
    short, long = na.generate(model, file, max_tokens=4)
    assert long["prompt_tokens"] == 124 and long["prompt_truncated"] and "prompt_truncated" not in short
    assert "1 of 2 prompts are longer than 124 tokens" in caplog.text
    with pytest.raises(UserError, match="must be below the model's 128 positions"):
        na.generate(model, file, max_tokens=128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be at least 0, but is -1.0"),
        ({"temperature": math.nan}, "temperature: must be at least 0"),
        ({"top_p": 0.0}, "top-p: must be above 0 and at most 1"),
        ({"max_tokens": 0}, "max-tokens: must be at least 1"),
        ({"batch_size": 0}, "batch-size: must be at least 1"),
        ({"seed": -1}, "seed: must be from 0"),
        ({"limit": 0}, "limit: must be at least 1, but is 0; leave it out"),
        ({"backend": "vllm"}, "which is not installed; pip install vllm"),
        ({"backend": "onnx"}, "backend: must be one of auto, vllm, transformers"),
        ({"tensor_parallel": 2}, "tp: is for vLLM"),
        ({"device": "cuda"}, "device: is cuda, but torch finds"),
        ({"device": "tpu9"}, "device: 'tpu9' is none that torch knows"),
        ({"dtype": "int4"}, "dtype: must be one of"),
    ],
)
def test_faults_of_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Before a model is looked for, as its export takes time, and so does the pass of the first of two."""
    file = write(tmp_path / "p.jsonl", [{"prompt": "Name"}])
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=message):
        na.generate("no_model", file, **settings)
    with pytest.raises(UserError, match=message):
        na.compare("no_model", "no_model", file, **settings)


def test_faults_of_a_chat_are_found_before_the_model_is() -> None:
    silent: dict[str, Any] = {"ask": lambda: None, "show": print}
    with pytest.raises(UserError, match="device: 'tpu9' is none that torch knows"):
        chat("no_model", device="tpu9", **silent)
    with pytest.raises(UserError, match="dtype: must be one of"):
        chat("no_model", dtype="int4", **silent)  # type: ignore[arg-type]


def test_faults_of_prompts_and_models(model: Path, tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "Name"}]}])
    make_tokenizer().save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"chats.jsonl:1: .* the tokenizer has no chat template"):
        na.generate(model, chats, tokenizer=tmp_path / "plain")
    strict = "{{ raise_exception('alternate, please') }}"
    make_tokenizer(template=strict).save_pretrained(tmp_path / "strict")
    with pytest.raises(UserError, match=r"1 bad of 1 records[\s\S]*alternate, please"):
        na.generate(model, chats, tokenizer=tmp_path / "strict")
    with pytest.raises(UserError, match="fit no known format"):
        na.generate(model, write(tmp_path / "x.jsonl", [{"quest": "Name"}]))
    with pytest.raises(UserError, match=r"empty prompt[\s\S]*fix them, or leave them out$"):
        na.generate(model, write(tmp_path / "y.jsonl", [{"prompt": "Name"}, {"prompt": " "}]))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with pytest.raises(UserError, match="no tokenizer: give a folder"):
        na.generate(bare, chats)
    (bare / "config.json").write_text(json.dumps({"model_type": "nonesuch", "eos_token_id": 1}))
    with pytest.raises(UserError, match="transformers does not load"):
        na.generate(bare, chats, tokenizer=model)


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *arguments, "--device", "cpu"])


def test_chat(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each turn's answer is that of ``generate`` on the conversation so far; /new forgets it."""
    options = ("--max-tokens", "6", "--system", "be brief")
    assert talk(monkeypatch, "Name\n\nWhat\n/new\nName\n/exit\nnever\n", str(model), *options) == 0
    printed = capsys.readouterr().out
    turns: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Name"}]

    def answer() -> str:
        file = write(tmp_path / "p.jsonl", [{"prompt": turns}])
        return str(na.generate(model, file, max_tokens=6)[0]["completion"])

    first = answer()
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "What"}]
    assert printed == f"{first}\n{answer()}\n{first}\n"


def test_chat_that_fills_the_model_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, "colour " * 120 + "\nName\n", str(model), "--max-tokens", "2") == 0
    assert "/new begins another conversation" in capsys.readouterr().out


def test_a_tokenizer_of_another_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose tokens have no row in the embedding: generate, and compare by the same way, and chat."""
    larger = make_tokenizer(template=CHATML)
    larger.add_tokens(["zebra"])
    larger.save_pretrained(tmp_path / "larger")
    size = len(larger)
    told = rf"the token {size - 1}, .* a vocabulary of {size - 1}: the tokenizer \S+larger, of {size}"
    chats = write(tmp_path / "chats.jsonl", [{"prompt": "Name"}, {"prompt": "a zebra"}])
    with pytest.raises(UserError, match=told):
        na.generate(model, chats, tokenizer=tmp_path / "larger", max_tokens=2)
    assert talk(monkeypatch, "zebra\n", str(model), "--tokenizer", str(tmp_path / "larger")) == 1
    assert re.search(told, capsys.readouterr().err)


def changed(model: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of ``model`` whose tensors are what ``change`` makes of them."""
    shutil.copytree(model, folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return folder


def test_weights_that_are_not_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would fill in random values, and take NaN for an answer; a tied head is rightly absent."""
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = changed(model, tmp_path / "lacking", lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=rf"lacking has no {name}, which its config.json asks for"):
        TransformersModel(lacking, torch.device("cpu"))
    narrow = changed(model, tmp_path / "narrow", lambda w: w.update({name: w[name][:4].clone()}))
    with pytest.raises(UserError, match=r"transformers does not load .*narrow"):
        TransformersModel(narrow, torch.device("cpu"))
    tied = changed(model, tmp_path / "tied", lambda weights: weights.pop("lm_head.weight"))
    shape = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(shape | {"tie_word_embeddings": True}))
    assert TransformersModel(tied, torch.device("cpu")).logp([0], [1]) < 0
    broken = changed(model, tmp_path / "broken", lambda weights: weights["model.norm.weight"].fill_(math.nan))
    file = write(tmp_path / "p.jsonl", [{"prompt": "Name"}])
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match=r"^the model.s log-probabilities are not finite.* --dtype fp32"):
            na.generate(broken, file, temperature=temperature, max_tokens=2, device="cpu")
    with pytest.raises(UserError, match=r"broken: the model's log-probabilities are not finite"):
        na.compare(broken, model, file, max_tokens=2, device="cpu")
    assert talk(monkeypatch, "Name\n", str(broken)) == 1
    assert "are not finite" in capsys.readouterr().err


def test_chat_needs_a_template(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "plain")
    assert talk(monkeypatch, "Name\n", str(model), "--tokenizer", str(tmp_path / "plain")) == 1
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_vllm_is_asked_for_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of vLLM's name with the calls that its documentation lists, which answers by transformers."""
    asked: dict[str, Any] = {}

    class LLM:
        def __init__(self, **settings: Any) -> None:
            asked["settings"] = settings
            self._model = TransformersModel(Path(settings["model"]), torch.device("cpu"))

        def generate(self, prompts: Any, parameters: Any) -> Any:
            asked["parameters"] = parameters
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            made = self._model.generate(ids, Sampling(max_tokens=3), {1})
            for each in made:
                output = ModuleType("output")
                output.__dict__.update(
                    token_ids=list(each.tokens),
                    finish_reason=each.finish_reason,
                    cumulative_logprob=each.logprob,
                )
                result = ModuleType("result")
                result.__dict__["outputs"] = [output]
                yield result

    module = ModuleType("vllm")
    module.__dict__.update(LLM=LLM, SamplingParams=dict, __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", module)
    file = write(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS])
    rows = na.generate(model, file, max_tokens=3, backend="vllm", dtype="bf16", seed=5)
    assert rows == na.generate(model, file, max_tokens=3, backend="transformers", seed=5)
    assert asked["settings"]["dtype"] == "bfloat16" and not asked["settings"]["trust_remote_code"]
    first, second, _ = asked["parameters"]
    assert first["stop_token_ids"] == [1] and first["max_tokens"] == 3 and first["temperature"] == 0
    assert (first["seed"], second["seed"]) == (5, 6)


def test_variables_of_the_chat_template(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training takes them: other prompts with the variable than without, and no name unread."""
    briefly = "{% if brief is defined and brief %}briefly{% endif %}" + CHATML
    make_tokenizer(template=briefly).save_pretrained(tmp_path / "briefly")
    prompts = write(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "What?"}]}])
    given = ["generate", str(model), "--prompts", str(prompts), "--tokenizer", str(tmp_path / "briefly")]
    found = []
    for variables in ([], ["--chat-template-kwargs", '{"brief": true}']):
        assert main([*given, "--max-tokens", "2", *variables]) == 0
        found.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    (more,) = make_tokenizer()(["briefly"], add_special_tokens=False)["input_ids"]
    assert found[1] - found[0] == len(more)
    assert main([*given, "--chat-template-kwargs", '{"breif": true}']) != 0
    assert "does not read `breif`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--chat-template-kwargs", "brief"])
    assert "must be a JSON object of names and values, but is 'brief'" in capsys.readouterr().err
