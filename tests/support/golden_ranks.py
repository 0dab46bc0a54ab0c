"""One of the two processes of ``golden_probe.two_processes``: each ``NAME:PORT`` of its arguments in turn."""

from __future__ import annotations

import os
import sys

from golden_probe import arguments, exact_roots, main

if __name__ == "__main__":
    exact_roots()
    for name, _, port in (text.partition(":") for text in sys.argv[1:]):
        os.environ["MASTER_PORT"] = port
        status = main(arguments(name, "trainer.devices=2", "exp_manager.seconds_to_sleep=0.1"))
        if status:
            sys.exit(status)
