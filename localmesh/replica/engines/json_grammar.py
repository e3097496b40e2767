"""JSON Schema to a grammar in llama.cpp's GBNF, and a check of grammars that come from outside. Pure.

Every text of the grammar is valid under the schema; not every valid text is in the grammar: properties come in the
order of the schema, and none that the schema does not name. A keyword that cannot be honoured is refused, by name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from localmesh.core.errors import InvalidRequest

SCHEMA_FIELD = "sampling.json_schema"
GRAMMAR_FIELD = "sampling.grammar"

_MAX_DEPTH = 64
_MAX_RULES = 5000
_MAX_GRAMMAR = 1 << 20
_MAX_NESTING = 500
"""llama.cpp's parser recurses for every open parenthesis, and dies of some ten thousands."""

_ANNOTATIONS = frozenset(
    {
        "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "example",
        "examples", "format", "readOnly", "title", "writeOnly",
    }
)  # fmt: skip
_ALLOWED: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "number": frozenset(),
    "integer": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_ANY = "any"
_BASE_RULES = {
    "space": '" "?',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": '"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": r'"{" space (string space ":" space any space ("," space string space ":" space any space)*)? "}"',
    "array": '"[" space (any space ("," space any space)*)? "]"',
    _ANY: "string | number | boolean | null | object | array",
}


def check_depth(value: Any, field: str, limit: int = _MAX_DEPTH) -> None:
    """Check that parsed JSON is not nested deeper than engines can take.

    Raises:
        InvalidRequest: It is.
    """
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return
    raise InvalidRequest(f"{field} is nested more than {limit} levels deep.", field=field)


def check_grammar(grammar: str) -> None:
    """Check that a grammar from outside cannot hurt llama.cpp's parser. Its syntax is the parser's business.

    Raises:
        InvalidRequest: It is too long, nested too deep, or in another language than GBNF.
    """
    if len(grammar) > _MAX_GRAMMAR:
        raise InvalidRequest(f"the grammar has more than {_MAX_GRAMMAR} characters.", field=GRAMMAR_FIELD)
    if grammar.lstrip().startswith("%"):
        raise InvalidRequest("the grammar is not in GBNF: it begins with '%'.", field=GRAMMAR_FIELD)
    depth = position = 0
    while position < len(grammar):
        character = grammar[position]
        if character in '"[':
            position = _end_of_literal(grammar, position + 1, '"' if character == '"' else "]")
        elif character == "#":
            end = grammar.find("\n", position)
            position = len(grammar) if end < 0 else end
        else:
            depth += (character == "(") - (character == ")")
        if depth > _MAX_NESTING:
            raise InvalidRequest(f"the grammar nests more than {_MAX_NESTING} parentheses.", field=GRAMMAR_FIELD)
        position += 1


def _end_of_literal(text: str, position: int, end: str) -> int:
    while position < len(text) and text[position] != end:
        position += 2 if text[position] == "\\" else 1
    return position


def grammar_of(schema: Any) -> str:
    """Return the grammar of a schema that is parsed JSON.

    Raises:
        InvalidRequest: It is no schema, or has a keyword that a grammar cannot hold.
    """
    check_depth(schema, SCHEMA_FIELD)
    return _Builder(schema).build()


