"""Pieces of Markdown for generated pages: tables that no value can break, and words that must not be missed."""

from collections.abc import Sequence


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; each line has as many cells as the header."""
    rows = [[cell(text) for text in row] for row in (header, *lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(header), *rows[1:]))


def cell(text: str) -> str:
    """Text that stays within its cell: on one line, without a bar that would end it."""
    return line(text).replace("\\", "\\\\").replace("|", "\\|")


def line(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def code(text: str) -> str:
    """Text as code within a line; a backtick would end it, so it becomes an apostrophe."""
    return f"`{line(text).replace('`', chr(39)) or ' '}`"


def loud(word: str) -> str:
    """Data and weights that say nothing of CIFAR-10 or of transfer learning are in capitals; they are bold as well."""
    return f"**{word}**" if word and word.upper() == word and any(map(str.isalpha, word)) else word or "not recorded"
