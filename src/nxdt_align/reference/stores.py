"""Stores as files: what a folder holds, and several machines' stores made into one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nxdt_align.files import CHOOSE_ANOTHER, atomic_write, explain, one_at_a_time, unwritable
from nxdt_align.record_ids import Array, distinct, spans
from nxdt_align.reference.cache import (
    ABOUT,
    ReferenceStore,
    ReferenceStoreError,
    fingerprint_of,
    name_of,
    read_about,
)
from nxdt_align.reference.parts import DAMAGED, FORMAT, PATTERN, FloatArray, read_part
from nxdt_align.reference.table import FOLDER

TOLERANCE = 1e-6
"""By which two values of a record may differ: of the larger one, and at least of 1 nat."""
PRECISION, TAKEN_OVER = "precision", "precisions_taken_over"
"""In ``store.json``: a part of what a fingerprint is made from; what other ones values were computed in."""
_NAMED = 5
"""Records that an error names."""


_ADVICE = (
    "where both are known to give the same values, reference merge --precision TEXT takes them over, and "
    "reference verify compares"
)


@dataclass(frozen=True)
class StoreReport:
    """What a store's folder holds."""

    path: Path
    format: str | None
    """None where ``store.json`` is missing or damaged."""
    made_from: Mapping[str, str]
    """What the values depend on, by name."""
    records: dict[int, int] = field(default_factory=dict)
    """Distinct records by the number of values that each has."""
    parts: int = 0
    bytes: int = 0
    """Of the parts."""
    damaged: tuple[str, ...] = ()
    """Names of parts that cannot be read, and why."""
    tables: int = 0
    """Data sets whose values are in a file of their own."""
    taken_over: tuple[str, ...] = ()
    """Precisions in which values were computed that stand under the one in ``made_from``."""

    @property
    def fingerprint(self) -> str:
        return self.path.name


def find_stores(path: Path) -> list[Path]:
    """The folders of the stores at ``path``: itself, those in it, or those in the folder ``reference`` of a
    ``data.cache_dir``. Raises ReferenceStoreError where there is none."""
    for folder in (path, path / "reference"):
        if _is_store(folder):
            return [folder]
        found = sorted(each for each in folder.glob("*") if _is_store(each)) if folder.is_dir() else []
        if found:
            return found
    what = f"is no reference store: it holds no {ABOUT}, and no part" if path.exists() else "does not exist"
    raise ReferenceStoreError(
        f"{path} {what}; give a store, or the folder `reference` of a data.cache_dir that holds stores"
    )


def _is_store(folder: Path) -> bool:
    return folder.is_dir() and ((folder / ABOUT).is_file() or any(folder.glob(PATTERN)))


def examine(store: Path) -> StoreReport:
    """Read a store's parts, each to its end."""
    about = read_about(store) or {}
    ids: dict[int, list[Array]] = {}
    damaged, count, size = [], 0, 0
    for path in sorted(store.glob(PATTERN)):
        count, size = count + 1, size + path.stat().st_size
        try:
            part = read_part(path)
        except DAMAGED as error:
            damaged.append(f"{path.name}: {error}")
            continue
        ids.setdefault(part.values.shape[1], []).append(part.ids)
    return StoreReport(
        store,
        about.get("format"),
        dict(about.get("fingerprint_of", {})),
        {width: len(distinct(np.concatenate(each))[0]) for width, each in ids.items()},
        count,
        size,
        tuple(damaged),
        len(list((store / FOLDER).glob("*.npy"))),
        tuple(map(str, about.get(TAKEN_OVER, ()))),
    )


def other_precision_alone(store: Path, made_from: Mapping[str, str]) -> bool:
    """Whether a store's values were computed from what ``made_from`` names, in the same number format, that
    is told in other words."""
    own: dict[str, str] = dict((read_about(store) or {}).get("fingerprint_of", {}))
    mine, theirs = own.get(PRECISION, ""), made_from.get(PRECISION, "")
    return (
        mine != theirs and own | {PRECISION: theirs} == made_from and _format_in(mine) == _format_in(theirs)
    )


def _format_in(precision: str) -> str:
    """What the model computes in: the engines tell it in the same words, and beside it what no
    log-probability passes through, such as master weights."""
    found = re.search(r"\bcompute=([\w.]+)", precision)
    return "autocast" if "autocast=True" in precision else found.group(1) if found else precision


