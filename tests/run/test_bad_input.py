"""What a user can get wrong, through the command line: one message that says what to do, status 1."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input_fixture import Terminal, break_inputs, break_weights, expect, message
from damage import DAMAGE
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from training_fixture import ORPO, Project, assert_same_run

import nxdt_align
from nxdt_align.cli import main
from nxdt_align.data.records import record_id
from nxdt_align.engines.native.checkpoint import NativeCheckpoint, checkpoint_step
from nxdt_align.engines.native.tensors import write_tensors
from nxdt_align.named_tensors import summary
from nxdt_align.reference.parts import digest_of
from nxdt_align.run.folder_lock import LOCK, FolderLock
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.names import to_hf

RESUME = "exp_manager.resume_from_checkpoint"
DPO = "model_alignment_strategy.dpo"
SAVING = "exp_manager.checkpoint_callback_params"
STOPPING = "exp_manager.early_stopping_callback_params"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project.create(tmp_path_factory.mktemp("project"))
    break_inputs(made)
    return made


@pytest.fixture(scope="module")
def whole(project: Project) -> Path:
    """The folder of a run of 6 steps that nothing disturbed."""
    assert project.train(f"exp_manager.exp_dir={project.root}/whole", "trainer.max_steps=6") == 0
    return project.only_run("whole")


@pytest.fixture(scope="module")
def weights(project: Project, whole: Path) -> Path:
    break_weights(whole, project.root / "weights")
    return project.root / "weights"


@pytest.fixture
def terminal(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    logger = logging.getLogger("nxdt_align")
    logger.handlers.clear()  # an earlier test's, which writes to that test's terminal
    yield Terminal(project, tmp_path / "experiments", capsys)
    logger.handlers.clear()


CONFIGURATION: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown key": (
        ("trainer.max_stepz=3",),
        ("trainer.max_stepz: is not a known key", "did you mean trainer.max_steps?"),
    ),
    "several wrong values": (
        ("trainer.devices=0", "data.seq_length=abc", "precision.type=fp23", f"{DPO}.kl_beta=-1"),
        (
            "4 faults in {root}/conf/run.yaml",
            "trainer.devices: must be at least 1, but is 0",
            "data.seq_length: must be an integer, but is 'abc'",
            "precision.type: must be one of fp32, bf16SR,",
            "but is 'fp23'; did you mean fp32?",
            f"{DPO}.kl_beta: must be above 0, but is -1.0",
        ),
    ),
    "missing data file": (
        ("data.train_dir={root}/trian.jsonl",),
        ("data.train_dir: must be a file or folder that exists", "{root}/trian.jsonl", "mean train.jsonl?"),
    ),
    "missing validation file": (
        ("data.val_dir={root}/none/val.jsonl",),
        ("data.val_dir: must be a file or folder that exists", "there is no folder {root}/none"),
    ),
    "prompt without room for a response": (
        (f"{DPO}.max_prompt_length=128",),
        (f"{DPO}.max_prompt_length: must be below data.seq_length (128)", "but is 128"),
    ),
    "an optimizer as schedule, as NxDT's documentation lists it": (
        ("model.optim.sched.name=rprop",),
        ("model.optim.sched.name: must be a schedule; this is an optimizer", "set model.optim.name: rprop"),
    ),
    "tensor parallel": (
        ("distributed_strategy.tensor_model_parallel_size=4", "trainer.devices=1"),
        (
            "trainer.devices: times trainer.num_nodes must be a multiple of tensor_model_parallel_size (4)",
            "= 4, but is 1",
        ),
    ),
    "mode of the checkpoint callback": (
        ("exp_manager.checkpoint_callback_params.mode=best",),
        ("exp_manager.checkpoint_callback_params.mode: must be one of max, min, but is 'best'",),
    ),
    "packages of loggers": (
        ("exp_manager.create_wandb_logger=True", "exp_manager.create_mlflow_logger=True"),
        (
            "exp_manager.create_wandb_logger: needs the package wandb, which is not installed; pip install "
            "'nxdt-align[wandb]', or set exp_manager.create_wandb_logger=False",
            "exp_manager.create_mlflow_logger: needs the package mlflow",
            "exp_manager.wandb_logger_kwargs: must have a name or a project",
        ),
    ),
    "arguments of the W&B logger": (
        ("exp_manager.create_wandb_logger=True", "exp_manager.wandb_logger_kwargs={{projct: x}}"),
        (
            "exp_manager.wandb_logger_kwargs.projct: is not an argument of the wandb logger",
            "did you mean project?",
        ),
    ),
    "seed": (("seed=-1",), ("seed: must be at least 0, but is -1",)),
    "time": (("trainer.max_time=2h",), ("trainer.max_time: must be days:hours:minutes:seconds", "'2h'")),
    "empty tokenizer folder": (
        ("data.tokenizer.type={bad}/empty",),
        ("data.tokenizer.type: must be a tokenizer's folder, with a tokenizer.json", "{bad}/empty"),
    ),
    "tokenizer's file instead of its folder": (
        ("data.tokenizer.type={root}/tokenizer/tokenizer.json",),
        ("data.tokenizer.type: must be a folder, not a file", "did you mean {root}/tokenizer?"),
    ),
    "missing checkpoint": (
        (RESUME + "={root}/none",),
        (f"{RESUME}: must be a folder that exists", "{root}/none"),
    ),
    "empty checkpoint": (
        (RESUME + "={bad}/empty",),
        (f"{RESUME}: must be a folder that holds weights", "{bad}/empty", "name a Hugging Face folder or"),
    ),
}
"""Found without a model or a record: what is wrong, overrides, what the message must say."""

FILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "empty data": (
        ("data.train_dir={bad}/empty.jsonl",),
        ("data.train_dir: {bad}/empty.jsonl is empty; name a file with at least one record",),
    ),
    "blank data": (
        ("data.val_dir={bad}/blank.jsonl",),
        ("data.val_dir: {bad}/blank.jsonl holds no records; name a file",),
    ),
    "record without its key": (
        ("data.train_dir={bad}/no_key.jsonl",),
        (
            "data.train_dir: 1 bad of 22 records",
            "{bad}/no_key.jsonl:3: no `rejected`; the record has prompt, chosen",
            "fix them, or set data.on_bad_record=drop",
        ),
    ),
    "tokenizer that cannot be read": (
        ("data.tokenizer.type={bad}/tokenizer",),
        ("data.tokenizer.type: {bad}/tokenizer holds a tokenizer that cannot be read", "download it again"),
    ),
    "tokenizer larger than the model's vocabulary": (
        ("model.model_config={bad}/small_vocabulary.json",),
        (
            "data.tokenizer.type: the tokenizer has ",
            "the model's vocab_size is 100",
            "do not belong together",
        ),
    ),
    "safetensors cut in its header": (
        (RESUME + "={weights}/hf_header",),
        (RESUME + ": {weights}/hf_header/model.safetensors is damaged", "copy or download it again"),
    ),
    "safetensors cut in its tensors": (
        (RESUME + "={weights}/hf_data",),
        (RESUME + ": {weights}/hf_data/model.safetensors is damaged", "copy or download it again"),
    ),
    "Hugging Face folder without weights": (
        (RESUME + "={weights}/hf_none",),
        (RESUME + ": {weights}/hf_none has no weights: it must hold one of model.safetensors",),
    ),
    "checkpoint cut": (
        (RESUME + "={weights}/native_cut",),
        (
            RESUME + ": checkpoint {weights}/native_cut is incomplete: tensors/__0_0.distcp has 50000 bytes",
            "Take another checkpoint, or copy it again",
        ),
    ),
    "checkpoint without its last file": (
        (RESUME + "={weights}/native_no_summary",),
        (RESUME + ": {weights}/native_no_summary is not a whole checkpoint", "checkpoint.json is missing"),
    ),
    "folder of runs": (
        (RESUME + "={whole.parent}",),
        (RESUME + ": {whole.parent} is a folder of one run ({whole.name}): name one, such as {whole}",),
    ),
    "Hugging Face weights of fewer layers": (
        (RESUME + "={weights}/hf", "model.num_layers=3"),
        (RESUME, "missing: model.layers.2.mlp.up_proj.weight", "num_hidden_layers"),
    ),
    "damaged reference": (
        ("model_alignment_strategy.reference_model={weights}/native_cut",),
        ("model_alignment_strategy.reference_model: checkpoint {weights}/native_cut is incomplete",),
    ),
    "no Neuron device": (
        ("trainer.accelerator=neuron",),
        ("trainer.accelerator: is neuron, but torch finds", "; trainer.accelerator=cpu runs here"),
    ),
    "no CUDA device": (
        ("trainer.accelerator=cuda",),
        ("trainer.accelerator: is cuda, but torch finds", "; trainer.accelerator=cpu runs here"),
    ),
    "experiments folder below a file": (
        ("exp_manager.exp_dir={root}/train.jsonl",),
        ("exp_manager.exp_dir: must be a folder that can be written to", "{root}/train.jsonl is a file"),
    ),
    "file as log folder": (
        ("exp_manager.explicit_log_dir={root}/train.jsonl",),
        ("exp_manager.explicit_log_dir: must be a folder that can be written to", "choose another folder"),
    ),
    "a custom loss that is not there": (
        ("model_alignment_strategy.loss=no_such_module.Loss",),
        ("model_alignment_strategy.loss: no_such_module.Loss: cannot import the module no_such_module",),
    ),
    "file as cache": (
        ("data.cache_dir={root}/train.jsonl",),
        ("data.cache_dir: must be a folder that can be written to", "choose another folder"),
    ),
}
"""Found where files are opened."""

LATER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "checkpoint of the right size with other bytes": (
        (RESUME + "={weights}/native_zeros",),
        ("checkpoint {weights}/native_zeros is damaged", "Take another checkpoint, or copy it again"),
    ),
    "validation behind the epoch's end": (
        ("trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=100"),
        ("trainer.val_check_interval: must not be above the steps of an epoch (6)", "but is 100"),
    ),
    "settings of the optimizer": (
        ("model.optim.betas=[0.9, 2]",),
        ("model.optim (adamw_fp32OptState)", "Invalid beta", "betas=(0.9, 2)"),
    ),
    "settings of the early stopping": (
        ("exp_manager.create_early_stopping_callback=True", f"{STOPPING}={{{{mode: down}}}}"),
        (f"{STOPPING}: `mode` can be min, max, got down",),
    ),
    "a setting that NeMo does not know": (
        (f"{STOPPING}={{{{patient: 3}}}}",),
        (f"{STOPPING}.patient: Key 'patient' not in 'EarlyStoppingParams'",),
    ),
    "settings of the checkpoint callback": (
        (f"{SAVING}.every_n_epochs=-4", f"{SAVING}.every_n_train_steps=null"),
        (f"{SAVING}: Invalid value for every_n_epochs=-4",),
    ),
    "settings of TensorBoard": (
        ("exp_manager.summary_writer_kwargs={{max_queue: many}}",),
        ("exp_manager.summary_writer_kwargs.max_queue: must be an integer", "'many'"),
    ),
    "another name of a TensorBoard setting": (
        ("exp_manager.summary_writer_kwargs={{queue: 3}}",),
        ("exp_manager.summary_writer_kwargs.queue: is not a setting of the TensorBoard logger", "max_queue"),
    ),
    "a checkpoint's name that cannot be filled in": (
        ("exp_manager.checkpoint_callback_params.filename=x{{step:zz}}",),
        ("exp_manager.checkpoint_callback_params.filename: cannot be filled in", "Unknown format code 'z'"),
    ),
    "NaN in the weights, without a reference": (
        (RESUME + "={weights}/hf_nan", *ORPO),
        ("reduced_train_loss is nan at step 1", "check the start weights"),
    ),
    "NaN in the weights, fp16": (
        (RESUME + "={weights}/hf_nan", "precision.type=fp16", *ORPO),
        ("reduced_train_loss is nan at step 1", "check the start weights"),
    ),
    "NaN in the weights, reference during training": (
        (RESUME + "={weights}/hf_nan", f"{DPO}.precompute_ref_log_probs=False"),
        ("preflight: ", "log-probabilities are not finite before the first step", "check the start weights"),
    ),
}
"""Found behind the reading of the data."""


OF_A_RUN = (
    *("empty data", "blank data", "record without its key", "a custom loss that is not there"),
    *("checkpoint of the right size with other bytes", "validation behind the epoch's end"),
    *("NaN in the weights, without a reference", "NaN in the weights, fp16"),
    "NaN in the weights, reference during training",
)
"""What `nxdt-align config` says that it does not look into; it refuses all others, as train does."""


def test_no_such_config(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["train", "--config-path", str(project.root / "conf"), "--config-name", "runn"])
    shown = message(status, capsys.readouterr().err)
    expect(
        shown, ("no config 'runn': looked for {root}/conf/runn.yaml", "did you mean run?"), root=project.root
    )


@pytest.mark.parametrize(("overrides", "words"), CONFIGURATION.values(), ids=CONFIGURATION)
def test_faults_of_the_configuration(
    terminal: Terminal, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    places = {"root": terminal.project.root, "bad": terminal.project.root / "bad"}
    given = [text.format(**places) for text in overrides]
    shown = terminal.fail(*given)
    expect(shown, words, **places)
    assert message(*terminal.run("config", *given)) == shown
    assert not terminal.experiments.exists()


@pytest.mark.parametrize(("overrides", "words"), (FILES | LATER).values(), ids=FILES | LATER)
def test_faults_of_files_and_settings(
    terminal: Terminal,
    weights: Path,
    whole: Path,
    overrides: tuple[str, ...],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = terminal.project.root
    places = {"root": root, "bad": root / "bad", "weights": weights, "whole": whole}
    given = [text.format(**places) for text in overrides]
    shown = terminal.fail(*given)
    expect(shown, words, **places)
    assert not terminal.checkpoints
    if request.node.callspec.id not in OF_A_RUN:
        assert message(*terminal.run("config", *given)) == shown
    if request.node.callspec.id in FILES:
        # Data are read in turn, so what was tokenized before the fault may be kept.
        assert not list(terminal.experiments.glob("[!c]*"))


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_every_tensor_of_another_shape_is_named(terminal: Terminal, weights: Path, kind: str) -> None:
    shown = terminal.fail(f"{RESUME}={weights}/{kind}", "model.hidden_size=64")
    names = HFFolder(weights / "hf").names()
    assert len(names) == 21  # all have the hidden size in their shape
    for name in summary(map(to_hf, names) if kind == "hf" else names):
        assert f"{name} must have shape" in shown
    assert "model.norm.weight" in shown and "[64]" in shown and "[32]" in shown
    assert not (terminal.experiments / "run").exists()


def test_full_state_of_another_shape(terminal: Terminal, weights: Path) -> None:
    """With the optimizer's state the checkpoint is read by the engine, not as a source of weights."""
    shown = terminal.fail(
        f"{RESUME}={weights}/native", "model.hidden_size=64", "model.weight_init_only=False"
    )
    assert "does not fit the model (21 tensors)" in shown
    assert not terminal.checkpoints


