"""An optimizer's state under the parameters' names, so that another layout or grouping can find it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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


def merged(of_ranks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """``plain`` of all ranks as one: pipeline stages hold different parameters. Groups of equal settings
    become one."""
    groups: dict[str, dict[str, Any]] = {}
    state: dict[str, dict[str, Any]] = {}
    for plain in of_ranks:
        for group in plain["param_groups"]:
            known = groups.setdefault(_settings(group), {**group, "params": []})["params"]
            known += sorted(set(group["params"]) - set(known), key=group["params"].index)
        for name, values in plain["state"].items():
            state.setdefault(name, {}).update(values)
    return {"param_groups": list(groups.values()), "state": state}


def restore(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    saved: NamedOptimizerState,
    everywhere: Collection[str],
) -> None:
    """Fill the optimizer, bit for bit and in the saved dtypes.

    Args:
        saved: ``tensors`` of this rank's parameters, laid out as they are; ``plain`` of all ranks.
        everywhere: the parameters of all ranks' optimizers.

    Raises EngineError where those are other parameters than were saved, or where a group holds
    parameters of different settings.
    """
    names = _names_by_index(optimizer, named_parameters)
    groups = _present_groups(optimizer, names, saved.plain["param_groups"], everywhere)
    indices = {name: index for index, name in names.items()}
    entries: dict[int, dict[str, Any]] = {}
    for parameter, values in saved.plain["state"].items():
        if parameter in indices:
            entries.setdefault(indices[parameter], {}).update(values)
    for name, tensor in saved.tensors.items():
        parameter, key = name.rsplit(".", 1)
        entries.setdefault(indices[parameter], {})[key] = tensor
    optimizer.load_state_dict({"state": dict(sorted(entries.items())), "param_groups": groups})
    _restore_dtypes(optimizer, entries)


def parameter_names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> list[str]:
    """The names of the parameters that this rank's optimizer moves."""
    return list(_names_by_index(optimizer, named_parameters).values())


def _settings(group: Mapping[str, Any]) -> str:
    return repr(sorted((key, value) for key, value in group.items() if key != "params"))


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


def _present_groups(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    saved: Sequence[dict[str, Any]],
    everywhere: Collection[str],
) -> list[dict[str, Any]]:
    """The optimizer's groups, numbered as in its state_dict, with the settings that their parameters had."""
    saved_with = {name: group for group in saved for name in group["params"]}
    moved = set(everywhere) ^ set(saved_with)
    present = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    found = [[] if moved else [saved_with[names[index]] for index in params] for params in present]
    if moved or any(len({_settings(group) for group in groups}) > 1 for groups in found):
        detail = f"first {min(moved)}" if moved else "the same parameters, divided otherwise"
        raise EngineError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, the present one {len(present)}, "
            f"over other parameters ({detail}). Keep model.optim as it was, or set "
            "model.weight_init_only: True to start from the weights alone"
        )
    return [{**groups[0], "params": params} for groups, params in zip(found, present, strict=True)]


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
