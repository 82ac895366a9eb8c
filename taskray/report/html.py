"""``report.html``: the report of a run or a study in one file. Unfinished runs have one too."""

from __future__ import annotations

from pathlib import Path

from taskray.errors import InputError
from taskray.files import write_text
from taskray.report import exchange, sections, study
from taskray.report.history import Run
from taskray.report.page import config_details, page


def write_report(folder: str | Path, baseline: str | Path | None = None) -> Path:
    """Write ``report.html`` into a run or study folder and return its path.

    ``baseline`` is a run folder to compare with: the report shows its curves, metrics and pictures
    beside those of the run. A folder with a ``table.json`` is a study. Raises InputError for any
    other folder, for a damaged file, and for a study with a baseline.
    """
    folder = Path(folder)
    is_study = (folder / study.TABLE).exists()
    if is_study and baseline:
        raise InputError(f"--baseline {baseline}", f"{folder} is a study, expected a run")
    try:
        if is_study:
            text = study.study_page(folder)
        else:
            text = run_page(Run(folder), Run(baseline) if baseline else None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            str(folder), f"contains values that taskray did not write: {error!r}"
        ) from error
    return write_text(folder / "report.html", text)


def run_page(run: Run, baseline: Run | None) -> str:
    """The report of one run as HTML."""
    return page(
        run.name,
        [
            sections.headline(run, baseline),
            sections.pictures(run, baseline),
            sections.metrics(run, baseline),
            sections.curves(run, baseline),
            exchange.exchange(run),
            exchange.steps(run),
            sections.events(run),
            config_details(run.config_text),
        ],
    )
