"""Models as YAML: what is read, how errors point at it, and what is refused for safety."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from localmesh.core.errors import InvalidSpec
from localmesh.rpc.manifest import MAX_BYTES, parse_models, parse_size, to_yaml
from localmesh.v1 import types_pb2

FULL = """\
apiVersion: localmesh/v1
kind: Model
name: tiny
engine: llama
source: tiny.gguf
parameters:
  context_tokens: 2048
  slots: 2
  threads: 3
  gpu_layers: 0
  cache_type: q8_0
  embeddings: true
  max_concurrent_requests: 7
  options: {seed: 1, mode: fast}
resources: {memory: 1.5GiB, device: gpu, devices: 2}
placement:
  min_replicas: 1
  max_replicas: 4
  node_selector: {zone: a, tier: 2}
  selector_terms:
    - {key: gpu.memory, operator: In, values: [24GiB, 48GiB]}
    - {key: tier, operator: NotIn, values: [1]}
    - {key: gpu.vendor, operator: Exists}
    - {key: broken, operator: DoesNotExist}
  groups: [large, 7]
  rollout: immediate
"""
HEAD = "apiVersion: localmesh/v1\nkind: Model\nname: tiny\nengine: llama\nsource: t.gguf\n"


def refused(text: str | bytes, *, origin: str = "m.yaml") -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        parse_models(text, origin=origin)
    return caught.value


def test_every_field_is_read() -> None:
    [(spec, policy)] = parse_models(FULL)
    assert spec == types_pb2.ModelSpec(
        name="tiny",
        backend="llama",
        source="tiny.gguf",
        parameters=types_pb2.LoadParameters(
            context_tokens=2048,
            slots=2,
            threads=3,
            gpu_layers=0,
            cache_type="q8_0",
            embeddings=True,
            max_concurrent_requests=7,
            options={"seed": "1", "mode": "fast"},
        ),
        resources=types_pb2.Resources(memory_bytes=3 << 29, device_kind="gpu", device_count=2),
    )
    assert policy == types_pb2.PlacementPolicy(
        node_selector={"zone": "a", "tier": "2"},
        min_replicas=1,
        max_replicas=4,
        selector_terms=[
            types_pb2.SelectorTerm(
                key="gpu.memory", operator=types_pb2.SELECTOR_OPERATOR_IN, values=["24GiB", "48GiB"]
            ),
            types_pb2.SelectorTerm(key="tier", operator=types_pb2.SELECTOR_OPERATOR_NOT_IN, values=["1"]),
            types_pb2.SelectorTerm(key="gpu.vendor", operator=types_pb2.SELECTOR_OPERATOR_EXISTS),
            types_pb2.SelectorTerm(key="broken", operator=types_pb2.SELECTOR_OPERATOR_DOES_NOT_EXIST),
        ],
        groups=["large", "7"],
        rollout=types_pb2.ROLLOUT_IMMEDIATE,
    )


def test_all_that_is_read_can_be_written_and_read_again() -> None:
    """F33."""
    [(spec, policy)] = parse_models(FULL)
    assert parse_models(to_yaml(spec, policy)) == [(spec, policy)]
    everywhere = types_pb2.PlacementPolicy(spread_all=True, pinned=True)
    assert parse_models(to_yaml(spec, everywhere)) == [(spec, everywhere)]


def test_without_placement_the_policy_stays_as_it_is() -> None:
    assert parse_models(HEAD)[0][1] is None
    assert parse_models(HEAD + "placement: {}\n")[0][1] == types_pb2.PlacementPolicy()


def test_gpu_layers_may_be_unset_or_zero() -> None:
    assert not parse_models(HEAD)[0][0].parameters.HasField("gpu_layers")
    assert parse_models(HEAD + "parameters: {gpu_layers: 0}\n")[0][0].parameters.HasField("gpu_layers")


def test_several_documents_are_several_models() -> None:
    text = f"---\n{HEAD}---\n# nothing\n---\n{HEAD.replace('tiny', 'other')}---\n"
    assert [spec.name for spec, _ in parse_models(text)] == ["tiny", "other"]


@pytest.mark.parametrize("name", ["1.5", "on", "12:30", "2024-01-01", "1e3", "0x10", "true"])
def test_a_name_is_its_text_also_where_yaml_sees_something_else(name: str) -> None:
    assert parse_models(HEAD.replace("tiny", name))[0][0].name == name


@pytest.mark.parametrize(
    ("line", "at", "field", "words"),
    [
        ("parametres: {}", 6, "parametres", "did you mean 'parameters'?"),
        ("backend: llama", 6, "backend", "did you mean 'engine'?"),
        ("zzz: 1", 6, "zzz", "known: apiVersion, kind"),
        ("parameters: {slot: 1}", 6, "parameters.slot", "did you mean 'slots'?"),
        ("parameters:\n  slots: two", 7, "parameters.slots", "expected a whole number, not 'two'"),
        ("parameters:\n  slots: 1.5", 7, "parameters.slots", "expected a whole number"),
        ("parameters:\n  slots: -1", 7, "parameters.slots", "from 0 to"),
        ("parameters:\n  slots: 99999999999", 7, "parameters.slots", "from 0 to"),
        ("parameters:\n  slots: [1]", 7, "parameters.slots", "not a list"),
        ("parameters:\n  slots:", 7, "parameters.slots", "not nothing"),
        ("parameters:\n  embeddings: 1", 7, "parameters.embeddings", "expected true or false"),
        ("parameters:\n  options: fast", 7, "parameters.options", "expected names with values"),
        ("parameters:\n  options:\n    a: [1]", 8, "parameters.options.a", "expected text, not a list"),
        ("parameters:\n  options:\n    a: 1\n    a: 2", 9, "parameters.options.a", "given twice"),
        ("parameters: [1]", 6, "parameters", "expected fields with values, not a list"),
        ("resources:\n  memory: lots", 7, "resources.memory", "expected a size such as 2GiB"),
        ("resources:\n  device: tpu", 7, "resources.device", "tpu"),
        ("parameters:\n  cache_type: q3", 7, "parameters.cache_type", "q3"),
        ("parameters:\n  context_tokens: 999999999", 7, "parameters.context_tokens", "between 0 and"),
        ("placement:\n  rollout: slowly", 7, "placement.rollout", "expected overlap or immediate"),
        ("placement:\n  max_replicas: 1\n  min_replicas: 2", 8, "placement.min_replicas", "above max_replicas"),
        ("placement:\n  spread_all: true\n  min_replicas: 1", 7, "placement.spread_all", "leave out min_replicas"),
        ("placement:\n  groups: large", 7, "placement.groups", "expected a list"),
        ("placement:\n  groups: [a/b]", 7, "placement.groups", "not a name of a group"),
        ("placement:\n  selector_terms: {a: b}", 7, "placement.selector_terms", "expected a list"),
        (
            "placement:\n  selector_terms:\n    - {key: a, operator: Is}",
            8,
            "placement.selector_terms[0].operator",
            "expected In or NotIn",
        ),
        ("placement:\n  selector_terms: [{key: a}]", 7, "placement.selector_terms[0].operator", "is missing"),
        ("placement:\n  selector_terms: [{key: a, operator: In}]", 7, "placement.selector_terms", "at least one value"),
        ("resources:\n  devices: two", 7, "resources.devices", "expected a whole number"),
        ("resources:\n  device: cpu\n  devices: 2", 8, "resources.devices", "one device of the kind 'cpu'"),
        ("name: again", 6, "name", "given twice, first in line 3"),
        ("? [a]\n: 1", 6, "key", "expected text"),
    ],
)
def test_an_error_names_file_line_and_field(line: str, at: int, field: str, words: str) -> None:
    error = refused(f"{HEAD}{line}\n")
    assert error.message.startswith(f"m.yaml:{at}: {field}: ")
    assert words in error.message
    assert (error.metadata["line"], error.metadata["field"], error.metadata["file"]) == (str(at), field, "m.yaml")


@pytest.mark.parametrize(
    ("old", "new", "at", "words"),
    [
        ("kind: Model\n", "", 1, "kind: is missing"),
        ("apiVersion: localmesh/v1\n", "", 1, "apiVersion: is missing"),
        ("name: tiny\n", "", 1, "name: is missing"),
        ("engine: llama\n", "", 1, "engine: is missing"),
        ("localmesh/v1", "localmesh/v9", 1, "expected 'localmesh/v1', not 'localmesh/v9'"),
        ("kind: Model", "kind: Node", 2, "expected 'Model'"),
        ("tiny", "a/b", 3, "not a model name"),
        ("llama", "gpt", 4, "no such backend"),
        ("t.gguf", "../t.gguf", 5, '".." in it'),
        ("t.gguf", "", 5, "expected text, not nothing"),
    ],
)
def test_the_head_is_checked(old: str, new: str, at: int, words: str) -> None:
    error = refused(HEAD.replace(old, new))
    assert error.message.startswith(f"m.yaml:{at}: ")
    assert words in error.message


def test_without_a_file_name_the_line_is_still_named() -> None:
    assert refused(HEAD + "zzz: 1", origin="").message.startswith("line 6: zzz: ")


def test_the_same_model_twice_is_refused_with_both_lines() -> None:
    assert "declared twice, first in line 1" in refused(f"{HEAD}---\n{HEAD}").message


@pytest.mark.parametrize("text", ["", "---\n", "# only a comment\n", "---\n---\n"])
def test_a_text_without_a_model_says_so(text: str) -> None:
    assert "there is no model in it" in refused(text).message


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "- name: x"])
def test_what_is_no_model_is_refused(text: str) -> None:
    assert "expected fields with values" in refused(text).message


def test_what_is_no_yaml_is_refused_with_its_line() -> None:
    error = refused("apiVersion: localmesh/v1\nkind: [Model\nname: x\n")
    assert "not YAML" in error.message
    assert error.metadata["line"] in ("2", "3", "4")


def test_anchors_and_aliases_cannot_make_a_small_text_large() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    assert "m.yaml:1: anchors and aliases are not allowed" in refused(bomb).message
    assert "anchors and aliases" in refused("x: *y").message
    assert "anchors and aliases" in refused("&a x: 1\n<<: *a").message


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!binary", "!x", "!!str"])
def test_tags_are_refused(tag: str) -> None:
    assert "tags are not allowed" in refused(f"{HEAD}parameters:\n  options: {{a: {tag} 'x'}}\n").message


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 50_000, "- " * 50_000])
def test_depth_is_bounded(text: str) -> None:
    assert "nested more than 8 deep" in refused(text).message


def test_size_is_bounded() -> None:
    assert "larger than 1 MiB" in refused("#" * (MAX_BYTES + 1)).message


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"\x80abc", "\x00", "\ud800", "a: \x07", "%YAML 9.9\n---\na: 1"])
def test_what_is_no_text_is_refused(text: str | bytes) -> None:
    refused(text)


@given(
    st.one_of(
        st.binary(max_size=200), st.text(max_size=200), st.text(alphabet=" -:{}[]&*!|>'\"%#?,\n\tabc1", max_size=80)
    )
)
@example("? ")
@example("!<")
@example("- |+9\n")
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidSpec):
        parse_models(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("17", 17), ("2GiB", 2 << 30), ("2 gib", 2 << 30), ("1.5Gi", 3 << 29), ("500M", 500_000_000), ("1kB", 1000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 XB", "0x10", "1..5G", "999999999999999999TiB", "\u0661"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size such as|too large"):
        parse_size(text)


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,20}", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
SPECS = st.builds(
    lambda name, source, slots, layers, memory, options: types_pb2.ModelSpec(
        name=name,
        backend="llama",
        source=source,
        parameters=types_pb2.LoadParameters(slots=slots, gpu_layers=layers, options=options),
        resources=types_pb2.Resources(memory_bytes=memory),
    ),
    name=NAMES,
    source=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,10}( .{0,4}x)?", fullmatch=True).filter(str.isprintable),
    slots=st.integers(0, 1024),
    layers=st.none() | st.integers(0, 99),
    memory=st.integers(0, 1 << 40) | st.integers(0, 99).map(lambda n: n << 30),
    options=st.dictionaries(TEXTS.filter(lambda t: ":" not in t), TEXTS, max_size=3),
)
POLICIES = st.none() | st.builds(
    lambda low, more, selector, rollout: types_pb2.PlacementPolicy(
        min_replicas=low, max_replicas=low + more, node_selector=selector, rollout=rollout
    ),
    low=st.integers(0, 9),
    more=st.integers(0, 9),
    selector=st.dictionaries(TEXTS, TEXTS, max_size=3),
    rollout=st.sampled_from([types_pb2.ROLLOUT_UNSPECIFIED, types_pb2.ROLLOUT_IMMEDIATE]),
)


@given(spec=SPECS, policy=POLICIES)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_as_the_same(
    spec: types_pb2.ModelSpec, policy: types_pb2.PlacementPolicy | None
) -> None:
    """F63: the texts of the desired folder and of an export."""
    assert parse_models(to_yaml(spec, policy)) == [(spec, policy)]
