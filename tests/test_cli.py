"""The command line: what it prints, what it returns, and what it does not import."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nxdt_align import __version__
from nxdt_align.cli import main
from nxdt_align.config.check import CheckedConfig
from nxdt_align.config.schema import Config
from nxdt_align.errors import SharedError, UserError

HEAVY = ("torch", "lightning", "pytorch_lightning", "nemo", "transformers", "datasets", "numpy", "pandas")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "COMPILE", "TRAIN_ITERS", "NXDT_ALIGN_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class FakeBuild:
    """Stands for the composition root: remembers how it was called."""

    error: BaseException | None = None
    calls: list[tuple[Config, Any]] = field(default_factory=list)

    def train(self, checked: CheckedConfig, env: Any) -> None:
        self.calls.append((checked.config, env))
        if self.error is not None:
            raise self.error


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> FakeBuild:
    fake = FakeBuild()
    module: Any = types.ModuleType("nxdt_align.run")
    module.train = fake.train
    module.RunEnv = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "nxdt_align.run", module)
    monkeypatch.setattr("nxdt_align.run", module, raising=False)
    return fake


@pytest.fixture
def good(tmp_path: Path) -> str:
    """A config without a fault, its files beside it."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "hidden_size": 16}')
    file = tmp_path / "good.yaml"
    file.write_text(f"""
trainer: {{max_steps: 10, limit_val_batches: 0}}
data:
    train_dir: {tmp_path}/train.jsonl
    val_dir: {tmp_path}/val.jsonl
    tokenizer: {{type: {tmp_path}/tokenizer}}
model:
    model_config: {tmp_path}/config.json
    optim: {{sched: {{max_steps: '${{trainer.max_steps}}'}}}}
model_alignment_strategy: {{dpo: {{}}}}
""")
    return str(file)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(repo: Path, tmp_path: Path) -> Run:
    """The command in a process of its own, from an empty folder."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(repo / "src"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "nxdt_align", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )

    return start


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--help-keys"],
        ["config", "--help"],
        ["config", "--no-check", "--config-name", "hf_llama3_8B_DPO_config", "trainer.max_steps=3"],
    ],
)
def test_it_answers(run: Run, arguments: list[str]) -> None:
    """Quickly, too, as nothing heavy is imported for it: see the next test."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_config_imports_nothing_heavy(repo: Path) -> None:
    code = (
        "import sys; from nxdt_align.cli import main; "
        "main(['config', '--config-name', 'hf_llama3_8B_DPO_config']); main(['--help-keys']); "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repo / "src")
    assert done.stdout.splitlines()[-1] == "[]"


# config


