"""A small project with everything in it that is broken, and a terminal to run it in."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from training_fixture import Project

from nxdt_align.cli import main


def break_inputs(project: Project) -> None:
    """Fill bad/ with data, a tokenizer and a model's shape that do not do."""
    bad = project.root / "bad"
    bad.mkdir()
    rows = [json.loads(line) for line in (project.root / "train.jsonl").read_text().splitlines()]
    (bad / "empty.jsonl").write_text("")
    (bad / "blank.jsonl").write_text("\n \n")
    write_rows(bad / "long.jsonl", [row | {"prompt": row["prompt"] + " the" * 200} for row in rows])
    without_key = [dict(row) for row in rows]
    del without_key[2]["rejected"]
    write_rows(bad / "no_key.jsonl", without_key)
    for name in ("empty", "tokenizer"):
        (bad / name).mkdir()
    (bad / "tokenizer" / "tokenizer.json").write_text("{}")
    shape = json.loads((project.root / "config.json").read_text())
    (bad / "small_vocabulary.json").write_text(json.dumps(shape | {"vocab_size": 100}))


def break_weights(run: Path, folder: Path) -> None:
    """Fill ``folder`` with hf and native as ``run`` wrote them, and with copies that are broken."""
    (saved,) = (run / "checkpoints").iterdir()
    for name in ("hf", "hf_header", "hf_data", "hf_none", "hf_nan"):
        shutil.copytree(run / "hf_export", folder / name)
    for name in ("native", "native_cut", "native_zeros", "native_no_summary"):
        shutil.copytree(saved, folder / name)
    cut(folder / "hf_header" / "model.safetensors", 100)
    cut(folder / "hf_data" / "model.safetensors", 50_000)
    (folder / "hf_none" / "model.safetensors").unlink()
    tensors = load_file(folder / "hf_nan" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "hf_nan" / "model.safetensors", metadata={"format": "pt"})
    cut(folder / "native_cut" / "tensors" / "__0_0.distcp", 50_000)
    zeros = folder / "native_zeros" / "tensors" / "__0_0.distcp"
    zeros.write_bytes(bytes(zeros.stat().st_size))
    (folder / "native_no_summary" / "checkpoint.json").unlink()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@dataclass
class Terminal:
    """Trains in this process, in an experiments folder of its own, and reads what the user would see."""

    project: Project
    experiments: Path
    capture: pytest.CaptureFixture[str]

    def train(self, *overrides: str) -> tuple[int, str]:
        """Exit status, and all that was written to stderr."""
        self.project.await_next_second(self.experiments)  # which is no folder of the project's
        return self.run("train", *overrides)

    def run(self, verb: str, *overrides: str) -> tuple[int, str]:
        """As ``train``, for a verb that takes a configuration."""
        self.capture.readouterr()
        settings = (f"exp_manager.exp_dir={self.experiments}", "data.val_dir=null", "trainer.max_steps=2")
        status = main([verb, *self.project.arguments(*settings, *overrides)[1:]])
        return status, self.capture.readouterr().err

    def succeed(self, *overrides: str) -> str:
        status, shown = self.train(*overrides)
        assert status == 0, shown
        return shown

    def fail(self, *overrides: str) -> str:
        """The one message."""
        return message(*self.train(*overrides))

    @property
    def checkpoints(self) -> list[Path]:
        """Of all runs; NeMo's empty marks of unfinished ones, which are files, do not count."""
        return sorted(f for f in self.experiments.glob("run/*/checkpoints/*") if f.is_dir())


def message(status: int, shown: str) -> str:
    assert status == 1, shown
    assert "Traceback" not in shown
    errors = re.findall(r"^error: .*", shown, re.MULTILINE | re.DOTALL)
    assert len(errors) == 1 and shown.count("error: ") == 1, shown
    return str(errors[0])


def expect(text: str, words: tuple[str, ...], **places: Path) -> None:
    for word in words:
        assert word.format(**places) in text
