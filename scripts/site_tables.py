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
            apply_lora_to_output use_dora
            """,
        "reference_implementation": """
            model.name_or_path model.archive tokenizer_name_or_path policy_dtype datasets loss
            loss.name beta lr optimizer warmup_steps max_grad_norm batch_size
            gradient_accumulation_steps eval_batch_size max_length n_epochs n_examples
            eval_every sample_during_eval n_eval_model_samples activation_checkpointing exp_name
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
