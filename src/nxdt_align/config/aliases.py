"""Other libraries' names for our settings, for messages that point to ours.

From TRL 1.16 and earlier, fairseq2, torchtune, the papers and the reference implementation of DPO;
docs/objectives.md has the table of objectives.
"""

from __future__ import annotations

_ALIGN = "model_alignment_strategy"
_DPO = f"{_ALIGN}.dpo"

OTHER_NAMES = {
    "beta": "kl_beta",
    "kl_beta": "beta",
    "tau": "kl_beta",
    "rpo_alpha": "nll_scale",
    "cpo_alpha": "nll_scale",
    "simpo_gamma": "gamma",
    "orpo_lambda": "beta",
    "average_log_prob": "length_normalization",
}
"""Another library's key of an objective -> our key, if the section has it."""

_OPTIM = "model.optim"
_CHECKPOINTS = "exp_manager.checkpoint_callback_params"


def _named(key: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), key)


FOREIGN_KEYS = {
    **_named(f"{_DPO}.kl_beta", "beta"),
    **_named(f"{_DPO}.nll_scale", "rpo_alpha"),
    **_named(f"{_OPTIM}.lr", "learning_rate lr"),
    **_named(f"{_OPTIM}.name", "optimizer optim optim_type optimizer.name optimizer._component_"),
    **_named(f"{_OPTIM}.weight_decay", "weight_decay"),
    **_named(f"{_OPTIM}.betas", "adam_beta1 adam_beta2 betas optim.beta"),
    **_named(f"{_OPTIM}.eps", "adam_epsilon"),
    **_named(
        f"{_OPTIM}.sched.name", "lr_scheduler_type lr_scheduler lr_scheduler.name lr_scheduler._component_"
    ),
    **_named(f"{_OPTIM}.sched.warmup_ratio", "warmup_ratio"),
    **_named(f"{_OPTIM}.sched.warmup_steps", "warmup_steps num_warmup_steps"),
    **_named(f"{_OPTIM}.sched.min_lr", "final_lr min_lr"),
    **_named("data.micro_batch_size", "per_device_train_batch_size"),
    **_named("data.seq_length", "max_length max_seq_len max_seq_length"),
    **_named("data.train_dir", "dataset_name dataset.path dataset.source datasets train_file"),
    **_named("data.val_dir", "eval_dataset valid_split"),
    **_named("data.dev_choose_samples", "n_examples max_train_samples"),
    **_named("data.num_workers", "dataset_num_proc dataloader_num_workers num_prefetch"),
    **_named("data.packing", "padding_free"),
    **_named("data.tokenizer.type", "tokenizer_name_or_path tokenizer.path tokenizer.name"),
    **_named("trainer.max_epochs", "num_train_epochs n_epochs epochs num_epochs num_data_epochs"),
    **_named("trainer.max_steps", "num_steps max_num_steps train_steps"),
    **_named("trainer.gradient_clip_val", "max_grad_norm max_gradient_norm clip_grad_norm"),
    **_named("trainer.log_every_n_steps", "logging_steps"),
    **_named("trainer.val_check_interval", "eval_steps validate_every_n_steps"),
    **_named("trainer.val_check_interval_examples", "eval_every"),
    **_named(
        "exp_manager.sample_during_eval.prompts",
        "n_eval_model_samples sample_during_eval generate_during_eval",
    ),
    **_named("exp_manager.exp_dir", "output_dir run_dir local_dirs logging_dir metric_logger.log_dir"),
    **_named("exp_manager.name", "run_name exp_name"),
    **_named(f"{_CHECKPOINTS}.every_n_train_steps", "save_steps checkpoint_every_n_steps"),
    **_named(f"{_CHECKPOINTS}.save_top_k", "save_total_limit keep_last_n_checkpoints"),
    **_named(f"{_CHECKPOINTS}.save_weights_only", "save_only_model"),
    **_named(f"{_CHECKPOINTS}.monitor", "metric_for_best_model"),
    **_named(f"{_CHECKPOINTS}.mode", "greater_is_better"),
    **_named("exp_manager.create_preemption_callback", "enable_jit_checkpoint"),
    **_named("exp_manager.create_wandb_logger", "report_to wandb.enabled"),
    **_named("exp_manager.wandb_logger_kwargs", "wandb.project wandb.entity project"),
    **_named(
        "model.activations_checkpoint_granularity",
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing",
    ),
    **_named("distributed_strategy.compile", "torch_compile torch_compile_backend torch_compile_mode"),
    **_named("precision.type", "bf16 fp16 tf32 dtype torch_dtype policy_dtype trainer.precision"),
    **_named("seed", "data_seed"),
    **_named("trainer.accelerator", "use_cpu no_cuda"),
    **_named("trainer.enable_progress_bar", "disable_tqdm"),
    **_named("trainer.num_sanity_val_steps", "eval_on_start"),
    **_named("data.attention", "attn_implementation"),
    **_named("data.buckets", "pad_to_multiple_of"),
    **_named(f"{_ALIGN}.reference_model", "ref_model ref_model_name_or_path reference_model.name"),
    **_named(f"{_ALIGN}.sft.train_on_prompt", "train_on_input completion_only_loss"),
    **_named(f"{_ALIGN}.peft.lora_rank", "lora_rank lora_r r peft.r"),
    **_named(f"{_ALIGN}.peft.lora_alpha", "lora_alpha"),
    **_named(f"{_ALIGN}.peft.lora_dropout", "lora_dropout"),
    **_named(f"{_ALIGN}.peft.target_modules", "lora_target_modules target_modules"),
    **_named(f"{_ALIGN}.peft.modules_to_save", "lora_modules_to_save modules_to_save"),
    **_named(f"{_ALIGN}.peft.lora_bias", "peft.bias"),
    **_named(f"{_ALIGN}.peft.rslora", "use_rslora"),
    **_named(f"{_ALIGN}.peft.dora", "use_dora"),
    **_named(f"{_ALIGN}.peft.init", "init_lora_weights"),
    **_named(
        f"{_ALIGN}.peft.quantize_base",
        "load_in_4bit use_4bit bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant "
        "use_bnb_nested_quant bnb_4bit_quant_storage",
    ),
}
"""Another library's key, or the end of its path -> our key."""

