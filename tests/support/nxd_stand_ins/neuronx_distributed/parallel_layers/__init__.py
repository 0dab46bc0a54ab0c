from . import comm, mappings, parallel_state, utils
from .layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

__all__ = [
    "ColumnParallelLinear",
    "ParallelEmbedding",
    "RowParallelLinear",
    "comm",
    "mappings",
    "parallel_state",
    "utils",
]
