"""The words between a worker and its replica process."""

import json
from typing import Any

import pytest

from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import (
    FailedEvent,
    ListeningEvent,
    LoadEvent,
    PhaseEvent,
    ReadyEvent,
    ReplicaSpecFile,
    StatusEvent,
    TlsPaths,
    parse_status,
    status_to_json,
)


def _spec_file(**changes: Any) -> ReplicaSpecFile:
    values: dict[str, Any] = {
        "mesh": "home",
        "replica": ReplicaId(ModelName("tiny"), NodeName("n1"), 2),
        "revision": "00ff00ff00ff00ff",
        "spec": ModelSpec(
            name=ModelName("tiny"), backend="llama", source="tiny.gguf", slots=2, options={"a": "b"}, gpu_layers=0
        ),
        "source_path": "/models/tiny.gguf",
        "devices": {CPU: 1 << 40},
        "run_dir": "/run/x",
        "cache_dir": "/cache",
        "parent_pid": 7,
    }
    return ReplicaSpecFile(**(values | changes))


@pytest.mark.parametrize(
    "changes", [{}, {"tls": TlsPaths(cert="c", key="k", ca="a")}, {"drain_seconds": 2.5, "gpu": True}]
)
def test_a_spec_file_is_read_as_it_was_written(changes: dict[str, Any]) -> None:
    file = _spec_file(**changes)
    assert ReplicaSpecFile.from_json(file.to_json()) == file


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("gpu",), 1, "'gpu' is not true or false: 1"),
        (("parent_pid",), "7", "'parent_pid' is not a whole number"),
        (("parent_pid",), True, "'parent_pid' is not a whole number"),
        (("index",), -1, "'index' is negative"),
        (("spec", "slots"), 1.5, "spec: 'slots' is not a whole number"),
        (("spec", "options"), {"a": 1}, "options: 'a' is not a string"),
        (("devices",), {"cpu": "1"}, "devices: 'cpu' is not a whole number"),
        (("tls",), {"cert": "c", "key": "k"}, "tls: 'ca' is missing"),
        (("model",), "../x", "not a model name"),
        (("surprise",), 1, "unknown 'surprise'"),
        (("spec", "surprise"), 1, "unknown 'surprise'"),
    ],
)
def test_a_bad_spec_file_is_refused_with_the_key_named(path: tuple[str, ...], value: object, expected: str) -> None:
    body = json.loads(_spec_file().to_json())
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=expected):
        ReplicaSpecFile.from_json(json.dumps(body))


@pytest.mark.parametrize("key", json.loads(_spec_file().to_json()))
def test_a_missing_key_is_named(key: str) -> None:
    body = json.loads(_spec_file().to_json())
    del body[key]
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        ReplicaSpecFile.from_json(json.dumps(body))


@pytest.mark.parametrize(
    "event",
    [
        PhaseEvent(phase="loading"),
        PhaseEvent(phase="converting", done_bytes=3, total_bytes=9),
        ListeningEvent(endpoint="127.0.0.1:1"),
        ReadyEvent(endpoint="[::1]:9", limit=16, memory_bytes=1 << 33),
        LoadEvent(in_flight=3, memory_bytes=0),
        FailedEvent(reason="LOAD_FAILED", message="a sentence\nof two lines"),
    ],
)
def test_a_status_event_is_one_line_and_read_as_it_was_written(event: StatusEvent) -> None:
    line = status_to_json(event)
    assert "\n" not in line
    assert parse_status(line) == event
    assert parse_status(line.encode()) == event


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff\xfe\xff",
        b"[1]",
        b"null",
        b'{"event": "dance"}',
        b'{"event": "load", "in_flight": 1}',
        b"[" * 9999,
    ],
)
def test_what_is_no_status_event_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_status(line)
