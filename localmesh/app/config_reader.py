"""Reads the configuration: flags, then LOCALMESH_* variables, then a file, then the running mesh, then defaults.

This is the only place of the program that looks at the environment.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localmesh.app import config, running
from localmesh.app.config import OPTIONS, Config, Option

CONFIG_VARIABLE = "LOCALMESH_CONFIG"
_PREFIX = "LOCALMESH_"


class ConfigError(Exception):
    """A setting that cannot be used. The message names its source, the value and what is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A configuration and what should be said about it."""

    config: Config
    sources: Mapping[str, str]
    """Where each setting that is not a default came from, by key."""
    notes: tuple[str, ...]
    """Sentences for the operator, such as a variable that looks misspelt."""


def read(
    flags: Mapping[str, object],
    *,
    config_file: str | None = None,
    environment: Mapping[str, str] | None = None,
    find_running: bool = False,
) -> Reading:
    """Read all sources.

    Args:
        flags: Values by option key, those that were given only.
        config_file: The flag --config.
        environment: Variables; the process's own if None.
        find_running: Look up the mesh that `up` runs on this machine, for addresses and certificates that nothing else
            names. For commands only.

    Raises:
        ConfigError: A value or a key cannot be used.
    """
    env = dict(os.environ) if environment is None else environment  # noqa: TID251 - the one place that reads it
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    chosen = config_file or env.get(CONFIG_VARIABLE, "")
    given = [_from_environment(env), ((o, v, f"flag {o.key}") for o, v in _from_flags(flags))]
    if chosen:
        given.insert(0, _from_file(Path(chosen).expanduser()))
    for layer in given:
        for option, value, source in layer:
            values[option.key] = _parse(option, value, source)
            sources[option.key] = source
    if not isinstance(values.get("state_dir"), Path) or values["state_dir"] == Path():
        values["state_dir"] = _default_state_dir(env)
    if find_running:
        found = running.find(config.build(values).state_dir)
        if found is not None:
            for key, value in found.client_settings(values).items():
                values[key], sources[key] = value, "the running mesh"
    return Reading(config=config.build(values), sources=sources, notes=tuple(_misspelt(env)))


def write_file(path: Path, tree: Config) -> None:
    """Write a configuration file, readable by its owner only, that reads back as the given tree."""
    document: dict[str, Any] = {}
    for key, value in config.flatten(tree).items():
        option = OPTIONS[key]
        where = document.setdefault(option.section, {}) if option.section else document
        where[option.name] = option.kind.dump(value)
    fresh = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fresh, "w", encoding="utf-8") as file:
        yaml.safe_dump(document, file)


def child_environment() -> dict[str, str]:
    """Return the environment for a child whose whole configuration is in a file: this one's without our variables."""
    env = os.environ  # noqa: TID251 - the one place that reads it
    return {name: value for name, value in env.items() if not name.startswith(_PREFIX)}


def _parse(option: Option, value: object, source: str) -> object:
    try:
        return option.kind.parse(value)
    except ValueError as problem:
        raise ConfigError(f"{option.key} = {value!r} (from {source}) cannot be used: {problem}.") from None


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[Option, object]]:
    for key, value in flags.items():
        if key not in OPTIONS:
            raise ConfigError(f"there is no setting {key!r}{_suggest(key, OPTIONS)}")
        yield OPTIONS[key], value


def _from_environment(env: Mapping[str, str]) -> Iterator[tuple[Option, object, str]]:
    for option in OPTIONS.values():
        text = env.get(option.variable)
        if text:
            yield option, text, option.variable


def _from_file(path: Path) -> Iterator[tuple[Option, object, str]]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"cannot read the configuration file {path}: {problem.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} is not YAML: {problem}") from None
    if document is None:
        return
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold settings as `name: value`, not a {type(document).__name__}.")
    for name, value in document.items():
        if name in config.SECTIONS:
            yield from _from_section(path, str(name), value)
        elif name in OPTIONS:
            yield OPTIONS[name], value, str(path)
        else:
            known = [*config.SECTIONS, *(o.name for o in OPTIONS.values() if not o.section)]
            raise ConfigError(f"{path} has an unknown setting {name!r}{_suggest(str(name), known)}")


def _from_section(path: Path, section: str, given: object) -> Iterator[tuple[Option, object, str]]:
    if given is None:
        return
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {section!r} must hold settings as `name: value`, not {given!r}.")
    for name, value in given.items():
        option = OPTIONS.get(f"{section}.{name}")
        if option is None:
            known = [o.name for o in OPTIONS.values() if o.section == section]
            raise ConfigError(f"{path} has an unknown setting {section}.{name}{_suggest(str(name), known)}")
        yield option, value, str(path)


def _suggest(name: str, known: Mapping[str, object] | list[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else f". Known are: {', '.join(sorted(known))}."


def _misspelt(env: Mapping[str, str]) -> Iterator[str]:
    # Not an error: Kubernetes sets LOCALMESH_ROUTER_SERVICE_HOST and the like by itself for a service of that name.
    known = {option.variable for option in OPTIONS.values()} | {CONFIG_VARIABLE}
    for name in sorted(env):
        if name.startswith(_PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            if near:
                yield f"the variable {name} means nothing here: did you mean {near[0]}?"


def _default_state_dir(env: Mapping[str, str]) -> Path:
    base = env.get("XDG_STATE_HOME", "")
    if base:
        return Path(base) / "localmesh"
    home = env.get("HOME", "")
    return (Path(home) if home else Path.home()) / ".local" / "state" / "localmesh"
