"""A model that is not finite is never written, ranked or exported, and the last good checkpoint stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import but_for
from rank_processes import run_forked
from training_fixture import Project, final_weights

from nxdt_align.engines.native.engine import NativeEngine

EVERY_STEP = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    import nemo.utils.exp_manager  # noqa: F401 (its log handlers keep stderr, which no test may have replaced)

    return Project.create(tmp_path_factory.mktemp("project"))


def checkpoints(run: Path) -> list[str]:
    return sorted(f.name.split("-consumed")[0] for f in (run / "checkpoints").iterdir() if f.is_dir())


def spoil_after(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Have ``step`` leave one NaN behind, in a weight or in a moment of the optimizer."""
    from nxdt_align.training.strategy import EngineStrategy

    optimizer_step = EngineStrategy.optimizer_step
    done: list[int] = []

    def spoiled(strategy: EngineStrategy, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = optimizer_step(strategy, optimizer, *args, **kwargs)
        done.append(1)
        if len(done) == step:
            parameter = dict(strategy.engine.named_parameters())["model.norm.weight"]
            tensor = parameter if what == "weight" else optimizer.state[parameter]["exp_avg_sq"]
            with torch.no_grad():
                tensor[3] = torch.nan
        return result

    monkeypatch.setattr(EngineStrategy, "optimizer_step", spoiled)


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.log_every_n_steps=1",),
        ("trainer.log_every_n_steps=100",),
        (
            "trainer.log_every_n_steps=1",
            "exp_manager.create_tensorboard_logger=False",
            "exp_manager.log_gradient_norm=False",
        ),
        ("exp_manager.create_checkpoint_callback=False", "trainer.log_every_n_steps=100"),
    ],
    ids=["logged", "not logged", "no logger", "no checkpoints"],
)
def test_a_learning_rate_that_destroys_the_model(
    project: Project, overrides: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 1 of the warm-up has rate 0; what step 2 makes of the weights gives step 3 no finite gradient."""
    where = (f"exp_manager.exp_dir={tmp_path}/experiments", "model.optim.lr=1e30", "trainer.max_steps=3")
    assert project.train(*where, EVERY_STEP, *overrides) == 1
    said = capsys.readouterr().err
    (run,) = (tmp_path / "experiments" / "run").glob("20*")
    assert "is nan at step 3; the first tensor that is not finite is model.embed_tokens.weight" in said
    assert not (run / "hf_export").exists()
    if "create_checkpoint_callback" in overrides[0]:
        assert "There is no checkpoint yet" in said
        return
    assert checkpoints(run) == ["run--step=2"]
    assert f"The last good checkpoint is kept: {run}/checkpoints/run--step=2" in said
    assert all(bool(weight.isfinite().all()) for weight in final_weights(run).values())


@pytest.mark.parametrize("background", [False, True], ids=["at once", "background"])
@pytest.mark.parametrize(
    ("what", "named"),
    [("weight", "model.norm.weight"), ("moment", "optimizer.model.norm.weight.exp_avg_sq")],
)
def test_one_value_that_no_loss_has_shown_yet(
    project: Project,
    what: str,
    named: str,
    background: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It comes after step 4's loss, so only a look at the tensors themselves finds it before the save."""
    where = f"exp_manager.exp_dir={tmp_path}/experiments"
    with monkeypatch.context() as patch:
        spoil_after(patch, 4, what)
        assert project.train(where, f"exp_manager.async_checkpointing={background}") == 1
    said = capsys.readouterr().err
    (run,) = (tmp_path / "experiments" / "run").glob("20*")
    assert "run--step=4-consumed_samples=16.0 is not written: the model is not finite at step 4" in said
    assert f"the first tensor that is not finite is {named} (on rank 0)" in said
    assert checkpoints(run) == ["run--step=2"] and not (run / "hf_export").exists()
    assert project.train(where) == 0  # from step 2
    assert checkpoints(run) == ["run--step=8"]


def test_a_run_that_ends_between_checkpoints(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the save of the last step nor the export is made."""
    spoil_after(monkeypatch, 3, "weight")
    assert project.train(f"exp_manager.exp_dir={tmp_path}/experiments", "trainer.max_steps=3") == 1
    (run,) = (tmp_path / "experiments" / "run").glob("20*")
    assert "run--step=3-consumed_samples=12.0 is not written" in capsys.readouterr().err
    assert checkpoints(run) == ["run--step=2"] and not (run / "hf_export").exists()


def test_an_export_without_checkpoints(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_after(monkeypatch, 3, "weight")
    none = "exp_manager.create_checkpoint_callback=False"
    assert project.train(f"exp_manager.exp_dir={tmp_path}/experiments", "trainer.max_steps=3", none) == 1
    (run,) = (tmp_path / "experiments" / "run").glob("20*")
    assert f"export {run}/hf_export is not written" in capsys.readouterr().err
    assert not (run / "hf_export").exists()


def test_a_weight_beyond_the_exports_dtype(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1e5 is finite in float32 masters, and infinite in fp16, which is exported."""
    from nxdt_align.training.hooks import FinishRun

    on_fit_end = FinishRun.on_fit_end

    def widened(hook: FinishRun, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            dict(hook._engine.named_parameters())["model.norm.weight"][0] = 1e5
        on_fit_end(hook, trainer, module)

    monkeypatch.setattr(FinishRun, "on_fit_end", widened)
    where = f"exp_manager.exp_dir={tmp_path}/experiments"
    assert project.train(where, "trainer.max_steps=2", "precision.type=fp16") == 1
    said = capsys.readouterr().err
    assert "hf_export is not written" in said and "model.norm.weight" in said


def test_an_earlier_checkpoint_that_is_not_finite_is_not_resumed(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As versions before this one may have written it."""
    from nxdt_align.training.finite import FiniteCheck

    where = f"exp_manager.exp_dir={tmp_path}/experiments"
    with monkeypatch.context() as patch:
        patch.setattr(FiniteCheck, "check_weights", lambda *_, **__: None)
        spoil_after(patch, 4, "weight")
        assert project.train(where, "trainer.max_steps=4") == 0
    assert project.train(where) == 1
    assert "holds values that are not finite, first model.norm.weight" in capsys.readouterr().err


def test_steps_that_are_not_logged_fetch_nothing(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 steps, logged after 4 and 8: two transfers, whatever is checked."""
    fetched: list[int] = []
    fetch = NativeEngine.fetch

    def counted(engine: NativeEngine, values: Sequence[torch.Tensor]) -> list[float]:
        fetched.append(len(values))
        return fetch(engine, values)

    monkeypatch.setattr(NativeEngine, "fetch", counted)
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=8"
    none = "trainer.limit_val_batches=0"
    where = f"exp_manager.exp_dir={tmp_path}/experiments"
    assert project.train(where, "trainer.log_every_n_steps=4", every, none) == 0
    assert len([count for count in fetched if count]) == 2
    # Loss and gradient norm of four steps travel with the logged values.
    assert fetched[0] > 8


@pytest.mark.parametrize("layout", but_for(["pipeline"], ["data", "tensor", "pipeline"]))
def test_all_ranks_stop(project: Project, layout: str, tmp_path: Path) -> None:
    """A NaN on rank 1 alone, after the step's loss."""
    sizes = {
        "data": ["distributed_strategy.zero1=True"],
        "tensor": ["distributed_strategy.tensor_model_parallel_size=2"],
        "pipeline": ["distributed_strategy.pipeline_model_parallel_size=2"],
    }[layout]
    script = (Path(__file__).parent.parent / "support" / "spoiled_rank.py").read_text()
    overrides = [f"exp_manager.exp_dir={tmp_path}/experiments", "trainer.devices=2", *sizes]
    ended = run_forked(2, *project.arguments(*overrides), script=script)
    said = "".join(ended.said)
    assert all(ended.statuses) and "the model is not finite at step 4" in said, said[-3000:]
    assert "(on rank 1)" in said
    (run,) = (tmp_path / "experiments" / "run").glob("20*")
    assert checkpoints(run) == ["run--step=2"] and not (run / "hf_export").exists()
