"""Metadata, addresses, pages, identities, health: what rpc decides without I/O."""

import asyncio
from typing import Any

import pytest

from localmesh.core.errors import InvalidRequest, JoinTokenInvalid, PermissionDenied, Unauthenticated
from localmesh.rpc import identity, interceptors
from localmesh.rpc.addresses import Listen, advertised, join_host_port, parse_listen, split_host_port
from localmesh.rpc.channels import channel_options
from localmesh.rpc.enrollment import JoinSecrets, JoinToken, peer_host
from localmesh.rpc.errors import ConfigError
from localmesh.rpc.health import HealthBook
from localmesh.rpc.identity import Identity, parse_uri, require_node, server_name
from localmesh.rpc.metadata import first, of_request, of_response
from localmesh.rpc.paging import page
from localmesh.rpc.proxy import Failure, connection_lost, kinds_of, retry_elsewhere
from localmesh.rpc.server import server_options
from localmesh.v1 import inference_service_pb2, registry_service_pb2


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


# metadata


def test_a_request_keeps_the_callers_metadata_but_not_the_transports_and_not_our_own() -> None:
    received = (
        ("user-agent", "x"),
        ("grpc-timeout", "1S"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("localmesh-model", "m"),
        ("localmesh-internal", "x"),
        ("a", "1"),
        ("a", "2"),
        ("b-bin", b"\x00"),
        ("grpc-status-details-bin", b"x"),
    )
    assert of_request(received, (("localmesh-replica", "m/n/0"),)) == (
        ("localmesh-model", "m"),
        ("a", "1"),
        ("a", "2"),
        ("b-bin", b"\x00"),
        ("localmesh-replica", "m/n/0"),
    )


def test_extra_metadata_replaces_what_the_caller_sent() -> None:
    assert of_request((("localmesh-replica", "forged"), ("a", "1")), (("localmesh-replica", "m/n/0"),)) == (
        ("a", "1"),
        ("localmesh-replica", "m/n/0"),
    )
    assert of_request(None) == ()


def test_a_response_keeps_status_details_and_who_served() -> None:
    received = (("grpc-status-details-bin", b"x"), ("localmesh-served-by-node", "n"), ("grpc-encoding", "gzip"))
    assert of_response(received) == received[:2]
    assert first(received, "localmesh-served-by-node") == "n"
    assert first(received, "absent") == ""
    assert first(None, "absent") == ""


# addresses


@pytest.mark.parametrize(
    ("text", "listen", "loopback"),
    [
        ("127.0.0.1:0", Listen(host="127.0.0.1", port=0), True),
        ("127.8.9.1:1", Listen(host="127.8.9.1", port=1), True),
        ("[::1]:9500", Listen(host="::1", port=9500), True),
        ("localhost:9500", Listen(host="localhost", port=9500), True),
        ("unix:/run/x.sock", Listen(path="/run/x.sock"), True),
        ("unix:///run/x.sock", Listen(path="/run/x.sock"), True),
        ("0.0.0.0:9500", Listen(host="0.0.0.0", port=9500), False),
        ("[::]:9500", Listen(host="::", port=9500), False),
        ("example.com:65535", Listen(host="example.com", port=65535), False),
        ("10.0.0.7:9500", Listen(host="10.0.0.7", port=9500), False),
    ],
)
def test_an_address_to_listen_on_is_read(text: str, listen: Listen, loopback: bool) -> None:
    assert parse_listen(text) == listen
    assert listen.loopback is loopback
    assert parse_listen(str(listen)) == listen


@pytest.mark.parametrize(
    "text",
    ["", "9500", ":9500", "host", "host:", "host:x", "host:-1", "host:65536", "::1:9500", "[::1]", "h:٣", "unix:"],
)
def test_what_is_no_address_is_refused_with_the_expected_form(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_listen(text)
    with pytest.raises(ConfigError):
        split_host_port("[a]:1")


def test_a_path_that_no_unix_socket_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="107"):
        parse_listen("unix:/" + "x" * 200)


@pytest.mark.parametrize(
    ("listen", "advertise", "expected"),
    [
        ("127.0.0.1:0", "", "127.0.0.1:7"),
        ("[::1]:0", "", "[::1]:7"),
        ("0.0.0.0:0", "gpu1.lan", "gpu1.lan:7"),
        ("0.0.0.0:0", "gpu1.lan:80", "gpu1.lan:80"),
        ("0.0.0.0:0", "gpu1.lan:0", "gpu1.lan:7"),
        ("[::]:0", "fd00::5", "[fd00::5]:7"),
        ("[::]:0", "[fd00::5]", "[fd00::5]:7"),
        ("[::]:0", "[fd00::5]:80", "[fd00::5]:80"),
        ("unix:/x", "gpu1", "unix:/x"),
    ],
)
def test_the_advertised_address_can_be_dialled(listen: str, advertise: str, expected: str) -> None:
    assert advertised(parse_listen(listen), 7, advertise) == expected


def test_ipv6_gets_brackets() -> None:
    assert join_host_port("::1", 5) == "[::1]:5"
    assert split_host_port("[::1]:5") == ("::1", 5)


# options


def test_options_name_each_setting_once_and_carry_the_one_message_size() -> None:
    for options in (dict(channel_options(1234)), server_options(1234)):
        assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 1234
    assert len(channel_options()) == len(dict(channel_options()))
    assert server_options(1)["grpc.so_reuseport"] == 0


def test_a_channel_gives_up_on_a_frozen_peer_and_its_server_permits_the_pings() -> None:
    channel, server = dict(channel_options()), server_options(1)
    seconds = (int(channel["grpc.keepalive_time_ms"]) + int(channel["grpc.http2.ping_timeout_ms"])) / 1000
    assert seconds < 20
    assert channel["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1
    assert server["grpc.http2.max_ping_strikes"] == 0


# pages


def names(count: int) -> list[str]:
    return [f"n{i:04}" for i in range(count)]


def test_pages_hold_every_item_once_in_order() -> None:
    token, seen = "", []
    for _ in range(10):
        found, token = page(reversed(names(25)), key=str, page_size=10, page_token=token)
        seen += found
        if not token:
            break
    assert seen == names(25)


def test_a_page_begins_after_the_last_item_of_the_one_before_even_if_that_is_gone() -> None:
    _, token = page(names(10), key=str, page_size=5, page_token="")
    found, _ = page([n for n in names(10) if n != "n0004"], key=str, page_size=5, page_token=token)
    assert found[0] == "n0005"


def test_page_sizes_have_a_default_and_a_ceiling() -> None:
    assert len(page(names(1500), key=str, page_size=0, page_token="")[0]) == 100
    assert len(page(names(1500), key=str, page_size=9999, page_token="")[0]) == 1000
    assert page(names(5), key=str, page_size=5, page_token="")[1] == ""


@pytest.mark.parametrize(
    ("size", "token", "field"), [(-1, "", "page_size"), (1, "?", "page_token"), (1, "é", "page_token")]
)
def test_a_page_that_cannot_be_is_refused(size: int, token: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        page(names(5), key=str, page_size=size, page_token=token)
    assert caught.value.metadata["field"] == field


# identities and policies


def who(role: str, name: str = "x", mesh: str = "home") -> Identity:
    return Identity(mesh=mesh, role=role, name=name)


def test_an_identity_is_read_from_its_uri() -> None:
    assert parse_uri("localmesh://home/node/n1") == who("node", "n1")
    assert who("node", "n1").uri == "localmesh://home/node/n1"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "localmesh://home/node",
        "localmesh://home/root/n1",
        "spiffe://home/node/n1",
        "localmesh://home/node/n1/x",
        "localmesh:///node/n1",
        "localmesh://home/node/",
    ],
)
def test_what_names_nobody_is_nobody(uri: str) -> None:
    assert parse_uri(uri) is None


def test_no_name_poses_as_another_role() -> None:
    assert server_name("node", "a.router") != server_name("router", "a")
    assert server_name("node", "N1") == "n1.node.localmesh.internal"


def test_the_registrys_table_names_every_method() -> None:
    """F60."""
    service = registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    assert set(identity.REGISTRY_METHODS) == set(kinds_of([service]))


@pytest.mark.parametrize(
    ("role", "method", "allowed"),
    [
        ("node", "Register", True),
        ("node", "Heartbeat", True),
        ("node", "ApplyModel", False),
        ("node", "ListModels", True),
        ("operator", "ApplyModel", True),
        ("operator", "DeleteModel", True),
        ("operator", "Register", False),
        ("client", "ApplyModel", False),
        ("client", "GetModel", True),
        ("router", "ListReplicas", True),
        ("router", "Deregister", False),
        ("client", "FromTheFuture", False),
        ("operator", "FromTheFuture", True),
    ],
)
def test_roles_may_call_what_the_registrys_table_says(role: str, method: str, allowed: bool) -> None:
    """F60."""
    policy = identity.registry_policy("home")
    if allowed:
        policy(f"/localmesh.v1.RegistryService/{method}", who(role))
    else:
        with pytest.raises(PermissionDenied) as caught:
            policy(f"/localmesh.v1.RegistryService/{method}", who(role))
        assert caught.value.metadata["identity"] == f"{role}/x"


@pytest.mark.parametrize("role", sorted(identity.ROLES))
@pytest.mark.parametrize(
    "method",
    [
        *("ApproveNode", "CordonNode", "UncordonNode", "DrainNode", "ResumeNode", "RemoveNode"),
        *("SetNodeLabels", "SetNodeOverrides", "ResetNodeOverrides"),
    ],
)
def test_only_operators_say_how_nodes_stand(method: str, role: str) -> None:
    """F3, F60: a worker's certificate approves, resumes and relabels nobody, itself included."""
    policy = identity.registry_policy("home")
    if role == "operator":
        policy(f"/localmesh.v1.RegistryService/{method}", who(role))
    else:
        with pytest.raises(PermissionDenied):
            policy(f"/localmesh.v1.RegistryService/{method}", who(role))


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [("a", "a", True), ("a", "b", False), ("", "a", False), ("", "", False), ("\ud800", "a", False)],
)
def test_an_empty_secret_opens_nothing(given: str, expected: str, same: bool) -> None:
    """F3."""
    assert identity.same_secret(given, expected) is same


