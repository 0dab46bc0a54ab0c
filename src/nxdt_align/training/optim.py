"""Optimizers and learning-rate schedules by NeMo's names, with the two that NxDT adds to them.

NeMo's registries are imported when a training run builds its optimizer and not before: it takes
seconds. Names and settings were held to the tables of ``config/optim.py`` when the YAML was read, and
values are judged by the classes; what is checked here is what only a built part shows.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nxdt_align.config.fields import is_dotted
from nxdt_align.config.optim import FIXED_SETTINGS, SCHEDULERS
from nxdt_align.errors import UserError
from nxdt_align.own_parts import OwnPartError, find_class
from nxdt_align.training.adamw import AdamWFP32OptState, AdamWInGraph, keep_saved_dtypes

T = TypeVar("T")
log = logging.getLogger(__name__)

FUSED_OPTIMIZERS = ("adam", "adamw", "adamw_fp32OptState", "sgd")
"""Where torch's fused step is used: it is elementwise, so the same for any number of threads."""

SCHEDULE_LENGTHS = ("max_steps", "warmup_steps", "hold_steps", "constant_steps", "decay_steps")
"""Attributes of NeMo's schedules that are numbers of steps."""


def linear_with_warmup(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """Share of the peak learning rate after ``step`` updates: up to 1 in a line, then down to 0.

    As ``get_linear_schedule_with_warmup`` of ``transformers.optimization``, so 0 at step 0.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    return max(0.0, (max_steps - step) / max(1, max_steps - warmup_steps))


class LinearAnnealingWithWarmUp(LambdaLR):
    """The schedule that NxDT adds to NeMo's: ``linear_with_warmup`` times each group's learning rate."""

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, *, max_steps: int, last_epoch: int = -1
    ) -> None:
        share = partial(linear_with_warmup, warmup_steps=warmup_steps, max_steps=max_steps)
        super().__init__(optimizer, share, last_epoch)


def register_with_nemo() -> None:
    """Add ``adamw_fp32OptState`` and ``LinearAnnealingWithWarmUp`` to NeMo's registries, once."""
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    AVAILABLE_OPTIMIZERS.setdefault("adamw_fp32OptState", AdamWFP32OptState)
    AVAILABLE_SCHEDULERS.setdefault("LinearAnnealingWithWarmUp", LinearAnnealingWithWarmUp)


def available_optimizers() -> dict[str, type[Optimizer]]:
    """Optimizer name -> class, of NeMo's registry."""
    register_with_nemo()
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    return dict(AVAILABLE_OPTIMIZERS)


def available_schedulers() -> dict[str, type[LRScheduler]]:
    """Schedule name -> class, of NeMo's registry."""
    register_with_nemo()
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS

    return dict(AVAILABLE_SCHEDULERS)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, layer_norm_weight_decay: bool
) -> list[dict[str, Any]]:
    """Parameters that decay, then those that don't; the second group sets ``weight_decay`` to 0. What is not
    trained is in neither.

    Biases never decay. Norm weights decay where ``layer_norm_weight_decay``, as NxDT's documentation
    has ``do_layer_norm_weight_decay``; its code for Hugging Face models does the reverse.
    """
    decaying: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        segments = name.lower().split(".")
        # GPT-2's norms are called ln_1, ln_2 and ln_f.
        is_norm = any(segment.endswith("norm") or segment.startswith("ln_") for segment in segments)
        # Engine nxd has bias_q, bias_k, bias_v and bias_qkv.
        spared = segments[-1].startswith("bias") or (is_norm and not layer_norm_weight_decay)
        (exempt if spared else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    named_parameters: Sequence[tuple[str, nn.Parameter]],
    name: str,
    settings: Mapping[str, Any],
    *,
    layer_norm_weight_decay: bool = False,
) -> Optimizer:
    """The optimizer that ``model.optim`` names: one of NeMo's, of NxDT's, or a class of the user's own.

    ``settings`` holds ``lr`` and what else that optimizer takes (``weight_decay``, ``betas``, ...); a
    setting that is None counts as left out. The fused step is used where torch has one, unless
    ``fused`` or ``foreach`` is set. Raises UserError where a class of the user's own is not found or is
    no optimizer, and for settings that the class refuses.
    """
    cls = _custom_optimizer(name) if is_dotted(name) else available_optimizers()[name]
    taken = _keywords_of(cls)
    if not named_parameters:
        raise ValueError("the optimizer got no trainable parameter")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if v is not None}
    kwargs: dict[str, Any] = FIXED_SETTINGS.get(name, {}) | given
    parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if cls is AdamW and all(parameter.device.type == "xla" for parameter in parameters):
        cls = AdamWInGraph
    kwargs |= _step_implementation(name, kwargs, parameters, can_be_captured="capturable" in taken)
    groups = parameter_groups(named_parameters, layer_norm_weight_decay=layer_norm_weight_decay)
    if "weight_decay" not in taken:
        groups = [{"params": parameters}]
    optimizer = _construct(f"model.optim ({name})", kwargs, lambda: cls(groups, **kwargs))
    if not isinstance(optimizer, AdamWFP32OptState):  # which does so itself
        keep_saved_dtypes(optimizer)
    if kwargs.get("capturable"):
        learning_rate_on_device(optimizer)
    return optimizer


