"""``python -m nxdt_align`` and ``nxdt-align``: check the Python version, then run the verb.

Imports only the standard library before the check, so that an unsupported Python gets one clear line.
"""

from __future__ import annotations

import sys

from nxdt_align import PYTHON


def main() -> int:
    """Run the command line; returns the exit status."""
    oldest, newest = PYTHON
    if not oldest <= sys.version_info[:2] <= newest:
        print(
            "error: nxdt-align runs on Python {}.{} to {}.{}, but this is {}.{} ({}); make an environment "
            "with one of those".format(*oldest, *newest, *sys.version_info[:2], sys.executable),
            file=sys.stderr,
        )
        return 1
    from nxdt_align import cli
    from nxdt_align.cli_process import reader_may_stop

    try:
        return cli.main()
    finally:  # also after --help, whose text argparse has printed
        with reader_may_stop():
            pass


if __name__ == "__main__":
    sys.exit(main())
