"""Models that transformers computes, through the command line: trained, resumed, exported and inspected."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_fixture import VALUES, config_of, write_model
from small_tokenizers import make_tokenizer
from training_fixture import Project, assert_same_run, final_weights, scalars

import nxdt_align
from nxdt_align.cli import main
from nxdt_align.run.conversion import export

USUAL = ("gpt2", "mixtral")


def prepared(root: Path, name: str, **changes: Any) -> tuple[Project, str]:
    """A project and a folder of a model to start from."""
    project, tokenizer = Project.create(root), make_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = config_of(name, vocab_size=len(tokenizer), **ids, **changes)
    write_model(root / "start", config, tokenizer)
    return project, str(root / "start")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.full) for name in VALUES]
)
def test_a_model_is_trained_resumed_and_exported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    project, start = prepared(tmp_path, name)
    given = (f"model.model_config={start}", f"exp_manager.resume_from_checkpoint={start}")
    assert project.train(*given, "trainer.max_steps=4") == 0
    assert "ForCausalLM computes the model" in "".join(capsys.readouterr()) or name == "gpt2"
    assert project.train(*given, "trainer.max_steps=6") == 0
    run = project.only_run()
    losses = [value for _, value in scalars(run)["reduced_train_loss"]]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] != losses[0]
    (checkpoint,) = [f for f in (run / "checkpoints").iterdir() if f.is_dir()]
    export(checkpoint, tmp_path / "exported")
    auto: Any = transformers.AutoModelForCausalLM
    loaded, report = auto.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values()), report
    trained, held = final_weights(run), loaded.state_dict()
    before = auto.from_pretrained(start).state_dict()
    assert all(held[name].equal(weight) for name, weight in trained.items())
    assert any(not before[name].equal(weight) for name, weight in trained.items())
    # transformers' own forward pass of what was exported gives what training computes.
    pairs = nxdt_align.load_pairs(str(tmp_path / "val.jsonl"), start, seq_length=128)
    one, other = (nxdt_align.load_policy(f).logps(pairs) for f in (checkpoint, tmp_path / "exported"))
    assert one.sums.equal(other.sums)
    example = pairs[0]
    ids = torch.tensor([[*example.prompt, *example.responses[0]]])
    with torch.no_grad():
        logps = loaded.eval()(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
    wanted = logps[len(example.prompt) - 1 :].sum()
    torch.testing.assert_close(one.sums[0], wanted, rtol=2e-5, atol=2e-5)
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["layers"] > 0


PEFT = "model_alignment_strategy.peft"
LORA = (
    f"{PEFT}.rank=4",
    f"{PEFT}.alpha=8",
    "model_alignment_strategy.dpo.precompute_ref_log_probs=False",
    "exp_manager.export_hf=adapter",
    "model.optim.lr=0.02",
)


MERGED = ("exp_manager.export_hf=merged",)


def loaded(folder: Path, adapter: Path | None = None) -> Any:
    """transformers' model of ``folder``, in PEFT's with ``adapter``."""
    import peft
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] % 60, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gpt2", [f"{PEFT}.modules_to_save=[ln_f,wpe]"]),
        *(
            pytest.param(name, more, marks=pytest.mark.full)
            for name, more in (
                ("gpt2", [f"{PEFT}.dora=True"]),
                ("granite", ["precision.type=mixed_precision", f"{PEFT}.modules_to_save=[lm_head]"]),
                ("mixtral", [f"{PEFT}.modules_to_save=[lm_head,gate]"]),
                ("deepseek_v3", [f"{PEFT}.rslora=True", f"{PEFT}.target_modules=[o_proj,kv_b_proj]"]),
            )
        ),
    ],
)
def test_adapters_are_trained_resumed_exported_and_started_from(
    name: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    project, start = prepared(tmp_path, name)

    def train(folder: str, *overrides: str, weights: Path | str = start) -> Path:
        given = (f"model.model_config={start}", f"exp_manager.resume_from_checkpoint={weights}")
        assert (
            project.train(*given, *LORA, *more, *overrides, f"exp_manager.exp_dir={tmp_path}/{folder}") == 0
        )
        return project.only_run(folder)

    whole = train("whole", "trainer.max_steps=4")
    train("broken", "trainer.max_steps=2")
    assert_same_run(train("broken", "trainer.max_steps=4"), whole)
    ln_2 = pytest.approx(math.log(2), abs=1e-5)
    losses = [value for _, value in scalars(whole)["reduced_train_loss"]]
    assert losses[0] == ln_2 and losses[-1] != losses[0]
    parts = {tensor.rpartition(".")[2] for tensor in final_weights(whole)}
    assert (
        {"lora_A", "lora_B"} <= parts <= {"lora_A", "lora_B", "magnitude", "trained_weight", "trained_bias"}
    )
    adapter, merged = whole / "hf_export", tmp_path / "merged"
    wanted = logits(loaded(Path(start), adapter))
    assert float((wanted - logits(loaded(Path(start)))).abs().max()) > 1e-3
    for place in (whole, adapter):
        assert main(["export", "--merge", "--quiet", str(place), str(merged)]) == 0
        torch.testing.assert_close(logits(loaded(merged)), wanted, rtol=0, atol=1e-5)
        shutil.rmtree(merged)
    # On from the adapter, whose frozen copy is the reference; at the run's end checked against the trainer.
    second = train("second", "trainer.max_steps=2", f"{PEFT}.dropout=0", *MERGED, weights=adapter)
    assert "the adapter frozen" in capsys.readouterr().err
    assert scalars(second)["reduced_train_loss"][0][1] == ln_2
    assert float((logits(loaded(second / "hf_export")) - wanted).abs().max()) > 1e-3