def test_config_prints_every_key_resolved(capsys: pytest.CaptureFixture[str], good: str) -> None:
    assert main(["config", "--no-check", "--config-name", good, "trainer.max_steps=7"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.model.optim.sched.max_steps == 7
    assert printed.model_alignment_strategy.dpo.kl_beta == 0.01
    assert printed.data.packing is None


def test_config_prints_a_yaml_of_another_machine(run: Run) -> None:
    """The shipped YAML names files of a trn1 node: train would stop here, no reason to print nothing."""
    done = run("config", "--config-name", "hf_llama3_8B_ORPO_config.yaml")
    assert done.returncode == 1
    assert "beta: 0.1" in done.stdout
    assert done.stderr.startswith("error: 4 faults in ") and done.stderr.count(" that exists") == 4
    assert run("config", "--no-check", "--config-name", "hf_llama3_8B_ORPO_config").stderr == ""


def test_config_reports_all_faults_and_prints_nothing(capsys: pytest.CaptureFixture[str], good: str) -> None:
    bad = ["trainer.max_step=5", "data.train_dir=/nowhere.jsonl", "model_alignment_strategy.dpo.kl_beta=-1"]
    assert main(["config", "--config-name", good, *bad]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: 3 faults in ")
    assert all(part in err for part in ("did you mean trainer.max_steps?", "/nowhere.jsonl", "above 0"))


def test_no_check_prints_what_check_refuses(capsys: pytest.CaptureFixture[str], good: str) -> None:
    arguments = ["--config-name", good, "model_alignment_strategy.dpo.kl_beta=-1"]
    assert main(["config", "--no-check", *arguments]) == 0
    assert "kl_beta: -1.0" in capsys.readouterr().out


def test_an_unknown_config_is_one_line_and_status_1(run: Run) -> None:
    done = run("config", "--config-name", "nonsense")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no config 'nonsense'")
    assert "Traceback" not in done.stderr


def test_overrides_may_stand_around_options(capsys: pytest.CaptureFixture[str], good: str) -> None:
    assert main(["config", "seed=1", "--config-name", good, "--no-check", "seed=2", "~data.val_dir"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.seed, printed.data.val_dir) == (2, None)


@pytest.mark.parametrize(
    "arguments", [[], ["config"], ["train", "--config-name", "x", "--max-steps", "3"], ["tran"]]
)
def test_a_wrong_command_line_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nxdt-align {__version__}\n"


# --help-keys


@pytest.mark.parametrize("arguments", [["--help-keys", "data"], ["config", "--help-keys", "data"]])
def test_keys_of_a_section(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "data.on_bad_record: error | drop = 'error'" in out
    assert "trainer." not in out.replace("trainer.max_steps", "")


def test_an_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help-keys", "dta"]) == 1
    assert "did you mean data?" in capsys.readouterr().err


# processes


def test_processes_prints_a_number_alone(capsys: pytest.CaptureFixture[str], good: str) -> None:
    assert main(["processes", "--config-name", good, "trainer.devices=4", "trainer.num_nodes=2"]) == 0
    assert capsys.readouterr() == ("4\n", "")


def test_processes_tells_the_engine_without_the_data(
    capsys: pytest.CaptureFixture[str], good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["processes", "--engine", "--config-name", good, "data.train_dir=/nowhere.jsonl"]
    for available, engine in ((False, "native"), (True, "nxd")):
        monkeypatch.setattr("nxdt_align.cli.neuron_available", lambda available=available: available)
        assert main(arguments) == 0
        assert main([*arguments, "distributed_strategy.engine=nxd"]) == 0
        assert capsys.readouterr().out == f"{engine}\nnxd\n"


def test_processes_reports_faults_before_anything_starts(
    capsys: pytest.CaptureFixture[str], good: str
) -> None:
    assert main(["processes", "--config-name", good, "data.train_dir=/nowhere.jsonl"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "data.train_dir: must be a file or folder that exists" in err


# train


def test_train_hands_configuration_and_environment_on(
    build: FakeBuild, good: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TRAIN_ITERS": "4"}.items():
        monkeypatch.setenv(name, value)
    arguments = ["train", "--config-name", good, "trainer.devices=4", "trainer.num_nodes=2", "seed=9"]
    assert main(arguments) == 0
    ((config, env),) = build.calls
    place = {"rank": 5, "world_size": 8, "local_rank": 1, "compile_only": False}
    assert {name: value for name, value in vars(env).items() if name in place} == place
    assert env.command.startswith("nxdt-align train --config-name ") and env.command.endswith(" seed=9")
    assert (config.seed, config.trainer.max_steps) == (9, 4)
    assert config.model.optim.sched is not None and config.model.optim.sched.max_steps == 4
    assert capsys.readouterr().err == "", "notices are the first rank's to give"


def test_train_gives_the_notices_of_the_configuration(
    build: FakeBuild, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config-name", good]) == 0
    assert "notice: trainer.limit_val_batches is 0: validation is off" in capsys.readouterr().err


@pytest.mark.parametrize(("compile_", "flags"), [("1", []), ("0", ["--dry-run-steps"])])
def test_dry_run_steps(
    build: FakeBuild, good: str, monkeypatch: pytest.MonkeyPatch, compile_: str, flags: list[str]
) -> None:
    monkeypatch.setenv("COMPILE", compile_)
    assert main(["train", "--config-name", good, *flags]) == 0
    assert build.calls[0][1].compile_only


def test_train_stops_before_it_builds_anything(
    build: FakeBuild, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "trainer.devices=2",
        "distributed_strategy.context_parallel_size=2",
        "model.fusions.ring_attention=True",
        "data.train_dir=/no.jsonl",
    ]
    assert main(["train", "--config-name", good, *arguments]) == 1
    assert build.calls == []
    err = capsys.readouterr().err
    assert err.startswith("error: 3 faults in ")
    assert "number of processes that run (1), but is 2 x 1 = 2" in err
    assert "distributed_strategy.context_parallel_size: must be 1" in err


def test_one_process_of_a_node_reports_the_faults_that_all_find(
    build: FakeBuild, good: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "--config-name", good, "seed=x"]) == 1
    build.error = SharedError("one checkpoint is damaged")
    assert main(["train", "--config-name", good]) == 1
    assert "error" not in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--config-name", good]) == 1
    assert capsys.readouterr().err.endswith("error: one checkpoint is damaged\n")


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "TRAIN_ITERS"])
def test_an_environment_variable_that_is_no_number(
    good: str, variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "-1")
    assert main(["train", "--config-name", good]) == 1
    assert f"the environment variable {variable} must be a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("the checkpoint is empty"), 1, "error (rank 2): the checkpoint is empty\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/out/x"),
            1,
            "error (rank 2): /out/x: the disk is full",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/out"),
            1,
            "error (rank 2): /out: permission denied",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "/f"), 1, "error (rank 2): /f: a file has the name of"),
        (IsADirectoryError(errno.EISDIR, "Is", "/d"), 1, "error (rank 2): /d: a folder has the name of"),
        (NotADirectoryError(errno.ENOTDIR, "Not", "/f/x"), 1, "error (rank 2): /f/x: a part of the path is"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_user_can_mend_is_told_without_a_traceback(
    build: FakeBuild,
    good: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    build.error = error
    monkeypatch.setenv("RANK", "2")
    assert main(["train", "--config-name", good]) == status
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "gone", "/x")])
def test_a_bug_keeps_its_traceback(build: FakeBuild, good: str, error: Exception) -> None:
    build.error = error
    with pytest.raises(type(error)):
        main(["train", "--config-name", good])


def test_debug_shows_the_traceback(build: FakeBuild, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build.error = UserError("the checkpoint is empty")
    monkeypatch.setenv("NXDT_ALIGN_DEBUG", "1")
    with pytest.raises(UserError):
        main(["train", "--config-name", good])


# The Neuron stack's environment


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What main reads and writes as os.environ."""
    variables = {"PATH": "/usr/bin"}
    monkeypatch.setattr("os.environ", variables)
    return variables


@pytest.fixture
def nxd_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the Neuron packages, for a package that has the engine."""
    monkeypatch.setattr("nxdt_align.cli.neuron_available", lambda: True)
    monkeypatch.setattr("nxdt_align.config.check.neuron_available", lambda: True)


@pytest.mark.usefixtures("nxd_here")
def test_environment_is_set_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, own_environment: dict[str, str], good: str, tmp_path: Path
) -> None:
    seen: dict[str, str] = {}

    class Build(types.ModuleType):
        RunEnv = types.SimpleNamespace

        def __getattr__(self, name: str) -> Any:
            """The first thing that is asked of the module, as if its import had read them."""
            seen.update(own_environment)
            return lambda *_, **given: None

    monkeypatch.setitem(sys.modules, "nxdt_align.run", Build("nxdt_align.run"))
    monkeypatch.setattr("nxdt_align.run", sys.modules["nxdt_align.run"], raising=False)
    own_environment |= {"NEURON_RT_EXEC_TIMEOUT": "7", "NEURON_CC_FLAGS": "-O1"}
    assert main(["train", "--config-name", good, f"compiler_cache_url={tmp_path}/cache"]) == 0
    assert seen["NEURON_RT_EXEC_TIMEOUT"] == "7", "the user's"
    assert seen["NEURON_CC_FLAGS"].startswith("-O1 --model-type transformer --enable")
    assert seen["NEURON_COMPILE_CACHE_URL"] == f"{tmp_path}/cache"
    assert seen["XLA_DOWNCAST_BF16"] == "0"


@pytest.mark.parametrize("where", ["distributed_strategy.engine=nxd", "trainer.accelerator=xla"])
def test_float32_stays_float32_whatever_is_set(
    build: FakeBuild,
    own_environment: dict[str, str],
    good: str,
    capsys: pytest.CaptureFixture[str],
    where: str,
    tmp_path: Path,
) -> None:
    """Under torch_xla's downcasts 257 is 256 and 1 + 2^-10 is 1, in float32 tensors. --print-env and the run
    agree, and the user is told."""
    own_environment |= {"XLA_USE_BF16": "1", "XLA_DOWNCAST_BF16": "0"}
    arguments = ["train", "--config-name", good, where, f"compiler_cache_url={tmp_path}/cache"]
    assert main([*arguments, "--print-env"]) == 0
    assert "export XLA_USE_BF16=0  # always, though it was set to 1\n" in capsys.readouterr().out
    assert own_environment["XLA_USE_BF16"] == "1"
    assert main(arguments) == 0
    assert (own_environment["XLA_USE_BF16"], own_environment["XLA_DOWNCAST_BF16"]) == ("0", "0")
    said = capsys.readouterr().err
    assert (
        said.count("is set to 0 instead of") == 1 and "notice: XLA_USE_BF16 is set to 0 instead of 1" in said
    )


def test_another_engine_sets_nothing(build: FakeBuild, own_environment: dict[str, str], good: str) -> None:
    assert main(["train", "--config-name", good, "distributed_strategy.engine=native"]) == 0
    assert "XLA_DOWNCAST_BF16" not in own_environment


@pytest.mark.usefixtures("nxd_here")
@pytest.mark.parametrize("verb", ["train", "processes"])
def test_compile_cache_that_cannot_be_written_stops_first(
    build: FakeBuild,
    own_environment: dict[str, str],
    good: str,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    """train.sh asks for the number of processes before it starts them."""
    assert main([verb, "--config-name", good, f"compiler_cache_url={good}/cache"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if not line.startswith("notice: ")]
    assert "compiler_cache_url: must be a folder that can be written to, or an s3:// address" in line
    assert f"where {good} is a file" in line
    assert build.calls == []
    assert "XLA_DOWNCAST_BF16" not in own_environment


def test_print_env_trains_nothing_and_needs_no_packages(
    build: FakeBuild, own_environment: dict[str, str], good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own_environment["NEURON_RT_EXEC_TIMEOUT"] = "7"
    arguments = ["train", "--config-name", good, "--print-env", "data.train_dir=/not/here.jsonl"]
    assert main([*arguments, "distributed_strategy.engine=nxd"]) == 0
    said = capsys.readouterr()
    assert "export NEURON_RT_EXEC_TIMEOUT=7  # already set\n" in said.out
    assert "export XLA_DOWNCAST_BF16=0  # YAML (engine nxd)\n" in said.out
    assert build.calls == []
    assert main([*arguments, "distributed_strategy.engine=native"]) == 0
    said = capsys.readouterr()
    assert said.out == "export NEURON_RT_EXEC_TIMEOUT=7  # already set\n"
    assert "engine native sets none of them" in said.err


def test_torch_neurons_runtime_gets_what_it_reads(
    build: FakeBuild, own_environment: dict[str, str], good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the compiler's flags, which its own compiler does not take."""
    own_environment["NEURON_RT_EXEC_TIMEOUT"] = "7"
    arguments = ["train", "--config-name", good, "distributed_strategy.engine=native", "trainer.lnc=1"]
    arguments += ["trainer.accelerator=neuron", "precision.type=bf16SR"]
    assert main([*arguments, "--print-env"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "export NEURON_LOGICAL_NC_CONFIG=1  # YAML (trainer.lnc)",
        "export NEURON_RT_EXEC_TIMEOUT=7  # already set",
        "export NEURON_RT_STOCHASTIC_ROUNDING_EN=1  # YAML (precision.type)",
    ]
    assert "sets none" not in said.err
    assert main(arguments) == 0
    assert own_environment["NEURON_LOGICAL_NC_CONFIG"] == "1"


def test_print_env_on_a_machine_of_torch_neurons(
    own_environment: dict[str, str],
    good: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where engine and device are auto, native's and the device's, as the run takes them."""
    monkeypatch.setattr("nxdt_align.config.engines.neuron_stack", lambda: "native")
    arguments = ["train", "--config-name", good, "--print-env", "trainer.lnc=1"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.startswith("export NEURON_LOGICAL_NC_CONFIG=1  # YAML (trainer.lnc)\n")
    assert "XLA_" not in said.out and "no NeuronCores" not in said.err
    assert main([*arguments, "distributed_strategy.engine=nxd"]) == 0
    assert "XLA_" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "overrides", "cores"),
    [
        ("1", ["trainer.accelerator=neuron"], 1),
        ("1", ["trainer.accelerator=neuron", "trainer.lnc=2"], 1),
        ("7", ["trainer.accelerator=neuron", "trainer.lnc=2"], 2),
        ("1", ["trainer.accelerator=cpu"], None),
    ],
)
def test_the_cores_that_the_runtime_was_told_count(
    build: FakeBuild,
    own_environment: dict[str, str],
    good: str,
    told: str,
    overrides: list[str],
    cores: int | None,
) -> None:
    """Not trainer.lnc, which the runtime would not be told then; the kernels would be for other cores."""
    own_environment["NEURON_LOGICAL_NC_CONFIG"] = told
    assert main(["train", "--config-name", good, "distributed_strategy.engine=native", *overrides]) == 0
    ((config, _),) = build.calls
    assert config.trainer.lnc == cores


def test_a_pods_own_disk_is_told_before_the_run(
    build: FakeBuild,
    own_environment: dict[str, str],
    good: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not of a dry run, which writes nothing."""
    own_environment["POD_UID"] = "7"
    monkeypatch.setattr(
        "nxdt_align.neuron.node.read_text", lambda path: "1 0 0:1 / / rw - overlay overlay rw"
    )
    assert main(["train", "--config-name", good]) == 0
    assert "notice: checkpoints go to " in capsys.readouterr().err
    assert main(["train", "--config-name", good, "--dry-run-steps"]) == 0
    assert "checkpoints go to" not in capsys.readouterr().err
    assert len(build.calls) == 2


@pytest.mark.parametrize(
    "verb",
    [
        *(["presets"], ["--help-keys"], ["config", "--no-check"]),
        *(["--help"], ["convert", "--help"], ["--version"], ["launch", "--path"]),
    ],
    ids=" ".join,
)
def test_a_reader_that_stops_early_is_no_error(repo: Path, tmp_path: Path, verb: list[str]) -> None:
    """As `nxdt-align presets | head -0`: the pipe has no reader when the command writes."""
    name = ["--config-name", "hf_llama3_8B_DPO_config"] if verb[0] == "config" else []
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nxdt_align", *verb, *name],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(repo / "src"), "PATH": "/usr/bin:/bin"},
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
