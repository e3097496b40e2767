"""How other machines reach a mesh that `up --listen` runs here: the address to listen on, and names to prove."""

import re
import socket

from localmesh.app.config import Config
from localmesh.rpc.addresses import Listen, host_of, is_address, own_address
from localmesh.rpc.errors import ConfigError

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")


def listen_host(config: Config) -> str:
    """Return the address or host name of this machine that up.listen names, without brackets.

    Raises:
        ConfigError: It is none, or nothing tells by which address others reach a machine that listens on all.
    """
    text = config.up.listen
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not is_address(host) and not _HOST.fullmatch(host):
        raise ConfigError(
            f"up.listen = {text!r} is no address of this machine: give an IP address or a host name, without a port"
            " (ports are --router-listen, --registry-listen and --registry-enrolment-listen)",
            field="up.listen",
        )
    alone = Listen(host=host).wildcard and Listen(host=own_address(host)).loopback
    if alone and not (config.registry.advertise and config.router.advertise and config.worker.advertise):
        raise ConfigError(
            f"up.listen = {text!r} listens on every address, and none was found by which other machines reach this"
            " one: name the address itself",
            field="up.listen",
        )
    return host


def names(config: Config, host: str) -> tuple[str, ...]:
    """Return the names and addresses that certificates of this machine's components must carry, besides loopback.

    Args:
        config: That of `up`.
        host: What `listen_host` returned.
    """
    listened = own_address(host) if Listen(host=host).wildcard else host
    told = (section.advertise for section in (config.registry, config.router, config.worker))
    found = (listened, *(host_of(advertise) for advertise in told), socket.gethostname())
    return tuple(dict.fromkeys(name for name in found if is_address(name) or _HOST.fullmatch(name)))
