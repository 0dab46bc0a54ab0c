"""Runs the golden YAMLs and reads off what they made: numbers that no change of the code's shape may move.

The one file of the guard that knows the package: its command line, ``record_ids`` of the data module, and the
names of a batch's tensors. All else is read off files, or through Lightning's and torch's own functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_fixture import scalars

from nxdt_align.cli import main

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PROJECT, WRITTEN, VALUES = GOLDEN / "project", GOLDEN / "written", GOLDEN / "values"
RUNS = {
    "dpo_shared_prompt": (),
    "dpo_packed": ("data.packing=packed", "model_alignment_strategy.dpo.label_smoothing=0.1"),
    "dpo_none": (
        "data.packing=none",
        "data.micro_batch_size=2",
        "model_alignment_strategy.dpo.loss_type=ipo",
    ),
    "orpo": ("~model_alignment_strategy.dpo", "model_alignment_strategy.orpo.beta=0.1"),
    "kto": ("~model_alignment_strategy.dpo", "model_alignment_strategy.kto.beta=0.2", "data.packing=packed"),
    "sft": ("~model_alignment_strategy.dpo", "model_alignment_strategy.sft.packing=True"),
}
"""Name -> overrides of project/run.yaml: four objectives, all three layouts."""
STOPPED = "dpo_shared_prompt"
"""The run of which written/ holds the first 3 steps."""
DATA_OF = {"kto": "labelled", "sft": "responses"}
REPRODUCIBLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
"""Environment in which every x86 CPU computes alike, in torch's own kernels, MKL's and oneDNN's. Else the
order of a sum is the CPU's own, and values near 0 (margins, accuracies of untrained models) are other values
on the next machine. It is read when torch is loaded, so golden runs have processes of their own. Square roots
need ``exact_roots`` besides."""
MEASURED = ("throughput", "throughput_peak")
"""Curves that are times."""
PLAN_FIELDS = ("input_ids", "position_ids", "labels", "response_positions", "record_index", "slot_role")


def exact_roots() -> None:
    """Let every square root of this process be the correctly rounded one.

    torch's ``sqrt`` goes to MKL's vector functions, whose kernel for SSE starts from ``rsqrtps``: an estimate
    that Intel's and AMD's CPUs make differently, under every MKL_CBWR. AdamW takes a root at every step. The
    root of a float64, good to its last bit or so, rounds to the right float32: none lies near a midpoint.
    """
    mkl = torch.sqrt

    def root(tensor: Tensor) -> Tensor:
        return mkl(tensor.double()).to(tensor.dtype)

    torch.sqrt = root
    Tensor.sqrt = root  # type: ignore[method-assign, assignment]
    torch._foreach_sqrt = lambda tensors: [root(tensor) for tensor in tensors]


def copy_project(folder: Path) -> Path:
    """The project's files in ``folder``, where its relative paths lead to."""
    shutil.copytree(PROJECT, folder, dirs_exist_ok=True)
    return folder


def arguments(name: str, *overrides: str) -> list[str]:
    files = DATA_OF.get(name, "pairs")
    data = (f"data.train_dir={files}.jsonl", f"data.val_dir={files}_val.jsonl")
    mine = (f"exp_manager.name={name}", f"data.cache_dir=cache_{name}")
    return ["train", "--config-path", ".", "--config-name", "run", *data, *mine, *RUNS[name], *overrides]


def train(project: Path, name: str, *overrides: str) -> Path:
    """Run one YAML in this process, in ``project``; returns its experiment folder."""
    with _in_folder(project):
        assert main(arguments(name, *overrides)) == 0
    (run,) = (project / "experiments" / name).glob("20*")
    return run


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Watch:
    """Reads the data's rows and the first step's gradients off a run, without a hand in it."""

    def __init__(self, start: Path) -> None:
        self._names = {_digest(tensor): name for name, tensor in load_file(start).items()}
        self.record_ids: list[str] = []
        self.plans: list[Any] = []
        self.gradients: dict[str, Any] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        fit = Trainer.fit

        def fit_and_look(trainer: Trainer, *args: Any, datamodule: Any, **kwargs: Any) -> None:
            self.record_ids = datamodule.record_ids("train")
            steps = [step for step, _ in zip(datamodule.train_dataloader(), range(5), strict=False)]
            self.plans = [[_describe_rows(batch) for batch in step] for step in steps]
            fit(trainer, *args, datamodule=datamodule, **kwargs)

        def look_at_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if not self.gradients:
                self.gradients = {
                    self._names[_digest(p.detach())]: project_tensor(p.grad) for p in parameters
                }

        hook = register_optimizer_step_pre_hook(look_at_gradients)
        Trainer.fit = fit_and_look  # type: ignore[method-assign, assignment]
        try:
            yield self
        finally:
            Trainer.fit = fit  # type: ignore[method-assign]
            hook.remove()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _describe_rows(batch: Any) -> dict[str, Any]:
    """Shape, tokens and places of a micro-batch: exact."""
    fields = {name: getattr(batch, name) for name in PLAN_FIELDS}
    digest = hashlib.sha256()
    for name, tensor in fields.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.to(torch.int64).contiguous().numpy().tobytes())
    rows, tokens = batch.input_ids.shape
    records = batch.record_index.tolist()
    return {
        "rows": rows,
        "tokens": tokens,
        "response_positions": batch.labels.shape[1],
        "records": records,
        "sha256": digest.hexdigest(),
    }


