"""Curves and log files that find no space: one message each, no traceback, and the training goes on."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter
from training_fixture import Project, scalars

FILL = """
import logging
from lightning.pytorch import Callback

class Fill(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        for name in ("nemo_logger", "lightning.pytorch"):
            logger = logging.getLogger(name)
            for handler in logger.handlers:
                if isinstance(handler, logging.FileHandler) and trainer.global_step == 1:
                    handler.stream.close()
                    handler.stream = open("/dev/full", "w")
            for i in range(3):
                logger.warning("a line")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    # Those of earlier tests write to these tests' terminals and folders.
    for name in ("nemo_logger", "lightning", "lightning.pytorch", "lightning.fabric", "nxdt_align"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fill_logs.py").write_text(FILL)
    yield Project.create(tmp_path)


@pytest.mark.parametrize("at", ["the first value", "step 2", "the file"])
def test_curves_that_cannot_be_written(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written, write = [0], RecordWriter.write

    def until_full(self: RecordWriter, data: bytes) -> None:
        written[0] += 1
        if written[0] > 30:
            full()
        write(self, data)

    if at == "the file":
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    else:
        monkeypatch.setattr(RecordWriter, "write", full if at == "the first value" else until_full)
    assert project.train("trainer.max_steps=4", "data.val_dir=null") == 0
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Exception in thread" not in said
    run = project.only_run()
    assert said.count(f"create_tensorboard_logger: the curves in {run} cannot be written") == 1
    assert "the disk is full: free some space" in said and "training goes on without them" in said
    assert (run / "hf_export" / "model.safetensors").is_file()
    if at == "step 2":
        steps = [step for step, _ in scalars(run)["reduced_train_loss"]]
        assert steps and steps[-1] < 4


def test_log_files_that_cannot_be_written(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        project.train("trainer.max_steps=2", "data.val_dir=null", "trainer.callbacks=[fill_logs.Fill]") == 0
    )
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Logging error" not in said
    run = project.only_run()
    for name in ("nemo_log_globalrank-0_localrank-0.txt", "lightning_logs.txt"):
        assert said.count(f"the log {run}/{name} cannot be written: the disk is full") == 1