def test_wrong_number_of_processes(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    shown = terminal.fail()
    expect(shown, ("must be the number of processes that run (2), but is 1 x 1 = 1", "train.sh or torchrun"))
    assert not terminal.experiments.exists()


def test_processes_without_a_launcher(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    shown = terminal.fail("trainer.devices=2")
    expect(shown, ("2 processes (WORLD_SIZE) cannot connect to each other", "RANK", "train.sh or torchrun"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_unwritable_experiments_folder(terminal: Terminal, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        shown = terminal.fail()
    finally:
        tmp_path.chmod(0o700)
    expect(shown, ("exp_manager.exp_dir: must be a folder that can be written to", "is not writable"))


# What goes on, and says so


def test_bad_records_can_be_dropped(terminal: Terminal) -> None:
    bad = terminal.project.root / "bad" / "no_key.jsonl"
    shown = terminal.succeed(f"data.train_dir={bad}", "data.on_bad_record=drop")
    expect(shown, ("1 bad of 22 records", "missing key: 1", "{bad}:3", "21 train examples"), bad=bad)


def test_a_prompt_longer_than_the_sequence_is_cut(terminal: Terminal) -> None:
    shown = terminal.succeed(f"data.train_dir={terminal.project.root}/bad/long.jsonl")
    assert "data: 22 train examples (22 truncated)" in shown
    assert terminal.checkpoints


def test_validation_switched_off(terminal: Terminal) -> None:
    """As NxDT's YAMLs are shipped: val_dir set, limit_val_batches 0.0."""
    val = terminal.project.root / "val.jsonl"
    shown = terminal.succeed(f"data.val_dir={val}", "trainer.limit_val_batches=0.0")
    expect(shown, ("notice: trainer.limit_val_batches is 0.0", "no reference log-probabilities are computed"))
    (part,) = terminal.experiments.glob("cache/reference/*/part-*.safetensors")
    assert len(load_arrays(part)["ids"]) == 22
    assert "val data" not in shown


def test_damaged_checkpoints(terminal: Terminal, whole: Path) -> None:
    """The older one goes on, bit for bit, also where nothing says any more whose it is; where there is none,
    nothing starts. test_search.py has every kind of damage."""
    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    val = f"data.val_dir={terminal.project.root}/val.jsonl"
    terminal.succeed(keep, val, "trainer.max_steps=4")
    older, newest = terminal.checkpoints
    (run,) = (terminal.experiments / "run").iterdir()
    shard = newest / "tensors" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    older.rename(terminal.experiments / "kept")
    shown = terminal.fail(val, "trainer.max_steps=6")
    expect(
        shown,
        (
            "resume_if_exists: is True, but no checkpoint of this run in {run}/checkpoints is whole:\n",
            "{newest} is damaged: tensors/__0_0.distcp: its bytes have changed since it was written",
            "Restore one from a copy, or start anew, at step 0, with exp_manager.resume_if_exists=False",
        ),
        run=run,
        newest=newest,
    )
    (terminal.experiments / "kept").rename(older)
    (run / "run_identity.json").write_text("{")
    shown = terminal.succeed(val, "trainer.max_steps=6")
    expect(
        shown,
        (
            "{run}/run_identity.json is damaged (",
            "not resumed from: checkpoint {newest} is damaged",
            "resuming from step 2 instead, {older}",
        ),
        run=run,
        newest=newest,
        older=older,
    )
    assert shard.read_bytes() == data  # left as it is, for whoever wants to know
    shutil.rmtree(newest)
    assert [run] == list((terminal.experiments / "run").iterdir())
    assert_same_run(run, whole)


RUN_FILES = (
    *("checkpoints/*4-*/checkpoint.json", "checkpoints/*4-*/trainer.pt"),
    *("checkpoints/*4-*/tensors/.metadata", "checkpoints/*4-*/tensors/__0_0.distcp"),
    *("run_identity.json", ".running/lock", "events.out.tfevents.*"),
)


@pytest.fixture(scope="module")
def interrupted(project: Project, whole: Path) -> Path:
    """The experiments of a run that was ended after 4 steps, and has kept steps 2 and 4."""
    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    where = project.root / "interrupted"
    assert project.train(f"exp_manager.exp_dir={where}", keep, "trainer.max_steps=4") == 0
    (run,) = (where / "run").iterdir()
    (run / LOCK).write_text('{"host": "a", "pid": 1, "started": "1"}')  # as a kill leaves it
    return where


@pytest.mark.full
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", RUN_FILES)
def test_any_damaged_file_of_a_run(
    terminal: Terminal, interrupted: Path, whole: Path, file: str, how: str
) -> None:
    """The weights of a run that nothing disturbed, in the same folder; and where the older checkpoint is
    gone, those or one message."""
    val = f"data.val_dir={terminal.project.root}/val.jsonl"
    shutil.copytree(interrupted, terminal.experiments)
    (run,) = (terminal.experiments / "run").iterdir()
    (damaged,) = run.glob(file)
    DAMAGE[how](damaged)
    shutil.copytree(terminal.experiments, terminal.experiments.with_name("alone"))
    shown = terminal.succeed(val, "trainer.max_steps=6")
    assert "resuming from this run's own checkpoint" in shown and "Traceback" not in shown
    assert [run] == list((terminal.experiments / "run").iterdir())
    (written,) = (run / "checkpoints").glob("*6-*")
    (wanted,) = (whole / "checkpoints").glob("*6-*")
    for name in NativeCheckpoint(wanted).names():
        assert torch.equal(NativeCheckpoint(written).read(name), NativeCheckpoint(wanted).read(name))

    shutil.rmtree(terminal.experiments)
    terminal.experiments.with_name("alone").rename(terminal.experiments)
    (older,) = (run / "checkpoints").glob("*2-*")
    shutil.rmtree(older)
    status, shown = terminal.train(val, "trainer.max_steps=6")
    assert [run] == list((terminal.experiments / "run").iterdir())
    if status == 0:
        assert "resuming from this run's own checkpoint" in shown and "Traceback" not in shown
    else:
        assert damaged.name in message(status, shown)


def test_a_run_that_is_resumed_twice_at_once(terminal: Terminal) -> None:
    terminal.succeed()
    (run,) = (terminal.experiments / "run").iterdir()
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}
    with FolderLock(run):
        before[run / LOCK] = (run / LOCK).stat().st_mtime_ns
        shown = terminal.fail("trainer.max_steps=4")
        expect(shown, ("{run} is in use: process", "Wait for it or end it"), run=run)
        assert before == {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}
    terminal.succeed("trainer.max_steps=4")
    assert [run] == list((terminal.experiments / "run").iterdir())


# Values that do not belong


def test_tampered_reference_values_stop_before_the_first_step(terminal: Terminal) -> None:
    terminal.succeed()
    shutil.rmtree(terminal.experiments / "run")
    (part,) = terminal.experiments.glob("cache/reference/*/part-*.safetensors")
    ids, values = (load_arrays(part)[name] for name in ("ids", "values"))
    values = values + np.float32(1)
    save_arrays({"ids": ids, "values": values}, part, metadata={"digest": digest_of(ids, values)})
    shutil.rmtree(part.parent / "tables")
    shown = terminal.fail()
    expect(
        shown,
        ("preflight: policy and reference differ by", "nats per token", "remove {store}", "preflight=False"),
        store=part.parent,
    )
    assert not terminal.checkpoints
    terminal.succeed("exp_manager.preflight=False")


def test_log_folder_of_another_run(terminal: Terminal, tmp_path: Path) -> None:
    explicit = f"exp_manager.explicit_log_dir={tmp_path}/mine"
    terminal.succeed(explicit)
    before = sorted((tmp_path / "mine").rglob("*"))
    shown = terminal.fail(explicit, "seed=8")
    expect(
        shown,
        ("exp_manager.explicit_log_dir: {mine} holds checkpoints of another run", "choose another"),
        mine=tmp_path / "mine",
    )
    shown = terminal.fail(explicit, "exp_manager.resume_if_exists=False")
    expect(shown, ("exp_manager.resume_if_exists: is False, but", "set it to True to resume from them"))
    assert sorted((tmp_path / "mine").rglob("*")) == before


def test_a_reference_that_is_not_finite_names_the_record(
    project: Project, weights: Path, tmp_path: Path
) -> None:
    """In a process of its own: this way leads through Lightning and NeMo, whose stderr counts too."""
    overrides = (f"{RESUME}={weights}/hf_nan", f"exp_manager.exp_dir={tmp_path}", "data.val_dir=null")
    command = [sys.executable, "-m", "nxdt_align", *project.arguments(*overrides)]
    environment = os.environ | {"PYTHONPATH": str(Path(nxdt_align.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shown = message(done.returncode, done.stderr)
    rows = [json.loads(line) for line in (project.root / "train.jsonl").read_text().splitlines()]
    known = {record_id(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows}
    named = re.search(r"reference log-probabilities of \d+ record.* first record (\w+): \[nan, nan\]", shown)
    assert named is not None and named[1] in known
    assert "Check the reference's weights and the precision" in shown
    assert not list(tmp_path.glob("run/*/checkpoints/*"))


# A full disk


def refuse_sync(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """No space left, found where the bytes go to the device, for files with ``part`` in their path."""
    sync = os.fsync

    def full(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        if part in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)


def refuse_size(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The system itself breaks the checkpoint's largest file off, as `ulimit -f` does."""

    def limited(folder: Path, *arguments: Any) -> None:
        assert part in str(folder)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            write_tensors(folder, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr("nxdt_align.engines.native.saving.write_tensors", limited)


@pytest.mark.parametrize(
    ("refuse", "reason"),
    [(refuse_sync, "the disk is full: free some space"), (refuse_size, "this process's limit (ulimit -f)")],
)
def test_a_checkpoint_that_finds_no_space_leaves_the_previous_one_whole(
    terminal: Terminal,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse: Callable[[pytest.MonkeyPatch, str], None],
    reason: str,
) -> None:
    val = f"data.val_dir={terminal.project.root}/val.jsonl"
    terminal.succeed(val)
    (previous,) = terminal.checkpoints
    with monkeypatch.context() as patch:
        refuse(patch, "/checkpoints/")
        shown = terminal.fail(val, "trainer.max_steps=6")
    expect(
        shown, ("cannot write checkpoint {at}", reason, "Earlier checkpoints are whole"), at=previous.parent
    )
    assert terminal.checkpoints == [previous] and checkpoint_step(previous) == 2
    assert not list(terminal.experiments.rglob("*.nxdt-tmp"))
    assert NativeCheckpoint(previous).fingerprint()

    shown = terminal.succeed(val, "trainer.max_steps=6")
    assert f"resuming from this run's own checkpoint {previous}" in shown
    (run,) = (terminal.experiments / "run").iterdir()
    assert [f.name for f in (run / "checkpoints").iterdir()] == [f.name for f in terminal.checkpoints]
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("/cache/tokens", ("token cache {experiments}/cache/tokens", "(data.cache_dir)")),
        ("/cache/reference", ("cannot write reference log-probabilities to {experiments}/cache/reference",)),
        ("run_identity", ("{experiments}/run/", "run_identity.json")),
        ("hf_export", ("cannot write {experiments}/run/", "/hf_export")),
    ],
)
def test_no_space_for_other_files(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, part: str, words: tuple[str, ...]
) -> None:
    with monkeypatch.context() as patch:
        refuse_sync(patch, part)
        shown = terminal.fail()
    expect(shown, (*words, "the disk is full: free some space"), experiments=terminal.experiments)
    assert not list(terminal.experiments.rglob("*.nxdt-tmp"))
    terminal.succeed()
    (run,) = {c.parent.parent for c in terminal.checkpoints}
    assert (run / "hf_export" / "model.safetensors").is_file()