@pytest.mark.parametrize("role", sorted(identity.ROLES))
@pytest.mark.parametrize("verb", ["Install", "Upgrade", "Delete"])
def test_only_operators_change_backends_and_only_through_a_router(verb: str, role: str) -> None:
    """F48, F60: what is installed on a node runs there, so a node, client or registry may not bring it."""
    router, worker = identity.router_policy("home"), identity.worker_policy("home")
    for policy, method, allowed in (
        (router, f"/localmesh.v1.RouterService/{verb}NodeBackend", {"operator"}),
        (worker, f"/localmesh.v1.WorkerService/{verb}Backend", {"operator", "router"}),
    ):
        if role in allowed:
            policy(method, who(role))
        else:
            with pytest.raises(PermissionDenied):
                policy(method, who(role))
    router("/localmesh.v1.RouterService/ListNodeBackends", who(role))
    worker("/localmesh.v1.WorkerService/ListBackends", who(role))


@pytest.mark.parametrize(
    "make", [identity.registry_policy, identity.router_policy, identity.worker_policy, identity.replica_policy]
)
def test_strangers_may_call_nothing_and_members_may_ask_for_health(make: Any) -> None:
    """F60."""
    policy = make("home")
    for stranger in (None, who("operator", mesh="other")):
        for method in ("/grpc.health.v1.Health/Check", "/localmesh.v1.RegistryService/ListModels"):
            with pytest.raises(Unauthenticated):
                policy(method, stranger)
    for role in identity.ROLES:
        policy("/grpc.health.v1.Health/Check", who(role))
        policy("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", who(role))


