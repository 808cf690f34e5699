"""Numbers for people."""


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
