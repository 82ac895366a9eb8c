"""The record of a study or a search, kept in the repository: results and how they were made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from taskray.files import plain, write_text
from taskray.report.render import markdown_table, to_markdown
from taskray.report.tables import Table, to_json


def record(
    folder: Path,
    name: str,
    description: str,
    table: Table,
    facts: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    source: Path,
) -> Path:
    """Write ``<name>.md`` and ``<name>.json`` into ``folder`` and return the first.

    To the ``facts`` (command, seeds, steps ...) it adds the commit of ``source``'s repository, the
    hardware and seconds of training in the ``results``, and the date.
    """
    facts = {
        **facts,
        "commit": commit_of(source.resolve().parent),
        "hardware": "; ".join(dict.fromkeys(str(r.get("hardware", "unknown")) for r in results)),
        "seconds": round(sum(float(r.get("seconds") or 0) for r in results), 1),
        "date": datetime.now(UTC).date().isoformat(),
    }
    content = {"name": name, **facts, "table": json.loads(to_json(table))}
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / f"{name}.json", text + "\n")
    lines = [f"# {name}", "", *([description, ""] if description else []), to_markdown(table)]
    lines += markdown_table([("", ""), *((key, _text(v)) for key, v in facts.items())], headings=2)
    return write_text(folder / f"{name}.md", "\n".join(lines) + "\n")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{k}: {_text(v)}" for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value))
    else:
        text = f"`{value}`" if str(value).startswith("taskray ") else str(value)
    return text


def commit_of(folder: Path) -> str:
    """The commit of a folder, with ``+ changes`` if tracked files differ from it."""
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head} + changes" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
