"""Both sides of a second machine: the listener beside the registry, and the worker that joins."""

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from localmesh.app.certificates import keep
from localmesh.app.config import Config, TlsSection, WorkerSection
from localmesh.core.clock import Clock
from localmesh.core.errors import ComponentUnreachable, NodeNameTaken
from localmesh.core.ids import NodeName
from localmesh.rpc.addresses import host_of, join_host_port, parse_listen, split_host_port
from localmesh.rpc.authority import CertificateAuthority, write_private
from localmesh.rpc.enrollment import SERVICE, EnrollmentServicer, JoinSecrets, JoinToken, enroll, make_listener
from localmesh.rpc.errors import ConfigError
from localmesh.rpc.identity import key_fingerprint
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.store.mirror import Mirror
from localmesh.v1 import registry_service_pb2_grpc
from localmesh.worker.identity import certificate_request, load_or_create

_NOTE = "enrolled.json"


@asynccontextmanager
async def listener(config: Config, mirror: Mirror, registries: Sequence[str], clock: Clock) -> AsyncIterator[JoinToken]:
    """Let new machines in while the block runs; yield the token that they need.

    Who joins is told the address at which others reach the registry, where one is configured, for both.

    Raises:
        ConfigError: There is no authority, or the address cannot be listened on.
    """
    own = config.registry
    if own.ca_dir is None:
        raise ConfigError("registry.enrolment_listen needs registry.ca_dir, the authority that signs", field="ca_dir")
    authority = await asyncio.to_thread(CertificateAuthority.load, own.ca_dir)
    shown = await asyncio.to_thread(make_listener, config.state_dir / "tls" / "enrolment")
    secrets = JoinSecrets(clock)

    async def admit(node: str, public_key: bytes) -> None:
        known = mirror.snapshot.approvals.get(NodeName(node))
        if known is not None and known.key_fingerprint not in ("", key_fingerprint(public_key)):
            raise NodeNameTaken(
                f"the name {node!r} belongs to another machine of this mesh: join with another --name", node=node
            )

    advertise = host_of(own.advertise)
    listening = ServerConfig(listen=own.enrolment_listen, tls=shown.tls, client_auth=False, advertise=advertise)
    server = GrpcServer(listening, name="enrolment")
    servicer = EnrollmentServicer(authority, secrets, registries=registries, admit=admit)
    server.add(registry_service_pb2_grpc.add_EnrollmentServiceServicer_to_server, servicer, SERVICE)
    async with server:
        host, port = split_host_port(server.endpoint)
        yield JoinToken(host=host, port=port, secret=secrets.issue(), pin=shown.pin)


async def enrolled(config: Config, folder: Path) -> Config:
    """Return the worker's configuration with what it got when it joined.

    With worker.join it enrols, unless it has done so with the same token before. Later starts need no token.

    Args:
        config: As it was read.
        folder: The worker's own.

    Raises:
        JoinTokenInvalid: The token is not accepted.
        NodeNameTaken: The node's name belongs to another key.
        ComponentUnreachable: Nobody answers at the token's address.
        ConfigError: The configuration contradicts what it got.
    """
    if config.tls.cert is not None and not config.worker.join:
        return config
    note = await asyncio.to_thread(_read_note, folder)
    token_hash = sha256(config.worker.join.encode()).hexdigest() if config.worker.join else ""
    if config.worker.join and note.get("token") != token_hash:
        note = await _enrol(config, folder, token_hash)
    if not note:
        return config
    tls = TlsSection(cert=folder / "tls" / "cert.pem", key=Path(note["key"]), ca=folder / "tls" / "ca.pem")
    worker = config.worker
    if worker.registries == WorkerSection().registries:
        worker = replace(worker, registries=tuple(note["registries"]))
    if worker.listen == WorkerSection().listen:
        worker = replace(worker, listen=_address_towards(worker.registries[0]))
    return replace(config, mesh=note["mesh"], tls=tls, worker=worker)


async def _enrol(config: Config, folder: Path, token_hash: str) -> dict[str, Any]:
    token = JoinToken.parse(config.worker.join)
    new = not folder.exists()
    identity = await asyncio.to_thread(load_or_create, folder)
    request = certificate_request(identity, node=folder.name)
    try:
        answer = await enroll(token, node=folder.name, certificate_request=request)
    except BaseException:
        if new:  # who was not let in leaves nothing behind
            shutil.rmtree(folder, ignore_errors=True)
        raise
    keep(folder, key=identity.key_path, certificate=answer.certificate, ca=answer.ca_certificate)
    note = {
        "token": token_hash,
        "key": str(identity.key_path),
        "mesh": answer.mesh,
        "registries": list(answer.registries),
    }
    write_private(folder / _NOTE, json.dumps(note).encode())
    return note


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / _NOTE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        note = json.loads(text)
        return {name: note[name] for name in ("token", "key", "mesh", "registries")}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder / _NOTE} is damaged: remove it and join again with a new token", field="state_dir"
        ) from None


def _address_towards(registry: str) -> str:
    """Return the address, with any port, by which this machine talks to a registry: others reach it there, too."""
    host, port = split_host_port(registry)
    if parse_listen(registry).loopback:
        return "[::1]:0" if ":" in host else "127.0.0.1:0"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it asks the routing table
            return join_host_port(str(probe.getsockname()[0]), 0)
    except OSError as problem:
        raise ComponentUnreachable(
            f"there is no way from here to the registry {registry} ({problem.strerror}): is this machine's network up?"
            " To start without, say by --listen which address of this machine others shall use.",
            endpoint=registry,
        ) from problem
