"""ZeRO-1: the optimizer's state and its weights, split over the data-parallel ranks by NxD."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from neuronx_distributed.optimizer import NeuronZero1Optimizer
from neuronx_distributed.parallel_layers import parallel_state
from torch import Tensor

from nxdt_align.engines import xla
from nxdt_align.engines.nxd.mesh import Mesh
from nxdt_align.engines.nxd.settings import Precision


class ShardedOptimizer(NeuronZero1Optimizer):  # type: ignore[misc]
    """An optimizer of the same class and settings as ``optimizer``, on this rank's rows of each parameter.

    The engine calls ``reduce`` before it clips, on rows that are sums over the ranks: NxD's own step
    takes means, and a norm that counts replicated kv heads as often as they are replicated. Only XLA
    devices have it. The rows are float32 where ``precision`` has masters, else as the weights are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mesh: Mesh, precision: Precision) -> None:
        self._hooks = (
            list(optimizer._optimizer_step_pre_hooks.values()),
            list(optimizer._optimizer_step_post_hooks.values()),
        )
        taken = inspect.signature(type(optimizer).__init__).parameters
        super().__init__(
            optimizer.param_groups,
            type(optimizer),
            optimizer_dtype=torch.float32 if precision.masters else precision.compute,
            grad_clipping=False,
            pin_layout=False,
            sharding_groups=parallel_state.get_data_parallel_replica_groups(),
            grad_norm_groups=parallel_state.get_tensor_model_parallel_replica_groups(),
            use_grad_acc_hook=precision.masters and precision.float32_sums,
            higher_cc_precision=precision.masters and precision.float32_reductions,
            save_master_weights=True,
            **{key: value for key, value in optimizer.defaults.items() if key in taken},
        )
        size, groups = mesh.groups.data.size, self.sharding_groups
        # NxD divides by the group's size.
        self._sums = [{"scale_factor": float(size), "sharding_group": groups, "group_size": size}]

    def init_zero(self) -> None:
        super().init_zero()
        # The caller's hooks, which for instance bring the learning rate to the device.
        before, after = self._hooks
        for hook in before:
            self.base_optimizer.register_step_pre_hook(hook)
        for hook in after:
            self.base_optimizer.register_step_post_hook(hook)
        if self.use_grad_acc_hook:
            self._make_sums()

    def _make_sums(self) -> None:
        """The sums of gradients in the optimizer's dtype, which torch_xla makes in the first backward pass.

        A later step sets them to zero in whatever graph is its first, such as a micro-batch of the reference:
        so would a process's first step be of other graphs than all others, whose numbers of micro-batches a
        resumed run need not start with.
        """
        for group, shards in zip(self.param_groups, self.base_optimizer.param_groups, strict=True):
            for parameter, shard in zip(group["params"], shards["params"], strict=True):
                zeros = torch.zeros(parameter.shape, dtype=self.optimizer_dtype)
                parameter.main_grad = shard.main_grad = zeros.to(self.device)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the ranks; each keeps those of its rows."""
        self._reduce_gradients(sharding_scheme=self._sums)

    def gradients(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Parameter, the gradient of this rank's rows of it, and the first row's number; after ``reduce``."""
        for group, shards in zip(self.param_groups, self.base_optimizer.param_groups, strict=True):
            for parameter, shard in zip(group["params"], shards["params"], strict=True):
                yield parameter, shard.grad, self.local_rank * shard.shape[0]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As NxD's, for a model whose weights are loaded; but values reach the device as data. NxD makes
        gradients of zeros and gathers the weights anew, in graphs that no other part of a run has."""
        given = {key: value for key, value in state_dict.items() if key != "base_state"}
        settings = set(self.defaults)
        torch.optim.Optimizer.load_state_dict(self, given)
        for added in set(self.defaults) - settings:
            del self.defaults[added]  # ``differentiable``, which not every class takes
        self.init_zero()
        shards = [shard for group in self.base_optimizer.param_groups for shard in group["params"]]
        masters = state_dict["sharded_master_weights"]
        with torch.no_grad(), xla.filling({str(i): shard for i, shard in enumerate(shards)}) as filled:
            for i in range(len(shards)):
                filled[str(i)].copy_(masters[i])
        state = {"state": state_dict["base_state"], "param_groups": given["param_groups"]}
        with xla.state_as_computed(self.base_optimizer):
            self.base_optimizer.load_state_dict(state)

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """Update this rank's rows, from gradients that ``reduce`` has summed, and gather all rows.

        ``closure`` is called first, as Lightning has its hooks in there, but may make no gradients.
        """
        result = None if closure is None else closure()
        self._update_parameters()
        return result
