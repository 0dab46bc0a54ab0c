"""``python -m nxdt_align``."""

from __future__ import annotations

import sys

from nxdt_align.cli import main

if __name__ == "__main__":
    sys.exit(main())
