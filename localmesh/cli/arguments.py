"""Flags from the table of options, so that flags, variables and file keys never disagree."""

import argparse
from collections.abc import Iterable, Mapping

from localmesh.app.config import OPTIONS, Option
from localmesh.app.kinds import BOOLEAN
from localmesh.core.errors import InvalidRequest

_PREFIX = "set:"
_SHORT = {"client.output": "-o"}


def add_settings(parser: argparse.ArgumentParser, own_section: str, keys: Iterable[str]) -> None:
    """Add a flag for each of the options, and --config."""
    group = parser.add_argument_group("settings", "also as LOCALMESH_* variables and in the configuration file")
    group.add_argument("--config", metavar="FILE", help="configuration file, YAML (LOCALMESH_CONFIG)")
    for key in keys:
        option = OPTIONS[key]
        names = [option.flag(own_section)]
        if key in _SHORT:
            names.insert(0, _SHORT[key])
        help_text = f"{option.help}{_default(option)} ({option.variable})".replace("%", "%%")
        if option.kind is BOOLEAN:
            group.add_argument(
                *names,
                dest=_PREFIX + key,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help_text,
            )
        else:
            metavar = "|".join(option.kind.choices) or option.kind.name
            group.add_argument(*names, dest=_PREFIX + key, metavar=metavar, default=argparse.SUPPRESS, help=help_text)


def keys_of(*sections: str) -> list[str]:
    """Return the keys of whole sections; the empty name is the top."""
    return [key for key, option in OPTIONS.items() if option.section in sections]


def given_settings(arguments: argparse.Namespace) -> Mapping[str, object]:
    """Return the values of the flags that were given, by option key."""
    return {name.removeprefix(_PREFIX): v for name, v in vars(arguments).items() if name.startswith(_PREFIX)}


def model_and_index(text: str) -> tuple[str, int | None]:
    """Read `MODEL` or `MODEL#INDEX`: all replicas of a model, or those of one index.

    Raises:
        InvalidRequest: What stands behind the `#` is no index.
    """
    model, separator, index = text.partition("#")
    if separator and not (index.isascii() and index.isdigit() and len(index) <= 9):
        raise InvalidRequest(f"{text!r}: behind the '#' there must be the index of a replica, 0 or more", field="index")
    return model, int(index) if separator else None


def _default(option: Option) -> str:
    value = option.default
    if option.kind is BOOLEAN or option.key == "state_dir" or value in (None, "", ()) or value == {}:
        return ""
    text = ",".join(value) if isinstance(value, tuple) else option.kind.dump(value)
    return f" [{text}]"
