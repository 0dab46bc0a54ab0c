from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nxdt_align.config.optim import REFUSED_SCHEDULERS
from nxdt_align.training.adamw import AdamWFP32OptState
from nxdt_align.training.optim import (
    available_optimizers,
    available_schedulers,
    build_optimizer,
    build_scheduler,
    parameter_groups,
    register_with_nemo,
)

TUTORIAL_OPTIMIZERS = [
    "adamw", "adamw_fp32OptState", "sgd", "adam", "adadelta", "adamax", "adagrad", "rmsprop", "rprop",
    "novograd", "adafactor",
]  # fmt: skip
TUTORIAL_SCHEDULERS: dict[str, dict[str, Any]] = {
    "LinearAnnealingWithWarmUp": {"warmup_steps": 3},
    "CosineAnnealing": {"warmup_steps": 3, "constant_steps": 0, "min_lr": 1e-4},
    "WarmupPolicy": {"warmup_steps": 3},
    "WarmupHoldPolicy": {"warmup_steps": 3, "hold_steps": 4},
    "SquareAnnealing": {"warmup_ratio": 0.2, "min_lr": 1e-5},
    "NoamAnnealing": {"d_model": 16, "warmup_steps": 3},
    "WarmupAnnealing": {"warmup_steps": 3},
    "StepLR": {"step_size": 4, "gamma": 0.5},
    "ExponentialLR": {"gamma": 0.8},
}
OTHER_SCHEDULERS: dict[str, dict[str, Any]] = {
    "CosineAnnealing": {"warmup_steps": 3, "constant_steps": 4, "min_lr": 1e-4},
    "PolynomialDecayAnnealing": {"power": 2.0, "warmup_steps": 2},
    "PolynomialHoldDecayAnnealing": {"hold_steps": 4, "warmup_steps": 2},
    "InverseSquareRootAnnealing": {"warmup_steps": 2},
    "SquareRootAnnealing": {},
    "T5InverseSquareRootAnnealing": {"constant_steps": 4},
    "NoamHoldAnnealing": {"warmup_steps": 2, "hold_steps": 3},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 3, "cycle_momentum": False},
}
STEPS = 12


def named_parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (7, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.0.self_attn.qkv_proj.q_proj.weight": (4, 4),
        "model.layers.0.self_attn.qkv_proj.q_proj.bias": (4,),
        "model.norm.weight": (4,),
    }
    return [(n, nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for n, s in shapes.items()]


class Run:
    """A toy run: optimizer, schedule and parameters, with gradients that depend on the step alone."""

    def __init__(
        self, optim: str, settings: dict[str, Any], sched: str | None, sched_settings: dict[str, Any],
        max_steps: int = STEPS,
    ) -> None:  # fmt: skip
        self.named = named_parameters()
        self.optimizer = build_optimizer(self.named, optim, settings)
        self.scheduler = build_scheduler(self.optimizer, sched, sched_settings, max_steps)
        self.rates: list[float] = []

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            for _, p in self.named:
                p.grad = torch.randn(p.shape, generator=generator)
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.scheduler.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        weights = [p.detach() for _, p in self.named]
        torch.save([weights, self.optimizer.state_dict(), self.scheduler.state_dict()], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        weights, optimizer, scheduler = torch.load(file, weights_only=True)
        with torch.no_grad():
            for (_, p), value in zip(self.named, weights, strict=True):
                p.copy_(value)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)


def assert_resumes_exactly(*args: Any) -> None:
    whole, first, second = Run(*args), Run(*args), Run(*args)
    start = [p.detach().clone() for _, p in whole.named]
    whole.train(0, STEPS)
    first.train(0, 5)
    second.load(first.save())
    second.train(5, STEPS)
    assert first.rates + second.rates == whole.rates
    for (_, a), (_, b), before in zip(whole.named, second.named, start, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, before)


@pytest.mark.parametrize("name", TUTORIAL_OPTIMIZERS)
def test_every_optimizer_of_the_tutorial_trains_and_resumes_exactly(name: str) -> None:
    assert_resumes_exactly(name, {"lr": 1e-2}, "CosineAnnealing", {"warmup_steps": 3})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("adam", {"betas": [0.8, 0.9], "amsgrad": True}),
        ("adamw", {"weight_decay": 0.01, "capturable": False, "betas": [0.9, 0.999]}),
        ("adamw", {"fused": False}),
        ("adamw_fp32OptState", {"weight_decay": 0.01, "capturable": False, "betas": [0.9, 0.999]}),
        ("rprop", {"etas": [0.5, 1.2], "step_sizes": [1e-6, 50]}),
        ("rmsprop", {"momentum": 0.5, "centered": True}),
        ("novograd", {"luc": True, "weight_decay": 0.1}),
        ("adafactor", {"beta1": 0.9, "weight_decay": 0.1, "eps": [1e-30, 1e-3]}),
        ("adan", {"betas": [0.98, 0.92, 0.99]}),
    ],
)
def test_optimizers_with_their_own_settings(name: str, settings: dict[str, Any]) -> None:
    assert_resumes_exactly(name, {"lr": 1e-2, **settings}, "CosineAnnealing", {"warmup_steps": 3})


