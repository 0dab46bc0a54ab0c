"""What is exported stops where its training data stopped, and keeps its start's generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import fresh
from small_tokenizers import LLAMA3, make_tokenizer
from training_fixture import Project

from nxdt_align.cli import main
from nxdt_align.models.presets import read_config_json
from nxdt_align.weights.hf_writer import write_hf_folder

SFT = ("~model_alignment_strategy.dpo", "model_alignment_strategy.sft={}", "data.val_dir=null")
STEPS = (
    "trainer.max_steps=60",
    "model.optim.lr=1e-2",
    "model.optim.sched=null",
)
START: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": [1, 3],
    "pad_token_id": 5,
    "max_length": 200,
    "do_sample": False,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.44.0",
}


def said(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return content


def answer(folder: Path, words: str) -> str:
    """Greedy, by transformers alone, with the folder's own generation config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)
    model.save_pretrained(folder.parent / "saved_again")
    return str(tokenizer.decode(made[0, ids.shape[1] :]))


@pytest.mark.full
def test_an_export_stops_after_the_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Eos of config and tokenizer is </s>, the template's turns end with <|eot|>: generation stops at both.
    The start's settings stay as they are, also those that transformers itself would not save."""
    project = Project.create(tmp_path)
    make_tokenizer(template=LLAMA3).save_pretrained(tmp_path / "start")
    model = read_config_json(tmp_path / "config.json")
    write_hf_folder(tmp_path / "start_weights", model, fresh(model))
    for file in (tmp_path / "start_weights").iterdir():
        file.rename(tmp_path / "start" / file.name)
    (tmp_path / "start" / "generation_config.json").write_text(json.dumps(START))
    towns = ("Ulm", "Kiel", "Oslo", "Lima", "Nice", "Bari", "Cork", "Riga")
    rows = [{"prompt": [{"role": "user", "content": f"Tide in {t}?"}], "response": "yes"} for t in towns]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = f"exp_manager.resume_from_checkpoint={tmp_path}/start"
    own = ("data.tokenizer.type=", "model.model_config=null", "data.global_batch_size=8")
    assert project.train(*SFT, *STEPS, *own, start) == 0
    assert "temperature, top_p are kept, but do_sample is not true" in caplog.text

    run = project.only_run()
    eot = make_tokenizer().convert_tokens_to_ids("<|eot|>")
    wanted = START | {"eos_token_id": [1, 3, eot]}
    assert said(run / "hf_export") == wanted
    assert answer(run / "hf_export", "Tide in Oslo?") == "yes<|eot|>"
    # The newest checkpoint, with the run's tokenizer; there and back in NxD's shards.
    for command in (
        ["export", str(run), f"{tmp_path}/exported"],
        ["convert", str(run / "checkpoints"), f"{tmp_path}/shards", "--tp", "2"],
        ["convert", f"{tmp_path}/shards/model", f"{tmp_path}/back", "--tokenizer", f"{run}/for_export"],
    ):
        assert main([*command, "--quiet"]) == 0
    for name in ("exported", "back"):
        assert said(tmp_path / name) == wanted
        names = [sorted(f.name for f in folder.iterdir()) for folder in (tmp_path / name, run / "hf_export")]
        assert names[0] == names[1]
    # Trained on from there: nothing is there twice.
    onward = ("trainer.max_steps=1", f"exp_manager.resume_from_checkpoint={tmp_path}/shards")
    tokenizer = f"data.tokenizer.type={run}/for_export"
    assert project.train(*SFT, *own[1:], tokenizer, *onward) == 0
    assert said(project.runs()[-1] / "hf_export") == wanted
