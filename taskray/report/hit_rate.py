"""Why a task found a peer's prediction as often as it did, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONS = {
    "absent": "{it} had not yet predicted on the batch",
    "stale": "{its} prediction was too old",
    "timeout": "the wait for {it} timed out",
    "unavailable": "{its} prediction could not be read",
    "unusable": "{its} prediction gave no finite loss",
}
"""What each reason of a miss means, in the order of the sentence."""
EQUAL = 1.25
"""Two tasks whose speeds differ by less than this factor run at about the same speed."""


def explain_hit_rate(
    consumer: str,
    producer: str,
    edge: Mapping[str, Any],
    consumer_speed: float | None = None,
    producer_speed: float | None = None,
) -> str:
    """One sentence on the hit rate of the edge ``consumer <- producer``; empty without a hit rate.

    ``edge`` is the edge's entry in the ``staleness`` of a result: ``hit_rate`` (a fraction) and
    ``misses`` (reason -> count), which older results do not have. The speeds are in steps per
    second; None or 0 (a frozen task) is unknown.

    >>> edge = {"hit_rate": 0.78, "misses": {"absent": 22}}
    >>> explain_hit_rate("depth", "normals", edge, 41.0, 10.0)
    'depth found normals on 78 % of its look-ups: normals is 4.1 times slower, and it had not yet \
predicted on the batch in the other 22 %.'
    """
    hit_rate, misses = edge.get("hit_rate"), edge.get("misses")
    if hit_rate is None:
        return ""
    counts = {reason: count for reason, count in (misses or {}).items() if count}
    if not counts and not hit_rate and misses is not None:
        return f"{consumer} made no look-ups of {producer}."
    found = f"{consumer} found {producer} on {_share(hit_rate)} of its look-ups"
    if hit_rate >= 1:
        return f"{found}."
    if not counts:
        return f"{found}; this result has no reasons for the other {_share(1 - hit_rate)}."
    speed = _speed(producer, consumer_speed, producer_speed) if _depends_on_speed(counts) else ""
    clauses = [speed] if speed else []
    total = sum(counts.values())
    for reason in sorted(counts, key=_rank):
        part = (1 - hit_rate) * counts[reason] / total
        where = f"in {_share(part)}"
        if len(counts) == 1:
            where = f"in the other {_share(part)}" if hit_rate else "in all of them"
        text = REASONS.get(reason, f"{{its}} prediction was missing ({reason})")
        named = not clauses  # the first clause names the producer, the next ones say 'it'
        it, its = (producer, f"{producer}'s") if named else ("it", "its")
        clauses.append(f"{text.format(it=it, its=its)} {where}")
    *before, last = clauses
    return f"{found}: {', '.join(before)}{', and ' if before else ''}{last}."


def _depends_on_speed(counts: Mapping[str, int]) -> bool:
    """Whether most of the misses come from tasks that are not at the same place."""
    return 2 * (counts.get("absent", 0) + counts.get("stale", 0)) > sum(counts.values())


def _speed(producer: str, consumer_speed: float | None, producer_speed: float | None) -> str:
    if not consumer_speed or not producer_speed:
        return ""
    ratio = consumer_speed / producer_speed
    if ratio >= EQUAL:
        return f"{producer} is {ratio:.1f} times slower"
    if ratio <= 1 / EQUAL:
        return f"{producer} is {1 / ratio:.1f} times faster"
    return f"{producer} runs at about the same speed"


def _share(fraction: float) -> str:
    """A fraction as a whole percentage that is 0 or 100 only if the fraction is 0 or 1."""
    if 0 < fraction < 0.01:
        return "less than 1 %"
    if 0.99 < fraction < 1:
        return "more than 99 %"
    return f"{fraction * 100:.0f} %"


def _rank(reason: str) -> int:
    known = list(REASONS)
    return known.index(reason) if reason in known else len(known)
