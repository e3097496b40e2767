"""Models as people write them: YAML to messages and back.

    apiVersion: localmesh/v1
    kind: Model
    name: tiny
    engine: llama
    source: tiny.gguf
    parameters: {context_tokens: 2048, slots: 2}
    resources: {memory: 2GiB, device: gpu, devices: 2}
    placement:
      min_replicas: 1
      max_replicas: 4
      node_selector: {zone: a}
      selector_terms: [{key: gpu.memory, operator: In, values: [24GiB, 48GiB]}]
      groups: [large]
      rollout: overlap

Only apiVersion, kind, name and engine are required. `placement: {spread_all: true}` stands for one replica on every
node that matches, instead of the minimum and maximum; `placement: {pinned: true}` keeps the model's replicas from being
stopped to make room for others. Several documents may stand in one file. Every error names the
line and the field. Anchors, aliases and tags have no use here and are refused, so that a small text cannot become a
large value or an object.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Final

import yaml

from localmesh.core.errors import InvalidSpec
from localmesh.rpc.convert import OPERATORS, policy_from_proto, spec_from_proto
from localmesh.v1 import types_pb2

API_VERSION: Final = "localmesh/v1"
KIND: Final = "Model"
MAX_BYTES: Final = 1 << 20
"""Size of a text at most."""

_MAX_DEPTH = 8
_INT32_MAX = (1 << 31) - 1
_INT64_MAX = (1 << 63) - 1
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXT_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp", "value"))
_BOOL_TAG = "tag:yaml.org,2002:bool"
_NULL_TAG = "tag:yaml.org,2002:null"
_TRUE = ("true", "yes", "on")
_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12}
_UNITS |= {"TB": 10**12, "KI": 1 << 10, "KIB": 1 << 10, "MI": 1 << 20, "MIB": 1 << 20, "GI": 1 << 30, "GIB": 1 << 30}
_UNITS |= {"TI": 1 << 40, "TIB": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,6}))?\s*([A-Za-z]{0,3})")
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_HINTS = {"backend": "engine", "model": "source", "file": "source", "path": "source", "policy": "placement"}
_HINTS |= {"memory_bytes": "memory", "device_kind": "device", "context": "context_tokens", "min": "min_replicas"}
_HINTS |= {"max": "max_replicas", "selector": "node_selector", "gpu": "device", "device_count": "devices"}
_HINTS |= {"match_expressions": "selector_terms", "group": "groups", "spread": "spread_all"}
_ROLLOUTS = {"overlap": types_pb2.ROLLOUT_OVERLAP, "immediate": types_pb2.ROLLOUT_IMMEDIATE}
_OPERATORS = {operator.value: number for number, operator in OPERATORS.items()}
_WRITTEN_AS = {"backend": "engine", "memory_bytes": "memory", "device_kind": "device", "device_count": "devices"}
"""Fields of the messages whose name in YAML is another one."""

Declared = tuple[types_pb2.ModelSpec, types_pb2.PlacementPolicy | None]
"""A model, and its policy if the text gives one."""


def parse_models(text: str | bytes, *, origin: str = "") -> list[Declared]:
    """Read the models of a YAML text.

    Args:
        text: UTF-8, any number of documents.
        origin: Where it is from, for the messages: usually the file's name.

    Returns:
        The models in the order of the text, complete and valid.

    Raises:
        InvalidSpec: With `line` and `field` in the metadata, and `file` if `origin` is given.
    """
    document = _Text(origin)
    try:
        content = text.decode("utf-8") if isinstance(text, bytes) else text
        too_large = len(content.encode("utf-8")) > MAX_BYTES
    except UnicodeError:
        raise document.error(None, "", "the text is not UTF-8") from None
    if too_large:
        raise document.error(None, "", f"the text is larger than {MAX_BYTES >> 20} MiB")
    try:
        document.refuse_tricks(content)
        nodes = [n for n in yaml.compose_all(content, Loader=_LOADER) if not _empty(n)]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else None
        raise document.error(line, "", f"not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise document.error(None, "", f"not YAML: {' '.join(str(error).split())}") from None
    if not nodes:
        raise document.error(None, "", "there is no model in it")
    found: list[Declared] = []
    lines: dict[str, int] = {}
    for node in nodes:
        declared = document.model(node)
        name = declared[0].name
        if name in lines:
            raise document.error(node, "name", f"the model {name!r} is declared twice, first in line {lines[name]}")
        lines[name] = _line(node)
        found.append(declared)
    return found


def to_yaml(spec: types_pb2.ModelSpec, policy: types_pb2.PlacementPolicy | None = None) -> str:
    """Write a model as one YAML document that `parse_models` reads as the same, without fields at their default."""
    load, take = spec.parameters, spec.resources
    parameters: dict[str, Any] = {name: getattr(load, name) for name in _INT_PARAMETERS if getattr(load, name)}
    if load.HasField("gpu_layers"):
        parameters["gpu_layers"] = load.gpu_layers
    if load.cache_type:
        parameters["cache_type"] = load.cache_type
    if load.embeddings:
        parameters["embeddings"] = True
    if load.options:
        parameters["options"] = dict(sorted(load.options.items()))
    resources: dict[str, Any] = {}
    if take.memory_bytes:
        resources["memory"] = _written_size(take.memory_bytes)
    if take.device_kind:
        resources["device"] = take.device_kind
    if take.device_count:
        resources["devices"] = take.device_count
    document: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND, "name": spec.name, "engine": spec.backend}
    if spec.source:
        document["source"] = spec.source
    if parameters:
        document["parameters"] = parameters
    if resources:
        document["resources"] = resources
    if policy is not None:
        document["placement"] = _written_policy(policy)
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def parse_size(text: str) -> int:
    """Read a number of bytes: "2GiB", "1.5 GB", "500M" or plain bytes.

    Raises:
        ValueError: It is none.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[3].upper()) if match is not None else None
    if match is None or unit is None:
        raise ValueError(f"expected a size such as 2GiB or 500MB, not {text[:40]!r}")
    fraction = match[2] or ""
    size: int = int(match[1] + fraction) * unit // 10 ** len(fraction)
    if size > _INT64_MAX:
        raise ValueError(f"{text!r} is too large")
    return size


