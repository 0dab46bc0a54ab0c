"""Supervised fine-tuning: its loss against the oracle, its formats, and as the stage before DPO."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import GRADIENT_TOLERANCE, dataset, engine
from oracle import assert_gradients_close, gradients, plain_model, random_examples, response_logp
from training_fixture import Project, final_weights, scalars

from nxdt_align.data.packing import Layout
from nxdt_align.data.token_columns import TokenColumns
from nxdt_align.data.token_sets import TokenizedSet, WholeSequences
from nxdt_align.data.tokenize import Encoded
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.sft import SFTLoss

SFT = ("~model_alignment_strategy.dpo", "model_alignment_strategy.sft.packing=True")
TEMPLATE = "{% for m in messages %}{{ m.content }} is {% endfor %}"
SHORT = ("trainer.max_steps=3", "data.val_dir=null")


@pytest.mark.parametrize("layout", ["none", "packed"])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("on_prompt", [False, True])
def test_the_mean_is_over_the_tokens_that_are_trained_on(layout: Layout, micro: int, on_prompt: bool) -> None:
    """Packed records do not see each other, or their log-probabilities would not be the oracle's."""
    plain = random_examples(7, seed=2, responses=1)
    encoded = [Encoded(e.prompt.tolist(), [e.responses[0].tolist()], truncated=False) for e in plain.examples]
    columns = TokenColumns.of([e.record_id for e in plain.examples], encoded)
    examples = TokenizedSet.of(columns, [e.record_id for e in plain.examples])
    if on_prompt:
        examples = WholeSequences(examples)
    policy = engine()
    data = dataset(examples, layout, micro)  # type: ignore[arg-type]
    output = policy.step(data[tuple(range(7))], GlobalMeanObjective(SFTLoss()))

    model = plain_model(0)
    total, tokens = torch.zeros(()), 0
    for example in plain.examples:
        prompt, response = example.prompt, example.responses[0]
        if on_prompt:
            prompt, response = prompt[:1], np.concatenate([prompt[1:], response])
        total = total - response_logp(model, prompt, response)
        tokens += len(response)
    wanted = total / tokens
    assert float(output.loss) == pytest.approx(float(wanted.detach()), rel=2e-6)
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)


@pytest.mark.parametrize("form", ["input_output", "prompt_response", "messages"])
def test_the_forms_of_records_give_the_same_run(tmp_path: Path, form: str) -> None:
    project = Project.create(tmp_path)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    pairs = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    write = {
        "input_output": lambda r: {"input": r["prompt"], "output": r["chosen"]},
        "prompt_response": lambda r: {"prompt": r["prompt"], "response": r["chosen"]},
        "messages": lambda r: {
            "messages": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["chosen"]},
            ]
        },
    }[form]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(write(r)) + "\n" for r in pairs))
    assert project.train(*SFT, *SHORT, f"data.train_dir={tmp_path}/sft.jsonl") == 0
    losses = [value for _, value in scalars(project.only_run())["reduced_train_loss"]]
    assert len(losses) == 3 and all(math.isfinite(value) for value in losses)
    if form != "messages":  # which go through the chat template
        assert project.train(*SFT, *SHORT, f"exp_manager.exp_dir={tmp_path}/pairs") == 0
        of_pairs = scalars(project.only_run("pairs"))["reduced_train_loss"]
        assert losses == pytest.approx([value for _, value in of_pairs])


def test_training_on_the_prompt_is_another_loss(tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    on_prompt = "model_alignment_strategy.sft.train_on_prompt=True"
    assert project.train(*SFT, *SHORT) == 0
    assert project.train(*SFT, *SHORT, on_prompt, f"exp_manager.exp_dir={tmp_path}/all") == 0
    alone, everything = (scalars(project.only_run(n)) for n in ("experiments", "all"))
    first = [curves["reduced_train_loss"][0][1] for curves in (alone, everything)]
    assert abs(first[0] - first[1]) > 1e-4


def test_sft_then_dpo_from_its_checkpoint(tmp_path: Path) -> None:
    """The reference implementation's two stages: DPO's policy and reference are what SFT ended with."""
    project = Project.create(tmp_path)
    assert project.train(*SFT, *SHORT, f"exp_manager.exp_dir={tmp_path}/sft") == 0
    stage = project.only_run("sft")
    (checkpoint,) = [f for f in (stage / "checkpoints").iterdir() if f.is_dir()]
    resting = (
        "model.optim.lr=0.0",
        "model.optim.weight_decay=0.0",
        "trainer.max_steps=2",
        "data.val_dir=null",
    )
    start = f"exp_manager.resume_from_checkpoint={checkpoint}"
    assert project.train(start, *resting, f"exp_manager.exp_dir={tmp_path}/dpo") == 0
    run = project.only_run("dpo")
    assert scalars(run)["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    wanted = final_weights(stage)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in final_weights(run).items())
