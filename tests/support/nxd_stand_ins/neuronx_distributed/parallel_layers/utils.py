from __future__ import annotations

from torch import Tensor


def set_tensor_model_parallel_attributes(
    tensor: Tensor, is_parallel: bool, dim: int, stride: int, num_partitions: int
) -> None:
    """Say on a weight how it is divided, for checkpoints and norms of NxD's own."""
    said = {
        "tensor_model_parallel": is_parallel,
        "partition_dim": dim,
        "partition_stride": stride,
        "num_partitions": num_partitions,
    }
    for name, value in said.items():
        assert not hasattr(tensor, name), f"{name} is said twice"
        setattr(tensor, name, value)
