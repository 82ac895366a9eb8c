"""What a run learned: parts of its report, each a function that returns HTML (or '')."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from taskray.loop.metric_key import ConsistencyLoss, Evaluated, MetricKey, SupervisedLoss
from taskray.record.formatting import (
    count,
    describe,
    duration,
    format_change,
    rank,
    relative_change,
)
from taskray.report.charts import Line, line_chart, smoothed
from taskray.report.compare import comparison_table, labels
from taskray.report.history import Run, Series
from taskray.report.page import facts, html_table, section
from taskray.report.panels import ERROR_SCALES, Panel, compose, png_data_uri


def headline(run: Run, baseline: Run | None) -> str:
    """Name, status, description and the main metrics."""
    status = run.status
    kind = status if status in ("finished", "failed") else ""
    description = str(run.config.get("description") or "")
    steps = [f"{t} {count(run.task_result(t).get('steps') or _last_step(run, t))}"
             for t in run.tasks]  # fmt: skip
    parts = [
        f'<span class="status {kind}">{escape(status)}</span>',
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="lead">{escape(description)}</p>' if description else "",
        _error(run),
        facts(
            [
                ("wall time", duration(run.seconds) if run.seconds is not None else ""),
                ("steps", " · ".join(steps)),
                ("hardware", str(run.result.get("hardware") or "")),
                ("compared with", str(baseline.path.name) if baseline else ""),
            ]
        ),
        _cards(run, baseline),
    ]
    return f"<header>{''.join(parts)}</header>"


def _error(run: Run) -> str:
    error = run.result.get("error")
    return f'<p class="error">{escape(str(error))}</p>' if error else ""


def _cards(run: Run, baseline: Run | None) -> str:
    """Two metrics of each task from its first evaluation: the first metric and the first ratio."""
    cards = []
    for task in run.tasks:
        evaluations = run.evaluations(task)
        if not evaluations:
            continue
        title, values = next(iter(evaluations.items()))
        names = sorted((n for n, v in values.items() if v is not None), key=rank)
        ratio = next((n for n in names[1:] if describe(n).percent), None)
        before = baseline.evaluations(task).get(title, {}) if baseline else {}
        for name in [*names[:1], *([ratio] if ratio else [])]:
            cards.append(_card(task, title, name, values[name], before.get(name)))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(task: str, title: str, name: str, value: float | None, before: float | None) -> str:
    info = describe(name)
    unit = f'<span class="unit">{escape(info.unit)}</span>' if info.unit else ""
    comparison = ""
    change = relative_change(value, before)
    if change is not None:
        kind = {True: "good", False: "bad", None: ""}[info.good(change)]
        comparison = (
            f'<small><span class="change {kind}">{format_change(change)}</span> '
            f"from {info.format(before)}</small>"
        )
    return (
        f'<div class="card"><small>{escape(task)} · {escape(info.title)}&nbsp;{info.arrow}</small>'
        f"<b>{info.format(value)}{unit}</b>{comparison}<small>on {escape(title)}</small></div>"
    )


def pictures(run: Run, baseline: Run | None) -> str:
    """Input, truth and predictions of each task's first evaluation."""
    blocks = []
    groups = list(dict.fromkeys(tuple(key.split("/")[:2]) for key in run.panels))
    main: dict[str, str] = {}
    for parts in groups:
        if len(parts) == 2:
            main.setdefault(parts[0], parts[1])
    for task, title in main.items():
        prefix = f"{task}/{title}/"
        names = [k.removeprefix(prefix).split("/")[0] for k in run.panels if k.startswith(prefix)]
        for quantity in dict.fromkeys(n for n in names if n != "image"):
            rows = compose(
                run.panels, f"{task}/{title}", quantity, labels(run, baseline),
                baseline.panels if baseline else None,
            )  # fmt: skip
            if not rows:
                continue
            blocks.append(_tiles(task, title, quantity, rows))
    return section("Predictions", "".join(blocks))


def _tiles(task: str, title: str, quantity: str, rows: list[list[Panel]]) -> str:
    scale = ERROR_SCALES.get(quantity)
    note = f' <span class="soft">errors: {escape(scale)}</span>' if scale else ""
    name = task if task == quantity else f"{task}: {quantity}"
    captions = "".join(f"<span>{escape(panel.caption)}</span>" for panel in rows[0])
    images = "".join(
        f'<img src="{png_data_uri(panel.pixels)}" alt="{escape(panel.caption)}">'
        for row in rows
        for panel in row
    )
    columns = f"grid-template-columns:repeat({len(rows[0])},minmax(128px,1fr))"
    return (
        f"<h3>{escape(name)} on {escape(title)}{note}</h3>"
        f'<div class="tiles" style="{columns}">{captions}{images}</div>'
    )


