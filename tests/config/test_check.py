"""Every rule refuses its bad value with key, rule, value and advice; good configurations pass."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from config_checks import check
from lightning.pytorch.loggers import WandbLogger

from nxdt_align.config.check import ConfigError, load_checked
from nxdt_align.config.load import to_yaml
from nxdt_align.config.loggers import MLFLOW, WANDB, logger_faults
from nxdt_align.config.schema import Config
from nxdt_align.run.mode import RunMode

Load = Callable[..., Config]
Reject = Callable[..., str]
ALIGN, SPREAD = "model_alignment_strategy", "distributed_strategy"


def test_a_good_configuration_has_no_fault_and_no_notice(load: Load, good: str) -> None:
    assert check(load(good), world_size=1, engine="native") == []


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("data.seq_length=0", "data.seq_length: must be at least 2, but is 0"),
        ("data.global_batch_size=-1", "data.global_batch_size: must be at least 1, but is -1"),
        (
            "data.micro_batch_size=3",
            "must be a multiple of data.micro_batch_size (3) x data-parallel size (1) = 3, "
            "but is 8; the next is 9",
        ),
        (f"{ALIGN}.dpo.max_prompt_length=4096", "must be below data.seq_length (4096)"),
        (f"{ALIGN}.dpo.kl_beta=0", "kl_beta: must be above 0, but is 0.0"),
        (f"{ALIGN}.dpo.label_smoothing=0.5", "label_smoothing: must be below 0.5, but is 0.5"),
        (
            f"{ALIGN}.dpo.loss_type=ippo",
            "apo_down, discopop, sigmoid_norm or a list of them, but is 'ippo'; did you mean ipo?",
        ),
        (f"{ALIGN}.dpo.truncation_mode=start", "must be one of keep_start, keep_end, but is 'start'"),
        (
            "precision.type=fp8",
            "must be one of fp32, bf16SR, mixed_precision, mixed_precisionSR, "
            "mixed_precision_SR, autocast, manual, fp16, but is 'fp8'",
        ),
        (
            f"{ALIGN}.orpo.beta=0.1",
            f"{ALIGN}: must have exactly one of dpo, orpo, cpo, simpo, kto and sft, but has dpo and orpo; "
            f"for orpo, drop dpo with ~{ALIGN}.dpo",
        ),
        (
            f"{ALIGN}.dpo=null",
            f"{ALIGN}: must have exactly one of dpo, orpo, cpo, simpo, kto and sft, but has none",
        ),
        ("model_source=megatron", "model_source: must be hf"),
        (
            "+data.chat_template_kwargs.tools=[]",
            "data.chat_template_kwargs.tools: is no variable of a chat template",
        ),
        ("+data.chat_template_kwargs=[1]", "data.chat_template_kwargs: must be a mapping"),
        ("model.moe.num_experts=8", "model.moe: Megatron's settings of experts are not read"),
        ("trainer.max_steps=-1", "training would never end"),
        ("trainer.accumulate_grad_batches=4", "must be 1 (data.global_batch_size sets"),
        ("trainer.check_val_every_n_epoch=null", "trainer.val_check_interval: must be a number of steps"),
        (
            "trainer.val_check_interval_examples=7",
            "val_check_interval_examples: must be at least data.global_batch_size (8), the examples of a "
            "step, but is 7",
        ),
        ("trainer.limit_val_batches=1.5", "must be a share from 0.0 to 1.0, or a whole number, but is 1.5"),
        ("trainer.max_time=999999999999:00:00:00", "trainer.max_time: must be days:hours:minutes:seconds"),
        (
            "exp_manager.max_time_per_run=2h",
            "exp_manager.max_time_per_run: must be days:hours:minutes:seconds",
        ),
        (f"{SPREAD}.timeout_minutes=1e30", "timeout_minutes: must be at most 525600, but is 1e+30"),
        (
            "exp_manager.checkpoint_callback_params.train_time_interval=5",
            "train_time_interval: must be a time, but is 5",
        ),
        ("trainer.lnc=3", "trainer.lnc: must be 1 or 2, but is 3"),
        ("data.buckets=[128,64]", "in ascending order, but is [128, 64]; [64, 128] would be"),
        ("exp_manager.ema.enable=True", "exp_manager.ema.enable: must be False"),
        ("exp_manager.checkpoint_callback_params.always_save_nemo=True", "no .nemo archive is written here"),
        (
            f"{SPREAD}.expert_model_parallel_size=2",
            "must be 1 (experts are not divided over ranks), but is 2",
        ),
        (
            f"{SPREAD}.tensor_model_parallel_size=2",
            "times trainer.num_nodes must be a multiple of "
            "tensor_model_parallel_size (2) x pipeline_model_parallel_size (1) x "
            "context_parallel_size (1) = 2, but is 1",
        ),
        (f"{SPREAD}.context_parallel_size=2", "model.fusions.ring_attention: must be True"),
        ("model.pipeline_cuts=[model.layers.1]", "must have pipeline_model_parallel_size - 1 (0) entries"),
        (
            f"{SPREAD}.virtual_pipeline_model_parallel_size=2",
            "must be 1 where pipeline_model_parallel_size is 1, as a single rank has nothing to interleave",
        ),
    ],
)
def test_a_broken_rule_is_named(reject: Reject, override: str, rule: str) -> None:
    assert rule in reject(override)


@pytest.mark.parametrize(
    ("cuts", "rule"),
    [
        (
            "[model.layers.1]",
            "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size - 1 (3) entries",
        ),
        (
            "[model.layers.1,model.layers.3,norm]",
            "must name layers in ascending order, as [model.layers.10, ",
        ),
        ("[model.layers.3,model.layers.1,model.layers.5]", "must name layers in ascending order"),
        ("[model.layers.1,model.layers.1,model.layers.5]", "must name layers in ascending order"),
    ],
)
def test_pipeline_cuts_name_layers_in_order(reject: Reject, cuts: str, rule: str) -> None:
    sizes = ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2")
    overrides = ("trainer.devices=2", *(f"{SPREAD}.{size}" for size in sizes))
    assert rule in reject(*overrides, f"model.pipeline_cuts={cuts}")


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["model.optim.name=adamww"], "must be a known optimizer, but is 'adamww'; did you mean adamw?"),
        (["model.optim.lr=-1.0"], "model.optim.lr: must be at least 0, but is -1.0"),
        (
            ["model.optim.sched.max_steps=many"],
            "model.optim.sched.max_steps: must be an integer, but is 'many'",
        ),
        (["model.optim.weight_deacy=0.1"], "model.optim.weight_deacy: is not a setting of any optimizer"),
        (
            ["model.optim.sched.name=rprop"],
            "must be a schedule; this is an optimizer, but is 'rprop'; set model.optim.name: rprop",
        ),
        (["model.optim.sched.name=Cosine"], "did you mean CosineAnnealing?"),
        (["model.optim.sched.name=StepLR"], "model.optim.sched.step_size: is required by StepLR"),
        (["model.optim.sched.warmup_step=5"], "did you mean warmup_steps?"),
        (
            ["model.optim.sched={name: CosineAnnealing, min_lr: 1.0}"],
            "model.optim.sched.min_lr: must not be above model.optim.lr (5e-07), but is 1.0",
        ),
    ],
)
def test_a_broken_rule_of_the_optimizer_is_named(reject: Reject, overrides: list[str], rule: str) -> None:
    assert rule in reject(*overrides)


def test_of_two_objectives_the_one_asked_for_last_is_kept(reject: Reject, good: str) -> None:
    assert f"for simpo, drop dpo with ~{ALIGN}.dpo" in reject(f"{ALIGN}.simpo.beta=2")
    assert f"for dpo, drop simpo with ~{ALIGN}.simpo" in reject(
        f"{ALIGN}.simpo.beta=2", f"+{ALIGN}.dpo.kl_beta=0.1"
    )
    assert f"for kto, drop dpo and orpo with ~{ALIGN}.dpo ~{ALIGN}.orpo" in reject(
        f"{ALIGN}.orpo={{}}", f"{ALIGN}.kto={{}}"
    )
    both = good.replace("{dpo: {}}", "{dpo: {}, orpo: {}}")
    assert f"drop one, e.g. with the override ~{ALIGN}.orpo" in reject("seed=1", text=both)


def test_another_librarys_setting_of_the_optimizer(reject: Reject) -> None:
    assert "model.optim.learning_rate: is not a setting" in reject("model.optim.learning_rate=1")
    assert "here it is model.optim.lr" in reject("model.optim.learning_rate=1")


def test_faults_of_reading_and_of_checking_come_together(reject: Reject) -> None:
    message = reject(
        *("trainer.max_step=5", "data.train_dir=/nowhere.jsonl", "data.global_batch_size=3"),
        *("data.micro_batch_size=2", f"{SPREAD}.tensor_model_parallel_size=3", "trainer.devices=3"),
        *(f"{ALIGN}.dpo.loss_type=ippo", "model.optim.sched.name=rprop", "data.seq_length=16384"),
        "model.encoder_seq_length=8192",
    )
    assert message.startswith("9 faults in ")
    for path in (
        *("trainer.max_step: is not", "data.train_dir: must be a file", "data.global_batch_size: must be a"),
        *("must divide num_attention_heads (32), but is 3", "loss_type: must be one of sigmoid"),
        *("sched.name: must be a schedule", "data.seq_length: must not be above"),
    ):
        assert path in message


def test_what_follows_from_a_value_that_cannot_be_read_is_not_reported(reject: Reject) -> None:
    """With data.seq_length unread, its default would make max_prompt_length look too long."""
    message = reject("data.seq_length=long", f"{ALIGN}.dpo.max_prompt_length=5000", "data.micro_batch_size=x")
    assert message.startswith("2 faults in ")
    assert "max_prompt_length" not in message


def test_sequences_must_not_be_longer_than_the_models(reject: Reject) -> None:
    message = reject("model.encoder_seq_length=2048", "data.seq_length=4096")
    assert "data.seq_length: must not be above model.encoder_seq_length (2048), but is 4096" in message


def test_a_shorter_sequence_than_the_models_is_fine(load: Load, good: str) -> None:
    check(load(good, "model.encoder_seq_length=8192"))


@pytest.mark.parametrize("packing", ["packed", "shared_prompt"])
def test_rows_of_packed_layouts_need_no_even_batch(load: Load, good: str, packing: str) -> None:
    check(load(good, "data.micro_batch_size=3", f"data.packing={packing}"))


def test_data_parallel_size_counts_in_the_batch(load: Load, good: str) -> None:
    config = load(good, "trainer.devices=4", "trainer.num_nodes=2", f"{SPREAD}.tensor_model_parallel_size=2")
    assert (config.world_size, config.data_parallel_size) == (8, 4)
    check(config)
    with pytest.raises(ConfigError, match=r"micro_batch_size \(3\) x data-parallel size \(4\) = 12"):
        check(dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch_size=3)))


def test_as_many_processes_must_run_as_the_yaml_says(load: Load, good: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(load(good, "trainer.devices=8"), world_size=2)
    assert "processes that run (2), but is 8 x 1 = 8" in str(error.value)
    assert "set trainer.devices=2" in str(error.value)


def test_required_keys_are_named(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as error:
        load_checked(str(write("trainer: {max_steps: 1}")))
    paths = {fault.path for fault in error.value.faults}
    assert paths == {"data.train_dir", "exp_manager.resume_from_checkpoint", ALIGN}


# Notices


def test_validation_data_that_is_not_read_is_noticed(load: Load, good: str, files: Path) -> None:
    config = load(good, f"data.val_dir={files}/nowhere.jsonl", "trainer.limit_val_batches=0.0")
    (notice,) = check(config)
    assert "trainer.limit_val_batches is 0.0: validation is off" in notice
    assert "no reference log-probabilities" in notice


RANK = "exp_manager.checkpoint_callback_params.monitor=val_loss"


def test_checkpoints_ranked_by_a_validation_that_is_off(load: Load, good: str) -> None:
    with pytest.raises(ConfigError, match=r"monitor: needs validation, but data.val_dir is None"):
        check(load(good, RANK, "data.val_dir=null"))


def test_validation_before_checkpoints_is_noticed(load: Load, good: str, files: Path) -> None:
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps={}"
    common = (RANK, f"data.val_dir={files}/train.jsonl", "trainer.val_check_interval=3")
    (notice,) = check(load(good, *common, every.format(2)))
    assert "runs before each, every 2 steps, besides trainer.val_check_interval, every 3" in notice
    assert check(load(good, *common, every.format(6))) == []


def test_validation_counts_examples(load: Load, good: str, files: Path) -> None:
    """As steps, across epochs; rounded down as the reference implementation does, which says so too."""
    by, whole = "trainer.val_check_interval_examples", load(good)
    assert whole.validation_interval == (1.0, 1)
    config = load(good, f"{by}=800", "trainer.check_val_every_n_epoch=null")
    assert check(config) == [] and config.validation_interval == (100, None)
    extent = RunMode().extent(config)
    assert (extent["val_check_interval"], extent["check_val_every_n_epoch"]) == (100, None)
    # A run's resolved settings, which have every key.
    assert not any(by in notice for notice in check(load(to_yaml(config))))
    config = load(good, f"{by}=20", "trainer.val_check_interval=500")
    rounded, idle = check(config)
    assert config.validation_interval == (2, None)
    assert rounded == (
        f"{by}: 20 is no multiple of data.global_batch_size (8), so that validation runs every 16 examples, "
        "2 steps"
    )
    assert idle == f"trainer.val_check_interval: no effect, since {by} is set"
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=3"
    (notice,) = check(load(good, RANK, f"data.val_dir={files}/train.jsonl", f"{by}=16", every))
    assert f"runs before each, every 3 steps, besides {by}, every 2" in notice


def test_settings_of_another_optimizer_are_noticed_and_left_out(load: Load, good: str) -> None:
    """As when a YAML for AdamW is run with model.optim.name=rprop."""
    config = load(
        good,
        *("model.optim.name=rprop", "model.optim.betas=[0.9,0.95]", "model.optim.weight_decay=0.1"),
        *("model.optim.sched={name: ExponentialLR, gamma: 0.9, warmup_steps: 10, last_epoch: 7}",),
    )
    assert check(config) == [
        "rprop takes no model.optim.betas, model.optim.weight_decay: no effect",
        "ExponentialLR takes no model.optim.sched.warmup_steps, model.optim.sched.last_epoch: no effect",
    ]
    assert config.model.optim.settings() == {"lr": 5e-7}
    assert config.model.optim.sched is not None
    assert config.model.optim.sched.settings() == {"gamma": 0.9}


def test_a_reference_for_an_objective_without_one_is_noticed(load: Load, good: str) -> None:
    config = load(good, f"~{ALIGN}.dpo", f"{ALIGN}.orpo.beta=0.1", f"{ALIGN}.reference_model=/somewhere")
    assert check(config) == [f"{ALIGN}.reference_model has no effect: orpo has no reference"]


def test_every_argument_of_the_wandb_logger_is_known() -> None:
    own = inspect.signature(WandbLogger.__init__).parameters.values()
    assert {each.name for each in own if each.kind is not each.VAR_KEYWORD} - {"self", "version"} <= set(
        WANDB
    )


def test_arguments_that_nemo_gives_itself(load: Load, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo calls the loggers with ``version`` and ``run_name`` beside the given arguments."""
    manager = load(good).exp_manager
    both = dataclasses.replace(
        manager,
        create_wandb_logger=True,
        create_mlflow_logger=True,
        wandb_logger_kwargs={"project": "p", "version": "1"},
        mlflow_logger_kwargs={"run_name": "x"},
    )
    version, run_name = faults_of(dataclasses.replace(load(good), exp_manager=both), monkeypatch)
    own = "must not be set: the run's folder names it"
    assert version.startswith(f"exp_manager.wandb_logger_kwargs.version: {own}; id chooses the run of W&B's")
    assert run_name.startswith(f"exp_manager.mlflow_logger_kwargs.run_name: {own}; tags=")


