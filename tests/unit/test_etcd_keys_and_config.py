"""Ranges of keys, endpoints and credentials: pure rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.etcd import EtcdConfig, prefix_end
from localmesh.etcd.config import Target, parse_endpoint
from localmesh.etcd.keys import range_of


@given(prefix=st.binary(max_size=4), key=st.binary(min_size=1, max_size=6))
def test_a_key_is_in_the_range_of_a_prefix_exactly_if_it_starts_with_it(prefix: bytes, key: bytes) -> None:
    start, end = range_of(prefix, prefix=True)
    inside = key >= start and (end == b"\0" or key < end)
    assert inside == key.startswith(prefix)


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"a", b"b"), (b"a/", b"a0"), (b"a\xff", b"b"), (b"a\xff\xff", b"b"), (b"\xff", b"\0"), (b"", b"\0")],
)
def test_the_end_of_a_prefix_skips_trailing_highest_bytes(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end


def test_a_range_is_a_key_or_a_prefix_or_has_an_end() -> None:
    assert range_of("k") == (b"k", b"")
    assert range_of("k", range_end="m") == (b"k", b"m")
    with pytest.raises(ValueError, match="not by both"):
        range_of("k", prefix=True, range_end="m")
    with pytest.raises(ValueError, match="not empty"):
        range_of("")


@pytest.mark.parametrize(
    ("endpoint", "tls", "target"),
    [
        ("127.0.0.1:2379", False, Target("127.0.0.1:2379", tls=False)),
        ("etcd.example:2379", True, Target("etcd.example:2379", tls=True)),
        ("[::1]:2379", False, Target("[::1]:2379", tls=False)),
        ("http://h:1", False, Target("h:1", tls=False)),
        ("https://h:1/", False, Target("h:1", tls=True)),
        ("https://[::1]:1", True, Target("[::1]:1", tls=True)),
    ],
)
def test_endpoints_are_host_and_port_or_urls(endpoint: str, tls: bool, target: Target) -> None:
    assert parse_endpoint(endpoint, tls_configured=tls) == target


@pytest.mark.parametrize(
    ("endpoint", "complaint"),
    [
        ("host", "is not host:port"),
        ("host:", "is not host:port"),
        (":2379", "is not host:port"),
        ("host:0", "is not host:port"),
        ("host:65536", "is not host:port"),
        ("host:http", "is not host:port"),
        ("::1:2379", "in brackets"),
        ("ftp://h:1", "only http and https"),
        ("http://h:1/v3", "host and port only"),
        ("http://u@h:1", "host and port only"),
    ],
)
def test_a_bad_endpoint_is_named_in_the_error(endpoint: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        EtcdConfig(endpoints=(endpoint,))
    assert repr(endpoint) in str(error.value)


def test_a_plain_url_beside_a_ca_is_a_contradiction() -> None:
    with pytest.raises(ValueError, match="say https"):
        EtcdConfig(endpoints=("http://h:1",), ca_pem=b"x")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"endpoints": ()}, "no etcd endpoint"),
        ({"cert_pem": b"x"}, "together or not at all"),
        ({"cert_pem": b"x", "key_pem": b"x"}, "needs the CA"),
        ({"password": "x"}, "without a user"),
        ({"try_timeout_seconds": 0.0}, "try_timeout_seconds must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EtcdConfig(**{"endpoints": ("h:1",), **settings})  # type: ignore[arg-type]
