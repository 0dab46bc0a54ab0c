"""Which engine runs, what it refuses, and the one notice of keys without effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yamls

from nxdt_align.config.check import ConfigError
from nxdt_align.config.engines import NO_EFFECT, Engine, find_engine_faults, notices, resolve_engine
from nxdt_align.config.keys import all_keys
from nxdt_align.config.load import load_config
from nxdt_align.config.schema import Config

Load = Callable[..., Config]


def engine_faults(config: Config, engine: Engine) -> None:
    """Raise ConfigError with what ``engine`` cannot do of ``config``."""
    faults = find_engine_faults(config, engine)
    if faults:
        raise ConfigError(faults, config.source)


@pytest.mark.parametrize(
    ("overrides", "neuron", "wanted"),
    [
        ([], True, "nxd"),
        ([], False, "native"),
        (["trainer.accelerator=cpu"], True, "native"),
        (["trainer.accelerator=neuron"], True, "nxd"),
        (["distributed_strategy.engine=native"], True, "native"),
        (["distributed_strategy.engine=nxd"], False, "nxd"),
    ],
)
def test_engine_is_chosen(load: Load, overrides: list[str], neuron: bool, wanted: str) -> None:
    assert resolve_engine(load("", *overrides), neuron) == wanted


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (
            "distributed_strategy.context_parallel_size=2",
            "must be 1 (engine native does not support it yet), but is 2; with 1, "
            "sequence_parallel over tensor_model_parallel_size=N ranks spreads long sequences",
        ),
    ],
)
def test_limits_of_the_native_engine(load: Load, override: str, rule: str) -> None:
    config = load("", override)
    assert any(rule in str(fault) for fault in find_engine_faults(config, "native"))


@pytest.mark.parametrize(
    ("engine", "overrides", "rule"),
    [
        ("nxd", (), "precision.type: must not be fp16 on engine nxd; precision.type=mixed_precision"),
        (
            "native",
            ("trainer.accelerator=xla",),
            "precision.type: must not be fp16 with trainer.accelerator xla; precision.type=mixed_precision",
        ),
        (
            "native",
            ("trainer.accelerator=neuron",),
            "precision.type: must not be fp16 on TorchNeuron's device, of which AWS documents bf16 and fp32",
        ),
    ],
)
def test_fp16_is_the_native_engines_and_in_no_graph(
    load: Load, engine: Engine, overrides: tuple[str, ...], rule: str
) -> None:
    config = load("", "precision.type=fp16", *overrides)
    with pytest.raises(ConfigError) as error:
        engine_faults(config, engine)
    assert rule in str(error.value)
    engine_faults(load("", "precision.type=fp16"), "native")


def test_native_engine_runs_the_defaults(load: Load) -> None:
    engine_faults(load(""), "native")


def test_native_engine_runs_pipelines(load: Load) -> None:
    text = (
        "distributed_strategy: {pipeline_model_parallel_size: 4, virtual_pipeline_model_parallel_size: 2}\n"
        "model: {pipeline_cuts: [model.layers.1]}"
    )
    engine_faults(load(text), "native")
    assert notices(load(text), "native") == []


def test_what_the_nxd_engine_cannot_do_in_this_version(load: Load) -> None:
    sizes = "pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2"
    text = f"distributed_strategy: {{engine: nxd, {sizes}, fsdp: true}}"
    with pytest.raises(ConfigError) as error:
        engine_faults(load(text), "nxd")
    assert "fsdp: must be False (engine nxd does not support it yet)" in str(error.value)
    assert "virtual_pipeline_model_parallel_size: must be 1 (engine nxd" in str(error.value)
    assert "only each rank's first chunk" in str(error.value)
    assert " pipeline_model_parallel_size: must be" not in str(error.value)
    for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        engine_faults(load(f"distributed_strategy: {{engine: nxd, {size}: 2}}"), "nxd")


def test_the_nxd_engine_takes_up_these_keys(load: Load) -> None:
    text = """
