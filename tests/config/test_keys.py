"""The schema documents itself."""

from __future__ import annotations

from typing import Any

import pytest

from nxdt_align.config import rules
from nxdt_align.config.aliases import FOREIGN_KEYS
from nxdt_align.config.convert import Walk, build_section
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.config.engines import LIMITS
from nxdt_align.config.keys import all_keys, describe_keys, nearest_key
from nxdt_align.config.optim import OPTIMIZERS, SCHEDULERS
from nxdt_align.config.schema import Config


def test_every_key_has_a_meaning_and_a_type() -> None:
    keys = all_keys()
    assert len(keys) > 150
    assert [key.path for key in keys.values() if not key.meaning or "typing" in key.type] == []
    assert [key.path for key in keys.values() if "class" in key.type] == []


def test_tables_of_rules_name_known_keys_only() -> None:
    named = {*rules.FIXED, *(path for limits in LIMITS.values() for path in limits)}
    assert named - set(all_keys()) == set()


def test_every_setting_that_a_form_reads_is_one_of_dpos() -> None:
    read = {f"model_alignment_strategy.dpo.{key}" for form in FORMS.values() for key in form.reads}
    assert read - set(all_keys()) == set()


def test_a_key_is_described_with_type_default_and_meaning() -> None:
    text = describe_keys("model_alignment_strategy.dpo")
    assert "model_alignment_strategy.dpo.kl_beta: number = 0.01\n    Weight of the KL divergence" in text
    assert "model_alignment_strategy.dpo.truncation_mode: keep_start | keep_end = 'keep_start'" in text
    assert "orpo" not in text
    everything = describe_keys()
    assert "data.packing: none | packed | shared_prompt | null | auto = null" in everything
    assert "data.data_impl" in everything


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("trainer.max_step", "trainer.max_steps"),
        ("trainer.seq_length", "data.seq_length"),
        ("exp_manger", "exp_manager"),
        ("model_alignment_strategy.dpo.beta", "model_alignment_strategy.dpo.kl_beta"),
        ("zzz.qqq", None),
    ],
)
def test_nearest_known_key(path: str, wanted: str | None) -> None:
    assert nearest_key(path) == wanted


ALIGN = "model_alignment_strategy"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        *(
            (name, "model.optim.lr")
            for name in ("learning_rate", "trainer.learning_rate", "optimizer.config.lr")
        ),
        ("per_device_train_batch_size", "data.micro_batch_size"),
        ("num_train_epochs", "trainer.max_epochs"),
        ("n_epochs", "trainer.max_epochs"),
        ("regime.num_data_epochs", "trainer.max_epochs"),
        ("warmup_ratio", "model.optim.sched.warmup_ratio"),
        ("lr_scheduler.num_warmup_steps", "model.optim.sched.warmup_steps"),
        ("max_length", "data.seq_length"),
        (f"{ALIGN}.dpo.max_length", "data.seq_length"),
        ("max_prompt_length", f"{ALIGN}.dpo.max_prompt_length"),
        ("criterion.config.beta", f"{ALIGN}.dpo.kl_beta"),
        ("loss.beta", f"{ALIGN}.dpo.kl_beta"),
        ("beta", f"{ALIGN}.dpo.kl_beta"),
        (f"{ALIGN}.simpo.kl_beta", f"{ALIGN}.simpo.beta"),
        (f"{ALIGN}.simpo.simpo_gamma", f"{ALIGN}.simpo.gamma"),
        ("max_grad_norm", "trainer.gradient_clip_val"),
        ("output_dir", "exp_manager.exp_dir"),
        ("eval_steps", "trainer.val_check_interval"),
        ("eval_every", "trainer.val_check_interval_examples"),
        ("save_steps", "exp_manager.checkpoint_callback_params.every_n_train_steps"),
        ("model.optim.beta", "model.optim.betas"),
        ("generate_during_eval", "exp_manager.sample_during_eval.prompts"),
        ("optim", "model.optim.name"),
        ("metric_logger.log_dir", "exp_manager.exp_dir"),
    ],
)
def test_another_librarys_name_leads_to_ours(path: str, wanted: str) -> None:
    assert nearest_key(path) == wanted


@pytest.mark.parametrize("name", ["store_strategy", "exp_manger", "model_alignment"])
def test_no_section_is_meant_by_a_single_value(name: str) -> None:
    assert not all_keys()[nearest_key(name, takes_section=False) or "seed"].is_section
    assert all_keys()[nearest_key(name) or "seed"].is_section


def advice_on(name: str, value: Any) -> str:
    walk = Walk()
    build_section(Config, {name: value}, "", walk)
    return " ".join(fault.advice for fault in walk.faults if fault.path.partition(".")[0] == name)


def test_advice_on_another_librarys_key() -> None:
    """What the loader says, by the key's value."""
    for name, value, said in (
        ("eval_strategy", "steps", "trainer.val_check_interval says when"),
        ("save_strategy", "steps", "every_n_train_steps or every_n_epochs says when"),
        ("logging_dir", "logs", "here it is exp_manager.exp_dir"),
        ("dataset_train_split", "train", "data.train_dir and data.val_dir are files, or data sets by name"),
        ("n_eval_examples", 256, "trainer.limit_val_batches bounds it"),
        ("resume_from_checkpoint", False, "exp_manager.resume_if_exists: True takes a run up again"),
        ("metric_logger", {"_component_": "a.b", "log_dir": "logs"}, "create_wandb_logger and"),
        ("metric_logger", {"log_dir": "logs"}, "here it is exp_manager.exp_dir"),
        ("use_liger_kernel", True, "nothing here is like it; leave it out"),
        ("store_strategy", "steps", ""),
        ("exp_manger", {"name": "n"}, "did you mean exp_manager?"),
        ("exp_manger", None, "did you mean exp_manager?"),
    ):
        found = advice_on(name, value)
        assert said in found and bool(said) == bool(found), (name, found)


def test_every_other_name_leads_to_a_key_that_exists() -> None:
    """Settings of optimizers and schedules are keys of open sections."""
    known = {*all_keys(), *(f"model.optim.{key}" for key in set().union(*OPTIMIZERS.values()))}
    known |= {f"model.optim.sched.{key}" for key in set().union(*SCHEDULERS.values())}
    assert set(FOREIGN_KEYS.values()) - known == set()
    assert set(FOREIGN_KEYS) & set(all_keys()) == set()
