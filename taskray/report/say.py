"""One way to say a line to a person."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a text as it is: brackets in a path are no markup, and no terminal folds its lines."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
