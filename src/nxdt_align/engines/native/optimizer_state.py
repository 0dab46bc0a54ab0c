"""An optimizer's state under the parameters' names, so that another layout or grouping can find it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nxdt_align.engines.base import EngineError


@dataclass(frozen=True)
class NamedOptimizerState:
    """What an optimizer has to remember."""

    tensors: dict[str, Tensor]
    """``<parameter>.<key>`` -> tensor, e.g. ``norm.weight.exp_avg``, ``norm.weight.step``."""
    plain: dict[str, Any]
    """``param_groups``, each with its parameters' names, and ``state``: parameter -> key -> value that
    is no tensor."""


def by_name(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> NamedOptimizerState:
    """The optimizer's state; tensors are its own, not copies."""
    names = _names_by_index(optimizer, named_parameters)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}.{key}"] = value
            else:
                values.setdefault(names[index], {})[key] = value
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return NamedOptimizerState(tensors, {"param_groups": groups, "state": values})


def restore(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    saved: NamedOptimizerState,
) -> None:
    """Fill the optimizer, bit for bit and in the saved dtypes.

    Raises EngineError where the parameter groups hold other parameters than they did.
    """
    names = _names_by_index(optimizer, named_parameters)
    indices = {name: index for index, name in names.items()}
    groups = saved.plain["param_groups"]
    _check_groups(optimizer, names, groups)
    entries: dict[int, dict[str, Any]] = {}
    for parameter, values in saved.plain["state"].items():
        entries.setdefault(indices[parameter], {}).update(values)
    for name, tensor in saved.tensors.items():
        parameter, key = name.rsplit(".", 1)
        entries.setdefault(indices[parameter], {})[key] = tensor
    # load_state_dict pairs saved and present parameters by their places in the groups.
    present = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    renumbered = [{**group, "params": params} for group, params in zip(groups, present, strict=True)]
    optimizer.load_state_dict({"state": entries, "param_groups": renumbered})
    _restore_dtypes(optimizer, entries)


def _names_by_index(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[int, str]:
    """state_dict numbers the parameters in the order of the groups."""
    names = {id(parameter): name for name, parameter in named_parameters}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    unknown = sum(id(p) not in names for p in parameters)
    if unknown:
        raise ValueError(f"{unknown} of the optimizer's parameters are not the engine's")
    return {index: names[id(p)] for index, p in enumerate(parameters)}


def _check_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], saved: list[dict[str, Any]]
) -> None:
    present = [{names[i] for i in g["params"]} for g in optimizer.state_dict()["param_groups"]]
    stored = [set(group["params"]) for group in saved]
    if present == stored:
        return
    moved = set().union(*present) ^ set().union(*stored)
    detail = f"first {min(moved)}" if moved else "the same parameters, divided otherwise"
    raise EngineError(
        f"the checkpoint's optimizer has {len(stored)} parameter groups, the present one {len(present)}, "
        f"over other parameters ({detail}). Keep model.optim and model.lora as they were, or set "
        "model.weight_init_only: True to start from the weights alone"
    )


def _restore_dtypes(optimizer: torch.optim.Optimizer, entries: Mapping[int, Mapping[str, Any]]) -> None:
    """torch's load_state_dict casts state to the parameter's dtype; fp32 state of bf16 weights must
    stay fp32."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in entries.items():
        state = optimizer.state[parameters[index]]
        for key, value in values.items():
            loaded = state.get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                state[key] = value.to(loaded.device)