@pytest.mark.parametrize("given", [{}, {"name": None}, {"project": "", "name": None}])
def test_wandb_needs_a_name(
    load: Load, good: str, monkeypatch: pytest.MonkeyPatch, given: dict[str, object]
) -> None:
    manager = dataclasses.replace(load(good).exp_manager, create_wandb_logger=True, wandb_logger_kwargs=given)
    (fault,) = faults_of(dataclasses.replace(load(good), exp_manager=manager), monkeypatch)
    assert "wandb_logger_kwargs: must have a name or a project" in fault


def test_mlflow_needs_no_name(load: Load, good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo names its experiment as the run's."""
    assert mlflow_faults(load(good), monkeypatch, {}) == []
    assert mlflow_faults(load(good), monkeypatch, {"experiment_name": None}) == []


def test_every_argument_of_the_mlflow_logger_is_known() -> None:
    """Those of NeMo's class, read from its source: the import takes seconds."""
    found = importlib.util.find_spec("nemo")
    assert found is not None and found.origin is not None
    source = Path(found.origin).parent / "utils" / "loggers" / "mlflow_logger.py"
    (own,) = (each for each in ast.parse(source.read_text()).body if isinstance(each, ast.ClassDef))
    fields = [each.target.id for each in own.body if isinstance(each, ast.AnnAssign)]  # type: ignore[union-attr]
    assert own.name == "MLFlowParams" and set(fields) == set(MLFLOW)


def mlflow_faults(config: Config, monkeypatch: pytest.MonkeyPatch, given: dict[str, object]) -> list[str]:
    manager = dataclasses.replace(config.exp_manager, create_mlflow_logger=True, mlflow_logger_kwargs=given)
    return faults_of(dataclasses.replace(config, exp_manager=manager), monkeypatch)


def faults_of(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of its loggers, where all packages but SQLAlchemy are installed."""
    monkeypatch.setattr("nxdt_align.config.loggers.has_module", lambda name: name != "sqlalchemy")
    return [str(fault) for fault in logger_faults(config)]


URI = "exp_manager.mlflow_logger_kwargs.tracking_uri"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"tracking_uri": "ftp://me:pass@host"},
            f"{URI}: must be a folder or an address of a kind that MLflow",
        ),
        ({"tracking_uri": [1]}, f"{URI}: must be text, but is [1]"),
        ({"tracking_uri": "mysql+pymysql://host/x"}, f"{URI}: needs the package sqlalchemy for mysql"),
        (
            {"trackng_uri": "x"},
            "is not an argument of the mlflow logger, but is 'x'; did you mean tracking_uri",
        ),
    ],
)
def test_an_mlflow_logger_that_would_not_start(
    load: Load, good: str, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], said: str
) -> None:
    (fault,) = mlflow_faults(load(good), monkeypatch, {"experiment_name": "x", **given})
    assert said in fault and "pass@" not in fault


@pytest.mark.parametrize(
    "uri", ["https://me:pass@host", "a/folder", "/a:b", "file:./runs", "databricks", None]
)
def test_where_mlflow_writes(load: Load, good: str, monkeypatch: pytest.MonkeyPatch, uri: str | None) -> None:
    assert mlflow_faults(load(good), monkeypatch, {"experiment_name": "x", "tracking_uri": uri}) == []