@pytest.mark.parametrize(
    ("name", "settings"), [*TUTORIAL_SCHEDULERS.items(), *OTHER_SCHEDULERS.items(), (None, {})]
)
def test_every_schedule_trains_and_resumes_exactly(name: str | None, settings: dict[str, Any]) -> None:
    assert_resumes_exactly("adamw_fp32OptState", {"lr": 1e-2}, name, settings)


def test_all_schedules_of_nemo_are_tested() -> None:
    tested = {*TUTORIAL_SCHEDULERS, *OTHER_SCHEDULERS, *REFUSED_SCHEDULERS}
    assert set(available_schedulers()) == tested
    assert set(TUTORIAL_OPTIMIZERS) <= set(available_optimizers())


def rates(name: str | None, settings: dict[str, Any], steps: int, max_steps: int, lr: float) -> list[float]:
    run = Run("sgd", {"lr": lr}, name, settings, max_steps)
    run.train(0, steps)
    return run.rates


def test_linear_annealing_by_hand() -> None:
    """Warm-up 0, 1/2 over 2 steps, then 1, 3/4, 2/4, 1/4, 0 down to step 6, and 0 from there."""
    found = rates("LinearAnnealingWithWarmUp", {"warmup_steps": 2}, 8, 6, lr=4.0)
    assert found == [0.0, 2.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]


def test_linear_annealing_equals_transformers() -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=37)
    expected = []
    for _ in range(45):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates("LinearAnnealingWithWarmUp", {"warmup_steps": 10}, 45, 37, lr=3e-4) == expected


def test_cosine_annealing_by_hand() -> None:
    """NeMo warms up over (step + 1) / (warmup + 1), then half a cosine from step 1 to step 5."""
    found = rates("CosineAnnealing", {"warmup_steps": 1}, 6, 5, lr=1.0)
    half = math.sqrt(0.5) / 2
    assert found == pytest.approx([0.5, 1.0, 0.5 + half, 0.5, 0.5 - half, 0.0], abs=1e-7)


def test_without_a_schedule_the_learning_rate_is_constant() -> None:
    assert rates(None, {}, 4, 10, lr=0.3) == [0.3] * 4


def test_max_steps_comes_from_sched_before_the_run() -> None:
    own = rates("LinearAnnealingWithWarmUp", {"max_steps": 4}, 5, 100, lr=4.0)
    assert own == [4.0, 3.0, 2.0, 1.0, 0.0]
    for unset in (None, -1):
        found = rates("LinearAnnealingWithWarmUp", {"max_steps": unset, "warmup_steps": None}, 3, 4, lr=4.0)
        assert found == [4.0, 3.0, 2.0]


def rates_after(earlier: tuple[Any, ...], present: tuple[Any, ...], steps: int) -> list[float]:
    """Of a run that resumes with ``present`` after ``steps`` of ``earlier``; lr, schedule and so on."""

    def run(lr: float, *schedule: Any) -> Run:
        return Run("adamw", {"lr": lr}, *schedule)

    first, second, whole = run(*earlier), run(*present), run(*present)
    first.train(0, steps)
    second.load(first.save())
    second.train(steps, STEPS)
    whole.train(0, STEPS)
    assert second.rates == whole.rates[steps:]
    return second.rates


@pytest.mark.parametrize("name", ["LinearAnnealingWithWarmUp", "CosineAnnealing"])
def test_a_resumed_run_with_more_steps_stretches_the_schedule(name: str) -> None:
    """From its first step on: at the end of the shorter one the rate was 0."""
    found = rates_after((1.0, name, {}, 6), (1.0, name, {}, 12), 6)
    if name == "LinearAnnealingWithWarmUp":
        assert found == [(12 - step) / 12 for step in range(6, 12)]