def project_tensor(tensor: Tensor) -> list[float]:
    """A tensor as five numbers: its norm, its sum, and its products with three fixed random directions."""
    flat = tensor.detach().double().flatten()
    made = torch.Generator().manual_seed(flat.numel())
    directions = torch.randn(3, flat.numel(), generator=made, dtype=torch.float64)
    return [float(flat.norm()), float(flat.sum()), *(directions @ flat).tolist()]


def read_run(run: Path) -> dict[str, Any]:
    """What a finished run's folder holds, without times."""
    export = run / "hf_export"
    weights = load_file(export / "model.safetensors")
    curves = {tag: values for tag, values in scalars(run).items() if tag not in MEASURED}
    identity = json.loads((run / "run_identity.json").read_text())
    return {
        "identity": identity["identity"],
        "curves": {tag: [[step, value] for step, value in values] for tag, values in sorted(curves.items())},
        "export": {
            "config": json.loads((export / "config.json").read_text()),
            "files": sorted(file.name for file in export.iterdir()),
            "tensors": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype),
                    "values": project_tensor(tensor),
                }
                for name, tensor in sorted(weights.items())
            },
        },
    }


def read_caches(folder: Path) -> list[str]:
    """Names of token caches and reference stores: hashes of all that went into them."""
    named = [*folder.glob("tokens/*"), *folder.glob("reference/*")]
    return sorted(str(entry.relative_to(folder)) for entry in named)


def alone(*arguments: str) -> str:
    """Run ``golden_alone.py``; returns what it printed."""
    script = str(Path(__file__).with_name("golden_alone.py"))
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, **REPRODUCIBLE, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def values_alone(project: Path, names: Sequence[str]) -> dict[str, Any]:
    """``one_process`` of each name."""
    file = project / "values.json"
    alone("values", str(project), str(file), *names)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def stopped_project(folder: Path) -> Path:
    """The project beside a run of an earlier version that was stopped after 3 of its 5 steps."""
    copy_project(folder)
    shutil.copytree(WRITTEN / "cache", folder / f"cache_{STOPPED}")
    shutil.copytree(WRITTEN / "run", folder / "experiments" / STOPPED / "2025-01-01_00-00-00")
    return folder


def resume(project: Path) -> Path:
    """Go on with the run of ``stopped_project``; returns its folder."""
    return Path(alone("reuse", str(project), STOPPED).splitlines()[-1])


def one_process(project: Path, name: str) -> dict[str, Any]:
    """Train in this process; everything that is golden about it."""
    with Watch(project / "start" / "model.safetensors").watching() as seen:
        run = train(project, name)
    return {
        "record_ids": seen.record_ids,
        "plans": seen.plans,
        "gradients": dict(sorted(seen.gradients.items())),
        **read_run(run),
        "caches": read_caches(project / f"cache_{name}"),
    }


def two_processes(project: Path, names: Sequence[str]) -> dict[str, Any]:
    """Train each in two processes, one after another: imports, the dear part, are paid for once."""
    ports = [_free_port() for _ in names]
    turns = [f"{name}:{port}" for name, port in zip(names, ports, strict=True)]
    command = [sys.executable, str(Path(__file__).with_name("golden_ranks.py")), *turns]
    path = os.pathsep.join(p for p in sys.path if p)
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            **REPRODUCIBLE,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "PYTHONPATH": path,
            "MASTER_ADDR": "127.0.0.1",
        }
        ranks.append(
            subprocess.Popen(
                command,
                cwd=project,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    found = {}
    for name in names:
        (run,) = (project / "experiments" / name).glob("20*")
        found[name] = read_run(run)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assert_golden(got: Any, want: Any, place: str = "") -> None:
    """Integers, texts and hashes exactly; floats to 1e-6 relative, and 1e-7 around 0.

    Of a list of floats (a tensor's projections, or a curve's point), the largest gives the scale: a sum that
    happens to be near 0 has no digits of its own.
    """
    if isinstance(want, Mapping):
        assert isinstance(got, Mapping) and got.keys() == want.keys(), place
        for key in want:
            assert_golden(got[key], want[key], f"{place}/{key}")
    elif isinstance(want, list) and any(isinstance(item, float) for item in want):
        scale = max(abs(item) for item in want if isinstance(item, float))
        assert len(got) == len(want), place
        for mine, theirs in zip(got, want, strict=True):
            tolerance = 1e-6 * scale + 1e-7 if isinstance(theirs, float) else 0
            assert abs(mine - theirs) <= tolerance, f"{place}: {got} is not {want}"
    elif isinstance(want, list):
        assert len(got) == len(want), place
        for index, item in enumerate(want):
            assert_golden(got[index], item, f"{place}[{index}]")
    else:
        assert got == want, f"{place}: {got!r} is not {want!r}"