def build_scheduler(
    optimizer: Optimizer, name: str | None, settings: Mapping[str, Any], max_steps: int
) -> LRScheduler:
    """The schedule that ``model.optim.sched`` names; a constant learning rate where ``name`` is None.

    ``settings`` holds what the schedule takes besides its name; None counts as left out.
    ``max_steps`` is the run's number of optimizer steps, for a schedule whose own ``max_steps`` is not
    set (or -1). A resumed run takes only the number of steps from the checkpoint, so that each step
    has the rate of this schedule from the first one on. Every schedule moves on at each optimizer
    step; NeMo moves ExponentialLR once per epoch, hence a notice in the log.

    Raises UserError where the number of steps is not known, and for values that the schedule refuses or
    with which it would fail during training.
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if name is None:
        constant = {"lr_lambda": lambda step: 1.0}
        unchanged: LRScheduler = _resuming(LambdaLR, constant, groups)(optimizer, **constant)
        return unchanged
    where = f"model.optim.sched ({name})"
    kwargs = {k: v for k, v in settings.items() if v is not None}
    if "max_steps" in SCHEDULERS[name]:
        steps = kwargs.get("max_steps", -1)
        kwargs["max_steps"] = max_steps if steps == -1 else steps
        if kwargs["max_steps"] < 1:
            raise UserError(
                f"{where} needs the number of steps, but max_steps is {kwargs['max_steps']}: set "
                "trainer.max_steps"
            )
    if name == "ExponentialLR":
        log.warning("%s: gamma is applied at each optimizer step; NeMo applies it once per epoch", where)
    cls: Any = available_schedulers()[name]
    build = _resuming(cls, kwargs, groups)
    scratch = SGD([nn.Parameter(torch.zeros(1))], lr=optimizer.param_groups[0]["lr"], momentum=0.9)
    _construct(where, kwargs, lambda: _walk(cls(scratch, **kwargs)))
    scheduler: LRScheduler = _construct(where, kwargs, lambda: build(optimizer, **kwargs))
    return scheduler


def _custom_optimizer(path: str) -> Callable[..., Optimizer]:
    try:
        return find_class(path, Optimizer)
    except OwnPartError as error:
        raise UserError(f"model.optim.name: {error}") from error


def _keywords_of(cls: Any) -> tuple[str, ...]:
    """What a constructor takes, with what it passes on to its bases by ``**kwargs``.

    A class that only passes on takes weight_decay too, and norms and biases are spared as with any other.
    """
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(names)


def _step_implementation(
    name: str, kwargs: Mapping[str, Any], parameters: Sequence[nn.Parameter], *, can_be_captured: bool
) -> dict[str, Any]:
    """Settings that choose how, not what, a step computes on the parameters' device."""
    devices = {parameter.device.type for parameter in parameters}
    chosen: dict[str, Any] = {}
    if kwargs.get("capturable") and devices == {"cpu"}:
        log.warning("model.optim.capturable: True has no effect on the CPU, which captures no graphs")
        chosen["capturable"] = False
    if devices == {"xla"} and can_be_captured:
        # The number of steps is then a tensor of the graph, and not a constant that makes each another one.
        chosen["capturable"] = True
    if name in FUSED_OPTIMIZERS and not {"fused", "foreach", "differentiable"} & set(kwargs):
        # One fused call cannot mix plain tensors and DTensors, or DTensors of several meshes.
        meshes = {getattr(parameter, "device_mesh", None) for parameter in parameters}
        if (devices == {"cuda"} and len(meshes) == 1) or (devices == {"cpu"} and meshes == {None}):
            chosen["fused"] = True
    return chosen


