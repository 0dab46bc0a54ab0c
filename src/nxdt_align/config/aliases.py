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
    **_named(f"{_OPTIM}.name", "optimizer optim_type optimizer.name optimizer._component_"),
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
    **_named("exp_manager.sample_during_eval.prompts", "n_eval_model_samples sample_during_eval"),
    **_named("exp_manager.exp_dir", "output_dir run_dir local_dirs"),
    **_named("exp_manager.name", "run_name exp_name"),
    **_named(f"{_CHECKPOINTS}.every_n_train_steps", "save_steps checkpoint_every_n_steps"),
    **_named(f"{_CHECKPOINTS}.save_top_k", "save_total_limit keep_last_n_checkpoints"),
    **_named("exp_manager.create_wandb_logger", "report_to wandb.enabled"),
    **_named("exp_manager.wandb_logger_kwargs", "wandb.project wandb.entity"),
    **_named(
        "model.activations_checkpoint_granularity",
        "gradient_checkpointing activation_checkpointing enable_activation_checkpointing",
    ),
    **_named("precision.type", "bf16 fp16 tf32 dtype torch_dtype policy_dtype"),
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
        "load_in_4bit use_4bit bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant",
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
FOREIGN_ADVICE = {
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
    **_named("adapters are of linear layers alone; leave it out", "target_parameters"),
    **_named(
        "it follows from the model; leave it out", "fan_in_fan_out peft_type task_type peft.inference_mode"
    ),
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
        *("common", "training", "training_args"),
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