_WEIGHTS = "exp_manager.resume_from_checkpoint is the folder of weights, model.model_config its config.json"
_BATCH = (
    "data.global_batch_size is pairs per step over all ranks, data.micro_batch_size those of a micro-batch; "
    "what is accumulated follows"
)
_OBJECTIVE = (
    f"the objective is a section, {_ALIGN}.dpo, orpo, cpo, simpo, kto or sft; {_DPO}.loss_type is a "
    "form of dpo"
)
_FOLLOWS = "it follows from the model; leave it out"
_UPLOAD = "nothing is uploaded: exp_manager.export_hf writes the folder that can be; leave it out"
_LAYOUT = (
    "distributed_strategy has the layout: tensor_model_parallel_size, pipeline_model_parallel_size, "
    "context_parallel_size, fsdp, zero1"
)
_LEFT_OUT = "nothing here is like it; leave it out"
FOREIGN_ADVICE = {
    **_named(
        "trainer.val_check_interval says when: an integer counts steps, a number with a point epochs",
        "eval_strategy evaluation_strategy eval_delay",
    ),
    **_named(
        f"{_CHECKPOINTS}.every_n_train_steps or every_n_epochs says when; "
        "exp_manager.create_checkpoint_callback: False turns checkpoints off",
        "save_strategy",
    ),
    **_named(
        "trainer.log_every_n_steps says when",
        "logging_strategy logging_first_step",
    ),
    **_named(
        "exp_manager.log_global_rank_0_only or log_local_rank_0_only says who writes a log",
        "log_on_each_node",
    ),
    **_named(
        "exp_manager.create_tensorboard_logger, create_wandb_logger and create_mlflow_logger turn loggers on",
        "metric_logger metric_logger._component_ trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    **_named(
        "exp_manager.resume_if_exists: True takes a run up again; exp_manager.resume_from_checkpoint is the "
        "folder of weights that it starts from",
        "resume_from_checkpoint",
    ),
    **_named(
        f"{_CHECKPOINTS}.monitor and mode rank checkpoints, save_top_k keeps the best",
        "load_best_model_at_end",
    ),
    **_named(
        "validation takes data.val_dir; trainer.limit_val_batches bounds it, in batches", "n_eval_examples"
    ),
    **_named("validation runs where data.val_dir is set; leave it out", "do_train do_eval do_predict"),
    **_named(
        "data.train_dir and data.val_dir are files, or data sets by name and split, as org/name:train",
        "dataset_train_split dataset_test_split dataset_config",
    ),
    **_named("large files are tokenized in parts, and mapped; leave it out", "dataset_streaming"),
    **_named(
        "columns that the format does not read are passed over, data.columns renames; leave it out",
        "remove_unused_columns label_names",
    ),
    **_named(
        "data.packing and data.buckets keep padding low; leave it out",
        "group_by_length train_sampling_strategy length_column_name",
    ),
    **_named(
        "data.num_workers alone says how batches are prepared; leave it out",
        "dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
    ),
    **_named(
        "a resumed run takes up its data, schedule and callbacks where they were; leave it out",
        "ignore_data_skip restore_callback_states_from_checkpoint",
    ),
    **_named(f"they are keys of {_OPTIM}, beside name and lr", "optim_args"),
    **_named(f"they are keys of {_OPTIM}.sched, beside name", "lr_scheduler_kwargs"),
    **_named(
        "precision.type, data.attention and model.trust_remote_code say how a model is loaded",
        "model_init_kwargs",
    ),
    **_named("name a folder of that revision in exp_manager.resume_from_checkpoint", "model_revision"),
    **_named(
        f"models have no dropout, adapters have {_ALIGN}.peft.lora_dropout; leave it out", "disable_dropout"
    ),
    **_named("the tokenizer says it: data.tokenizer.type", "pad_token"),
    **_named("the reference pass takes data.micro_batch_size, too", "precompute_ref_batch_size"),
    **_named(
        f"the reference stays what it was, {_ALIGN}.reference_model or the start weights; leave it out",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    ),
    **_named(f"{_DPO}.label_smoothing is that of pairs; leave this one out", "label_smoothing_factor"),
    **_named("validation computes as training does, in precision.type", "bf16_full_eval fp16_full_eval"),
    **_named("nxdt-align plan says which data.micro_batch_size fits", "auto_find_batch_size"),
    **_named(
        "model.activations_checkpoint_granularity alone says what is recomputed; leave it out",
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    ),
    **_named(
        _LAYOUT,
        "accelerator_config parallelism_config fsdp_config deepspeed ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank",
    ),
    **_named("distributed_strategy.timeout_minutes is it, in minutes", "ddp_timeout"),
    **_named(
        _UPLOAD,
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    ),
    **_named(
        _LEFT_OUT,
        "activation_offloading use_liger_kernel liger_kernel_config torch_empty_cache_steps "
        "optim_target_modules average_tokens_across_devices use_cache neftune_noise_alpha log_level "
        "log_level_replica logging_nan_inf_filter "
        "include_num_input_tokens_seen prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps include_for_metrics batch_eval_metrics save_on_each_node full_determinism "
        "debug skip_memory_metrics ignore_bias_buffers",
    ),
    **_named(
        _BATCH, "gradient_accumulation_steps grad_accumulation grad_accumulation.num_batches batch_size"
    ),
    **_named("validation has the sizes of training: data.micro_batch_size", "per_device_eval_batch_size"),
    **_named("validation has the sizes of training: data.micro_batch_size", "eval_batch_size"),
    **_named(_OBJECTIVE, "loss loss.name loss._component_ criterion criterion.name"),
    **_named(_WEIGHTS, "model_name_or_path model.name_or_path checkpoint_dir model.archive name_or_path"),
    **_named(
        f"{_ALIGN}.peft.target_modules names the layers: q_proj, v_proj, gate_proj, ... or all-linear; "
        f"{_ALIGN}.peft.modules_to_save=[lm_head] trains the head",
        "lora_attn_modules apply_lora_to_mlp apply_lora_to_output",
    ),
    **_named(
        f"{_ALIGN}.peft.target_modules takes patterns for whole paths, as model.layers.[0-7].*.q_proj",
        "layers_to_transform layers_pattern exclude_modules",
    ),
    **_named(
        f"{_ALIGN}.peft.lora_rank and lora_alpha are those of all layers; leave it out",
        "rank_pattern alpha_pattern",
    ),
    **_named("adapters are of linear layers alone; leave it out", "target_parameters lora_target_parameters"),
    **_named(_FOLLOWS, "fan_in_fan_out peft_type task_type lora_task_type peft.inference_mode"),
    **_named(f"{_ALIGN}.peft.quantize_base: nf4 holds the base in 4 bits", "use_qlora load_in_8bit"),
    **_named(f"a section {_ALIGN}.peft trains adapters, without one every weight is trained", "use_peft"),
    **_named(
        f"data.seq_length bounds prompt and response together, {_DPO}.max_prompt_length the prompt",
        "max_completion_length max_target_length max_response_length",
    ),
}
"""As FOREIGN_KEYS, where no single key of ours is the same -> what to do."""

