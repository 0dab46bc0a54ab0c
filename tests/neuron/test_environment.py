"""The environment that the YAML asks for, against NxDT's own table, and what the user has set."""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from nxdt_align.cli_process import Environment, enter_run
from nxdt_align.config.check import CheckedConfig
from nxdt_align.config.load import load_config
from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.neuron.environment import (
    DEFAULT_CACHE,
    INSPECT,
    INSPECT_DIR,
    KEYS,
    LOGICAL_CORES,
    add_flags,
    cache_fault,
    describe,
    local_cache,
    missing_from,
    neuron_environment,
    replaced,
)
from nxdt_align.stop_signals import StopSignals


def config(*overrides: str) -> Config:
    return load_config("hf_llama3_8B_DPO_config", overrides)


def test_shipped_yaml() -> None:
    """By hand from training_orchestrator.py of NxDT, on its own hf_llama3_8B_DPO_config.yaml; but for
    XLA_DOWNCAST_BF16, under which float32 master weights would be bf16."""
    assert neuron_environment(config()) == {
        "NEURON_FUSE_SOFTMAX": "1",
        "NEURON_EXPERIMENTAL_COMPRESS_RG": "0",
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS": "5",
        "BUCKET_CAP_MB": "1024",
        "NEURON_COMPILE_CACHE_URL": "/home/ubuntu/neuron_cache",
        "NEURON_CC_FLAGS": "--model-type transformer --enable-mixed-precision-accumulation",
        "NEURON_RT_EXEC_TIMEOUT": "100",
        "XLA_USE_BF16": "0",
        "XLA_DOWNCAST_BF16": "0",
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "0",
    }
    assert list(neuron_environment(config())) == [
        name for name in KEYS if name not in (LOGICAL_CORES, INSPECT, INSPECT_DIR)
    ]


def test_neurons_own_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With trainer.profiler, into the folder of the run where the YAML names it; --print-env tells; of the
    first process alone unless all are asked for, and not of a dry run."""
    profiler = "trainer.profiler={}"
    dated = neuron_environment(config(profiler, f"exp_manager.exp_dir={tmp_path}", "name=mine"))
    assert dated[INSPECT] == "1" and Path(dated[INSPECT_DIR]).parent == tmp_path / "neuron_profile"
    explicit = config(profiler, f"exp_manager.explicit_log_dir={tmp_path}/run")
    wanted = neuron_environment(explicit)
    assert wanted[INSPECT_DIR] == f"{tmp_path}/run/profile/neuron"
    assert f"export {INSPECT}=1  # YAML (trainer.profiler)" in describe({}, wanted)

    def set_of(settings: Config, **environment: str) -> bool:
        monkeypatch.setattr("os.environ", dict(environment))
        found = CheckedConfig(replace(settings, compiler_cache_url=None), "nxd", [], [])
        enter_run(found, Environment.read(environment), StopSignals())
        return os.environ.get(INSPECT_DIR) == f"{tmp_path}/run/profile/neuron"

    everyone = config("trainer.profiler={all_ranks: true}", f"exp_manager.explicit_log_dir={tmp_path}/run")
    assert set_of(explicit) and not set_of(explicit, RANK="1") and set_of(everyone, RANK="1")
    assert not set_of(explicit, COMPILE="1")
    told = f"Neuron's runtime, where there is one, writes its own profile to {tmp_path}/run/profile/neuron"
    assert capsys.readouterr().err.count(told) == 1, "the first process says it"


@pytest.mark.parametrize(
    ("override", "variable", "value"),
    [
        ("model.fusions.softmax=False", "NEURON_FUSE_SOFTMAX", None),
        ("neuron_experimental_compress_rg=True", "NEURON_EXPERIMENTAL_COMPRESS_RG", "1"),
        ("aync_exec_max_inflight_requests=7", "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS", "7"),
        ("bucket_size_collectives=512", "BUCKET_CAP_MB", "512"),
        ("compiler_cache_url=null", "NEURON_COMPILE_CACHE_URL", None),
        ("compiler_cache_url=s3://bucket/cache", "NEURON_COMPILE_CACHE_URL", "s3://bucket/cache"),
        ("neuron_rt_exec_timeout=600", "NEURON_RT_EXEC_TIMEOUT", "600"),
    ],
)
def test_each_key_reaches_its_variable(override: str, variable: str, value: str | None) -> None:
    assert neuron_environment(config(override)).get(variable) == value


ACCUMULATE, NO_CAST = "--enable-mixed-precision-accumulation", "--auto-cast none"


@pytest.mark.parametrize(
    ("kind", "rounding", "flags"),
    [
        ("bf16SR", "1", [ACCUMULATE]),
        ("mixed_precision", "0", [ACCUMULATE]),
        ("mixed_precisionSR", "1", [ACCUMULATE]),
        ("mixed_precision_SR", "1", [ACCUMULATE]),
        ("fp32", None, [NO_CAST]),
        ("autocast", "0", [ACCUMULATE, NO_CAST]),
        ("manual", "1", []),
    ],
)
def test_precision_types(kind: str, rounding: str | None, flags: list[str]) -> None:
    """NxDT's table; mixed_precisionSR, which its YAML documents and its code refuses, is the _SR spelling."""
    keys = ("xla_use_bf16", "xla_downcast_bf16", "neuron_rt_stochastic_rounding_en")
    found = neuron_environment(config(f"precision.type={kind}", *(f"precision.{key}='1'" for key in keys)))
    assert (found["XLA_USE_BF16"], found["XLA_DOWNCAST_BF16"]) == ("0", "0")
    assert found.get("NEURON_RT_STOCHASTIC_ROUNDING_EN") == rounding
    assert found["NEURON_CC_FLAGS"] == " ".join(["--model-type transformer", *flags])


