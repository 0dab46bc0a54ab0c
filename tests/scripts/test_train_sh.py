"""scripts/train.sh with a recorder in the interpreter's place: what it starts, where it logs, how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from train_sh_fixture import Trainer, after, write_script


@pytest.fixture
def train(repo: Path, tmp_path: Path) -> Trainer:
    return Trainer(repo, tmp_path)


def test_one_process_runs_the_trainer_itself(train: Trainer) -> None:
    result = train()
    assert result.status == 0
    conf = str(train.repo / "src" / "nxdt_align" / "conf")
    common = ["--config-path", conf, "--config-name", "hf_llama3_8B_DPO_config", "trainer.num_nodes=1"]
    assert [call["argv"] for call in result.calls] == [
        ["-m", "nxdt_align", "processes", *common],
        ["-m", "nxdt_align", "train", *common],
    ]
    assert result.calls[-1]["cwd"] == str(train.cwd), "experiments go under the current folder"
    assert result.calls[-1]["env"]["PYTHONPATH"] == str(train.repo / "src")


def test_no_dated_version_reaches_the_trainer(train: Trainer) -> None:
    """A dated NEMO_EXPM_VERSION is what keeps NxD Training's auto-resume from ever finding its run."""
    assert "NEMO_EXPM_VERSION" not in train().calls[-1]["env"]


def test_examples_holds_the_same_script_and_configs(repo: Path) -> None:
    package = repo / "src" / "nxdt_align"
    assert (repo / "examples" / "train.sh").resolve() == (repo / "scripts" / "train.sh").resolve()
    assert (repo / "examples" / "train.sh").resolve() == package / "train.sh"
    assert (repo / "examples" / "conf").resolve() == (repo / "conf").resolve() == package / "conf"


@pytest.mark.parametrize("name", ["hf_llama3_8B_ORPO_config", "hf_llama3_8B_ORPO_config.yaml"])
def test_config_by_name(train: Trainer, name: str) -> None:
    arguments = train(CONF_FILE=name).trained
    assert after(arguments, "--config-path") == str(train.repo / "src" / "nxdt_align" / "conf")
    assert after(arguments, "--config-name") == "hf_llama3_8B_ORPO_config"


@pytest.mark.parametrize(
    "given", ["{folder}/my conf/run 1.yaml", "../my conf/run 1", "../my conf/run 1.yaml"]
)
def test_config_by_path(train: Trainer, given: str) -> None:
    folder = train.folder / "my conf"
    folder.mkdir()
    (folder / "run 1.yaml").write_text("name: x\n")
    arguments = train(CONF_FILE=given.format(folder=train.folder)).trained
    assert after(arguments, "--config-path") == str(folder)
    assert after(arguments, "--config-name") == "run 1"


def test_config_in_the_current_folder(train: Trainer) -> None:
    (train.cwd / "mine.yaml").write_text("name: x\n")
    assert after(train(CONF_FILE="mine").trained, "--config-path") == str(train.cwd)


def test_runs_from_examples(train: Trainer) -> None:
    train.script = "./train.sh"
    train.cwd = train.repo / "examples"
    result = train(LOG_PATH=str(train.folder / "logs"), CONF_FILE="hf_llama3_8B_ORPO_config")
    assert result.status == 0
    assert result.calls[-1]["cwd"] == str(train.repo / "examples")