def metrics(run: Run, baseline: Run | None) -> str:
    """All evaluations in one table, beside the baseline's."""
    theirs, ours = labels(run, baseline)
    runs = {theirs: baseline.as_result()} if baseline else {}
    table = comparison_table({**runs, ours: run.as_result()})
    lead = "Change is relative; green is better." if baseline else ""
    if not run.finished:
        lead = "So far: the last evaluation of each task. " + lead
    return section("Metrics", html_table(table), lead.strip())


def curves(run: Run, baseline: Run | None) -> str:
    """Losses and evaluations over steps and over seconds, a block for each task."""
    plots = []
    for axis in ("steps", "seconds"):
        blocks = "".join(_task_curves(run, baseline, task, axis) for task in run.tasks)
        plots.append(f'<div class="by-{axis}">{blocks}</div>' if blocks else "")
    if not any(plots):
        return ""
    switch = (
        '<input class="switch" type="radio" name="axis" id="steps" checked>'
        '<input class="switch" type="radio" name="axis" id="seconds">'
        '<div class="tabs"><label for="steps">over steps</label>'
        '<label for="seconds">over seconds</label></div>'
    )
    return section("Training", f'{switch}<div class="plots">{"".join(plots)}</div>')


def _task_curves(run: Run, baseline: Run | None, task: str, axis: str) -> str:
    style = colour_of(run, task)
    names = labels(run, baseline)
    losses, relations, evaluations = [], [], []
    for key in sorted(run.keys(task), key=_by_metric):
        match key:
            case SupervisedLoss(term):
                title = f"{term or 'supervised'} loss".replace("_", " ")
                losses.append(_chart(run, baseline, task, key, title, axis, style, names))
            case ConsistencyLoss(None):
                losses.append(
                    _chart(run, baseline, task, key, "consistency loss", axis, style, names)
                )
            case ConsistencyLoss(relation, term):
                title = "consistency: " + "/".join(filter(None, (relation, term)))
                title = title.replace("_", " ")
                relations.append(_chart(run, None, task, key, title, axis, style, names))
            case Evaluated(title, name) if len(run.series(task, key).values) > 1:
                title = f"{describe(name).heading} on {title}"
                evaluations.append(_chart(run, baseline, task, key, title, axis, style, names))
    charts = [*losses, *relations]
    shown = [c for c in [*charts, *evaluations[:1]] if c]
    if not shown:
        return ""
    more = "".join(evaluations[1:])
    fold = (
        '<details class="fold"><summary>More evaluation curves</summary>'
        f'<div class="charts">{more}</div></details>'
    )
    return (
        f'<h3>{escape(task)}</h3><div class="charts">{"".join(shown)}</div>{fold if more else ""}'
    )


def _by_metric(key: MetricKey) -> int:
    """Evaluations in the order of the tables; other keys keep their order."""
    return rank(key.metric) if isinstance(key, Evaluated) else 0


def _chart(
    run: Run, baseline: Run | None, task: str, key: MetricKey, title: str, axis: str, style: str,
    names: tuple[str, str],
) -> str:  # fmt: skip
    scale = 100.0 if isinstance(key, Evaluated) and describe(key.metric).percent else 1.0
    lines = []
    if baseline:
        lines += _line(baseline.series(task, key), names[0], axis, "base", scale)[-1:]
    lines += _line(run.series(task, key), names[1], axis, style, scale)
    return line_chart(title, lines, x=axis)


def _line(series: Series, name: str, axis: str, style: str, scale: float = 1.0) -> list[Line]:
    if not series:
        return []
    xs: Sequence[float] = series.steps if axis == "steps" else series.times
    return smoothed(Line(name, xs, [v * scale for v in series.values], style))


def events(run: Run) -> str:
    """Restarts, failures and other events."""
    items = []
    for line in run.events:
        time = line.get("time")
        stamp = duration(float(time)) if time is not None else ""
        items.append(
            f"<li><time>{escape(stamp)}</time><span>{escape(str(line['event']))}</span></li>"
        )
    body = f'<ol class="events">{"".join(items)}</ol>' if items else ""
    return section("Events", body or "<p class=soft>No restart, no failure.</p>")


def colour_of(run: Run, task: str) -> str:
    """The colour of a task, the same on the whole page."""
    return f"c{run.tasks.index(task) % 6}"


def _last_step(run: Run, task: str) -> int | None:
    steps = [line["step"] for line in run.lines if line.get("task") == task and "step" in line]
    return max(steps, default=None)