def test_what_is_set_stays_and_flags_are_added() -> None:
    present = {"NEURON_RT_EXEC_TIMEOUT": "7", "NEURON_CC_FLAGS": "--cache_dir=/c", "HOME": "/root"}
    wanted = neuron_environment(config())
    absent = missing_from(present, wanted)
    assert set(absent) == set(wanted) - {"NEURON_RT_EXEC_TIMEOUT"}
    assert absent["NEURON_CC_FLAGS"] == f"--cache_dir=/c --model-type transformer {ACCUMULATE}"
    assert missing_from({**present, **absent}, wanted) == {}, "a second process of the run adds nothing"


def test_xlas_downcasts_do_not_stay() -> None:
    """The exception to what is set: float32 would silently be bf16. A setting of 0, or none, is no matter."""
    wanted = neuron_environment(config())
    present = {"XLA_USE_BF16": "1", "XLA_DOWNCAST_BF16": "0"}
    assert replaced(present, wanted) == ["XLA_USE_BF16"]
    absent = missing_from(present, wanted)
    assert absent["XLA_USE_BF16"] == "0" and "XLA_DOWNCAST_BF16" not in absent
    assert replaced({"XLA_USE_BF16": ""}, wanted) == replaced({}, wanted) == []
    assert missing_from({**present, **absent}, wanted) == {}


@pytest.mark.parametrize(
    ("first", "more", "both"),
    [
        ("", "-O1 --a b", "-O1 --a b"),
        ("--a=b", "--a c --d", "--a=b --d"),
        ("--a b", "--a=c", "--a b"),
        ("-O1", "--optlevel 2 --x", "-O1 --x"),
        ("--optlevel=3", "-O2", "--optlevel=3"),
        ("--t='--p q'", "--u '--r s'", "--t='--p q' --u '--r s'"),
        (" --a ", "", "--a"),
    ],
)
def test_a_flag_that_is_set_is_not_set_again(first: str, more: str, both: str) -> None:
    assert add_flags(first, more) == both


def test_an_open_quote_is_named() -> None:
    with pytest.raises(UserError, match=r"compiler_flags.*must be options as in a shell.*'--a \"b'"):
        neuron_environment(config("compiler_flags='--a \"b'"))


def test_description_is_shell_with_origins() -> None:
    """What it prints, a shell reads back: the values that the run would have."""
    present = {"NEURON_CC_FLAGS": "-O1", "BUCKET_CAP_MB": "64", "FI_PROVIDER": "efa", "HOME": "/root"}
    wanted = neuron_environment(config())
    lines = describe(present, wanted)
    words = [shlex.split(line, comments=True) for line in lines]
    assert all(word[0] == "export" and len(word) == 2 for word in words)
    values = dict(word[1].split("=", 1) for word in words)
    run = {**present, **missing_from(present, wanted)}
    assert values == {name: run[name] for name in (*wanted, "FI_PROVIDER")}
    origins = {name: line.rsplit("# ", 1)[1] for name, line in zip(values, lines, strict=True)}
    assert origins["BUCKET_CAP_MB"] == origins["FI_PROVIDER"] == "already set"
    assert origins["NEURON_CC_FLAGS"] == "already set, then YAML (compiler_flags, precision.type)"
    assert origins["NEURON_RT_EXEC_TIMEOUT"] == "YAML (neuron_rt_exec_timeout)"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (DEFAULT_CACHE, "")),
        ({"NEURON_COMPILE_CACHE_URL": "/c"}, ("/c", "NEURON_COMPILE_CACHE_URL")),
        ({"NEURON_COMPILE_CACHE_URL": "file:///c"}, ("/c", "NEURON_COMPILE_CACHE_URL")),
        ({"NEURON_COMPILE_CACHE_URL": "s3://b/c"}, None),
        (
            {"NEURON_COMPILE_CACHE_URL": "s3://b/c", "NEURON_CC_FLAGS": "-O1 --cache_dir /d"},
            ("/d", "NEURON_CC_FLAGS"),
        ),
        ({"NEURON_CC_FLAGS": "--cache_dir=/d"}, ("/d", "NEURON_CC_FLAGS")),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], place: tuple[str, str] | None) -> None:
    assert local_cache(variables) == place


def test_cache_that_can_be_made_is_no_fault_and_is_not_made(tmp_path: Path) -> None:
    wanted = neuron_environment(config(f"compiler_cache_url={tmp_path}/a/b"))
    assert cache_fault({}, wanted) is None
    assert list(tmp_path.iterdir()) == []
    assert cache_fault({"NEURON_COMPILE_CACHE_URL": "s3://b/c"}, wanted) is None


def test_cache_behind_a_file_is_one_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = neuron_environment(config(f"compiler_cache_url={tmp_path}/file/cache"))
    assert str(cache_fault({}, wanted)) == (
        "compiler_cache_url: must be a folder that can be written to, or an s3:// address, but is "
        f"{tmp_path}/file/cache, where {tmp_path}/file is a file; make it writable, or choose another folder"
    )
    fault = cache_fault({"NEURON_COMPILE_CACHE_URL": f"{tmp_path}/file"}, neuron_environment(config()))
    assert "so must the variable NEURON_COMPILE_CACHE_URL, which takes precedence" in str(fault)


def test_cache_without_permission_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the system's answer is asked for by the mode."""
    monkeypatch.setattr("os.access", lambda path, _: bool(Path(path).stat().st_mode & stat.S_IWUSR))
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    fault = cache_fault({}, neuron_environment(config(f"compiler_cache_url={folder}/cache")))
    assert f"but is {folder}/cache, and {folder} is not writable; make it writable" in str(fault)
