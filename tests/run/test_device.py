"""The device of a run: ``trainer.accelerator``, and where COMPILE=1 takes its dry-run steps."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from rank_processes import run_forked

from nxdt_align.config.data import Attention, DataConfig
from nxdt_align.config.engines import find_engine_faults, keys_without_effect
from nxdt_align.config.faults import ConfigError
from nxdt_align.config.model import ModelConfig
from nxdt_align.config.schema import (
    Accelerator,
    Config,
    DistributedStrategyConfig,
    PrecisionConfig,
    TrainerConfig,
)
from nxdt_align.engines import xla
from nxdt_align.errors import SharedError, UserError
from nxdt_align.models.presets import TINY
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.run.computing import attention, compiling, say_choices
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.dry_run import DryRun
from nxdt_align.run.mode import RunMode
from nxdt_align.run.native import NativeParts
from nxdt_align.run.processes import device


def config(accelerator: Accelerator, attention: Attention = "auto") -> Config:
    return replace(
        Config(), trainer=TrainerConfig(accelerator=accelerator), data=DataConfig(attention=attention)
    )


@pytest.mark.parametrize("accelerator", ["cuda", "neuron"])
def test_an_accelerator_that_is_not_here(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(UserError, match=f"is {accelerator}, but torch finds no acceler.*=cpu runs"):
        device(config(accelerator), RunEnv(), RunMode())
    other = torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: other)
    with pytest.raises(UserError, match=f"is {accelerator}, but torch finds xpu alone"):
        device(config(accelerator), RunEnv(), RunMode())


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        (False, r"no accelerator: torch-neuronx 2.99.3.0.1 goes with torch 2.99, but .*=cpu runs here"),
        (True, r"no accelerator: its packages fit, so that the Neuron driver or runtime .*=cpu runs here"),
    ],
)
def test_a_broken_torch_neuron_does_not_train_on_the_cpu(
    fits: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto is neuron where TorchNeuron is installed. This process's torch was imported without it."""
    monkeypatch.setattr("nxdt_align.config.neuron_packages.TORCH_NEURON_PYTHON", (3, 0))
    release = ".".join(torch.__version__.split(".")[:2]) if fits else "2.99"
    info = tmp_path / f"torch_neuronx-{release}.3.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-neuronx\nVersion: {release}.3.0.1\n")
    for module in ("torch_neuronx", "nki"):
        (tmp_path / f"{module}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: None)
    wordings: dict[Accelerator, str] = {"auto": "auto, which is neuron where Torch", "neuron": "neuron, but"}
    for accelerator, meant in wordings.items():
        with pytest.raises(UserError, match=f"accelerator: is {meant}.*{said}"):
            device(config(accelerator), RunEnv(), RunMode())
        with pytest.raises(UserError, match=said):
            device(config(accelerator), RunEnv(compile_only=True), DryRun())
    assert device(config("cpu"), RunEnv(), RunMode()).type == "cpu"


@pytest.mark.parametrize(
    ("kind", "lnc", "said"),
    [
        ("cuda", None, "must be 4 at most here: torch finds 4 cuda devices; but is {}"),
        ("neuron", None, r"4 logical NeuronCores \(trainer.lnc 2\), or 8 with trainer.lnc=1, .*; but is {}"),
        ("neuron", 1, r"finds 4 logical NeuronCores \(trainer.lnc 1\); but is {}"),
    ],
)
def test_more_processes_than_devices(
    kind: str, lnc: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here: Any = SimpleNamespace(type=kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: here)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    moved: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", moved.append)
    monkeypatch.setattr("nxdt_align.run.processes.torch.device", lambda *of: of)

    def on(devices: int, env: RunEnv) -> Any:
        given = replace(Config(), trainer=TrainerConfig(devices=devices, lnc=lnc))
        return device(given, env, RunMode())

    assert on(4, RunEnv(local_rank=3)) == (kind, 3)
    for rank in (0, 7):  # all say it, so one of a node is heard
        with pytest.raises(SharedError, match=said.format(8)):
            on(8, RunEnv(local_rank=rank))
    with pytest.raises(UserError, match=said.format(6)) as error:
        on(4, RunEnv(local_rank=5))
    assert not isinstance(error.value, SharedError)
    assert moved == ([3] if kind == "cuda" else [])
    no_device = RunEnv(local_rank=7, compile_only=True, compiles_without_device=True)
    assert on(8, no_device) == (kind, 7)


def test_only_neuron_is_compiled_for_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that was built for CUDA names it where there is no card, too."""

    def known(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", known)
    monkeypatch.setattr("nxdt_align.engines.xla.is_available", lambda: False)
    env = RunEnv(compile_only=True, compiles_without_device=True)
    assert device(config("auto"), env, DryRun()).type == "cpu"
    with pytest.raises(UserError, match="is cuda, but torch finds no accelerator"):
        device(config("cuda"), env, DryRun())


@pytest.mark.parametrize(
    ("chosen", "where", "backend"),
    [
        *(("auto", "cpu", None), ("auto", "cuda", "inductor"), ("auto", "neuron", "neuron")),
        *(("none", "cuda", None), ("none", "neuron", None), ("blocks", "cuda", "inductor")),
        *(("blocks", "neuron", "neuron"), ("blocks", "xla", None), ("blocks", "cpu", "inductor")),
    ],
)
def test_what_compiles_a_step(
    chosen: Literal["auto", "none", "blocks"],
    where: str,
    backend: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nxdt_align.engines.native.compiled.require_compiler", lambda: None)
    given = replace(config("auto"), distributed_strategy=DistributedStrategyConfig(compile=chosen))
    # This torch knows no device "neuron".
    found = compiling(given, SimpleNamespace(type=where), TINY)  # type: ignore[arg-type]
    assert (None if found is None else found.backend) == backend
    if where == "cpu" and chosen == "blocks":
        assert isinstance(attention(given, torch.device("cpu"), TINY), DenseAttention)


CUDA = torch.device("cuda")


def test_row_lengths_that_are_too_many_to_compile() -> None:
    """Which device auto is, the check of the YAML does not know; a CPU compiles none."""
    given = replace(config("auto"), data=DataConfig(buckets=tuple(range(64, 64 * 34, 64))))
    assert find_engine_faults(given, "native") == []
    told = r"data.buckets: must be 32 row lengths at most with .*compile auto, which .* is 33; "
    for kind in ("cuda", "neuron"):
        card: Any = SimpleNamespace(type=kind)
        with pytest.raises(ConfigError, match=told):
            compiling(given, card, TINY)
        op_by_op = replace(given, distributed_strategy=DistributedStrategyConfig(compile="none"))
        assert compiling(op_by_op, card, TINY) is None
    assert compiling(given, torch.device("cpu"), TINY) is None


def test_auto_compiles_nothing_with_an_old_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nxdt_align.engines.native.compiled.is_too_old", lambda: True)
    assert compiling(config("auto"), CUDA, TINY) is None
    assert not caplog.messages, "attention asks too, and a notice is for once"
    say_choices(config("auto"), CUDA, TINY)
    assert "compile: auto is none, as torch" in caplog.text


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("cuda", "run but nothing is compiled ahead"),
        ("neuron", "run but no graph is listed: TorchNeuron's cache gets operations one by one"),
    ],
)
@pytest.mark.parametrize("chosen", ["auto", "none", "blocks"])
def test_a_dry_run_of_a_device_that_compiles_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    chosen: Literal["auto", "none", "blocks"],
    where: str,
    said: str,
) -> None:
    """auto is none there for what it recomputes."""
    monkeypatch.setattr("nxdt_align.run.native.check", lambda *_: SimpleNamespace(type=where))
    monkeypatch.setattr("nxdt_align.run.processes.start_processes", lambda *_: None)
    tensor = 1 if chosen == "blocks" else 2
    given = replace(
        config("auto"),
        distributed_strategy=DistributedStrategyConfig(compile=chosen, tensor_model_parallel_size=tensor),
        model=ModelConfig(
            activations_checkpoint_granularity="selective", activations_checkpoint_recompute=("LlamaMLP",)
        ),
    )
    whys = {"auto": "compile: auto is none, as with tensor parallel", "none": "compile is none", "blocks": ""}
    for mode in (RunMode(), DryRun()):
        NativeParts(given, RunEnv(world_size=1), TINY, mode)
        told = [line for line in caplog.messages if line.startswith("COMPILE=1: ")]
        assert len(told) == (isinstance(mode, DryRun) and chosen != "blocks")
    for line in told:
        assert f"COMPILE=1: distributed_strategy.{whys[chosen]}" in line and line.endswith(said)


@pytest.mark.parametrize(
    ("accelerator", "where", "chosen", "warned"),
    [
        *(("auto", "cuda", "auto", True), ("auto", "cpu", "auto", True), ("cuda", "cuda", "auto", True)),
        *(("cpu", "cpu", "auto", False), ("cuda", "cuda", "none", False)),
    ],
)
def test_a_guard_of_no_graphs_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    accelerator: Accelerator,
    where: str,
    chosen: Literal["auto", "none"],
    warned: bool,
) -> None:
    """Once: where the YAML alone shows it, the key is among those without effect."""
    monkeypatch.setattr("nxdt_align.engines.native.compiled.is_too_old", lambda: True)
    given = config(accelerator)
    given = replace(
        given,
        distributed_strategy=DistributedStrategyConfig(compile=chosen),
        exp_manager=replace(given.exp_manager, fail_on_recompile=True),
        given=frozenset({"exp_manager.fail_on_recompile"}),
    )
    say_choices(given, torch.device(where), TINY)
    assert ("fail_on_recompile: guards nothing, as no step is compiled (distr" in caplog.text) == warned
    assert ("exp_manager.fail_on_recompile" in keys_without_effect(given, "native")) != warned


def test_modules_that_tensor_parallel_graphs_cannot_recompute(caplog: pytest.LogCaptureFixture) -> None:
    for chosen in ("auto", "blocks"):
        given = replace(
            config("auto"),
            distributed_strategy=DistributedStrategyConfig(compile=chosen, tensor_model_parallel_size=2),
            model=ModelConfig(
                activations_checkpoint_granularity="selective", activations_checkpoint_recompute=("LlamaMLP",)
            ),
        )
        if chosen == "auto":
            assert compiling(given, CUDA, TINY) is None
            say_choices(given, CUDA, TINY)
            assert "compile: auto is none, as with tensor parallel" in caplog.text
        else:
            with pytest.raises(UserError, match=r"recompute LlamaMLP by itself .*, or .*compile=none"):
                compiling(given, CUDA, TINY)


def test_stochastic_rounding_is_said_as_it_is_on_each_device(caplog: pytest.LogCaptureFixture) -> None:
    """The variable itself: tests/neuron/test_environment.py."""
    given = replace(config("auto"), precision=PrecisionConfig(type="bf16SR"))
    for kind, said in (("cpu", "needs Neuron hardware; fp32 master"), ("neuron", "_EN=1); AWS does not say")):
        caplog.clear()
        say_choices(given, SimpleNamespace(type=kind), TINY)  # type: ignore[arg-type]
        assert caplog.text.count(said) == caplog.text.count("NOTICE") == 1


def test_nki_attention_is_the_neuron_devices() -> None:
    given = config("auto", "nki")
    with pytest.raises(
        UserError, match=r"nki needs trainer.accelerator neuron, but this run's device is cpu; auto"
    ):
        attention(given, torch.device("cpu"), TINY)
    on_neuron = SimpleNamespace(type="neuron")
    with pytest.raises(UserError, match=r"needs the package nki and nki-library.*attention=dense runs"):
        attention(given, on_neuron, TINY)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"heads of up to 128 entries, but this model's have 256"):
        attention(given, on_neuron, replace(TINY, head_dim=256))  # type: ignore[arg-type]


@pytest.mark.parametrize(("lnc", "cores"), [(None, 2), (1, 1), (2, 2)])
def test_nki_attention_has_the_devices_physical_cores(
    monkeypatch: pytest.MonkeyPatch, lnc: int | None, cores: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("nxdt_align.ops.attention_nki._device_operator", asked.append)
    given = config("auto", "nki")
    given = replace(given, trainer=replace(given.trainer, lnc=lnc))
    attention(given, SimpleNamespace(type="neuron"), TINY)  # type: ignore[arg-type]
    assert asked == [cores]


def test_layers_that_transformers_computes_are_not_compiled() -> None:
    other = SimpleNamespace(model_type="gpt2")
    assert compiling(config("auto"), CUDA, other) is None  # type: ignore[arg-type]
    given = replace(config("auto"), distributed_strategy=DistributedStrategyConfig(compile="blocks"))
    with pytest.raises(
        UserError, match=r"compile: blocks compiles .* computes this gpt2; set .*compile=none"
    ):
        compiling(given, CUDA, other)  # type: ignore[arg-type]


NEURON = """
import sys, types
import torch
# A backend of its own name, as PyTorch's native Neuron registers itself; it has no kernels here.
torch.utils.rename_privateuse1_backend("neuron")
is_here = sys.argv[2] == "here"
module = types.SimpleNamespace(is_available=lambda: is_here, device_count=lambda: 4)
torch._register_device_module("neuron", module)
moved_to = []
torch.accelerator.set_device_index = moved_to.append
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.dry_run import DryRun
from nxdt_align.run.mode import RunMode
from nxdt_align.run.computing import attention
from nxdt_align.run.processes import device
from nxdt_align.config.schema import Config, TrainerConfig
from nxdt_align.models.presets import TINY
from dataclasses import replace
config = replace(Config(), trainer=TrainerConfig(accelerator=sys.argv[1]))
env = RunEnv(local_rank=3, compile_only=not is_here, compiles_without_device=not is_here)
found = device(config, env, RunMode() if is_here else DryRun())
print(found, moved_to, type(attention(config, found, TINY)).__name__)
"""


@pytest.mark.parametrize(("accelerator", "is_here"), [("auto", True), ("neuron", True), ("neuron", False)])
def test_any_accelerator_goes_the_same_way(accelerator: str, is_here: bool) -> None:
    """No vendor is asked for. In a process of its own, as a backend has one name for good. Where TorchNeuron
    only compiles, a dry run needs no device."""
    said = run_forked(1, accelerator, "here" if is_here else "not here", script=NEURON).well()
    assert said.split("\n")[0] == "neuron:3 [] DenseAttention"


@pytest.fixture(params=[True, False], ids=["with torch_xla", "without"])
def has_torch_xla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The meta device stands for torch_xla's."""
    monkeypatch.setattr(xla, "is_available", lambda: request.param)
    monkeypatch.setattr(xla, "device", lambda: torch.device("meta"))
    return bool(request.param)


def test_xla_needs_torch_xla(has_torch_xla: bool) -> None:
    if has_torch_xla:
        assert device(config("xla"), RunEnv(), RunMode()).type == "meta"
        return
    with pytest.raises(UserError, match=r"is xla, but the package torch_xla is not installed.*=cpu"):
        device(config("xla"), RunEnv(), RunMode())


@pytest.mark.parametrize("compile_only", [True, False])
def test_xla_is_one_process(has_torch_xla: bool, compile_only: bool) -> None:
    fault = r"xla runs in one process here, but there are 2 \(WORLD_SIZE\)" if has_torch_xla else "installed"
    with pytest.raises(UserError, match=fault):
        device(config("xla"), RunEnv(world_size=2), DryRun() if compile_only else RunMode())


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_a_dry_run_compiles_where_it_can(
    has_torch_xla: bool, accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    """The run itself stays on the CPU."""
    caplog.set_level(logging.INFO)
    assert device(config(accelerator), RunEnv(), RunMode()).type == "cpu"
    place = device(config(accelerator), RunEnv(), DryRun()).type
    assert place == ("meta" if has_torch_xla else "cpu")
    assert ("torch_xla is not installed, so the dry-run steps run" in caplog.text) != has_torch_xla


@pytest.mark.parametrize(
    ("attention", "processes", "why"),
    [
        ("auto", 2, "torch_xla's CPU device runs one process"),
        ("blocks", 1, "blocks has no static shapes"),
        *((kind, 1, f"{kind} is not for torch_xla's CPU device") for kind in ("flex", "nki")),
    ],
)
def test_a_dry_run_that_cannot_compile_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    attention: Attention,
    processes: int,
    why: str,
) -> None:
    monkeypatch.setattr(xla, "is_available", lambda: True)
    caplog.set_level(logging.INFO)
    env = RunEnv(world_size=processes)
    assert device(config("cpu", attention), env, DryRun()).type == "cpu"
    assert f"{why}, so the dry-run steps run but nothing is compiled ahead" in caplog.text


def test_a_dry_run_of_fp16_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it skips a step is no part of a graph."""
    monkeypatch.setattr(xla, "is_available", lambda: True)
    caplog.set_level(logging.INFO)
    half = replace(config("cpu"), precision=PrecisionConfig(type="fp16"))
    assert device(half, RunEnv(), DryRun()).type == "cpu"
    assert "precision.type: fp16 is not in the engine's compiled graphs, so the dry-run" in caplog.text
