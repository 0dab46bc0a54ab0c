"""Runs through the command line: what they write, and that a broken-off run ends as an uninterrupted one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixture import ORPO, Project, assert_same_run, final_weights, scalars

from nxdt_align.config.start import SAMPLES_FILE
from nxdt_align.engines.native import gradients
from nxdt_align.engines.native.tensors import TensorFolder

NXDT_METRICS = {
    *("reduced_train_loss", "chosen_rewards", "rejected_rewards", "lr", "parameter_norm", "gradient_norm"),
    *("global_step", "consumed_samples", "throughput", "throughput_peak"),
}
TRL_METRICS = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.create(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project: Project) -> Path:
    """The folder of a run of 8 steps that nothing interrupted: 22 pairs by 4 are epochs of 6 steps."""
    assert project.train(f"exp_manager.exp_dir={project.root}/whole") == 0
    return project.only_run("whole")


def test_a_fresh_run_starts_at_ln_2_and_logs_every_metric_at_every_step(whole: Path) -> None:
    curves = scalars(whole)
    assert curves.keys() >= NXDT_METRICS | TRL_METRICS | {"val_loss", "val_rewards/accuracies"}
    for tag in NXDT_METRICS | TRL_METRICS:
        assert [step for step, _ in curves[tag]] == list(range(1, 9))
    assert curves["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert curves["rewards/margins"][0][1] == pytest.approx(0.0, abs=1e-5)
    assert [value for _, value in curves["consumed_samples"]] == [4, 8, 12, 16, 20, 22, 26, 30]
    assert [step for step, _ in curves["val_loss"]] == [3, 6]
    assert curves["val_loss"][-1][1] < math.log(2)


def test_what_a_run_leaves_behind(whole: Path) -> None:
    assert len(list(whole.glob("events.out.tfevents.*"))) == 1
    assert [f.name for f in (whole / "checkpoints").iterdir()] == ["run--step=8-consumed_samples=30.0"]
    assert (whole / "hf_export" / "config.json").is_file()
    assert (whole / "hf_export" / "tokenizer.json").is_file()


def test_the_export_loads_in_transformers_and_generates(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(whole / "hf_export")
    model = AutoModelForCausalLM.from_pretrained(whole / "hf_export")
    ids = tokenizer("the a is", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
    trained = final_weights(whole)["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight.data, trained)


@pytest.mark.parametrize(
    "stops", [*(pytest.param(stops, marks=pytest.mark.full) for stops in [(5,), (6,)]), (3, 7)], ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    project: Project, whole: Path, stops: tuple[int, ...]
) -> None:
    """Stopped in an epoch, at its end, and where validation was due; TRAIN_ITERS would do the same."""
    experiments = "resumed-" + "-".join(map(str, stops))
    for steps in (*stops, 8):
        assert (
            project.train(f"exp_manager.exp_dir={project.root}/{experiments}", f"trainer.max_steps={steps}")
            == 0
        )
    assert_same_run(project.only_run(experiments), whole)


def test_a_resumed_run_reads_each_tensor_of_its_checkpoint_once(
    project: Project, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and the optimizer's two moments and step count: 4 tensors per weight."""
    read: list[str] = []
    read_into = TensorFolder.read_into

    def counted(folder: TensorFolder, parts: Mapping[str, Any]) -> None:
        read.extend(parts)
        read_into(folder, parts)

    where = f"exp_manager.exp_dir={project.root}/read-once"
    assert project.train(where, "trainer.max_steps=4") == 0
    monkeypatch.setattr(TensorFolder, "read_into", counted)
    assert project.train(where) == 0
    assert len(read) == len(set(read)) == 4 * len(final_weights(whole))
    assert_same_run(project.only_run("read-once"), whole)