def test_readmes_commands_as_written(train: Trainer) -> None:
    readme = (train.repo / "README.md").read_text()
    (block,) = re.findall(r"^```bash\n(cd examples\n.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    environment = train.environment(LOG_PATH=str(train.folder / "logs"))
    subprocess.run(["bash", "-euc", block], cwd=train.repo, env=environment, check=True, timeout=300)
    arguments = json.loads(train.calls.read_text().splitlines()[-1])["argv"]
    assert arguments[2] == "train" and after(arguments, "--config-name") == "hf_llama3_8B_DPO_config"
    assert arguments[-2:] == ["data.train_dir=/data/my_pairs.jsonl", "trainer.max_steps=100"]


def test_unknown_config_is_named_with_the_known_ones(train: Trainer) -> None:
    result = train(CONF_FILE="no_such_config")
    assert result.status == 1
    assert "CONF_FILE=no_such_config" in result.stderr
    assert "hf_llama3_8B_DPO_config" in result.stderr
    assert result.calls == []


def test_overrides_arrive_as_given_and_last(train: Trainer) -> None:
    overrides = ["exp_manager.name=a b; $(touch oops)", "+model.x='*'", "trainer.max_steps=7"]
    assert train(*overrides).trained[-4:] == ["trainer.num_nodes=1", *overrides]
    assert not (train.cwd / "oops").exists()


@pytest.mark.parametrize("value", ["yes", "2"])
def test_compile_is_0_or_1(train: Trainer, value: str) -> None:
    result = train(COMPILE=value)
    assert result.status == 1
    assert f"COMPILE must be 0 or 1, but is '{value}'" in result.stderr
    assert result.calls == []


def test_number_of_steps_reaches_the_trainer(train: Trainer) -> None:
    assert train(TRAIN_ITERS="3").calls[-1]["env"]["TRAIN_ITERS"] == "3"


def test_the_reference_alone(train: Trainer) -> None:
    """On as many processes as training has."""
    alone = train("seed=2", REFERENCE="2/4", FAKE_PROCESSES="2")
    argv = alone.trained
    at = argv.index("reference")
    assert argv[:3] == ["-m", "nxdt_align", "workers"]
    assert argv[at : at + 4] == ["reference", "precompute", "--share", "2/4"] and argv[-1] == "seed=2"
    assert "--config-name" in argv[at:] and "train" not in argv
    both = train(REFERENCE="1/1", COMPILE="1")
    assert both.status == 1 and "COMPILE=1" in both.stderr
    assert both.calls == alone.calls, "nothing was started"


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["trainer.devises=2"], {}, "trainer.devices"),
        ([], {"TRAIN_ITERS": "ten"}, "TRAIN_ITERS"),
    ],
)
def test_fault_of_the_config_is_one_message(
    train: Trainer, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    """With the real command line: it checks the config before anything is started."""
    result = train(*arguments, NXDT_ALIGN_PYTHON=sys.executable, **variables)
    assert result.status == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("status", ["0", "1", "3"])
def test_exits_with_the_trainers_status(train: Trainer, status: str) -> None:
    assert train(FAKE_STATUS=status).status == int(status)


def test_logs_to_the_terminal_and_to_a_file(train: Trainer) -> None:
    result = train(FAKE_STATUS="3")
    log = train.cwd / "nemo_experiments" / "logs" / "log"
    assert log.read_text() == "training on stdout\ntraining on stderr\n"
    assert "training on stdout\ntraining on stderr\n" in result.stdout
    assert "nemo_experiments/logs/log" in result.stdout
    train(LOG_PATH="elsewhere")
    assert "training on stdout" in (train.cwd / "elsewhere" / "log").read_text()


def test_a_second_run_keeps_the_first_ones_log(train: Trainer) -> None:
    train()
    train()
    log = train.cwd / "nemo_experiments" / "logs" / "log"
    assert log.read_text().count("training on stdout") == 2


def test_config_error_starts_nothing(train: Trainer) -> None:
    result = train(FAKE_CONFIG_ERROR="1")
    assert result.status == 1
    assert result.stderr == "error: trainer.devices must be positive\n"
    assert len(result.calls) == 1


def test_a_count_that_is_no_number_is_refused(train: Trainer) -> None:
    result = train(FAKE_PROCESSES="auto")
    assert result.status == 1
    assert "number of processes, got: auto" in result.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_reaches_the_trainer(train: Trainer, stop: signal.Signals) -> None:
    process = subprocess.Popen(
        [train.script],
        cwd=train.cwd,
        env=train.environment(FAKE_SLEEP="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Ignored, as in a background job, no shell could catch it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    log = train.cwd / "nemo_experiments" / "logs" / "log"
    deadline = time.monotonic() + 300
    while not (log.exists() and "ready" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the trainer did not start"
        time.sleep(0.05)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 17, "the trainer's own status"
    assert "asked to stop" in output
    assert "asked to stop" in log.read_text()


def test_compile_without_neuron_is_the_trainers_own(train: Trainer) -> None:
    result = train(COMPILE="1")
    assert result.calls[-1]["env"]["COMPILE"] == "1"
    assert result.trained[:3] == ["-m", "nxdt_align", "train"]


def test_compile_runs_under_the_compiler(train: Trainer) -> None:
    write_script(train.bin / "neuron_parallel_compile", "#!/bin/sh\n")
    arguments = train(COMPILE="1", FAKE_PROCESSES="32").trained
    assert arguments[:4] == ["-m", "nxdt_align", "precompile", "neuron_parallel_compile"]
    assert arguments[4:8] == [str(train.python), "-m", "nxdt_align", "workers"]
    assert arguments[arguments.index("train") - 2 : arguments.index("train") + 1] == [
        "-m",
        "nxdt_align",
        "train",
    ]
    assert train(COMPILE="0").trained[:3] == ["-m", "nxdt_align", "train"]


def test_engine_native_needs_no_compiler_of_xlas(train: Trainer) -> None:
    """neuron_parallel_compile would find no graph of torch.compile's."""
    write_script(train.bin / "neuron_parallel_compile", "#!/bin/sh\n")
    result = train("trainer.max_steps=3", COMPILE="1", FAKE_ENGINE="native")
    assert result.trained[:3] == ["-m", "nxdt_align", "train"]
    assert result.calls[0]["argv"][2:4] == ["processes", "--engine"]
    assert result.calls[0]["argv"][4:] == result.trained[3:], "of the run's own configuration"


@pytest.mark.parametrize(("failed", "status"), [(0, 0), (2, 1)])
def test_totals_of_the_compiler_decide(train: Trainer, failed: int, status: int) -> None:
    """With the real command line between train.sh and a compiler that prints what the real one does."""
    program = "echo DRYRUN $COMPILE\n" + "".join(
        f"echo '2026-08-01 INFO ||NEURON_PARALLEL_COMPILE||: Total {what}: {count}'\n"
        for what, count in (
            ("graphs", 5),
            ("successful compilations", 5 - failed),
            ("failed compilations", failed),
        )
    )
    write_script(train.bin / "neuron_parallel_compile", f"#!/bin/sh\n{program}")
    # As a worker of torchrun, so that no configuration of this machine's is asked for.
    variables = {"COMPILE": "1", "NXDT_ALIGN_PYTHON": sys.executable, "TORCHELASTIC_RUN_ID": "job"}
    result = train("distributed_strategy.engine=nxd", **variables)
    assert result.status == status, result.stdout + result.stderr
    assert "DRYRUN 1" in result.stdout and f"Total failed compilations: {failed}" in result.stdout
    log = (train.cwd / "nemo_experiments/logs/job/rank_0/log").read_text()
    assert ("error: COMPILE=1: 2 of 5 graphs did not compile" in log) == bool(failed)
    assert "Traceback" not in log


def test_print_env_with_the_real_command_line(train: Trainer) -> None:
    result = train("distributed_strategy.engine=nxd", "--print-env", NXDT_ALIGN_PYTHON=sys.executable)
    assert result.status == 0, result.stderr
    assert "export NEURON_RT_EXEC_TIMEOUT=100  # YAML (neuron_rt_exec_timeout)" in result.stdout
    assert "export MALLOC_ARENA_MAX=128  # already set" in result.stdout


def test_interpreter_of_the_active_environment(train: Trainer) -> None:
    environment = train.folder / "env"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(train.python)
    result = train(NXDT_ALIGN_PYTHON="", VIRTUAL_ENV=str(environment))
    assert result.status == 0
    assert len(result.calls) == 2


def test_interpreter_that_is_not_there_is_refused(train: Trainer) -> None:
    result = train(NXDT_ALIGN_PYTHON="/no/such/python")
    assert result.status == 1
    assert "NXDT_ALIGN_PYTHON=/no/such/python" in result.stderr
