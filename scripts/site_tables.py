#!/usr/bin/env python3
"""The tables of docs/migration.md and docs/verbs.md, from what the errors and the command line use.

    scripts/site_tables.py [--check]

Writes what lies between <!-- NAME: ... --> and <!-- /NAME -->. --check writes nothing, and fails where a page
differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "src"))

from nxdt_align.cli_parser import make_parser  # noqa: E402
from nxdt_align.config.aliases import (  # noqa: E402
    FOREIGN_ADVICE,
    FOREIGN_KEYS,
    LOSS_TYPES,
    OTHER_NAMES,
    foreign_advice,
)
from nxdt_align.config.megatron import MEGATRON_KEYS  # noqa: E402

ORIGINS: dict[str, tuple[str, ...]] = {
    name: tuple(text.split())
    for name, text in {
        "trl": """
            model_name_or_path dataset_name output_dir run_name beta rpo_alpha learning_rate
            lr_scheduler_type warmup_ratio warmup_steps weight_decay adam_beta1 adam_beta2
            adam_epsilon max_grad_norm num_train_epochs per_device_train_batch_size
            per_device_eval_batch_size gradient_accumulation_steps max_length
            max_completion_length max_target_length max_seq_length completion_only_loss
            padding_free dataset_num_proc dataloader_num_workers logging_steps eval_steps
            save_steps save_total_limit report_to gradient_checkpointing bf16 fp16 tf32
            torch_dtype ref_model ref_model_name_or_path eval_dataset use_peft lora_r r
            lora_alpha lora_dropout lora_target_modules target_modules lora_modules_to_save
            modules_to_save use_rslora use_dora init_lora_weights load_in_4bit
            bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant
            use_bnb_nested_quant bnb_4bit_quant_storage load_in_8bit lora_target_parameters
            lora_task_type attn_implementation model_revision model_init_kwargs
            disable_dropout pad_token pad_to_multiple_of precompute_ref_batch_size
            generate_during_eval sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
            dataset_config dataset_train_split dataset_test_split dataset_streaming
            remove_unused_columns label_names group_by_length train_sampling_strategy
            length_column_name dataloader_drop_last dataloader_pin_memory
            dataloader_persistent_workers dataloader_prefetch_factor
            dataloader_multiprocessing_context dataloader_in_order data_seed optim optim_args
            lr_scheduler_kwargs label_smoothing_factor eval_strategy evaluation_strategy
            eval_delay eval_on_start bf16_full_eval fp16_full_eval do_train do_eval do_predict
            save_strategy save_only_model load_best_model_at_end metric_for_best_model
            greater_is_better enable_jit_checkpoint resume_from_checkpoint ignore_data_skip
            restore_callback_states_from_checkpoint logging_dir logging_strategy
            logging_first_step log_on_each_node disable_tqdm project trackio_space_id
            trackio_bucket_id trackio_static_space_id push_to_hub hub_token hub_private_repo
            hub_model_id hub_strategy hub_always_push hub_revision torch_compile
            torch_compile_backend torch_compile_mode gradient_checkpointing_kwargs
            activation_checkpointing_kwargs auto_find_batch_size use_cpu no_cuda
            accelerator_config parallelism_config fsdp_config deepspeed
            ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
            ddp_static_graph ddp_backend ddp_timeout local_rank activation_offloading
            use_liger_kernel liger_kernel_config torch_empty_cache_steps optim_target_modules
            average_tokens_across_devices use_cache neftune_noise_alpha log_level
            log_level_replica logging_nan_inf_filter include_num_input_tokens_seen
            prediction_loss_only eval_do_concat_batches eval_use_gather_object
            eval_accumulation_steps include_for_metrics batch_eval_metrics save_on_each_node
            full_determinism debug skip_memory_metrics ignore_bias_buffers
            """,
        "fairseq2": """
            criterion criterion.name beta dataset.path valid_split max_seq_len num_prefetch
            tokenizer.name tokenizer.path dtype reference_model.name activation_checkpointing
            max_gradient_norm grad_accumulation grad_accumulation.num_batches batch_size
            optimizer optimizer.name lr betas weight_decay lr_scheduler lr_scheduler.name
            num_warmup_steps final_lr num_steps max_num_steps num_data_epochs
            validate_every_n_steps checkpoint_every_n_steps keep_last_n_checkpoints
            wandb.enabled wandb.project
            """,
        "torchtune": """
            checkpoint_dir output_dir tokenizer.path max_seq_len dataset.source train_on_input
            loss loss._component_ beta optimizer optimizer._component_ lr weight_decay
            lr_scheduler lr_scheduler._component_ num_warmup_steps epochs batch_size
            gradient_accumulation_steps clip_grad_norm dtype enable_activation_checkpointing
            lora_rank lora_alpha lora_dropout lora_attn_modules apply_lora_to_mlp
            apply_lora_to_output use_dora metric_logger metric_logger._component_
            metric_logger.log_dir resume_from_checkpoint
            """,
        "reference_implementation": """
            model.name_or_path model.archive tokenizer_name_or_path policy_dtype datasets loss
            loss.name beta lr optimizer warmup_steps max_grad_norm batch_size
            gradient_accumulation_steps eval_batch_size max_length n_epochs n_examples
            eval_every n_eval_examples sample_during_eval n_eval_model_samples
            activation_checkpointing exp_name debug
            local_dirs wandb.enabled wandb.project wandb.entity
            """,
    }.items()
}
"""Library -> those of our known foreign names that its configurations use, the order of the tables."""


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _ours(name: str) -> str:
    advice = foreign_advice(name)
    return f"`{advice.removeprefix('here it is ')}`" if advice.startswith("here it is ") else advice


def _keys(names: Iterable[str]) -> str:
    return table(("yours", "here"), ((f"`{name}`", _ours(name)) for name in names))


def _others() -> str:
    named = {name for names in ORIGINS.values() for name in names}
    return _keys(name for name in (*FOREIGN_KEYS, *FOREIGN_ADVICE) if name not in named)


def _objective_names() -> str:
    return table(
        ("yours", "here, in the objective's section"), ((f"`{a}`", f"`{b}`") for a, b in OTHER_NAMES.items())
    )


def _loss_types() -> str:
    return table(("yours", "here"), ((f"`{name}`", advice) for name, advice in LOSS_TYPES.items()))


def _megatron() -> str:
    sections: dict[str, list[str]] = {}
    for key in sorted(MEGATRON_KEYS):
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"`{name}`")
    return table(
        ("section", "keys"), ((f"`{section}`", ", ".join(names)) for section, names in sections.items())
    )


def _verbs(parser: argparse.ArgumentParser, above: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb with its parser, ``reference merge`` too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                below = list(_verbs(verb, f"{above}{name} "))
                yield from below or [(f"{above}{name}", verb)]


def _options(verb: argparse.ArgumentParser) -> str:
    rows = []
    for action in verb._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        if action.choices is not None and action.metavar is None:
            value = "one of " + ", ".join(map(str, action.choices))
        else:
            value = f"`{action.metavar or action.dest.upper()}`" if action.nargs != 0 else ""
        rows.append((" ".join(filter(None, (names, value))), action.help or ""))
    return table(("argument", "what it does"), rows)


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/migration.md": {
        **{name: (lambda names=names: _keys(names)) for name, names in ORIGINS.items()},
        "other_names": _others,
        "objective_names": _objective_names,
        "loss_types": _loss_types,
        "megatron_keys": _megatron,
    },
    "docs/verbs.md": {
        f"options of {name}": (lambda verb=verb: _options(verb)) for name, verb in _verbs(make_parser())
    },
}
"""Page -> name of a block -> its content."""


def filled(page: str, text: str) -> str:
    """``text`` with each block of ``page`` as the code has it. Raises ValueError where one is missing."""
    for name, content in BLOCKS[page].items():
        begin, end = f"<!-- {name}: scripts/site_tables.py writes this -->", f"<!-- /{name} -->"
        block = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(block.findall(text)) != 1:
            raise ValueError(f"{page} must have {begin} and {end} once")
        before, after = block.split(text)
        text = f"{before}{begin}\n{content()}\n{end}{after}"
    return text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Fill in the tables of docs/migration.md and docs/verbs.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a page differs")
    check = parser.parse_args(argv).check
    differ = []
    for page in BLOCKS:
        before = (REPO / page).read_text(encoding="utf-8")
        after = filled(page, before)
        if after != before:
            differ.append(page)
            if not check:
                (REPO / page).write_text(after, encoding="utf-8")
    print("\n".join(f"{page}: {'differs' if check else 'written'}" for page in differ) or "nothing to change")
    return int(check and bool(differ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
