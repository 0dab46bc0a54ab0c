"""``python graph_recorder.py``: for each line of its input, which orders a recording, the recording's exit
status as a line of output.

A process records one run, as there is no way back from recording; but torch and the package take as long to
import as a run to record. So each is a fork of this process, which itself records nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

# What a recording imports; but not torch_xla nor neuronx-distributed, which read the environment.
import torch._dynamo
import torch.fx  # noqa: F401

from nxdt_align.cli import main
from nxdt_align.run import graphs  # noqa: F401

SECONDS = 900


def record(order: dict[str, Any]) -> int:
    """Have a child write ``stdout`` and ``stderr`` in the order's folder; its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(SECONDS)
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(order["folder"]) / name, os.O_WRONLY | os.O_CREAT), number)
    sys.path[:0] = order["path"]
    sys.exit(main(order["arguments"]))


for line in sys.stdin:
    print(record(json.loads(line)), flush=True)
