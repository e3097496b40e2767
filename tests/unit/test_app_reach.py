"""Where `up --listen` listens and which names its certificates carry; how a worker that joined finds its address."""

import socket
from typing import Any

import pytest

from localmesh.app import enrolment, reach
from localmesh.app.config import Config, RegistrySection, RouterSection, UpSection, WorkerSection
from localmesh.core.errors import ComponentUnreachable
from localmesh.rpc.errors import ConfigError


def listening(address: str, *, registry: str = "", router: str = "", worker: str = "") -> Config:
    return Config(
        up=UpSection(listen=address),
        registry=RegistrySection(advertise=registry),
        router=RouterSection(advertise=router),
        worker=WorkerSection(advertise=worker),
    )


@pytest.mark.parametrize(
    ("given", "host"),
    [("192.0.2.10", "192.0.2.10"), ("[2001:db8::1]", "2001:db8::1"), ("2001:db8::1", "2001:db8::1"), ("gpu1.lan",) * 2],
)
def test_an_address_or_a_name_is_listened_on_with_brackets_or_without(given: str, host: str) -> None:
    """F53."""
    assert reach.listen_host(listening(given)) == host


@pytest.mark.parametrize("given", ["192.0.2.10:9500", "[::1]:5", "a b", "/x", "-x", "[gpu1]x", "http://192.0.2.10"])
def test_anything_else_is_refused_with_what_is_expected(given: str) -> None:
    with pytest.raises(ConfigError, match="without a port"):
        reach.listen_host(listening(given))


def test_every_name_by_which_others_call_is_in_the_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """F60: else they refuse what they called."""
    monkeypatch.setattr(socket, "gethostname", lambda: "host-a")
    config = listening("192.0.2.10", registry="mesh.example:443", router="[2001:db8::7]", worker="192.0.2.10")
    assert reach.names(config, "192.0.2.10") == ("192.0.2.10", "mesh.example", "2001:db8::7", "host-a")


def test_listening_everywhere_needs_an_address_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "own_address", lambda _: "192.0.2.10")
    assert reach.listen_host(listening("0.0.0.0")) == "0.0.0.0"
    assert reach.names(listening("0.0.0.0"), "0.0.0.0")[0] == "192.0.2.10"
    monkeypatch.setattr(reach, "own_address", lambda _: "127.0.0.1")
    with pytest.raises(ConfigError, match="name the address itself"):
        reach.listen_host(listening("0.0.0.0"))
    told = listening("0.0.0.0", registry="mesh.example", router="mesh.example", worker="mesh.example")
    assert reach.listen_host(told) == "0.0.0.0"


def test_a_worker_whose_network_is_down_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(ComponentUnreachable, match=r"192\.0\.2\.10:9501 \(Network is unreachable\).*--listen"):
        enrolment._address_towards("192.0.2.10:9501")
    assert enrolment._address_towards("127.0.0.2:9501") == "127.0.0.1:0"
