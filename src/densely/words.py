"""Words of messages."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 file" or "1,200 files"."""
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