distributed_strategy: {engine: nxd, pipeline_model_parallel_size: 2}
model: {num_layers: 4, pipeline_cuts: [model.layers.0]}
model_alignment_strategy: {reference_dtype: fp32}
precision: {type: manual, xla_downcast_bf16: '1', master_weights: True, fp32_grad_acc: True,
            fp32_grads_cc: True, parallel_layers_reduce_dtype: bf16}
"""
    engine_faults(load(text), "nxd")
    assert notices(load(text), "nxd") == []


MANUAL = ("precision.type=manual", "precision.xla_downcast_bf16='1'")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ("precision.type=mixed_precision", "precision.parallel_layers_reduce_dtype=fp32"),
            "parallel_layers_reduce_dtype: must be bf16 with precision.type mixed_precision on engine nxd",
        ),
        (
            ("precision.type=fp32", "precision.parallel_layers_reduce_dtype=bf16"),
            "parallel_layers_reduce_dtype: must be fp32 with precision.type fp32 on engine nxd",
        ),
        (
            (*MANUAL, "precision.fp32_grad_acc=True"),
            "fp32_grad_acc: must be False without precision.master_weights on engine nxd",
        ),
        (
            (*MANUAL, "precision.fp32_grads_cc=True"),
            "fp32_grads_cc: must be False without precision.master_weights on engine nxd",
        ),
    ],
)
def test_number_formats_that_the_nxd_engine_has_not(
    load: Load, overrides: tuple[str, ...], fault: str
) -> None:
    config = load("", *overrides)
    with pytest.raises(ConfigError) as error:
        engine_faults(config, "nxd")
    assert fault in str(error.value)
    engine_faults(config, "native")


@pytest.mark.parametrize(
    "override",
    ["tensor_model_parallel_size=2", "sequence_parallel=True", "zero1=True", "fsdp=True", "fsdp=full"],
)
def test_native_engine_spreads_the_model(load: Load, override: str) -> None:
    config = load("", f"distributed_strategy.{override}")
    engine_faults(config, "native")
    assert notices(config, "native") == []


def test_one_notice_names_every_key_without_effect(repo: Path) -> None:
    (notice,) = notices(load_config("hf_llama3_8B_DPO_config", [], repo / "conf"), "native")
    assert notice.startswith("keys without effect on engine native: ")
    for key in (
        *(
            "compiler_flags",
            "compiler_cache_url",
            "aync_exec_max_inflight_requests",
            "bucket_size_collectives",
        ),
        *("neuron_rt_exec_timeout", "neuron_experimental_compress_rg", "distributed_strategy.kv_replicator"),
        *("model.qkv_linear", "model.fuse_qkv", "model.fusions.softmax", "model.fusions.flash_attention"),
        *("model.use_cpu_initialization", "exp_manager.save_xser", "exp_manager.load_xser"),
        *("exp_manager.ckpt_ptl_version", "precision.xla_use_bf16"),
    ):
        assert key in notice
    for key in ("data.seq_length", "model.optim.betas", "model.rope_theta", "trainer.max_steps"):
        assert key not in notice


def test_the_nxd_engine_says_why_a_key_changes_nothing(repo: Path) -> None:
    given = ("trainer.lnc=2", "trainer.sequential_move_factor=4", "model.use_cpu_initialization=False")
    flash = ("model.fusions.flash_attention=False", "model.transpose_nki_inputs=True")
    packed = ("model.fusions.flash_attention_packed=True",)
    (notice,) = notices(
        load_config("hf_llama3_8B_DPO_config", [*given, *flash, *packed], repo / "conf"), "nxd"
    )
    for key in (
        *("trainer.lnc (", "exp_manager.ckpt_ptl_version (", "model.transpose_nki_inputs ("),
        *("model.use_cpu_initialization (", "trainer.sequential_move_factor ("),
        "model.fusions.flash_attention_packed (",
    ):
        assert key in notice


def test_what_the_nxd_engine_does_is_not_named(repo: Path) -> None:
    """As the shipped YAML has it, and with stages."""
    done = ("model.transpose_nki_inputs=False", "exp_manager.enable_recovery_time_instrumentation=True")
    stages = ("trainer.sequential_move_factor=4", "distributed_strategy.pipeline_model_parallel_size=2")
    config = load_config("hf_llama3_8B_DPO_config", [*done, *stages, "trainer.num_nodes=2"], repo / "conf")
    (notice,) = notices(config, "nxd")
    for key in (*(k.partition("=")[0] for k in (*done, *stages)), "use_cpu_initialization"):
        assert key not in notice


def test_keys_that_are_not_given_are_not_named(load: Load) -> None:
    assert notices(load(yamls.TUTORIAL_DPO), "native") == []


def test_keys_of_a_megatron_yaml_are_named(load: Load) -> None:
    (notice,) = notices(load(yamls.MEGATRON_SFT, "model_source=hf"), "native")
    for key in ("data.data_impl", "data.tokenizer.library", "model.ffn_hidden_size", "model.moe"):
        assert key in notice


def test_a_key_that_counts_only_with_another_value_is_named_without_it(load: Load) -> None:
    text = """
