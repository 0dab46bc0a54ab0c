"""Models of every family through the command line: a YAML trains one, and transformers loads its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families_fixture import BASE, VALUES, draw
from training_fixture import Project, final_weights, scalars

import nxdt_align
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig, from_hf_dict
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.run.conversion import export
from nxdt_align.weights.hf_writer import write_hf_folder

USUAL = ("gemma2", "olmo2")


def prepared(root: Path, name: str) -> tuple[Project, DecoderConfig]:
    """A project whose model is one of the family, with weights to start from."""
    project = Project.create(root)
    known = json.loads((root / "config.json").read_text())
    given = {key: known[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = from_hf_dict(BASE | VALUES[name] | given | {"num_hidden_layers": 2, "sliding_window_pattern": 2})
    model = Decoder(config, DenseAttention())
    draw(model, 0, 0.1)
    write_hf_folder(root / "start", config, model.state_dict(), tokenizer_dir=root / "tokenizer")
    return project, config


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.full) for name in VALUES]
)
def test_a_family_is_trained_and_exported(name: str, tmp_path: Path) -> None:
    import transformers

    project, config = prepared(tmp_path, name)
    start = str(tmp_path / "start")
    given = (
        f"model.model_config={start}",
        f"exp_manager.resume_from_checkpoint={start}",
        "trainer.max_steps=4",
    )
    assert project.train(*given) == 0
    run = project.only_run()
    losses = [value for _, value in scalars(run)["reduced_train_loss"]]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] != losses[0]
    (checkpoint,) = [f for f in (run / "checkpoints").iterdir() if f.is_dir()]
    export(checkpoint, tmp_path / "exported")
    auto: Any = transformers.AutoModelForCausalLM
    loaded, report = auto.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values()), report
    model = Decoder(config, DenseAttention())
    model.load_state_dict(final_weights(run))
    ids = torch.randint(config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    index = torch.arange(60, dtype=torch.int32)[None]
    context = model.model.prepare(torch.zeros_like(index), index + 1, DenseAttention().prepare)
    with torch.no_grad():
        ours = model.logits(model(ids, index.long(), context))
        torch.testing.assert_close(loaded.eval()(ids).logits, ours, rtol=0, atol=1e-5)
    # The same model again for a script, from the checkpoint and from its export.
    pairs = nxdt_align.load_pairs(str(tmp_path / "val.jsonl"), str(tmp_path / "tokenizer"), seq_length=128)
    one, other = (nxdt_align.load_policy(f).logps(pairs) for f in (checkpoint, tmp_path / "exported"))
    assert one.sums.equal(other.sums)


def test_attention_that_cannot_cap_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project, _ = prepared(tmp_path, "gemma2")
    given = (f"model.model_config={tmp_path / 'start'}", "data.packing=none", "data.attention=causal")
    assert project.train(*given) != 0
    said = capsys.readouterr().err
    assert "this model's capped scores need a backend that caps them: set data.attention=dense" in said
