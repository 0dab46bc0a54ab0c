from . import qkv_linear

__all__ = ["qkv_linear"]