def _construct(where: str, settings: Mapping[str, Any], build: Callable[[], T]) -> T:
    """``build()``, whose complaints about values become one UserError with place and settings."""
    try:
        return build()
    except (TypeError, ValueError, ArithmeticError, LookupError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise UserError(f"{where}: {str(error) or type(error).__name__}; the settings are {given}") from error


def _walk(scheduler: LRScheduler) -> None:
    """Ask the schedule for each stage's learning rate, so that it fails now and not after the warm-up."""
    edges = [int(getattr(scheduler, attribute, 0) or 0) for attribute in SCHEDULE_LENGTHS]
    last = int(getattr(scheduler, "max_steps", 0) or max(edges) + 1)
    steps = {edge + offset for edge in edges for offset in (-1, 0, 1)}
    for step in sorted(step for step in steps if 0 < step <= last):
        scheduler.last_epoch = step
        scheduler._get_lr_called_within_step = True
        for lr in scheduler.get_lr():
            if isinstance(lr, complex) or not 0 <= lr < math.inf:
                raise ValueError(f"the learning rate at step {step} would be {lr}")


def _resuming(cls: Any, settings: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> Any:
    """``cls`` built with ``settings``, whose ``load_state_dict`` takes nothing but the number of steps done.

    The saved state may be of another schedule, length or learning rate. It walks the same schedule to that
    step instead, on copies of ``groups`` (the optimizer's settings before it was built), so that the rates
    are those of a run that has had this YAML from its start, bit for bit: some schedules multiply the last
    rate. The optimizer's groups get the result, as they hold what the checkpoint had.
    """

    def load_state_dict(self: LRScheduler, state_dict: dict[str, Any]) -> None:
        copies = [{**group, "params": [nn.Parameter(torch.zeros(1))]} for group in groups]
        scratch = Optimizer(copies, dict(self.optimizer.defaults))
        walker: LRScheduler = cls(scratch, **settings)
        scratch._opt_called = True  # type: ignore[attr-defined]  # else torch warns of the order of calls
        for _ in range(int(state_dict["last_epoch"])):
            walker.step()
        vars(self).update({name: value for name, value in vars(walker).items() if name != "optimizer"})
        for group, before, after in zip(
            self.optimizer.param_groups, groups, scratch.param_groups, strict=True
        ):
            set_by_schedule = {k for k, v in after.items() if k not in before or before[k] != v}
            group.update({key: after[key] for key in {"lr", *set_by_schedule} - {"params"}})

    return type(cls.__name__, (cls,), {"load_state_dict": load_state_dict, "__module__": cls.__module__})


# An optimizer whose step is part of a compiled graph: the learning rate goes in as a tensor. As a number it
# would be a constant of the graph, and each change of it another graph.

SMALLEST = 1e-20
"""Stands for a learning rate of 0, as a warm-up starts with: torch's capturable step divides by it, so
that a weight whose gradient is 0 would become NaN. Nothing that float32 can show moves at this rate."""


def learning_rate_on_device(optimizer: Optimizer) -> None:
    """Have every step see its groups' learning rates as tensors, (1,) float32, on the parameters' device.

    Outside of ``step`` they are numbers, for the schedule, the log and checkpoints.
    """
    numbers: list[float] = []

    def to_tensors(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        numbers[:] = [group["lr"] for group in stepping.param_groups]
        for group in stepping.param_groups:
            # One element and no scalar: XLA makes constants of scalars that are 0 or 1.
            group["lr"] = torch.tensor([max(group["lr"], SMALLEST)]).to(group["params"][0].device)

    def to_numbers(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        for group, number in zip(stepping.param_groups, numbers, strict=True):
            group["lr"] = number

    optimizer.register_step_pre_hook(to_tensors)
    optimizer.register_step_post_hook(to_numbers)
