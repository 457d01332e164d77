"""Numbers as a person reads them: rounded, with their units. And contents as an address."""

import base64
import math

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def amount(value: float) -> str:
    """A number with about four digits: 0.2346, 1,234, 3e-05."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def loss(value: float) -> str:
    """A loss, with four decimals, or four digits if it is small: 0.2340, 2.512e-05."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.4g}"


def whole(value: float) -> str:
    """A whole number with thousands apart: 12,000."""
    return f"{round(value):,}"


def percent(share: float, signed: bool = False) -> str:
    """A share in percent: 29 %, or with its sign +29 %; one digit more below 10 %."""
    value = 100 * share
    digits = 0 if abs(value) >= 9.95 else 1
    return f"{value:{'+' if signed else ''}.{digits}f} %".replace("-", "−")


def change(before: float, now: float) -> str:
    """How a number changed, in percent of what it was; empty if that cannot be said."""
    if not before or not math.isfinite(before) or not math.isfinite(now):
        return ""
    return percent((now - before) / abs(before), signed=True)


def duration(seconds: float) -> str:
    """A time in its two largest units: 46 s, 3 min 20 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "not known"
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < _MINUTE:
        return f"{total} s"
    units = ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min"), (1, "s"))
    index = next(i for i, (length, _) in enumerate(units) if total >= length)
    (large, name), (small, other) = units[index], units[index + 1]
    rest = total % large // small
    return f"{total // large} {name}" + (f" {rest} {other}" if rest else "")


def memory(size: float) -> str:
    """A number of bytes: 852 MiB, 23.4 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number of things: 1 row, 2 rows."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as an address that holds its own content; `kind`: its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
