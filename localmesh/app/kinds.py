"""Kinds of settings: how a value is read from a flag, a variable or a file, and written to a file."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one kind are read and written.

    `parse` takes the text of a flag or variable, or a YAML value, and raises ValueError with what was expected.
    """

    name: str
    """What a person should type, in capitals."""
    parse: Callable[[object], object]
    dump: Callable[[object], object] = str
    choices: tuple[str, ...] = ()


def _text(value: object) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError("expected a text")


def _path(value: object) -> Path | None:
    text = _text(value)
    return Path(text).expanduser().absolute() if text else None


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError("expected true or false")


def _count(value: object) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
        raise ValueError("expected a whole number, 0 or more")
    return int(str(value))


def _bytes(value: object) -> int:
    """Read a size: `64MiB`, `64M` and `67108864` are the same; `64MB` is decimal."""
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError("expected a size such as 64MiB, 1.5GB or a number of bytes")
    unit = (match[2] or "").upper()
    decimal = bool(unit) and not unit.endswith("I") and str(value).strip().upper().endswith("B")
    return int(float(match[1]) * (1000 if decimal else 1024) ** _POWERS[unit[:1]])


def _seconds(value: object) -> float:
    match = _SECONDS.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError("expected a time such as 30, 500ms, 2m or 1h")
    return float(match[1]) * _DURATIONS[match[2] or "s"]


def _list(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return tuple(text for item in items if (text := _text(item).strip()))


def _labels(value: object) -> Mapping[str, str]:
    if isinstance(value, Mapping):
        return MappingProxyType({_text(k): _text(v) for k, v in value.items()})
    labels = {}
    for item in _list(value):
        name, separator, text = item.partition("=")
        if not separator or not name:
            raise ValueError(f"expected name=value pairs with commas between, not {item!r}")
        labels[name.strip()] = text.strip()
    return MappingProxyType(labels)


def _same(value: object) -> object:
    return value


def _dump_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _dump_labels(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def CHOICES(*words: str) -> Kind:
    """Return the kind of one of some words."""

    def parse(value: object) -> str:
        # YAML reads a bare `on` or `off` as a boolean.
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
        if text not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return text

    return Kind("WORD", parse, _same, words)


TEXT = Kind("TEXT", _text, _same)
PATH = Kind("PATH", _path)
BOOLEAN = Kind("YES|NO", _boolean, _same)
COUNT = Kind("N", _count, _same)
BYTES = Kind("SIZE", _bytes, _same)
SECONDS = Kind("SECONDS", _seconds, _same)
LIST = Kind("A,B,...", _list, _dump_list)
LABELS = Kind("K=V,...", _labels, _dump_labels)
