"""What the doctor found, for people and as JSON: lengths against their limits, and the findings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nxdt_align.evaluation.doctor import Finding, Split, Tokens, quantile

_QUANTILES = (50, 90, 99, 100)


def lengths(split: Split) -> dict[str, dict[str, int]]:
    """Quantiles of tokens before truncation, in percent."""
    names = ["prompt", *(("chosen", "rejected") if split.is_pairs else ("response",))]
    columns = {name: [each.whole[at] for each in split.encoded] for at, name in enumerate(names)}
    columns["record"] = [each.whole[0] + max(each.whole[1:]) for each in split.encoded]
    return {
        name: {str(percent): quantile(values, percent) for percent in _QUANTILES}
        for name, values in columns.items()
    }


def histogram(values: Sequence[int], limit: int, width: int = 40) -> list[str]:
    """Lines of a histogram in powers of two, with what is above ``limit`` marked."""
    bins = Counter(max(value, 1).bit_length() for value in values)
    most = max(bins.values())
    lines = []
    for power in range(min(bins), max(bins) + 1):
        low, high = 2 ** (power - 1), 2**power - 1
        bar = "#" * -(-bins[power] * width // most)
        mark = "  over the limit" if low > limit else "  the limit is within" if high > limit else ""
        lines.append(f"    {low:>7,} to {high:>7,} {bins[power]:>8,} {bar}{mark}")
    return lines


def to_dict(splits: Sequence[Split], findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "splits": {
            split.name: {
                "records": len(split.records),
                "bad": split.report.total,
                "lengths": lengths(split) if split.records else {},
            }
            for split in splits
        },
        "findings": [asdict(finding) for finding in findings],
    }


def to_text(splits: Sequence[Split], findings: Sequence[Finding], tokens: Tokens) -> str:
    lines = []
    for split in splits:
        lines.append(f"{split.key}: {len(split.records):,} records, {split.report.total:,} bad ones")
        if not split.records:
            continue
        for name, values in lengths(split).items():
            said = ", ".join(f"{percent}% {value:,}" for percent, value in values.items())
            lines.append(f"  tokens per {name}: {said}")
        lines.append(f"  prompts, limit {tokens.truncation.prompt_limit:,} ({tokens.limit_key}):")
        lines += histogram([each.whole[0] for each in split.encoded], tokens.truncation.prompt_limit)
        limit = tokens.truncation.seq_length
        lines.append(f"  prompt and longest response, limit {limit:,} (data.seq_length):")
        whole = [each.whole[0] + max(each.whole[1:]) for each in split.encoded]
        lines += histogram(whole, limit)
    lines.append("")
    for number, finding in enumerate(findings, start=1):
        lines.append(f"{number}. {finding.weight}, {finding.what}: {finding.says}")
        lines += [f"     {example}" for example in finding.examples]
        lines.append(f"     change: {finding.change}")
    if not findings:
        lines.append("nothing found")
    return "\n".join(lines)


def as_json(splits: Sequence[Split], findings: Sequence[Finding]) -> str:
    return json.dumps(to_dict(splits, findings), indent=2)