class _Builder:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._rules: dict[str, str] = dict(_BASE_RULES)
        self._refs: dict[str, str] = {}

    def build(self) -> str:
        root = self._expression(self._schema, "#")
        lines = [f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._rules.items())]
        return "\n".join(lines) + "\n"

    def _rule(self, body: str) -> str:
        if len(self._rules) >= _MAX_RULES:
            raise _refused("#", "it is too large")
        name = f"r{len(self._rules)}"
        self._rules[name] = body
        return name

    def _expression(self, schema: Any, at: str) -> str:
        """Return an expression for a value, without the space after it."""
        if schema is True or schema == {}:
            return _ANY
        if not isinstance(schema, dict):
            raise _refused(at, "a schema is an object or true")
        keys = set(schema) - _ANNOTATIONS
        if not keys:
            return _ANY
        if "$ref" in keys:
            return self._reference(schema["$ref"], keys, at)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in keys:
                return self._alternatives(schema[key], key, keys, at)
        if "const" in keys:
            return self._rule(_literal(schema["const"]))
        if "enum" in keys:
            values = schema["enum"]
            if not isinstance(values, list) or not values:
                raise _refused(at, "enum is a list of at least one value")
            return self._rule(" | ".join(_literal(v) for v in values))
        return self._typed(schema, keys, at)

    def _reference(self, reference: Any, keys: set[str], at: str) -> str:
        if keys != {"$ref"}:
            raise _refused(at, f"$ref beside {', '.join(sorted(keys - {'$ref'}))}")
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise _refused(at, f"$ref {reference!r:.80}: only references within the schema are known")
        if reference not in self._refs:
            target = self._schema
            for part in reference[1:].split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or part not in target:
                    raise _refused(at, f"$ref {reference!r:.80} points nowhere")
                target = target[part]
            name = self._refs[reference] = self._rule("")
            self._rules[name] = self._expression(target, reference)
        return self._refs[reference]

    def _alternatives(self, options: Any, key: str, keys: set[str], at: str) -> str:
        if keys != {key}:
            raise _refused(at, f"{key} beside {', '.join(sorted(keys - {key}))}")
        if not isinstance(options, list) or not options:
            raise _refused(at, f"{key} is a list of at least one schema")
        if key == "allOf" and len(options) > 1:
            raise _refused(at, "allOf of more than one schema")
        parts = [self._expression(option, f"{at}/{key}/{i}") for i, option in enumerate(options)]
        return parts[0] if len(parts) == 1 else self._rule(" | ".join(parts))

    def _typed(self, schema: Mapping[str, Any], keys: set[str], at: str) -> str:
        declared = schema.get("type")
        if declared is None:
            declared = [kind for kind, allowed in _ALLOWED.items() if keys & allowed]
        kinds = declared if isinstance(declared, list) else [declared]
        if not kinds or not all(isinstance(kind, str) and kind in _ALLOWED for kind in kinds):
            what = min(keys) if not kinds else f"type {declared!r:.80}"
            raise _refused(at, f"{what} is not known here")
        allowed = frozenset({"type"}).union(*(_ALLOWED[kind] for kind in kinds))
        if unknown := sorted(keys - allowed):
            raise _refused(at, f"{unknown[0]} is not supported")
        parts = [self._of_kind(kind, schema, at) for kind in kinds]
        return parts[0] if len(parts) == 1 else self._rule(" | ".join(parts))

    def _of_kind(self, kind: str, schema: Mapping[str, Any], at: str) -> str:
        if kind == "object" and {"properties", "required", "additionalProperties"} & set(schema):
            return self._object(schema, at)
        if kind == "array" and {"items", "prefixItems", "minItems", "maxItems"} & set(schema):
            return self._array(schema, at)
        if kind == "string" and {"minLength", "maxLength"} & set(schema):
            low, high = _bounds(schema, "minLength", "maxLength", at)
            return self._rule(f'"\\"" char{{{low},{"" if high is None else high}}} "\\""')
        return kind

    def _object(self, schema: Mapping[str, Any], at: str) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict):
            raise _refused(at, "properties is an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _refused(at, "required is a list of names")
        others = schema.get("additionalProperties", True)
        unnamed = [name for name in required if name not in properties]
        if unnamed and others is False:
            raise _refused(at, f"{unnamed[0]!r:.80} is required but not allowed")
        properties = properties | dict.fromkeys(unnamed, others)
        if not properties:
            return self._map(others, at)
        # From the last property to the first: what may follow where nothing stands before it, and where something does.
        first, rest = '""', '""'
        for name, inner in reversed(properties.items()):
            pair = f'{_literal(name)} space ":" space {self._expression(inner, f"{at}/properties/{name}")} space'
            first_here, rest_here = f"{pair} {rest}", f'"," space {pair} {rest}'
            if name not in required:
                first_here, rest_here = f"{first_here} | {first}", f"{rest_here} | {rest}"
            first, rest = self._rule(first_here), self._rule(rest_here)
        return self._rule(f'"{{" space {first} "}}"')

    def _map(self, others: Any, at: str) -> str:
        if others is False:
            return self._rule('"{" space "}"')
        pair = self._rule(f'string space ":" space {self._expression(others, f"{at}/additionalProperties")} space')
        return self._rule(f'"{{" space ({pair} ("," space {pair})*)? "}}"')

    def _array(self, schema: Mapping[str, Any], at: str) -> str:
        low, high = _bounds(schema, "minItems", "maxItems", at)
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise _refused(at, "prefixItems is a list of schemas")
        fixed = [self._expression(inner, f"{at}/prefixItems/{i}") for i, inner in enumerate(prefix)]
        if fixed:
            if low > len(fixed) or (high is not None and high < len(fixed)):
                raise _refused(at, "prefixItems of another length than minItems and maxItems say")
            return self._rule('"[" space ' + ' space "," space '.join(fixed) + ' space "]"')
        if high == 0 or schema.get("items") is False:
            return self._rule('"[" space "]"')
        item = self._expression(schema.get("items", True), f"{at}/items")
        more = f'("," space {item} space){{{max(0, low - 1)},{"" if high is None else high - 1}}}'
        body = f"{item} space {more}" if low else f"({item} space {more})?"
        return self._rule(f'"[" space {body} "]"')


def _bounds(schema: Mapping[str, Any], low_key: str, high_key: str, at: str) -> tuple[int, int | None]:
    low, high = schema.get(low_key, 0), schema.get(high_key)
    for key, value in ((low_key, low), (high_key, high)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise _refused(at, f"{key} is a whole number from 0")
    if high is not None and high < low:
        raise _refused(at, f"{high_key} is below {low_key}")
    return int(low), None if high is None else int(high)


def _literal(value: Any) -> str:
    """Return a JSON value as a literal of the grammar."""
    text = json.dumps(value, ensure_ascii=False)
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


def _refused(at: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"the JSON Schema cannot be used, at {at:.200}: {why}.", field=SCHEMA_FIELD)


def parse_schema(text: str) -> Any:
    """Return the schema in a request's JSON text.

    Raises:
        InvalidRequest: It is no JSON object, or nested too deep.
    """
    schema = parse_json(text, SCHEMA_FIELD)
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{SCHEMA_FIELD} is not a JSON object.", field=SCHEMA_FIELD)
    return schema


def parse_json(text: str, field: str) -> Any:
    """Return the value of a JSON text of a request.

    Raises:
        InvalidRequest: It is no JSON, or nested too deep.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidRequest(f"{field} is nested too deep.", field=field) from None
    except ValueError as error:
        raise InvalidRequest(f"{field} is not JSON: {error}.", field=field) from None
    check_depth(value, field)
    return value


def _no_constant(name: str) -> Sequence[Any]:
    raise ValueError(f"{name} is no JSON number")