# Merging


@dataclass(frozen=True)
class Merged:
    """What a merge has made of a store."""

    path: Path
    sources: int
    records: int
    """In the destination now."""
    added: int
    known: int
    """Records of the sources that the destination, or an earlier source, had."""


def merge(
    sources: Sequence[Path], destination: Path, *, tolerance: float = TOLERANCE, precision: str | None = None
) -> Merged:
    """Add what the sources hold to a store.

    Where several have a record, the value of the destination counts, then that of the first source.

    Args:
        sources: stores, or folders that lead to one, see ``find_stores``.
        destination: a store, or the folder that stores are in; it is made where there is none.
        tolerance: see ``TOLERANCE``.
        precision: under which the values are to stand, as a fingerprint has it, though the sources tell it
            in other words; that they are what is computed in it is taken on trust, and noted in the
            destination. None: the sources'.

    Raises ReferenceStoreError, and changes nothing, where the fingerprints differ, with what differs; where
    values of a record conflict, with the records; where a source has damaged parts; and where the destination
    cannot be written.
    """
    stores = [_only_store(source) for source in sources]
    for each in stores:
        _require_same(stores[0], each)
    about = read_about(stores[0]) or {}
    made_from: dict[str, str] = dict(about["fingerprint_of"])
    taken_over: set[str] = set().union(*((read_about(each) or {}).get(TAKEN_OVER, ()) for each in stores))
    name = stores[0].name
    if precision is not None and precision != made_from.get(PRECISION):
        own = made_from.get(PRECISION, "")
        if _format_in(own) != _format_in(precision):
            raise ReferenceStoreError(
                f"--precision: the values of {stores[0]} were computed in {own}, which is another "
                f"number format than {precision}: compute them again with reference precompute"
            )
        taken_over.add(own)
        made_from[PRECISION] = precision
        name = fingerprint_of(made_from)
    into = destination if _is_store(destination) else destination / name
    if _is_store(into):
        _require_same(stores[0], into, made_from, name)
    problem = unwritable(into)
    if problem is not None:
        raise ReferenceStoreError(f"{into} cannot be written to{problem}; {CHOOSE_ANOTHER}")
    with one_at_a_time(into.parent / f".{into.name}.merge-lock"):
        widths = sorted({width for store in (*stores, into) for width in examine(store).records})
        counts = [_merge_width(stores, into, width, made_from, tolerance) for width in widths]
        _note(into, taken_over)
    records, added, known = (sum(count[at] for count in counts) for at in range(3))
    return Merged(into, len(stores), records, added, known)


def _only_store(source: Path) -> Path:
    found = find_stores(source)
    if len(found) > 1:
        raise ReferenceStoreError(
            f"{source} holds {len(found)} stores, of other inputs each: give one of "
            f"{', '.join(store.name for store in found)}"
        )
    damaged = examine(found[0]).damaged
    if damaged:
        raise ReferenceStoreError(
            f"{found[0]} has damaged parts ({'; '.join(damaged)}): copy it again, or remove them and compute "
            "their records again"
        )
    return found[0]


def _note(store: Path, taken_over: set[str]) -> None:
    about = read_about(store) or {}
    known = set(about.get(TAKEN_OVER, ()))
    if taken_over <= known:
        return
    text = json.dumps(about | {TAKEN_OVER: sorted(known | taken_over)}, indent=2, sort_keys=True)
    try:
        atomic_write(store / ABOUT, text.encode() + b"\n")
    except OSError as error:
        raise ReferenceStoreError(f"{store / ABOUT} cannot be written: {explain(error)}") from error


