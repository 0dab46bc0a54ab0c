"""The model spread over two processes, as torchrun starts them, against one process: the same
curves, weights and export, across a resume."""

from __future__ import annotations

import pytest
from matrix import but_for
from safetensors.torch import load_file
from training_fixture import Project, final_weights, scalars

SPREADS = {
    "tensor and sequence parallel": ("tensor_model_parallel_size=2", "sequence_parallel=True"),
    "zero1": ("zero1=True",),
    "fsdp": ("fsdp=full",),
}
CURVES = (
    *("reduced_train_loss", "rewards/margins", "logps/chosen", "gradient_norm", "parameter_norm"),
    *("val_loss", "lr", "consumed_samples"),
)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One process, trained."""
    project = Project.create(tmp_path_factory.mktemp("project"))
    assert project.train(*common(project, "one")) == 0
    return project


def common(project: Project, name: str) -> list[str]:
    return [f"exp_manager.exp_dir={project.root}/{name}", "exp_manager.log_parameter_norm=True"]


@pytest.mark.parametrize("name", but_for(["tensor and sequence parallel"], SPREADS))
def test_as_one_process(one: Project, name: str) -> None:
    """2e-5 on every curve, 5e-5 on every weight after 8 AdamW steps, four of them before a restart."""
    folder = name.replace(" ", "_")
    spread = ["trainer.devices=2", *(f"distributed_strategy.{key}" for key in SPREADS[name])]
    one.train_spread(2, *common(one, folder), *spread, "trainer.max_steps=4")
    one.train_spread(2, *common(one, folder), *spread)
    run, alone = one.only_run(folder), one.only_run("one")
    got, want = scalars(run), scalars(alone)
    assert [step for step, _ in got["reduced_train_loss"]] == list(range(1, 9))
    for tag in CURVES:
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=2e-5, rel=2e-5), tag
    weights = final_weights(alone)
    for parameter, tensor in final_weights(run).items():
        assert float((tensor - weights[parameter]).abs().max()) <= 5e-5, parameter
    exported, wished = (load_file(r / "hf_export" / "model.safetensors") for r in (run, alone))
    assert exported.keys() == wished.keys()
    for parameter, tensor in exported.items():
        assert float((tensor - wished[parameter]).abs().max()) <= 5e-5, parameter
