"""Printing a line of text for a person."""

from __future__ import annotations

from rich.console import Console


def print_plain(console: Console, text: str) -> None:
    """Print a text as it is: brackets in a path are no markup, and long lines are not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