def _require_same(
    one: Path, other: Path, made_from: Mapping[str, str] | None = None, name: str | None = None
) -> None:
    """Raise ReferenceStoreError where two stores are of other inputs, with what differs. ``made_from`` and
    ``name``: those that the values of ``one`` are to have, where they are others than its own."""
    about, theirs = read_about(one), read_about(other)
    for store, found in ((one, about), (other, theirs)):
        if found is None or found.get("format") != FORMAT:
            what = f"has no {ABOUT} that can be read" if found is None else f"is {found.get('format')!r}"
            raise ReferenceStoreError(f"{store} {what}: what its values were computed from is unknown")
    assert about is not None and theirs is not None
    mine, yours = made_from or about["fingerprint_of"], theirs["fingerprint_of"]
    if mine != yours or (name or one.name) != other.name:
        differing = [
            f"{name}: {mine.get(name, 'none')} and {yours.get(name, 'none')}"
            for name in sorted({*mine, *yours})
            if mine.get(name) != yours.get(name)
        ] or [f"fingerprint: {name or one.name} and {other.name}"]
        raise ReferenceStoreError(
            f"{one} and {other} do not go together: their values were computed from other inputs "
            f"({'; '.join(differing)})" + (f"; {_ADVICE}" if other_precision_alone(one, yours) else "")
        )


def _merge_width(
    stores: Sequence[Path], into: Path, width: int, made_from: Mapping[str, str], tolerance: float
) -> tuple[int, int, int]:
    """Records in the destination afterwards; added; known before."""
    target = ReferenceStore(into.parent, into.name, width, description=made_from)
    ids, values, places = _all_of([into, *stores], width)
    own = places[0][1]  # as they were read: a run may add parts meanwhile
    first, at = distinct(ids)
    if at is not None:
        _require_agreement(ids, values, first[at], places, tolerance)
    added = first[first >= own]
    for span in spans(len(added), 2**16):
        target.add(ids[added[span]], values[added[span]])
        target.flush()
    return len(first), len(added), len(ids) - own - len(added)


def _all_of(stores: Sequence[Path], width: int) -> tuple[Array, FloatArray, list[tuple[Path, int]]]:
    """Ids and values of all stores, one after the other, and each store with the number of its values."""
    ids: list[Array] = []
    values: list[FloatArray] = []
    places: list[tuple[Path, int]] = []
    for store in stores:
        count = 0
        for part in ReferenceStore(store.parent, store.name, width).parts():
            ids.append(part.ids)
            values.append(part.values)
            count += len(part.ids)
        places.append((store, count))
    return np.concatenate(ids), np.concatenate(values), places


def _require_agreement(
    ids: Array, values: FloatArray, first: Array, places: list[tuple[Path, int]], tolerance: float
) -> None:
    """Raise ReferenceStoreError naming records whose values differ from those that come first for them; (N,)
    ``first`` says where."""
    before = values[first]
    allowed = tolerance * np.maximum(np.maximum(np.abs(values), np.abs(before)), 1)
    conflicts = np.flatnonzero((np.abs(values - before) > allowed).any(1))
    if not len(conflicts):
        return
    starts = np.cumsum([0, *(count for _, count in places)])

    def store_of(row: int) -> Path:
        return places[int(np.searchsorted(starts, row, "right")) - 1][0]

    named = [
        f"record {name_of(ids[row])}: {values[first[row]].tolist()} in {store_of(first[row])}, "
        f"{values[row].tolist()} in {store_of(row)}"
        for row in conflicts[:_NAMED].tolist()
    ]
    raise ReferenceStoreError(
        f"values of {len(conflicts):,} records conflict by more than {tolerance:g}:\n"
        + "\n".join(f"  {each}" for each in named)
        + "\nSuch values come of other hardware or other sizes: leave one of the stores out, or allow the "
        "difference with --tolerance; the destination's own value then counts, else that of the store named "
        "first"
    )


def words(report: StoreReport) -> Iterator[str]:
    """A store in lines of text."""
    yield f"store {report.path}"
    for name, value in report.made_from.items():
        yield f"  {name}: {value}"
    for precision in report.taken_over:
        yield f"  taken on trust: values that were computed in {precision}; see reference verify"
    if report.format is None:
        yield f"  {ABOUT} is missing or damaged: what the values were computed from is unknown"
    elif report.format != FORMAT:
        yield f"  {report.format}: this version reads {FORMAT!r}"
    for width, count in sorted(report.records.items()):
        yield f"  {count:,} records of {width} value{'s' if width > 1 else ''}"
    yield f"  {report.parts:,} parts of {report.bytes / 1e6:,.1f} MB; tables of {report.tables} data sets"
    for each in report.damaged:
        yield f"  damaged: {each}"