_INT_PARAMETERS = ("context_tokens", "slots", "threads", "max_concurrent_requests")
_Reader = Callable[["_Text", yaml.Node, str], Any]
_Fields = Mapping[str, tuple[yaml.Node, Any]]


class _Text:
    """Reads nodes of one text; knows where it is from."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def error(self, where: yaml.Node | int | None, field: str, problem: str) -> InvalidSpec:
        line = where if isinstance(where, int) or where is None else _line(where)
        place = ":".join(str(part) for part in (self._origin, line) if part)
        if place and not self._origin:
            place = f"line {place}"
        metadata: dict[str, Any] = {"field": field} if field else {}
        if line:
            metadata["line"] = line
        if self._origin:
            metadata["file"] = self._origin
        return InvalidSpec(": ".join(part for part in (place, field, problem) if part), **metadata)

    def refuse_tricks(self, content: str) -> None:
        """Refuse what is deep, shared or tagged, before anything is built from it."""
        depth = 0
        event: Any  # the stubs know neither marks nor tags of events
        for event in yaml.parse(content, Loader=_LOADER):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise self.error(line, "", "anchors and aliases are not allowed")
            if getattr(event, "tag", None):
                raise self.error(line, "", f"tags are not allowed ({event.tag})")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > _MAX_DEPTH:
                raise self.error(line, "", f"nested more than {_MAX_DEPTH} deep")

    def model(self, node: yaml.Node) -> Declared:
        top = self.fields(node, "", _TOP)
        for name in ("apiVersion", "kind", "name", "engine"):
            if name not in top:
                raise self.error(node, name, "is missing")
        for name, value in (("apiVersion", API_VERSION), ("kind", KIND)):
            if top[name][1] != value:
                raise self.error(top[name][0], name, f"expected {value!r}, not {top[name][1]!r}")
        spec = types_pb2.ModelSpec(
            name=top["name"][1],
            backend=top["engine"][1],
            source=_value(top, "source", ""),
            parameters=types_pb2.LoadParameters(**_values(top, "parameters")),
            resources=types_pb2.Resources(
                memory_bytes=_value(_within(top, "resources"), "memory", 0),
                device_kind=_value(_within(top, "resources"), "device", ""),
                device_count=_value(_within(top, "resources"), "devices", 0),
            ),
        )
        policy = types_pb2.PlacementPolicy(**_values(top, "placement")) if "placement" in top else None
        self._validate(node, top, spec, policy)
        return spec, policy

    def _validate(
        self, node: yaml.Node, top: _Fields, spec: types_pb2.ModelSpec, policy: types_pb2.PlacementPolicy | None
    ) -> None:
        """Check what the registry would check, so that its answer has a line."""
        try:
            spec_from_proto(spec)
            if policy is not None:
                policy_from_proto(policy, model=spec.name)
        except InvalidSpec as error:
            name = error.metadata.get("field", "").rpartition(".")[2]
            path, where = dict(_places(top)).get(_WRITTEN_AS.get(name, name), ("", node))
            raise self.error(where, path, error.message.removeprefix(f"model {spec.name}: ")) from None

    def fields(self, node: yaml.Node, path: str, known: Mapping[str, _Reader]) -> dict[str, tuple[yaml.Node, Any]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, path, f"expected fields with values, not {_described(node)}")
        found: dict[str, tuple[yaml.Node, Any]] = {}
        for key, value in node.value:
            name = self.text(key, path or "key")
            inner = f"{path}.{name}" if path else name
            if name not in known:
                raise self.error(key, inner, f"unknown field{_did_you_mean(name, known)}")
            if name in found:
                raise self.error(key, inner, f"given twice, first in line {_line(found[name][0])}")
            found[name] = (value, known[name](self, value, inner))
        return found

    def text(self, node: yaml.Node, path: str) -> str:
        # Any plain scalar is its text: a model may be called 1.5, on or 2024-01-01 without quotes.
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _TEXT_TAGS:
            raise self.error(node, path, f"expected text, not {_described(node)}")
        return str(node.value)

    def count(self, node: yaml.Node, path: str) -> int:
        # Quoted or not: what is written is a number or is not.
        if not isinstance(node, yaml.ScalarNode) or not _INTEGER.fullmatch(node.value):
            raise self.error(node, path, f"expected a whole number, not {_described(node)}")
        value = int(node.value)
        if not 0 <= value <= _INT32_MAX:
            raise self.error(node, path, f"expected a number from 0 to {_INT32_MAX}, not {value}")
        return value

    def boolean(self, node: yaml.Node, path: str) -> bool:
        if not isinstance(node, yaml.ScalarNode) or node.tag != _BOOL_TAG:
            raise self.error(node, path, f"expected true or false, not {_described(node)}")
        return node.value.lower() in _TRUE

    def size(self, node: yaml.Node, path: str) -> int:
        try:
            return parse_size(self.text(node, path))
        except ValueError as error:
            raise self.error(node, path, str(error)) from None

    def rollout(self, node: yaml.Node, path: str) -> types_pb2.Rollout.ValueType:
        value = _ROLLOUTS.get(self.text(node, path))
        if value is None:
            raise self.error(node, path, f"expected {' or '.join(_ROLLOUTS)}, not {_described(node)}")
        return value

    def texts(self, node: yaml.Node, path: str) -> dict[str, str]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, path, f"expected names with values, not {_described(node)}")
        found: dict[str, str] = {}
        for key, value in node.value:
            name = self.text(key, path)
            if name in found:
                raise self.error(key, f"{path}.{name}", "given twice")
            found[name] = self.text(value, f"{path}.{name}")
        return found

    def items(self, node: yaml.Node, path: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(node, path, f"expected a list, not {_described(node)}")
        return list(node.value)

    def names(self, node: yaml.Node, path: str) -> list[str]:
        return [self.text(item, path) for item in self.items(node, path)]

    def terms(self, node: yaml.Node, path: str) -> list[types_pb2.SelectorTerm]:
        return [self.term(item, f"{path}[{number}]") for number, item in enumerate(self.items(node, path))]

    def term(self, node: yaml.Node, path: str) -> types_pb2.SelectorTerm:
        found = self.fields(node, path, _TERM)
        for name in ("key", "operator"):
            if name not in found:
                raise self.error(node, f"{path}.{name}", "is missing")
        return types_pb2.SelectorTerm(
            key=found["key"][1], operator=found["operator"][1], values=_value(found, "values", [])
        )

    def operator(self, node: yaml.Node, path: str) -> types_pb2.SelectorOperator.ValueType:
        value = _OPERATORS.get(self.text(node, path))
        if value is None:
            raise self.error(node, path, f"expected {' or '.join(_OPERATORS)}, not {_described(node)}")
        return value

    def parameters(self, node: yaml.Node, path: str) -> _Fields:
        return self.fields(node, path, _PARAMETERS)

    def resources(self, node: yaml.Node, path: str) -> _Fields:
        return self.fields(node, path, _RESOURCES)

    def placement(self, node: yaml.Node, path: str) -> _Fields:
        return self.fields(node, path, _PLACEMENT)


_TOP: Mapping[str, _Reader] = {
    "apiVersion": _Text.text,
    "kind": _Text.text,
    "name": _Text.text,
    "engine": _Text.text,
    "source": _Text.text,
    "parameters": _Text.parameters,
    "resources": _Text.resources,
    "placement": _Text.placement,
}
_PARAMETERS: Mapping[str, _Reader] = {
    **dict.fromkeys(_INT_PARAMETERS, _Text.count),
    "gpu_layers": _Text.count,
    "cache_type": _Text.text,
    "embeddings": _Text.boolean,
    "options": _Text.texts,
}
_RESOURCES: Mapping[str, _Reader] = {"memory": _Text.size, "device": _Text.text, "devices": _Text.count}
_TERM: Mapping[str, _Reader] = {"key": _Text.text, "operator": _Text.operator, "values": _Text.names}
_PLACEMENT: Mapping[str, _Reader] = {
    "node_selector": _Text.texts,
    "min_replicas": _Text.count,
    "max_replicas": _Text.count,
    "spread_all": _Text.boolean,
    "pinned": _Text.boolean,
    "selector_terms": _Text.terms,
    "groups": _Text.names,
    "rollout": _Text.rollout,
}


def _empty(node: yaml.Node | None) -> bool:
    return node is None or (node.tag == _NULL_TAG and node.value == "")


def _line(node: yaml.Node) -> int:
    mark: Any = node.start_mark
    return int(mark.line) + 1


def _described(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "fields with values"
    text = str(node.value)
    return repr(text if len(text) <= 40 else f"{text[:40]}...") if text else "nothing"


def _did_you_mean(name: str, known: Mapping[str, _Reader]) -> str:
    hint = _HINTS.get(name)
    close = [hint] if hint in known else get_close_matches(name[:64], known, n=1)
    return f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})"


def _value(fields: _Fields, name: str, default: Any) -> Any:
    return fields[name][1] if name in fields else default


def _within(fields: _Fields, name: str) -> _Fields:
    inner: _Fields = _value(fields, name, {})
    return inner


def _values(fields: _Fields, name: str) -> dict[str, Any]:
    return {key: value for key, (_, value) in _within(fields, name).items()}


def _places(top: _Fields) -> Iterator[tuple[str, tuple[str, yaml.Node]]]:
    """Yield each field's name, with its path and where it stands."""
    for name, (node, value) in top.items():
        yield name, (name, node)
        if name in ("parameters", "resources", "placement"):
            for inner, (place, _) in value.items():
                yield inner, (f"{name}.{inner}", place)


def _written_policy(policy: types_pb2.PlacementPolicy) -> dict[str, Any]:
    written: dict[str, Any] = {}
    if policy.min_replicas:
        written["min_replicas"] = policy.min_replicas
    if policy.max_replicas:
        written["max_replicas"] = policy.max_replicas
    if policy.node_selector:
        written["node_selector"] = dict(sorted(policy.node_selector.items()))
    if policy.spread_all:
        written["spread_all"] = True
    if policy.pinned:
        written["pinned"] = True
    if policy.selector_terms:
        written["selector_terms"] = [_written_term(term) for term in policy.selector_terms]
    if policy.groups:
        written["groups"] = list(policy.groups)
    if policy.rollout == types_pb2.ROLLOUT_IMMEDIATE:
        written["rollout"] = "immediate"
    return written


def _written_term(term: types_pb2.SelectorTerm) -> dict[str, Any]:
    written: dict[str, Any] = {"key": term.key, "operator": OPERATORS[term.operator].value}
    if term.values:
        written["values"] = list(term.values)
    return written


def _written_size(size: int) -> str | int:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return size