def test_a_crash_between_checkpoints_goes_on_from_the_last_one(
    project: Project, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step behind the checkpoint is trained and logged twice; TensorBoard shows it once."""
    from nxdt_align.training.module import AlignmentModule

    log_step = AlignmentModule._log_step

    def crash(module: AlignmentModule, *arguments: object) -> None:
        log_step(module, *arguments)  # type: ignore[arg-type]
        if module.global_step == 5:
            raise RuntimeError("power cut")

    where = f"exp_manager.exp_dir={project.root}/crashed"
    with monkeypatch.context() as patch:
        patch.setattr(AlignmentModule, "_log_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            project.train(where)
    (left,) = (project.only_run("crashed") / "checkpoints").iterdir()
    assert "step=4" in left.name
    assert project.train(where) == 0
    assert_same_run(project.only_run("crashed"), whole)


def test_the_reference_pass_is_not_repeated(
    project: Project, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new run with the same inputs and the same cache computes none; another beta does not either."""
    caplog.set_level("INFO", logger="nxdt_align")
    cache = f"data.cache_dir={project.root}/whole/cache"
    overrides = ("trainer.max_steps=1", "model_alignment_strategy.dpo.kl_beta=0.1", cache)
    assert project.train(f"exp_manager.exp_dir={project.root}/again", *overrides) == 0
    passes = [r.getMessage() for r in caplog.records if "reference log-probs of" in r.getMessage()]
    assert len(passes) == 2 and all(" 0 computed" in message for message in passes)


def test_a_changed_input_meets_no_stale_value(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    """Other truncation, other fingerprint: everything is computed again, in a folder of its own."""
    caplog.set_level("INFO", logger="nxdt_align")
    cache = f"data.cache_dir={project.root}/stale"
    for prompt in (64, 5):
        where = f"exp_manager.exp_dir={project.root}/stale{prompt}"
        length = f"model_alignment_strategy.dpo.max_prompt_length={prompt}"
        assert project.train(where, length, cache, "trainer.max_steps=1") == 0
    assert len(list((project.root / "stale" / "reference").iterdir())) == 2


def test_reference_during_training_gives_the_same_run(project: Project, whole: Path) -> None:
    """precompute_ref_log_probs: False, which NxDT cannot do. Rows differ in their neighbours, so
    values agree to fp32 rounding (2e-5 a curve) and not bit for bit."""
    where = f"exp_manager.exp_dir={project.root}/during"
    assert project.train(where, "model_alignment_strategy.dpo.precompute_ref_log_probs=False") == 0
    during, before = scalars(project.only_run("during")), scalars(whole)
    for tag in ("reduced_train_loss", "chosen_rewards", "val_loss"):
        wanted = [value for _, value in before[tag]]
        assert [value for _, value in during[tag]] == pytest.approx(wanted, abs=2e-5, rel=2e-4)


def test_the_reference_computes_in_its_own_dtype(project: Project, whole: Path) -> None:
    """Beside an fp32 policy a bf16 reference is off by its rounding from the first step on, alike in the
    pre-fit pass and during training; fp32 is what it was anyway, with the same stored values."""
    curves = {}
    for dtype, before in (("bf16", True), ("bf16", False), ("fp32", True)):
        name = f"reference-{dtype}-{before}"
        where = (f"exp_manager.exp_dir={project.root}/{name}", f"data.cache_dir={project.root}/whole/cache")
        chosen = (
            f"model_alignment_strategy.reference_dtype={dtype}",
            f"model_alignment_strategy.dpo.precompute_ref_log_probs={before}",
        )
        stores = set((project.root / "whole" / "cache" / "reference").iterdir())
        assert project.train(*where, *chosen, "trainer.max_steps=3") == 0
        new = set((project.root / "whole" / "cache" / "reference").iterdir()) - stores
        assert len(new) == (dtype == "bf16" and before), "the dtype is part of the fingerprint"
        curves[dtype, before] = [value for _, value in scalars(project.only_run(name))["rewards/margins"]]
    wanted = [value for _, value in scalars(whole)["rewards/margins"]][:3]
    # beta 0.3 times log-ratios that are rounding alone: of the last digits of log-probs of so many nats.
    nats = max(abs(scalars(whole)[f"logps/{side}"][0][1]) for side in ("chosen", "rejected"))
    assert curves["fp32", True] == wanted
    assert abs(wanted[0]) <= 0.3 * 2 * nats * torch.finfo(torch.float32).eps
    assert 1e-5 < abs(curves["bf16", True][0]) < 0.05
    assert curves["bf16", False] == pytest.approx(curves["bf16", True], abs=5e-3)


@pytest.mark.parametrize("layout", ["none", "packed"])
def test_layouts_train_alike(project: Project, whole: Path, layout: str) -> None:
    where = f"exp_manager.exp_dir={project.root}/{layout}"
    assert project.train(where, f"data.packing={layout}") == 0
    got, want = scalars(project.only_run(layout)), scalars(whole)
    for tag in ("reduced_train_loss", "rewards/margins", "gradient_norm", "val_loss"):
        wanted = [value for _, value in want[tag]]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, abs=5e-5, rel=5e-4), tag


def test_dpo_then_orpo_under_one_name_never_meet(project: Project, whole: Path) -> None:
    """NxDT's two YAMLs share a name: an ORPO run must not go on from the DPO run's checkpoint."""
    where = f"exp_manager.exp_dir={project.root}/whole"
    assert project.train(where, *ORPO) == 0
    dpo, orpo = project.runs("whole")
    curves = scalars(orpo)
    assert [step for step, _ in curves["reduced_train_loss"]] == list(range(1, 9))
    assert {"nll_loss", "log_odds_ratio", "log_odds_chosen"} <= curves.keys()
    assert dpo == whole
    shutil.rmtree(orpo)


def test_compile_only_writes_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nxdt_align.engines.xla.is_available", lambda: False)
    monkeypatch.setenv("COMPILE", "1")
    before = sorted(project.root.rglob("*"))
    assert project.train(f"exp_manager.exp_dir={project.root}/dry", "trainer.max_steps=3") == 0
    assert sorted(project.root.rglob("*")) == before
    assert "COMPILE=1: torch_xla is not installed, so the dry-run steps run" in caplog.text


def test_weight_init_only_starts_a_new_run_from_weights_alone(project: Project, whole: Path) -> None:
    """From a checkpoint of ours and from its export: the same weights, so the same run, step 1 first."""
    (checkpoint,) = (whole / "checkpoints").iterdir()
    curves = []
    for name, start in (("from-checkpoint", checkpoint), ("from-export", whole / "hf_export")):
        overrides = (f"exp_manager.resume_from_checkpoint='{start}'", "trainer.max_steps=2")
        assert project.train(f"exp_manager.exp_dir={project.root}/{name}", *overrides) == 0
        curves.append(scalars(project.only_run(name)))
    assert [step for step, _ in curves[0]["lr"]] == [1, 2] and curves[0]["lr"][0][1] == 0.0
    assert curves[0]["reduced_train_loss"] == curves[1]["reduced_train_loss"]
    assert curves[0]["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)


def test_a_full_checkpoint_goes_on_where_weight_init_only_is_false(project: Project, whole: Path) -> None:
    where = f"exp_manager.exp_dir={project.root}/first-half"
    samples = "exp_manager.sample_during_eval={prompts: 1, max_tokens: 8}"
    assert project.train(where, "trainer.max_steps=4", samples) == 0
    (half,) = (project.only_run("first-half") / "checkpoints").iterdir()
    overrides = (f"exp_manager.resume_from_checkpoint='{half}'", "model.weight_init_only=False")
    # Broken off and resumed itself, the run has the reference that it began with, not its start's policy.
    second = (f"exp_manager.exp_dir={project.root}/second-half", *overrides, samples)
    assert project.train(*second, "trainer.max_steps=6") == 0
    assert project.train(*second) == 0
    got, want = final_weights(project.only_run("second-half")), final_weights(whole)
    assert all(torch.equal(got[name], want[name]) for name in want)
    # The policy answers where this run begins, and so does its reference, the start of the one before.
    before, told = (
        [json.loads(line) for line in (project.only_run(name) / SAMPLES_FILE).open()]
        for name in ("first-half", "second-half")
    )
    assert [(each["step"], each["validation"]) for each in told] == [(4, 0), (6, 1)]
    assert told[1]["before"] == told[0]["completion"]
    assert told[0]["reference"] == told[1]["reference"] == before[0]["completion"] != ""


@pytest.mark.parametrize(
    "kind",
    ["mixed_precision", "mixed_precisionSR", "mixed_precision_SR", "bf16SR", "autocast", "manual", "fp16"],
)
def test_every_precision_trains(project: Project, kind: str) -> None:
    """In 16 bits the loss starts at ln 2 within the preflight's tolerance, and stays finite."""
    where = f"exp_manager.exp_dir={project.root}/{kind}"
    manual = ("precision.xla_downcast_bf16='1'",) if kind == "manual" else ()
    assert project.train(where, f"precision.type={kind}", "trainer.max_steps=3", *manual) == 0
    losses = [value for _, value in scalars(project.only_run(kind))["reduced_train_loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=0.05) and all(map(math.isfinite, losses))


def test_fp16_skips_what_overflows_and_goes_on_after_a_break(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped steps use up their data and count, but move neither weights nor the learning rate; the scale
    and their number are logged, and a run that was stopped in between ends as one that was not."""
    monkeypatch.setattr(gradients, "INITIAL", 2.0**40)
    monkeypatch.setattr(gradients, "BACKOFF", 2.0**-7)
    for folder, stops in (("fp16-whole", (8,)), ("fp16-broken", (2, 5, 8))):
        for steps in stops:
            where = f"exp_manager.exp_dir={project.root}/{folder}"
            assert project.train(where, "precision.type=fp16", f"trainer.max_steps={steps}") == 0
    run = project.only_run("fp16-whole")
    assert_same_run(project.only_run("fp16-broken"), run)
    curves = {tag: [value for _, value in points] for tag, points in scalars(run).items()}
    count = int(curves["skipped_steps"][-1])
    assert 3 <= count <= 5
    assert curves["skipped_steps"] == [min(step, count) for step in range(1, 9)]
    assert curves["loss_scale"] == [2.0 ** (40 - 7 * min(step, count)) for step in range(1, 9)]
    assert curves["consumed_samples"] == [4, 8, 12, 16, 20, 22, 26, 30]
    assert len(curves["gradient_norm"]) == 8 - count
    assert curves["global_step"] == list(range(1, 9))
    assert all(map(math.isfinite, curves["reduced_train_loss"]))
    assert len(set(curves["parameter_norm"][:count])) == 1 < len(set(curves["parameter_norm"][count:]))
    assert len(set(curves["lr"][: count + 1])) == 1 < len(set(curves["lr"][count:]))


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.activations_checkpoint_granularity=full",),
        pytest.param(
            (
                "model.activations_checkpoint_granularity=selective",
                "model.activations_checkpoint_recompute=[CoreAttention,LlamaMLP]",
            ),
            marks=pytest.mark.full,
        ),
        ("data.num_workers=2",),
    ],
    ids=["full", "selective", "workers"],
)
def test_these_change_nothing_in_the_result(
    project: Project, whole: Path, overrides: tuple[str, ...]
) -> None:
    name = overrides[0].split("=")[1]
    assert project.train(f"exp_manager.exp_dir={project.root}/same-{name}", *overrides) == 0
    assert_same_run(project.only_run(f"same-{name}"), whole)


def test_epochs_instead_of_steps(project: Project) -> None:
    """Two epochs of 6 steps; a schedule without max_steps spans the run: warm-up 2, then to 0 at 12."""
    where = f"exp_manager.exp_dir={project.root}/epochs"
    schedule = "model.optim.sched.max_steps=null"
    assert project.train(where, "trainer.max_steps=-1", "trainer.max_epochs=2", schedule) == 0
    rates = [value for _, value in scalars(project.only_run("epochs"))["lr"]]
    assert rates == pytest.approx([3e-3 * x for x in (0, 0.5, *[(12 - i) / 10 for i in range(2, 12)])])


def test_save_last_and_top_k(project: Project) -> None:
    where = f"exp_manager.exp_dir={project.root}/kept"
    keep = ("exp_manager.checkpoint_callback_params.save_top_k=2", "trainer.max_steps=7")
    last = "exp_manager.checkpoint_callback_params.save_last=True"
    assert project.train(where, *keep, last) == 0
    names = sorted(f.name.split("-consumed")[0] for f in (project.only_run("kept") / "checkpoints").iterdir())
    assert names == ["run--step=6", "run--step=7", "run--step=7"]
    assert project.train(where, *keep, last, "trainer.max_steps=8") == 0
    assert [step for step, _ in scalars(project.only_run("kept"))["lr"]] == list(range(1, 9))
