"""Rules on what ``exp_manager`` makes: the packages must be installed, and loggers get what they require."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path

from nxdt_align.config.faults import Fault, did_you_mean
from nxdt_align.config.fields import name_fault
from nxdt_align.config.neuron_packages import has_module
from nxdt_align.config.rules import lookup
from nxdt_align.config.schema import Config

PACKAGES: dict[str, tuple[str, str]] = {
    "exp_manager.create_tensorboard_logger": ("tensorboard", "pip install tensorboard"),
    "exp_manager.create_wandb_logger": ("wandb", "pip install 'nxdt-align[wandb]'"),
    "exp_manager.create_mlflow_logger": ("mlflow", "pip install mlflow"),
    "exp_manager.create_dllogger_logger": (
        "dllogger",
        "pip install git+https://github.com/NVIDIA/dllogger",
    ),
    "exp_manager.create_clearml_logger": ("clearml", "pip install clearml"),
    "exp_manager.create_neptune_logger": ("neptune", "pip install neptune"),
    "exp_manager.create_straggler_detection_callback": (
        "ptl_resiliency",
        "install NVIDIA's resiliency extension",
    ),
    "exp_manager.create_fault_tolerance_callback": (
        "ptl_resiliency",
        "install NVIDIA's resiliency extension",
    ),
}
"""Switch -> the module that it needs, and how one gets it."""

_NAMED = ("wandb", "neptune")
"""Loggers that need a name or a project."""


SUMMARY_WRITER: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("log_graph", "default_hp_metric"), ((bool,), "True or False")),
    **dict.fromkeys(("prefix", "sub_dir", "comment", "filename_suffix"), ((str,), "text")),
    **dict.fromkeys(("max_queue", "purge_step"), ((int,), "an integer")),
    "flush_secs": ((int, float), "a number"),
}
"""Setting of the TensorBoard logger -> its types, and what they are called."""
WANDB = (
    *("name", "project", "entity", "group", "job_type", "tags", "notes", "id", "save_dir", "dir", "offline"),
    *("log_model", "prefix", "checkpoint_name", "experiment", "anonymous", "config", "mode"),
    *("resume", "config_exclude_keys", "config_include_keys", "allow_val_change", "force", "reinit"),
    *("resume_from", "fork_from", "save_code", "tensorboard", "sync_tensorboard", "monitor_gym", "settings"),
)
"""Arguments of Lightning's WandbLogger and, through it, of wandb.init."""
MLFLOW = (
    *("experiment_name", "tracking_uri", "tags", "save_dir", "prefix", "artifact_location", "run_id"),
    "log_model",
)
"""Arguments of NeMo's MLFlowParams."""
_NAMED_BY_FOLDER = {
    ("wandb", "version"): "id chooses the run of W&B's to go on with, name what it is called",
    ("mlflow", "run_name"): "tags={mlflow.runName: ...} chooses another, run_id a run to go on with",
}
"""Arguments that Lightning's loggers have and NeMo sets itself -> what there is instead."""
_STORES = ("file", "http", "https", "databricks", "databricks-uc", "uc")
_DATABASES = ("postgresql", "mysql", "sqlite", "mssql")
"""They may name a driver, ``mysql+pymysql``, and need SQLAlchemy."""
_IN_A_NAME = ("prefix", "sub_dir", "comment", "filename_suffix")


def logger_faults(config: Config) -> Iterator[Fault]:
    """What loggers and callbacks of ``exp_manager`` lack on this machine, or would not take."""
    for key, (module, install) in PACKAGES.items():
        if lookup(config, key) and not has_module(module):
            yield Fault(
                key,
                f"needs the package {module}, which is not installed",
                advice=f"{install}, or set {key}=False",
                is_missing_path=True,
            )
    for name in _NAMED:
        given: Mapping[str, object] = lookup(config, f"exp_manager.{name}_logger_kwargs") or {}
        named = given.get("name") or given.get("project")
        if lookup(config, f"exp_manager.create_{name}_logger") and not named:
            key = f"exp_manager.{name}_logger_kwargs"
            yield Fault(
                key,
                f"must have a name or a project with exp_manager.create_{name}_logger",
                advice=f"e.g. {key}={{project: alignment}}",
            )
    mlflow = config.exp_manager.mlflow_logger_kwargs
    if config.exp_manager.create_wandb_logger:
        yield from _unknown_names("wandb", config.exp_manager.wandb_logger_kwargs or {}, WANDB)
    if config.exp_manager.create_mlflow_logger:
        yield from _unknown_names("mlflow", mlflow, MLFLOW)
        yield from _tracking_uri(mlflow.get("tracking_uri"))
    yield from _summary_writer(config.exp_manager.summary_writer_kwargs or {})
    for file in config.exp_manager.files_to_copy or ():
        if not Path(file).is_file():
            rule = "must be files that exist"
            yield Fault("exp_manager.files_to_copy", rule, file, is_missing_path=True)


def _unknown_names(logger: str, given: Mapping[str, object], known: tuple[str, ...]) -> Iterator[Fault]:
    """Which its package would refuse, or not read, when training starts."""
    for name, value in given.items():
        key = f"exp_manager.{logger}_logger_kwargs.{name}"
        instead = _NAMED_BY_FOLDER.get((logger, name))
        if instead is not None:
            yield Fault(key, "must not be set: the run's folder names it", advice=instead)
        elif name not in known:
            near = did_you_mean(name, known)
            advice = f"{near} There are: {', '.join(known)}".strip()
            yield Fault(key, f"is not an argument of the {logger} logger", value, advice)


def _tracking_uri(uri: object) -> Iterator[Fault]:
    """Of a kind that no store of MLflow's, or of another package, has."""
    key = "exp_manager.mlflow_logger_kwargs.tracking_uri"
    if uri is None:
        return
    if not isinstance(uri, str):
        yield Fault(key, "must be text", uri)
        return
    scheme = uri.partition("://")[0].lower() if "://" in uri else ""
    plugins = [each.name for each in entry_points(group="mlflow.tracking_store")]
    database = scheme.partition("+")[0]
    if database in _DATABASES:
        if not has_module("sqlalchemy"):
            rule = f"needs the package sqlalchemy for {database}, which is not installed"
            yield Fault(key, rule, advice="pip install sqlalchemy", is_missing_path=True)
    elif scheme and scheme not in (*_STORES, *plugins):
        known = ", ".join(f"{name}://" for name in (*_STORES, *_DATABASES, *plugins))
        # Not the rest, which may have a password.
        yield Fault(
            key,
            "must be a folder or an address of a kind that MLflow knows",
            f"{scheme}://",
            f"There are: {known}",
        )


def _summary_writer(given: Mapping[str, object]) -> Iterator[Fault]:
    for name, value in given.items():
        key = f"exp_manager.summary_writer_kwargs.{name}"
        types, called = SUMMARY_WRITER.get(name, ((), ""))
        if name == "log_dir":
            yield Fault(key, "must not be set: the logger writes into the run's folder")
        elif not types:
            near = did_you_mean(name, SUMMARY_WRITER)
            advice = f"{near} There are: {', '.join(SUMMARY_WRITER)}".strip()
            yield Fault(key, "is not a setting of the TensorBoard logger", value, advice)
        elif not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield Fault(key, f"must be {called}", value)
        elif name in _IN_A_NAME and value:
            yield from name_fault(key, str(value))
