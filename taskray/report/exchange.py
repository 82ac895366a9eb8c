"""Exchange of predictions, cache and steps of a run: parts of its report, as HTML."""

from __future__ import annotations

from html import escape

from taskray.loop.metric_key import HitRate, Staleness
from taskray.record.formatting import NOTHING, count, fixed, percent, size
from taskray.report.charts import Line, line_chart
from taskray.report.history import Run
from taskray.report.hit_rate import explain_hit_rate
from taskray.report.page import facts, section, text_table


def exchange(run: Run) -> str:
    """How old the peers' predictions were, how often one was found, and the cache."""
    stale: list[Line] = []
    seconds: list[Line] = []
    hits: list[Line] = []
    edges = [(t, peer) for t in run.tasks for peer in _peers(run, t)]
    for i, (task, peer) in enumerate(edges):
        edge, style = f"{task} ← {peer}", f"c{i % 6}"
        mean = run.series(task, Staleness(peer, "steps_mean"))
        most = run.series(task, Staleness(peer, "steps_max"))
        age = run.series(task, Staleness(peer, "seconds_mean"))
        hit = run.series(task, HitRate(peer))
        stale.append(Line(edge, mean.steps, mean.values, style))
        stale.append(Line(f"{edge}, largest", most.steps, most.values, style, True, True))
        seconds.append(Line(edge, age.steps, age.values, style))
        hits.append(Line(edge, hit.steps, hit.values, style))
    charts = [
        line_chart("Staleness in steps of the producer", stale, zero=True),
        line_chart("Age in seconds", seconds, zero=True),
        line_chart("Hit rate", hits, percent=True),
    ]
    body = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    body += _edge_table(run) + _why(run) + _cache_facts(run)
    lead = "Each edge reads: consumer ← producer of the prediction."
    return section("Exchanged predictions", body, lead)


def _peers(run: Run, task: str) -> list[str]:
    keys = run.keys(task)
    return list(dict.fromkeys(key.peer for key in keys if isinstance(key, (Staleness, HitRate))))


def _edge_table(run: Run) -> str:
    rows = []
    for edge, v in (run.result.get("staleness") or {}).items():
        rows.append(
            [edge.replace("<-", " ← "), fixed(v.get("steps_mean"), 1), fixed(v.get("steps_max"), 0),
             fixed(v.get("bound"), 0), fixed(v.get("seconds_mean"), 2),
             percent(v.get("hit_rate"))]
        )  # fmt: skip
    header = ["edge", "staleness, mean steps", "largest", "bound", "mean age (s)", "hit rate"]
    return text_table(*_without_empty_columns(header, rows))


def _why(run: Run) -> str:
    """A sentence for each edge on why its hit rate is what it is."""
    items = []
    for edge, values in (run.result.get("staleness") or {}).items():
        consumer, _, producer = edge.partition("<-")
        speeds = [run.task_result(t).get("steps_per_second") for t in (consumer, producer)]
        if sentence := explain_hit_rate(consumer, producer, values, *speeds):
            items.append(f"<li>{escape(sentence)}</li>")
    return f'<ul class="soft">{"".join(items)}</ul>' if items else ""


def _cache_facts(run: Run) -> str:
    cache = run.result.get("cache") or {}
    shown = [
        (f"cache {name}", size(value) if "bytes" in name else count(value))
        for name, value in cache.items()
        if isinstance(value, (int, float))
    ]
    return facts([(name.replace("_", " "), text) for name, text in shown])


def steps(run: Run) -> str:
    """Steps, speed and waiting of each task."""
    rows = []
    for task in run.tasks:
        values = run.task_result(task)
        if not values:
            continue
        rows.append(
            [task,
             *(count(values.get(k)) for k in
               ("steps", "supervised_steps", "consistency_steps", "replaced_by_supervised",
                "skipped_consistency_steps", "restarts")),
             fixed(values.get("steps_per_second"), 1),
             percent(values.get("data_wait_fraction")),
             count(values.get("corrupt_rows") or None)]
        )  # fmt: skip
    header = ["task", "steps", "supervised", "consistency", "replaced by supervised", "skipped",
              "restarts", "steps/s", "waiting for data or peers", "corrupt rows"]  # fmt: skip
    lead = "A consistency step that finds no peer is replaced by a supervised one, or skipped."
    return section("Steps", text_table(*_without_empty_columns(header, rows)), lead)


def _without_empty_columns(
    header: list[str], rows: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """The table without columns that no run or an older taskray has filled."""
    kept = [i for i in range(len(header)) if any(row[i] != NOTHING for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
