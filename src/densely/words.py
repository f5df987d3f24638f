"""Words of messages."""

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 file" or "1,200 files"."""
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    """The text, with what is no text spelt out: names of folders may hold any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def on_one_line(text: str) -> str:
    r"""A text on one line of a terminal: what has no glyph is escaped, as \n is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names with commas, the first of them and how many there are where there are more."""
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")
