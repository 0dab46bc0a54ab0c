"""The section ``exp_manager``: folders, loggers, checkpoints, resume. Part of the schema.

NeMo 2.1.0's ``ExpManagerConfig`` and ``CallbackParams``, with NeMo's defaults unless noted, plus
NxDT's keys and ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nxdt_align.config.faults import Fault
from nxdt_align.config.fields import PATH, name_fault, number


@dataclass(frozen=True, kw_only=True)
class CheckpointCallbackConfig:
    """When checkpoints are written and which are kept."""

    filepath: str | None = None
    """NeMo's old spelling of dirpath and filename; leave it null."""
    dirpath: str | None = field(default=None, metadata=PATH)
    """Folder of the checkpoints; null: checkpoints in the experiment's folder."""
    filename: str | None = None
    """Name of a checkpoint, with {step} and {consumed_samples} filled in; null: derived from the name."""
    monitor: str = "step"
    """Metric that ranks checkpoints, of the step that is saved: validation runs before it where it needs one
    of validation. NeMo's default is val_loss; NxDT's YAMLs have step."""
    mode: Literal["max", "min"] = "max"
    """Whether the largest (max) or smallest (min) value of monitor is best."""
    save_top_k: int = number(1, at_least=-1)
    """Number of checkpoints to keep; -1 for all."""
    save_last: bool = False
    """Write one more at the end, with a name ending in -last."""
    every_n_train_steps: int | None = number(None, at_least=0)
    """Steps between two checkpoints."""
    every_n_epochs: int | None = 1
    """Epochs between two checkpoints; no effect if every_n_train_steps is set."""
    train_time_interval: Any = None
    """Wall-clock time between two checkpoints, as a section of days, hours, minutes or seconds:
    {minutes: 30}."""
    save_on_train_epoch_end: bool = False
    """Write at the end of a training epoch instead of after validation."""
    save_weights_only: bool = False
    """Leave out the optimizer's state."""
    auto_insert_metric_name: bool = True
    """Put the metric's name into the file name."""
    enable_version_counter: bool = False
    """Add -v1, -v2 to a name that exists."""
    verbose: bool = True
    """Log each checkpoint."""
    prefix: str | None = None
    """Start of the name; null: derived from the experiment's name."""
    postfix: str = ".nemo"
    """End of a .nemo archive's name; none is written here."""
    save_best_model: bool = False
    """Write the best checkpoint as a .nemo archive; none is written here."""
    always_save_nemo: bool = False
    """Write every checkpoint as a .nemo archive; none is written here."""
    save_nemo_on_train_end: bool = False
    """Write a .nemo archive at the end; none is written here."""
    save_last_n_optim_states: int = -1
    """Checkpoints that keep the optimizer's state; -1 for all."""
    async_save: bool = False
    """NeMo's asynchronous checkpoints; exp_manager.async_checkpointing has ours."""
    model_parallel_size: int | None = None
    """Tensor x pipeline parallel size, ${multiply:...} in NxDT's YAMLs; here it follows from
    distributed_strategy."""
    use_master_weights_in_ckpt: bool = False
    """Save the fp32 copy of the weights instead of the bf16 ones."""

    def faults(self) -> Iterator[Fault]:
        for key in ("filename", "prefix"):
            yield from name_fault(key, getattr(self, key))
        interval = self.train_time_interval
        if interval is not None and not _is_duration(interval):
            advice = "give days, hours, minutes or seconds, e.g. {minutes: 30}"
            yield Fault("train_time_interval", "must be a time", interval, advice)


