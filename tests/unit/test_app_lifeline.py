"""What parent and child say to each other."""

import pytest

from localmesh.app.lifeline import Failed, Ready, Status, parse_line, to_line
from localmesh.app.names import node_name_of_host
from localmesh.app.running import RunningMesh

MESH = RunningMesh(
    pid=1, started=2.0, mesh="main", router="r:1", registry="g:2", tls_cert="/c", tls_key="/k", tls_ca="/a"
)


@pytest.mark.parametrize(
    "status",
    [Ready(endpoint="127.0.0.1:1", port=1, detail="x\ny"), Failed(message="port 1 is in use", exit_code=3)],
)
def test_a_status_line_reads_back_as_the_status(status: Status) -> None:
    line = to_line(status)
    assert line.count("\n") == 1
    assert parse_line(line.encode()) == status


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b'{"event":"ready"}', b'{"event":"other"}', b"\xff"])
def test_what_is_no_status_line_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a status line"):
        parse_line(line)


@pytest.mark.parametrize(
    ("host", "suffix", "name"),
    [
        ("box.example.org", "", "box"),
        ("my box!", "-1", "my-box--1"),
        ("", "", "node"),
        ("-x", "", "x"),
        ("a" * 80, "-12", "a" * 60 + "-12"),
    ],
)
def test_a_host_name_becomes_a_node_name(host: str, suffix: str, name: str) -> None:
    assert node_name_of_host(host, suffix) == name


def test_a_command_takes_addresses_and_certificates_from_the_running_mesh() -> None:
    assert set(MESH.client_settings({})) == {"client.router", "client.registry", "tls.cert", "tls.key", "tls.ca"}


def test_who_names_an_address_gets_nothing_from_the_running_mesh() -> None:
    assert MESH.client_settings({"client.router": "other:1"}) == {}


def test_given_certificates_are_not_mixed_with_those_of_the_running_mesh() -> None:
    assert set(MESH.client_settings({"tls.ca": "/mine"})) == {"client.router", "client.registry"}
