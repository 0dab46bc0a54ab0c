"""What of the NxD engine needs no neuronx-distributed: places, messages, groups, a run's settings."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import TINY

from nxdt_align.config.load import load_config
from nxdt_align.config.schema import Config
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.checkpoint_folder import CheckpointError
from nxdt_align.engines.nxd import checkpoint, compat
from nxdt_align.engines.nxd.settings import (
    Parallel,
    Precision,
    SaveOptions,
    check_adapters,
    check_kv_groups,
)
from nxdt_align.errors import UserError
from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.run.mode import RunMode
from nxdt_align.run.nxd import (
    NxDParts,
    form_notes,
    parallel_of,
    precision_of,
    reference_precision_of,
    save_options_of,
)

Load = Callable[..., Config]


@pytest.fixture
def load(repo: Path) -> Load:
    return lambda *overrides: load_config("tiny_llama_DPO_config", list(overrides), repo / "conf")


# Places


@pytest.mark.parametrize(
    ("accelerator", "variable", "backend"),
    [
        ("cpu", None, "cpu"),
        ("xla", None, "xla"),
        ("neuron", "1", "neuron"),
        ("auto", None, "neuron"),
        ("auto", "0", "neuron"),
        ("auto", "1", "cpu"),
    ],
)
def test_backends(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, variable: str | None, backend: str
) -> None:
    monkeypatch.delenv("NXD_CPU_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("NXD_CPU_MODE", variable)
    assert compat.backend_of(accelerator) == backend


def test_cuda_is_refused() -> None:
    with pytest.raises(EngineError, match=r"not on cuda; distributed_strategy.engine=native does"):
        compat.backend_of("cuda")


def test_several_processes_on_xla_are_refused() -> None:
    with pytest.raises(EngineError, match="in one process, but there are 2"):
        compat.start("xla", 0, 2)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuronx_distributed", None)
    with pytest.raises(EngineError, match=r"cannot import neuronx_distributed: .*pip.repos.neuron"):
        compat.import_nxd()


def test_a_placeholder_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuronx_distributed", ModuleType("neuronx_distributed"))
    with pytest.raises(EngineError, match="a placeholder; install the real packages"):
        compat.import_nxd()


def test_a_run_without_the_packages_says_what_to_install(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nxdt_align.config.neuron_packages.has_module", lambda name: False)
    monkeypatch.setattr("nxdt_align.config.neuron_packages._versions", lambda package: [])
    config = load("distributed_strategy.engine=nxd", "trainer.accelerator=cpu")
    with pytest.raises(UserError, match="not installed: neuronx-distributed, torch-xla"):
        NxDParts(config, None, TINY, RunMode())  # type: ignore[arg-type]


# Groups


def test_ranks_that_share_kv_heads_must_be_of_one_tensor_parallel_group() -> None:
    """tp 4, multiplier 2: ranks r and r + 2 hold the same heads. On trn1 NxD spreads a tensor-parallel group
    of 4 over every second rank of 8, but shares kv heads among neighbours."""
    check_kv_groups([[0, 2], [1, 3], [4, 6], [5, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]], 2)
    check_kv_groups([[0], [1]], [[0, 1]], 1)
    with pytest.raises(EngineError, match="gradients of other heads would be summed"):
        check_kv_groups([[0, 2], [1, 3], [4, 6], [5, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]], 2)


# A run's settings


def test_sizes(load: Load) -> None:
    config = load(
        "distributed_strategy.tensor_model_parallel_size=4",
        "distributed_strategy.kv_replicator=2",
        "distributed_strategy.sequence_parallel=True",
        "distributed_strategy.zero1=True",
        "model.qkv_linear=True",
    )
    on_neuron, on_cpu = (parallel_of(config, TINY, backend) for backend in ("neuron", "cpu"))
    assert (on_neuron.tensor, on_neuron.kv_multiplier, on_neuron.qkv) == (4, 2, "fused")
    assert on_neuron.sequence_parallel and on_neuron.zero1 and not on_cpu.zero1
    split = parallel_of(load("model.qkv_linear=True", "model.fuse_qkv=False"), TINY, "cpu")
    assert split.qkv == "split" and not split.sequence_parallel
    assert parallel_of(load(), TINY, "cpu").qkv == "separate"
    assert parallel_of(load(), replace(TINY, num_key_value_heads=4), "cpu").qkv == "coalesced"
    cut = ("distributed_strategy.pipeline_model_parallel_size=2", "model.pipeline_cuts=[model.layers.0]")
    assert parallel_of(load(*cut), TINY, "cpu").pipeline_cuts == (0,)


@pytest.mark.parametrize(
    ("overrides", "model", "fault"),
    [
        (["tensor_model_parallel_size=3"], {}, "must divide intermediate_size|does not fit 4 query heads"),
        (["tensor_model_parallel_size=4", "kv_replicator=3"], {}, "multipliers that fit: 2"),
        (["tensor_model_parallel_size=4", "kv_replicator=2"], {}, "use qkv_linear"),
        (
            ["pipeline_model_parallel_size=2"],
            {"tie_word_embeddings": True},
            "must be 1 for a model whose head is tied",
        ),
    ],
)
def test_sizes_that_do_not_fit(
    load: Load, monkeypatch: pytest.MonkeyPatch, overrides: list[str], model: dict[str, Any], fault: str
) -> None:
    monkeypatch.setattr("nxdt_align.config.neuron_packages.has_module", lambda name: True)
    keys = [f"distributed_strategy.{key}" for key in overrides]
    if "qkv_linear" not in fault:
        keys.append("model.qkv_linear=True")
    with pytest.raises(UserError, match=fault):
        config = load("trainer.accelerator=cpu", *keys)
        NxDParts(config, None, replace(TINY, **model), RunMode())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "backend", "wanted"),
    [
        ("fp32", "neuron", Precision()),
        ("mixed_precision", "neuron", Precision(torch.bfloat16, masters=True)),
        ("mixed_precisionSR", "cpu", Precision(torch.bfloat16, masters=True)),
        ("bf16SR", "neuron", Precision(torch.bfloat16)),
        ("bf16SR", "cpu", Precision(torch.bfloat16, masters=True)),
    ],
)
def test_precision(load: Load, kind: str, backend: compat.Backend, wanted: Precision) -> None:
    assert precision_of(load(f"precision.type={kind}"), backend) == wanted


LOW = torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "on_neuron", "on_cpu"),
    [
        ("xla_use_bf16='0'", Precision(), Precision()),
        ("xla_use_bf16='1'", Precision(LOW), Precision(LOW)),
        (
            "xla_downcast_bf16='1' neuron_rt_stochastic_rounding_en='1'",
            Precision(LOW),
            Precision(LOW, masters=True),
        ),
        (
            "xla_downcast_bf16='1' master_weights=True",
            *(Precision(LOW, masters=True, float32_sums=False, float32_reductions=False),) * 2,
        ),
        (
            "xla_downcast_bf16='1' master_weights=True fp32_grads_cc=True",
            *(Precision(LOW, masters=True, float32_sums=False),) * 2,
        ),
        (
            "xla_downcast_bf16='1' master_weights=True fp32_grad_acc=True",
            *(Precision(LOW, masters=True),) * 2,
        ),
    ],
)
def test_manual_precision(load: Load, keys: str, on_neuron: Precision, on_cpu: Precision) -> None:
    config = load("precision.type=manual", *(f"precision.{key}" for key in keys.split()))
    assert precision_of(config, "neuron") == on_neuron and precision_of(config, "cpu") == on_cpu


def test_how_gradients_are_added_up_is_no_part_of_a_references_identity() -> None:
    low_sums = Precision(LOW, masters=True, float32_sums=False, float32_reductions=False)
    assert str(low_sums) == str(Precision(LOW, masters=True)) != str(Precision())


@pytest.mark.parametrize(
    ("kind", "dtype", "wanted"),
    [
        ("fp32", None, Precision()),
        ("fp32", "bf16", Precision(torch.bfloat16)),
        ("mixed_precision", "fp32", Precision()),
        ("mixed_precision", "bf16", Precision(torch.bfloat16, masters=True)),
        ("mixed_precision", None, Precision(torch.bfloat16, masters=True)),
    ],
)
def test_a_reference_of_the_policys_dtype_is_like_it(
    load: Load, kind: str, dtype: str | None, wanted: Precision
) -> None:
    """So that the policy itself can be asked before its first step, and stored values are found again."""
    chosen = f"model_alignment_strategy.reference_dtype={dtype or 'null'}"
    config = load(f"precision.type={kind}", chosen)
    assert reference_precision_of(config, precision_of(config, "cpu")) == wanted


def test_autocast_is_refused(load: Load) -> None:
    with pytest.raises(UserError, match=r"precision.type: autocast is not in engine nxd; mixed_precision"):
        precision_of(load("precision.type=autocast"), "cpu")


def test_the_form_of_checkpoints(load: Load) -> None:
    mixed, key = Precision(torch.bfloat16, masters=True), "exp_manager.checkpoint_callback_params"
    plain = load("exp_manager.save_xser=False")
    assert save_options_of(plain, mixed) == SaveOptions(False, torch.bfloat16)
    assert save_options_of(plain, Precision()) == SaveOptions(False, None)
    exact = load("exp_manager.save_xser=True", f"+{key}.use_master_weights_in_ckpt=True")
    assert save_options_of(exact, mixed) == SaveOptions(True, None)


@pytest.mark.parametrize(
    ("overrides", "form", "said"),
    [
        (
            ["exp_manager.load_xser=True"],
            "plain",
            "load_xser: is True, but .* holds plain files, one per rank",
        ),
        (["exp_manager.load_xser=False"], "xser", r"is False, but .* holds a file per tensor \(xser\)"),
        (["exp_manager.load_xser=True"], "xser", None),
        (["exp_manager.load_xser=False"], "plain", None),
        ([], "plain", None),
        (["exp_manager.load_xser=True"], "no shards", None),
    ],
)
@pytest.mark.parametrize("place", ["model", "."])
def test_load_xser_against_what_is_there(
    load: Load, tmp_path: Path, overrides: list[str], form: str, said: str | None, place: str
) -> None:
    shard = tmp_path / place / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
    shard.parent.mkdir(exist_ok=True)
    if form != "no shards":
        shard.touch()
    if form == "xser":
        shard.with_name(f"{shard.name}.tensors").mkdir()
        shard.with_name(f"{shard.name}.info.pt").touch()
    notes = form_notes(load(*overrides), tmp_path)
    assert (notes == []) if said is None else re.search(said, *notes)


# Checkpoints, as far as they can be judged without NxD


def test_a_folder_is_a_checkpoint_when_every_file_is_there(tmp_path: Path) -> None:
    torch.save({"global_step": 3}, tmp_path / checkpoint.EXTRA)
    assert not checkpoint.is_checkpoint(tmp_path) and checkpoint.checkpoint_step(tmp_path) is None
    checkpoint.SUMMARY.write(tmp_path, checkpoint.description({"global_step": 3}, {"tensor": 1}, False))
    assert checkpoint.is_checkpoint(tmp_path) and checkpoint.checkpoint_step(tmp_path) == 3
    assert checkpoint.read_extra(tmp_path) == {"global_step": 3}
    summary = json.loads((tmp_path / checkpoint.SUMMARY.name).read_text())
    (tmp_path / checkpoint.SUMMARY.name).write_text(json.dumps({**summary, "version": 99}))
    with pytest.raises(CheckpointError, match=r"not one that this version reads: .*version 99"):
        checkpoint.SUMMARY.require_whole(tmp_path)


def test_values_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"path": Path("x")}, tmp_path / checkpoint.EXTRA)
    checkpoint.SUMMARY.write(tmp_path, checkpoint.description({}, {}, False))
    with pytest.raises(CheckpointError, match=r"user_content\.pt cannot be read as plain values"):
        checkpoint.read_extra(tmp_path)


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_the_flash_kernel_never_sees_a_downcast_of_0(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, given: str | None
) -> None:
    """NxD's kernel keeps its log-sum-exp in bf16 at exactly that value. Without the variable torch_xla
    downcasts as little."""
    monkeypatch.setenv("XLA_DOWNCAST_BF16", given or "")
    if given is None:
        monkeypatch.delenv("XLA_DOWNCAST_BF16")
    monkeypatch.setenv("NXD_CPU_MODE", "1")
    compat._set_environment("neuron")
    assert "XLA_DOWNCAST_BF16" not in os.environ
    assert ("XLA_DOWNCAST_BF16" in caplog.text) is (given == "1")


# Adapters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modules_to_save": ["model.layers.1.mlp.down_proj"], "target_modules": ["q_proj"]},
            r"trains embed_tokens, lm_head and norms whole, but model\.layers\.1\.mlp\.down_proj is a part",
        ),
        (
            {"target_modules": ["layers.0.mlp.up_proj"]},
            "must leave each pipeline stage a weight to train, but stage 1 has none; name layers of all",
        ),
    ],
)
def test_adapters_that_the_engine_does_not_train(settings: dict[str, Any], message: str) -> None:
    spec = adapter_spec(TINY, rank=2, alpha=4, **settings)
    with pytest.raises(EngineError, match=message):
        check_adapters(Parallel(pipeline=2).partition(TINY, spec))


def test_a_stage_trains_what_is_trained_whole_there() -> None:
    spec = adapter_spec(
        TINY, rank=2, alpha=4, target_modules=["layers.0.mlp.up_proj"], modules_to_save=["norm"]
    )
    check_adapters(Parallel(pipeline=2).partition(TINY, spec))