@pytest.mark.parametrize(
    ("name", "settings"), [*TUTORIAL_SCHEDULERS.items(), *OTHER_SCHEDULERS.items(), (None, {})]
)
def test_a_resumed_run_has_the_present_learning_rate_and_schedule(
    name: str | None, settings: dict[str, Any]
) -> None:
    """Whatever the earlier ones were, each step has the rate that it would have had from the start."""
    rates_after((1e-2, name, settings, STEPS), (5e-4, name, settings, STEPS), 4)
    other = ("CosineAnnealing", {"warmup_steps": 2}, STEPS)
    rates_after((1e-2, *other), (1e-2, name, settings, STEPS), 4)
    rates_after((1e-2, name, settings, STEPS), (1e-2, *other), 4)


def test_a_cycle_of_beta1_resumes() -> None:
    settings = {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 3, "cycle_momentum": True}
    whole, first, second = (Run("adamw", {"lr": 1e-2}, "CyclicLR", settings) for _ in range(3))
    whole.train(0, STEPS)
    first.train(0, 5)
    second.load(first.save())
    betas = second.optimizer.param_groups[0]["betas"]
    assert betas == first.optimizer.param_groups[0]["betas"] and 0.8 < betas[0] < 0.9
    second.train(5, STEPS)
    assert first.rates + second.rates == whole.rates
    assert second.optimizer.param_groups[0]["betas"] == whole.optimizer.param_groups[0]["betas"]


def test_exponential_decay_is_per_step_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert rates("ExponentialLR", {"gamma": 0.5}, 3, 10, lr=1.0) == [1.0, 0.5, 0.25]
    assert "gamma is applied at each optimizer step" in caplog.text


def test_registering_twice_is_harmless() -> None:
    register_with_nemo()
    register_with_nemo()
    assert available_optimizers()["adamw_fp32OptState"] is AdamWFP32OptState


@pytest.mark.parametrize("decay_norms", [False, True])
def test_what_decays(decay_norms: bool) -> None:
    """Documented: do_layer_norm_weight_decay True adds decay on norm weights. Biases never decay."""
    named = named_parameters()
    groups = parameter_groups(named, layer_norm_weight_decay=decay_norms)
    exempt = {id(p) for g in groups if g.get("weight_decay") == 0.0 for p in g["params"]}
    names = {name for name, p in named if id(p) in exempt}
    bias = "model.layers.0.self_attn.qkv_proj.q_proj.bias"
    norms = {"model.layers.0.input_layernorm.weight", "model.norm.weight"}
    assert names == ({bias} if decay_norms else {bias, *norms})
    assert sum(len(g["params"]) for g in groups) == len(named)


def test_decay_moves_exactly_the_decaying_parameters() -> None:
    """With zero gradients AdamW's step is w -> w * (1 - lr * weight_decay) = 0.9 w, or nothing."""
    named = named_parameters()
    before = {name: p.detach().clone() for name, p in named}
    optimizer = build_optimizer(named, "adamw_fp32OptState", {"lr": 0.5, "weight_decay": 0.2})
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in named:
        factor = 1.0 if "norm" in name or name.endswith("bias") else 0.9
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_a_parameter_list_without_exempt_ones_is_one_group() -> None:
    optimizer = build_optimizer(named_parameters()[:1], "adamw", {"lr": 0.1})
    assert len(optimizer.param_groups) == 1


def test_fused_where_torch_has_it_and_nobody_chose() -> None:
    def fused(name: str, **settings: Any) -> Any:
        optimizer = build_optimizer(named_parameters(), name, {"lr": 0.1, **settings})
        return optimizer.param_groups[0].get("fused")

    assert all(fused(name) for name in ("adamw", "adamw_fp32OptState", "adam", "sgd"))
    assert fused("adamw", fused=False) is False
    assert not fused("adamw", foreach=True)
    assert not fused("rmsprop")


def test_built_adamw_fp32_equals_torch_adamw_bit_for_bit() -> None:
    ours, theirs = (
        Run(name, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}, "CosineAnnealing", {})
        for name in ("adamw_fp32OptState", "adamw")
    )
    for run in (ours, theirs):
        run.train(0, STEPS)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours.named, theirs.named, strict=True))