def test_a_node_speaks_for_itself_only() -> None:
    require_node(None, "n1")
    require_node(who("node", "n1"), "n1")
    for other in (who("node", "n2"), who("operator", "n1")):
        with pytest.raises(PermissionDenied):
            require_node(other, "n1")


def test_errors_are_mapped_outside_everything_and_identity_is_checked_before_a_components_own() -> None:
    own = object()
    built = interceptors.chain(identity.router_policy("home"), [own])
    assert [type(i) for i in built[:-1]] == [interceptors.ErrorInterceptor, interceptors.IdentityInterceptor]
    assert built[-1] is own
    assert tuple(type(i) for i in built[:-1]) == interceptors.ORDER
    assert [type(i) for i in interceptors.chain(None, [])] == [interceptors.ErrorInterceptor]


# join tokens


def test_a_join_token_is_read_as_it_was_written_and_never_shown_by_accident() -> None:
    """F3."""
    secret = JoinSecrets(ManualClock()).issue()
    token = JoinToken(host="::1", port=9502, secret=secret, pin="A" * 43)
    assert JoinToken.parse(str(token)) == token
    assert JoinToken.parse(f"  {token}\n") == token
    assert secret not in repr(token)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:1",
        "h:1/abc",
        "h:1/abc.def",
        "h/" + "A" * 32 + "." + "A" * 43,
        "h:0/" + "A" * 32 + "." + "A" * 43,
        "h:1/" + "!" * 32 + "." + "A" * 43,
        "h:1/" + "é" * 32 + "." + "A" * 43,
    ],
)
def test_what_is_no_join_token_is_refused_without_repeating_it(text: str) -> None:
    """F3."""
    with pytest.raises(JoinTokenInvalid, match="expected HOST:PORT/SECRET") as caught:
        JoinToken.parse(text)
    assert not text or text not in str(caught.value)


