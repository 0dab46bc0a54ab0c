"""Golden runs of one process, in a process of their own, so that its arithmetic can be chosen.

golden_alone.py values FOLDER FILE NAME...: train each NAME in FOLDER, and write all that is golden to FILE.
golden_alone.py reuse FOLDER NAME: train NAME with a tokenizer that refuses to work, and print its folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from golden_probe import exact_roots, one_process, train


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the token cache was there to be read")


if __name__ == "__main__":
    exact_roots()
    what, folder, *rest = sys.argv[1:]
    if what == "values":
        file, *names = rest
        Path(file).write_text(json.dumps({name: one_process(Path(folder), name) for name in names}))
    else:
        import transformers

        transformers.PreTrainedTokenizerFast._encode_plus = _refuse  # type: ignore[method-assign]
        print(train(Path(folder), rest[0]))
