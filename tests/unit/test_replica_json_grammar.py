"""JSON Schema to GBNF, and grammars from outside. That llama.cpp takes the grammars is tested with llama.cpp."""

import json
from typing import Any

import pytest

from localmesh.core.errors import InvalidRequest
from localmesh.replica.engines.json_grammar import (
    check_depth,
    check_grammar,
    grammar_of,
    parse_json,
    parse_schema,
)


def root(schema: Any) -> str:
    """Return the root rule with the numbered rules that it uses put in its place."""
    rules = dict(line.split(" ::= ", 1) for line in grammar_of(schema).splitlines())
    text = rules["root"]
    numbered = [name for name in rules if name[0] == "r" and name[1:].isdigit()]
    for name in sorted(numbered, key=lambda n: -int(n[1:])):
        text = text.replace(name, f"({rules[name]})")
    return text


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, "any"),
        (True, "any"),
        ({"description": "x", "title": "y"}, "any"),
        ({"type": "string"}, "string"),
        ({"type": "string", "format": "date"}, "string"),
        ({"type": ["integer", "null"]}, "(integer | null)"),
        ({"const": 'a"\\\n'}, r'("\"a\\\"\\\\\\n\"")'),
        ({"enum": ["yes", 1, None]}, r'("\"yes\"" | "1" | "null")'),
        ({"type": "string", "minLength": 2, "maxLength": 5}, r'("\"" char{2,5} "\"")'),
        ({"type": "string", "minLength": 2}, r'("\"" char{2,} "\"")'),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, "(null | integer)"),
        ({"allOf": [{"type": "integer"}]}, "integer"),
        ({"type": "object"}, "object"),
        ({"type": "array"}, "array"),
        ({"type": "object", "additionalProperties": False}, '("{" space "}")'),
        ({"type": "array", "maxItems": 0}, '("[" space "]")'),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 1},
            '("[" space integer space ("," space integer space){0,} "]")',
        ),
        (
            {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
            '("[" space (integer space ("," space integer space){0,2})? "]")',
        ),
        (
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}]},
            '("[" space integer space "," space null space "]")',
        ),
    ],
)
def test_a_schema_becomes_a_rule(schema: Any, expected: str) -> None:
    assert root(schema) == expected


def test_required_properties_come_in_order_and_optional_ones_may_be_left_out() -> None:
    text = root(
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
            "required": ["b"],
        }
    )
    a, b = r'"\"a\"" space ":" space integer space', r'"\"b\"" space ":" space null space'
    assert f'({b} "")' in text  # b alone
    assert f'"," space {b} ""' in text  # b after a
    assert a in text


def test_a_required_property_without_a_schema_may_have_any_value() -> None:
    assert r'"\"x\"" space ":" space any' in root({"type": "object", "required": ["x"]})


def test_a_map_has_any_keys_and_values_of_its_schema() -> None:
    assert 'string space ":" space integer' in root({"type": "object", "additionalProperties": {"type": "integer"}})


def test_a_schema_may_refer_to_itself() -> None:
    schema = {
        "$ref": "#/$defs/node",
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    }
    assert grammar_of(schema).startswith("root ::= r")


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (5, "a schema is an object"),
        ([], "a schema is an object"),
        (False, "a schema is an object"),
        ({"type": "nonsense"}, "type 'nonsense' is not known"),
        ({"type": "string", "pattern": "a"}, "pattern is not supported"),
        ({"not": {}}, "not is not known"),
        ({"type": "integer", "minimum": 3}, "minimum is not supported"),
        ({"$ref": "https://example.org/x"}, "only references within"),
        ({"$ref": "#/nope"}, "points nowhere"),
        ({"$ref": "#/a", "type": "string"}, "beside type"),
        ({"enum": []}, "at least one value"),
        ({"anyOf": "x"}, "list of at least one schema"),
        ({"anyOf": [{}], "type": "string"}, "beside type"),
        ({"allOf": [{}, {}]}, "allOf of more than one"),
        ({"properties": [1]}, "properties is an object"),
        ({"properties": {"a": {"type": 7}}}, "at #/properties/a"),
        ({"type": "object", "required": "a"}, "required is a list"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "required but not allowed"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "maxLength is below"),
        ({"type": "array", "prefixItems": [{}], "minItems": 3}, "another length"),
        ({"anyOf": [{"const": str(i)} for i in range(6000)]}, "too large"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_place_named(schema: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        grammar_of(schema)
    assert caught.value.metadata["field"] == "sampling.json_schema"


def test_nesting_is_bounded() -> None:
    check_depth([[[1]]], "f", limit=5)
    with pytest.raises(InvalidRequest, match="nested more than"):
        check_depth([[[[[[1]]]]]], "f", limit=5)
    with pytest.raises(InvalidRequest, match="nested too deep"):
        parse_json("[" * 100_000, "f")
    with pytest.raises(InvalidRequest, match="nested"):
        parse_schema('{"items": ' * 200 + "{}" + "}" * 200)


@pytest.mark.parametrize("text", ["", "{", "nope", "NaN", '{"a": Infinity}'])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="f is not JSON"):
        parse_json(text, "f")


def test_a_schema_is_a_json_object() -> None:
    assert parse_schema('{"type": "null"}') == {"type": "null"}
    with pytest.raises(InvalidRequest, match="not a JSON object"):
        parse_schema("[]")


@pytest.mark.parametrize(
    "grammar",
    ["root ::= " + "(" * 1000, '%llguidance {}\nstart: "a"', "root ::= " + " " * (1 << 20)],
)
def test_a_grammar_that_could_hurt_the_parser_is_refused(grammar: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_grammar(grammar)
    assert caught.value.metadata["field"] == "sampling.grammar"


def test_parentheses_in_literals_and_comments_do_not_nest() -> None:
    many = "(" * 1000
    check_grammar(f'root ::= "{many}" [{many}] # {many}\n')
    check_grammar(f'root ::= "\\"{many}" ("a")')


def test_names_with_any_characters_are_escaped_in_the_grammar() -> None:
    nasty = 'a"b\\c\nd'
    grammar = grammar_of({"type": "object", "properties": {nasty: {"type": "null"}}, "required": [nasty]})
    assert all(line.split(" ::= ")[0].isalnum() for line in grammar.splitlines())
    assert len(grammar.splitlines()) < 20
    assert json.dumps(nasty)[1:4] in grammar.replace("\\\\", "\\").replace('\\"', '"')
