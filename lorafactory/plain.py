"""Values as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def finite(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON-able copy in which no number is NaN or infinite: such a one is None, and `<key>_undefined` says why.

    Raises TypeError for what is neither a container, text, a path nor a number (numpy's and torch's included).
    """
    copy: dict[str, Any] = {}
    for key, item in value.items():
        reasons: list[str] = []
        copy[str(key)] = plain(item, reasons)
        if reasons:
            copy.setdefault(f"{key}_undefined", reasons[0])
    return copy


def plain(value: Any, reasons: list[str]) -> Any:
    """The same for any value; what is not finite outside of a mapping adds its name to `reasons`."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, list | tuple):
        return [plain(item, reasons) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, float):
        if not hasattr(value, "item"):
            raise TypeError(f"a record cannot hold {value!r} of type {type(value).__name__}")
        return plain(value.item(), reasons)
    if math.isfinite(value):
        return value
    reasons.append(str(value))
    return None


def short(value: Any) -> Any:
    """The same containers, their numbers to nine significant digits: half the bytes, and the same float32."""
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [short(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def flat(config: Mapping[str, Any], without: tuple[str, ...] = (), prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted key: value}, less those under a key in `without` and the empty ones: None and ""
    are the same as not there, so a new optional setting changes nothing. Whole floats are ints: 1.0 is 1."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in without or value is None or value == "":
            continue
        if isinstance(value, Mapping):
            settings |= flat(value, without, f"{name}.")
        else:
            settings[name] = _setting(value)
    return settings


def _setting(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_setting(item) for item in value]
    if isinstance(value, Mapping):
        return flat(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    value = plain(value, [])
    return int(value) if isinstance(value, float) and value.is_integer() else value
