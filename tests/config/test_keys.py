"""The schema documents itself."""

from __future__ import annotations

import pytest

from nxdt_align.config import rules
from nxdt_align.config.aliases import FOREIGN_KEYS
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.config.engines import LIMITS
from nxdt_align.config.keys import all_keys, describe_keys, nearest_key
from nxdt_align.config.optim import OPTIMIZERS, SCHEDULERS


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
    ],
)
def test_another_librarys_name_leads_to_ours(path: str, wanted: str) -> None:
    assert nearest_key(path) == wanted


def test_every_other_name_leads_to_a_key_that_exists() -> None:
    """Settings of optimizers and schedules are keys of open sections."""
    known = {*all_keys(), *(f"model.optim.{key}" for key in set().union(*OPTIMIZERS.values()))}
    known |= {f"model.optim.sched.{key}" for key in set().union(*SCHEDULERS.values())}
    assert set(FOREIGN_KEYS.values()) - known == set()
    assert set(FOREIGN_KEYS) & set(all_keys()) == set()
