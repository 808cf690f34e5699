"""How results are shown: numbers for people, tables for a terminal and for Markdown."""

import statistics


def percent(right: list[bool]) -> float | None:
    """Share of `True` in percent, rounded as the official scorers print it; `None` where there is nothing."""
    return float(f"{sum(right) / len(right) * 100:.2f}") if right else None


def shown(value) -> str:
    """A score as tables show it."""
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def markdown_table(rows: list[dict]) -> str:
    """Rows of equal columns as a Markdown table that is aligned in a terminal, too."""
    columns = list(rows[0])
    cells = [columns, *([shown(row[name]) for name in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    # Names on the left, numbers on the right.
    left = [any(isinstance(row[name], str) for row in rows) for name in columns]
    lines = [[c.ljust(w) if lf else c.rjust(w) for c, w, lf in zip(row, widths, left, strict=True)] for row in cells]
    lines.insert(1, ["-" * w if lf else "-" * (w - 1) + ":" for w, lf in zip(widths, left, strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float], form: str = ".1f") -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def readable(count: float) -> str:
    """A number of bytes."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1024 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024


def duration(seconds: float) -> str:
    """A number of seconds."""
    if seconds < 60:
        return f"{seconds:,.2g} s" if seconds < 10 else f"{seconds:,.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