def test_a_secret_opens_until_it_expires() -> None:
    """F3."""
    clock = ManualClock()
    book = JoinSecrets(clock)
    first_secret, second = book.issue(ttl_seconds=10), book.issue(ttl_seconds=20)
    book.check(first_secret)
    for wrong in ("", "x", first_secret[:-1], first_secret + "x", "\udcff"):
        with pytest.raises(JoinTokenInvalid, match="wrong or has expired"):
            book.check(wrong)
    clock.now += 15
    with pytest.raises(JoinTokenInvalid, match="wrong or has expired"):
        book.check(first_secret)
    book.check(second)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:4711", "10.0.0.7"),
        ("ipv6:%5B::1%5D:4711", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "fe80::1"),
        ("unix:/x", ""),
        ("", ""),
        ("ipv4:junk", ""),
    ],
)
def test_the_peers_address_is_read(peer: str, host: str) -> None:
    assert peer_host(peer) == host


# proxy decisions


def test_kinds_come_from_descriptors() -> None:
    kinds = kinds_of(inference_service_pb2.DESCRIPTOR.services_by_name.values())
    assert kinds["/localmesh.v1.InferenceService/Generate"] == (False, False)
    assert kinds["/localmesh.v1.InferenceService/StreamGenerate"] == (False, True)


def test_only_what_the_transport_says_is_a_lost_connection() -> None:
    from grpc import StatusCode

    assert connection_lost(StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused", ())
    assert connection_lost(StatusCode.UNAVAILABLE, "Socket closed", ())
    assert connection_lost(StatusCode.UNAVAILABLE, "keepalive watchdog timeout", ())
    assert not connection_lost(StatusCode.UNAVAILABLE, "model is busy", ())
    assert not connection_lost(StatusCode.UNAVAILABLE, "Socket closed", (("grpc-status-details-bin", b"x"),))
    assert not connection_lost(StatusCode.DEADLINE_EXCEEDED, "Socket closed", ())


def test_a_lost_or_refused_attempt_goes_elsewhere_a_few_times() -> None:
    def failure(**changes: Any) -> Failure:
        base: dict[str, Any] = {"error": InvalidRequest("x"), "lost": False, "answered": False, "replayable": True}
        return Failure(**{**base, "attempt": 1, **changes})

    assert retry_elsewhere(failure(lost=True))
    assert not retry_elsewhere(failure(lost=True, attempt=4))
    assert not retry_elsewhere(failure())


# health


async def test_health_tells_every_watcher_the_last_state_and_ends_when_closed() -> None:
    book = HealthBook()
    book.set_serving("s", True)
    heard: dict[str, list[bool | None]] = {"a": [], "b": [], "unknown": []}

    async def watch(who_listens: str, service: str) -> None:
        async for state in book.follow(service):
            heard[who_listens].append(state)

    async with asyncio.TaskGroup() as tasks:
        leaving = tasks.create_task(watch("a", "s"))
        tasks.create_task(watch("b", "s"))
        tasks.create_task(watch("unknown", "u"))
        await asyncio.sleep(0)
        book.set_serving("s", False)
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.sleep(0)
        book.set_serving("s", True)
        await asyncio.sleep(0)
        book.close()
        book.set_serving("s", True)
    assert heard == {"a": [True, False], "b": [True, False, True, False], "unknown": [None]}
    assert book.serving == {"": False, "s": False}


def test_a_service_can_be_forgotten_but_not_the_server() -> None:
    book = HealthBook()
    book.set_serving("s", True)
    book.forget("s")
    book.forget("")
    assert book.serving == {"": False}
