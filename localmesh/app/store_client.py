"""Opens the store that a configuration names."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from localmesh.app.config import Config
from localmesh.core.clock import Clock
from localmesh.core.errors import StoreUnavailable
from localmesh.etcd import AuthenticationFailed, EtcdClient, EtcdConfig, PermissionDenied
from localmesh.rpc.errors import ConfigError, tls_trouble
from localmesh.store.mesh import MeshStore


@asynccontextmanager
async def open_store(config: Config, clock: Clock) -> AsyncIterator[MeshStore]:
    """Yield the mesh's store, its schema checked.

    Raises:
        StoreUnavailable: etcd does not answer.
        SchemaUnsupported: Another version wrote what is there.
        ConfigError: The settings of etcd cannot be used.
    """
    async with EtcdClient(etcd_config(config), clock) as client:
        try:
            store = MeshStore(client, config.mesh, clock)
        except ValueError as problem:
            raise ConfigError(f"mesh = {config.mesh!r} cannot be used: {problem}", field="mesh") from None
        try:
            await store.check_schema()
        except StoreUnavailable as error:
            where = ", ".join(config.etcd_endpoints)
            said = str(error.__cause__ or error.message)
            raise StoreUnavailable(f"etcd at {where} cannot be used ({said}). {_advice(error, config)}") from error
        yield store


def _advice(error: StoreUnavailable, config: Config) -> str:
    if isinstance(error.__cause__, AuthenticationFailed | PermissionDenied):
        return (
            "Give --etcd-user and --etcd-password-file of a user that may read and write what begins with"
            f" /localmesh/{config.mesh}/."
        )
    trouble = tls_trouble(str(error.__cause__ or error.message))
    if trouble:
        return f"{trouble} TLS to etcd is set by --etcd-ca, --etcd-cert and --etcd-key."
    return "Start it, or name another with --etcd-endpoints."


def etcd_config(config: Config) -> EtcdConfig:
    """Return how etcd is reached.

    Raises:
        ConfigError: The settings contradict each other, or a file cannot be read.
    """
    given = config.etcd
    try:
        return EtcdConfig(
            endpoints=config.etcd_endpoints,
            user=given.user,
            password=(_read(given.password_file) or b"").decode().strip(),
            ca_pem=_pem(given.ca),
            cert_pem=_pem(given.cert),
            key_pem=_pem(given.key),
            max_message_bytes=config.max_message_bytes,
        )
    except ValueError as problem:
        raise ConfigError(f"the settings of etcd cannot be used: {problem}.", field="etcd") from None


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as problem:
        raise ConfigError(f"cannot read {path}, which is set for etcd: {problem.strerror}.", field="etcd") from None


def _pem(path: Path | None) -> bytes | None:
    content = _read(path)
    if content is not None and b"-----BEGIN " not in content:
        raise ConfigError(f"{path}, which is set for etcd, is not PEM.", field="etcd")
    return content
