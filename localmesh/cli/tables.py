"""Text for people: aligned tables and sizes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its title, and whether it is aligned to the right, as numbers are."""

    title: str
    right: bool = False


def render(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with aligned columns, two spaces between, no space at the ends of lines."""
    table = [[column.title for column in columns], *([_printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(count: int) -> str:
    """Return bytes as a person reads them: `0 B`, `2.6 MiB`, `139 GiB`."""
    value, unit = float(count), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or abs(value) >= 99.95 else f"{value:.1f} {_UNITS[unit]}"


def seconds(value: float) -> str:
    """Return a time as a person reads it: `0.4 s`, `12 s`, `3 min 20 s`."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def count(number: int, singular: str) -> str:
    """Return a number with its noun: `1 model`, `2 models`."""
    return f"{number} {singular}{'' if number == 1 else 's'}"


def word(name: str, prefix: str) -> str:
    """Return the name of an enum's value as a person reads it: `NODE_STATE_LIVE` is `live`."""
    return name.removeprefix(prefix).lower()


def _printable(text: str) -> str:
    # What others named must not move the cursor of whoever looks at it.
    return "".join(char if char.isprintable() else "?" for char in text)