FOREIGN_SECTIONS = frozenset(
    [
        *("loss", "criterion", "optimizer", "lr_scheduler", "regime", "dataset", "checkpointer"),
        *("common", "training", "training_args", "metric_logger"),
    ]
)
"""Sections of other libraries, whose keys are named one by one."""


def foreign_key(path: str) -> str | None:
    """Our key for another library's: by its whole path, else by ever shorter ends of it."""
    return _longest_end(FOREIGN_KEYS, path)


def advice_without_key(path: str) -> str:
    """What to write instead of another library's key where no single one of ours is the same; else empty."""
    return _longest_end(FOREIGN_ADVICE, path) or ""


def foreign_advice(path: str) -> str:
    """What to write instead of another library's key; empty for a path that no other library has."""
    advice = advice_without_key(path)
    key = foreign_key(path)
    return advice or (f"here it is {key}" if key else "")


def _longest_end(table: dict[str, str], path: str) -> str | None:
    parts = path.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((table[end] for end in ends if end in table), None)


LOSS_TYPES = {
    "sft": f"{_DPO}.nll_scale adds that term to any loss_type",
    "rso": f"use loss_type hinge with {_DPO}.gamma",
    "slic": "use loss_type hinge",
    "cdpo": f"use loss_type sigmoid with {_DPO}.label_smoothing",
    "dpo": "use loss_type sigmoid",
    "kto_pair": f"{_ALIGN}.kto takes labelled completions",
    **{name: f"use {_ALIGN}.{name} instead of dpo" for name in ("orpo", "cpo", "simpo", "kto")},
}
"""Another library's loss type, in lower case -> what to do."""


def loss_type_advice(path: str, value: object) -> str:
    """Our equivalent of another library's loss type; empty for other keys and unknown types."""
    return LOSS_TYPES.get(str(value).lower(), "") if path == f"{_DPO}.loss_type" else ""
