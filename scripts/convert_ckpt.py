#!/usr/bin/env python3
"""Converts checkpoints: ``nxdt-align convert`` under the name that NxD Training's users know.

The options are both ours and those of NxD Training's converter:

scripts/convert_ckpt.py --model_style hf --input_dir HF --output_dir pretrained_ckpt \
    --convert_from_full_state --tp_size 32 --kv_size_multiplier 4 --qkv_linear True
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import nxdt_align  # noqa: F401
except ImportError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from nxdt_align.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
