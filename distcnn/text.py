"""Names and numbers as they are shown, on a terminal and on a page."""

from __future__ import annotations


def shown(name: str) -> str:
    """A name with what cannot be printed (control characters, writing direction, no UTF-8) as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def size(count: float) -> str:
    """Bytes with a unit: 0 B, 12.3 kB, 4.56 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def channels(values: tuple[float, ...]) -> str:
    """'0.491 0.482 0.447', '-' if not known."""
    return " ".join(f"{value:.3f}" for value in values) or "-"


def counted(count: int, one: str, many: str = "") -> str:
    """'1 pair', '1,030 pairs'."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