def test_capturable_on_the_cpu_is_noticed_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = build_optimizer(named_parameters(), "adamw", {"lr": 0.1, "capturable": True})
    assert "model.optim.capturable: True has no effect on the CPU" in caplog.text
    assert optimizer.param_groups[0]["capturable"] is False


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sgd", {"lr": 0.1, "betas": [0.9, 0.99]}, r"model\.optim \(sgd\): .* argument 'betas'; .*lr=0\.1"),
        ("adamw", {"lr": 0.1, "betas": [0.9, 2.0]}, r"model\.optim \(adamw\): Invalid beta.* 2\.0"),
        ("adamw", {"lr": 0.1, "betas": [0.9]}, r"model\.optim \(adamw\): "),
        ("adamw", {"lr": -1.0}, r"model\.optim \(adamw\): Invalid learning rate: -1\.0"),
    ],
)
def test_settings_that_an_optimizer_refuses_are_named(
    name: str, settings: dict[str, Any], message: str
) -> None:
    """What ``config`` can tell it has told before: see tests/config/test_check.py and test_optim.py."""
    with pytest.raises(ValueError, match=message):
        build_optimizer(named_parameters(), name, settings)


def test_no_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer([], "adamw", {"lr": 0.1})


@pytest.mark.parametrize(
    ("name", "settings", "max_steps", "message"),
    [
        ("NoamAnnealing", {"warmup_steps": 1}, 10, r"NoamAnnealing.*d_model"),
        ("StepLR", {"gamma": 0.1}, 10, r"StepLR.*step_size"),
        ("CosineAnnealing", {}, -1, r"max_steps is -1: set trainer\.max_steps"),
        ("CosineAnnealing", {"warmup_steps": 1, "warmup_ratio": 0.1}, 10, r"Either use particular number"),
        ("CosineAnnealing", {"warmup_steps": "few"}, 10, r"model\.optim\.sched \(CosineAnnealing\): "),
        ("NoamHoldAnnealing", {"hold_steps": 2}, 10, r"cannot be used without warmup steps"),
        ("T5InverseSquareRootAnnealing", {}, 10, r"model\.optim\.sched \(T5InverseSquareRootAnnealing\): "),
        ("StepLR", {"step_size": 0}, 10, r"model\.optim\.sched \(StepLR\): "),
    ],
)  # fmt: skip
def test_settings_that_a_schedule_refuses_are_named(
    name: str, settings: dict[str, Any], max_steps: int, message: str
) -> None:
    optimizer = build_optimizer(named_parameters(), "sgd", {"lr": 0.1})
    with pytest.raises(ValueError, match=message):
        build_scheduler(optimizer, name, settings, max_steps)


@pytest.mark.parametrize("name", TUTORIAL_SCHEDULERS)
def test_a_run_shorter_than_its_warm_up_is_taken(name: str) -> None:
    """``TRAIN_ITERS=2`` with the YAML of a long run."""
    settings = {**TUTORIAL_SCHEDULERS[name]}
    for length in {"warmup_steps", "hold_steps"} & set(settings):
        settings[length] = 2000
    found = rates(name, settings, 2, 2, lr=1e-2)
    assert all(0 <= rate <= 1e-2 for rate in found)


def test_last_epoch_of_minus_one_is_taken() -> None:
    assert rates("CosineAnnealing", {"last_epoch": -1}, 1, 10, lr=1.0) == [1.0]


def test_a_class_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the current folder, given what it takes; weight decay spares norms there too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_optimizers.py").write_text(
        "import torch\nclass Plain(torch.optim.SGD):\n    def __init__(self, params, lr, weight_decay=0.0):\n"
        "        super().__init__(params, lr=lr, weight_decay=weight_decay)\nclass NoOptimizer: pass\n"
        "class PassesOn(torch.optim.AdamW):\n    def __init__(self, params, **kwargs):\n"
        "        super().__init__(params, **kwargs)\nclass Inherits(torch.optim.AdamW): pass\n"
    )
    for name in ("Plain", "PassesOn", "Inherits"):
        optimizer = build_optimizer(
            named_parameters(), f"own_optimizers.{name}", {"lr": 0.1, "weight_decay": 0.2}
        )
        assert type(optimizer).__name__ == name
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for name, settings, message in (
        (
            "own_optimizers.NoOptimizer",
            {},
            r"model\.optim\.name: .* must be a subclass of torch.optim.*Optimizer",
        ),
        (
            "own_optimizers.Missing",
            {},
            r"model\.optim\.name: own_optimizers.Missing: own_optimizers has no Missing",
        ),
        ("no_such_module.Plain", {}, r"model\.optim\.name: .*cannot import the module no_such_module"),
        ("own_optimizers.Plain", {"betas": (0.9, 0.9)}, r"model\.optim \(own_optimizers.Plain\): .*betas"),
    ):
        with pytest.raises(ValueError, match=message):
            build_optimizer(named_parameters(), name, {"lr": 0.1, **settings})