precision: {type: fp32, xla_use_bf16: '1'}
model: {activations_checkpoint_recompute: [CoreAttention]}
"""
    (notice,) = notices(load(text), "native")
    assert "model.activations_checkpoint_recompute, precision.xla_use_bf16" in notice
    overrides = ["precision.type=manual", "model.activations_checkpoint_granularity=selective"]
    assert notices(load(text, *overrides), "native") == []


@pytest.mark.parametrize(
    ("accelerator", "stack", "has_effect"),
    [("neuron", None, True), ("auto", "native", True), ("auto", None, False), ("cpu", "native", False)],
)
def test_keys_of_the_runtime_count_on_torch_neuron(
    load: Load, monkeypatch: pytest.MonkeyPatch, accelerator: str, stack: str | None, has_effect: bool
) -> None:
    monkeypatch.setattr("nxdt_align.config.engines.neuron_stack", lambda: stack)
    keys = ("trainer.lnc=2", "neuron_rt_exec_timeout=50", f"trainer.accelerator={accelerator}")
    said = " ".join(notices(load(yamls.TUTORIAL_DPO, *keys), "native"))
    assert ("trainer.lnc" in said, "neuron_rt_exec_timeout" in said) == (not has_effect,) * 2


def test_tables_name_known_keys_only() -> None:
    assert {key for keys in NO_EFFECT.values() for key in keys} <= set(all_keys())


@pytest.mark.parametrize(
    ("engine", "overrides", "rule"),
    [
        (
            "nxd",
            [],
            "compile: must be auto or none on engine nxd, whose steps are graphs anyway, but is 'blocks'",
        ),
        (
            "native",
            ["trainer.accelerator=xla"],
            "compile: must be auto or none with trainer.accelerator xla, where steps are graphs anyway",
        ),
        (
            "native",
            ["data.attention=blocks"],
            "data.attention: must be auto, dense, causal, flex or nki with distributed_strategy.compile "
            "blocks, which compiles static shapes, but is 'blocks'; those of data.attention=blocks follow "
            "the data",
        ),
        (
            "native",
            [f"data.buckets={list(range(64, 64 * 34, 64))}"],
            "data.buckets: must be 32 row lengths at most with distributed_strategy.compile blocks, which "
            "compiles graphs of each, but is 33; leave it out to have few chosen, or set "
            "distributed_strategy.compile=none",
        ),
    ],
)
def test_what_compiled_steps_cannot_do(load: Load, engine: Engine, overrides: list[str], rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        engine_faults(load("", "distributed_strategy.compile=blocks", *overrides), engine)
    assert rule in str(error.value)
    engine_faults(load("", "distributed_strategy.compile=none", *overrides), engine)


def test_compiled_steps_on_native(load: Load) -> None:
    engine_faults(load("", "distributed_strategy.compile=blocks", "data.buckets=[64, 128]"), "native")
    many = f"data.buckets={list(range(64, 64 * 34, 64))}"
    engine_faults(load("", many, "trainer.accelerator=cpu"), "native")
    with pytest.raises(ConfigError, match=r"must be 32 row lengths at most with .*compile auto, which"):
        engine_faults(load("", many, "trainer.accelerator=cuda"), "native")
