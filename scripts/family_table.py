#!/usr/bin/env python3
"""The table of families in README.md and docs/native.md, from what their tiny models do on this machine.

    scripts/family_table.py [--columns NAME,...] [--rows NAME;...] [--pages]

Runs every column and row (or those named), keeps what it finds in docs/families.json, and writes the pages.
Columns of engine nxd need neuronx-distributed: run them where it is (``--columns "nxd tp,nxd pp"``), the
others anywhere.
``--pages`` runs nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "support")]

import family_table as families  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill in the table of families.")
    parser.add_argument("--columns", default=",".join(families.COLUMNS), help="of them, separated by commas")
    every = (*families.ROWS, *families.THEIRS)
    parser.add_argument("--rows", default=";".join(every), help="of them, separated by semicolons")
    parser.add_argument("--pages", action="store_true", help="write the pages from what was found before")
    arguments = parser.parse_args(argv)
    columns = [] if arguments.pages else arguments.columns.split(",")
    unknown = [name for name in columns if name not in families.COLUMNS]
    if unknown:
        parser.error(f"no column {', '.join(unknown)}; there are {', '.join(families.COLUMNS)}")
    rows = arguments.rows.split(";")
    unknown = [name for name in rows if name not in every]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {'; '.join(every)}")
    record = families.read(families.RECORD) if families.RECORD.exists() else {}
    for name in columns:
        new = families.found([name], rows)
        record = families.update(record, new)
        families.write(record, families.RECORD)
        figures = [cell.off for cells in new.values() for cell in cells.values() if cell.off is not None]
        furthest = f", {max(figures):.1e} off at most" if figures else ""
        print(f"{name}: {len(figures)} of {len(new)} run{furthest}", flush=True)
    empty = [f"{row}, {c}" for row in every for c in families.COLUMNS if c not in record.get(row, {})]
    if empty:
        print(f"not run yet: {'; '.join(empty)}; the pages stay as they are", file=sys.stderr)
        return 1
    for page in families.PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(families.with_table(text, families.page_content(page, record)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
