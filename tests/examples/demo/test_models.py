"""The demo on a small model of each family: its configuration, and the whole way in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo.evaluate import HuggingFaceModel, read_pairs
from demo.models import LLAMA, MODELS, model_config
from demo.prepare import Sizes, prepare

from nxdt_align.cli import main
from nxdt_align.models.families import FAMILIES
from nxdt_align.models.presets import from_hf_dict, parameter_count

OTHERS = [name for name in MODELS if name not in (LLAMA, "gemma")]


def test_there_is_one_of_each_family() -> None:
    assert {str(model["model_type"]) for model in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_is_that_of_transformers_class(name: str) -> None:
    import transformers

    values = model_config(name, 384, bos=1, eos=2, pad=0)
    shape = from_hf_dict(values)
    model_class = getattr(transformers, values["architectures"][0])
    model = model_class(model_class.config_class(**values))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == parameter_count(shape)
    assert 500_000 < parameters < 1_000_000


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
def test_the_whole_way_in_a_few_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up, DPO from its export, and transformers' view of both on the held-out pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NXDT_DEMO_DIR", str(tmp_path))
    monkeypatch.setenv("NXDT_DEMO_MODEL", name)
    prepare(tmp_path, seed=7, sizes=Sizes(sft=320, train=64, heldout=32), model=name)
    steps = ("trainer.max_steps=6", "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1")
    (tmp_path / "warmup").symlink_to(train("SFT", name, *steps, "model.optim.sched.warmup_steps=1"))
    aligned = train("DPO", name, *steps, "model.optim.sched.warmup_steps=1", "model.optim.lr=3e-4")
    pairs = read_pairs(tmp_path / "data")
    before, after = (HuggingFaceModel(folder).likelihoods(pairs) for folder in (tmp_path / "warmup", aligned))
    gained = (after.chosen - before.chosen) - (after.rejected - before.rejected)
    assert gained.mean() > 0
    assert json.loads((aligned / "config.json").read_text())["model_type"] == MODELS[name]["model_type"]


def train(objective: str, name: str, *overrides: str) -> Path:
    """The export of a run."""
    assert main(["train", "--config-name", f"tiny_llama_{objective}_config", *overrides]) == 0
    (export,) = Path.cwd().glob(f"nemo_experiments/tiny_{name}_{objective}/*/hf_export")
    return export