def _is_duration(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        key in ("days", "hours", "minutes", "seconds")
        and isinstance(part, int | float)
        and not isinstance(part, bool)
        and 0 <= part < 1e6
        for key, part in value.items()
    )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """(ours) Answers to fixed validation prompts from the policy as it trains, beside those before training
    and the reference's."""

    prompts: int = number(0, at_least=0, at_most=1000)
    """Number of prompts, the first different ones of the validation data; 0: no samples."""
    every_n_validations: int = number(1, at_least=1)
    """Validations between two samplings; before the first step there is always one, in a new run."""
    max_tokens: int = number(64, at_least=1)
    """New tokens per prompt. Each takes a whole forward pass over all prompts, at most as many at a
    time as a micro-batch has tokens for (data.micro_batch_size * data.seq_length)."""
    temperature: float = number(0.0, at_least=0)
    """0 takes the likeliest token; above 0, tokens are drawn from logits divided by it (with one
    tensor-parallel rank and pipeline stage), by random numbers apart from the run's."""


@dataclass(frozen=True, kw_only=True)
class ExpManagerConfig:
    """The experiment's folder, loggers and checkpoints, and what training resumes from."""

    explicit_log_dir: str | None = field(default=None, metadata=PATH)
    """Folder of the experiment, instead of exp_dir/name/date (exp_log_dir is accepted too)."""
    exp_dir: str | None = field(default=None, metadata=PATH)
    """Folder of all experiments; null: nemo_experiments in the current folder."""
    name: str | None = None
    """Folder of this experiment's runs; null: the top-level name."""
    version: str | None = None
    """Folder of this run; null: the date."""
    use_datetime_version: bool = True
    """Name runs by date; False: version_0, version_1, ..."""
    resume_if_exists: bool = False
    """Resume from the newest checkpoint of the same run (objective, data, start weights and model)."""
    resume_past_end: bool = False
    """Resume even from a checkpoint of the end."""
    resume_ignore_no_checkpoint: bool = False
    """Start a new run if resume_if_exists finds no checkpoint."""
    resume_from_checkpoint: str | None = field(default=None, metadata=PATH)
    """Where training starts: a Hugging Face folder of weights, a checkpoint, a run's folder or its
    folder of checkpoints (the newest), or a link or file that names one; null: random weights.
    A checkpoint of this run in the experiment's folder takes precedence."""
    log_local_rank_0_only: bool = False
    """Write a log file only for the first process of a node."""
    log_global_rank_0_only: bool = False
    """Write a log file only for the first process of the run."""
    create_tensorboard_logger: bool = True
    """Log to TensorBoard."""
    summary_writer_kwargs: Mapping[str, Any] | None = None
    """Arguments of the TensorBoard logger."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases."""
    wandb_logger_kwargs: Mapping[str, Any] | None = None
    """Arguments of the W&B logger: name or project, id, ..."""
    create_mlflow_logger: bool = False
    """Log to MLflow."""
    mlflow_logger_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the MLflow logger: experiment_name (null: exp_manager.name, or name), tracking_uri, ..."""
    create_dllogger_logger: bool = False
    """Log with NVIDIA's DLLogger."""
    dllogger_logger_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of DLLogger."""
    create_clearml_logger: bool = False
    """Log to ClearML."""
    clearml_logger_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the ClearML logger."""
    create_neptune_logger: bool = False
    """Log to Neptune."""
    neptune_logger_kwargs: Mapping[str, Any] | None = None
    """Arguments of the Neptune logger."""
    create_checkpoint_callback: bool = True
    """Write checkpoints."""
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)
    create_early_stopping_callback: bool = False
    """Stop when a metric no longer improves."""
    early_stopping_callback_params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of early stopping: monitor, mode, patience, ..."""
    create_preemption_callback: bool = True
    """On SIGTERM, SIGINT or SIGUSR1, finish the step, write a checkpoint and end with status 128 + signal;
    False: the signal ends the run at once, and nothing is saved."""
    files_to_copy: tuple[str, ...] | None = None
    """Files to copy into the experiment's folder."""
    log_step_timing: bool = False
    """Log the time of each step with NeMo's timer, whose step axis starts at 0; throughput is always
    logged."""
    log_delta_step_timing: bool = False
    """Log the time between steps with NeMo's logger."""
    step_timing_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the step timer: reduction, sync_cuda, buffer_size."""
    disable_validation_on_resume: bool = False
    """Skip the validation that was due when the run was interrupted (NeMo's default, with which a resumed run
    logs less than an uninterrupted one)."""
    ema: Mapping[str, Any] = field(default_factory=dict)
    """NeMo's moving average of weights; enable must be False."""
    max_time_per_run: str | None = None
    """Wall-clock time after which the run ends with a checkpoint, as DD:HH:MM:SS."""
    seconds_to_sleep: float = number(5, at_least=0, at_most=86_400)
    """Seconds that the other ranks wait while rank 0 creates the folder."""
    create_straggler_detection_callback: bool = False
    """NeMo's detection of slow ranks (CUDA)."""
    straggler_detection_params: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments."""
    create_fault_tolerance_callback: bool = False
    """NeMo's fault tolerance (CUDA)."""
    fault_tolerance: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments."""
    log_tflops_per_sec_per_gpu: bool = True
    """NeMo's count of floating-point operations."""
    log_parameter_norm: bool = True
    """Log the parameters' L2 norm."""
    log_gradient_norm: bool = True
    """Log the gradients' L2 norm before clipping."""
    log_step_phases: bool = False
    """(ours) Log seconds per step of waiting for data, forward and backward pass, optimizer, and metrics, as
    time/data, ...; the device is waited for after each, but where a step is one graph (engine nxd, xla):
    those are the host's times. run.log has their shares without that, too."""
    log_token_statistics: bool = True
    """Log TRL's statistics of the responses' tokens: logits/chosen, logits/rejected, entropy and
    mean_token_accuracy."""
    enable_recovery_time_instrumentation: bool = False
    """Log how long each part of a start or a restart takes, up to the end of the first step."""
    save_xser: bool = True
    """Write checkpoints in torch_xla's xser form, one file per tensor."""
    load_xser: bool = True
    """Expect checkpoints in xser form. The form is detected on reading; if this key is set and differs, the
    log says so (engine nxd)."""
    save_bf16: bool = False
    """Write checkpoint weights in bf16."""
    async_checkpointing: bool = False
    """Write checkpoints while training goes on, from a copy of the state in each rank's host memory. At
    most one is in progress; a failed write stops the run at the next checkpoint, or at the end."""
    ckpt_ptl_version: str | None = None
    """NxDT's: Lightning version of a checkpoint that does not record it. Ours always do."""
    export_hf: bool | Literal["merged", "adapter"] = True
    """(ours) Write the trained model as a Hugging Face folder at the end. With adapters, merged (or True):
    the model with the adapters added in; adapter (or True, with peft.quantize_base): the adapters alone, as
    PEFT loads them."""
    check_export: bool = True
    """(ours) Compare the export's log-probabilities of three records, by transformers, with the trainer's; up
    to 20 GB of weights, where the device compiles no graphs, and not of adapters alone."""
    report: bool = True
    """(ours) At the end, write report.html and report.json into the run's folder: curves, settings and a
    verdict in words."""
    sample_during_eval: SampleConfig = field(default_factory=SampleConfig)
    preflight: bool = True
    """(ours) Before the first step, check that policy and reference agree; stop a new run if they should and
    do not."""
    fail_on_recompile: bool = False
    """(ours) Stop if a step compiles a graph after the first two steps of its shapes; False only warns. Where
    steps are compiled: on neuron and xla, and with distributed_strategy.compile."""

    def faults(self) -> Iterator[Fault]:
        yield from name_fault("name", self.name)
        if self.explicit_log_dir is not None and not self.explicit_log_dir.strip():
            # It would be the current folder, whose files NeMo moves aside.
            advice = "leave it out, or name a folder"
            yield Fault("explicit_log_dir", "must not be empty", self.explicit_log_dir, advice)
