"""Where etcd's failures become the mesh's: the one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from localmesh.core.errors import InternalError, StoreUnavailable
from localmesh.etcd import (
    AuthenticationFailed,
    ConnectionFailedError,
    ConnectionTimeoutError,
    EtcdError,
    LeaseExpired,
    PermissionDenied,
    RequestRefused,
    UnknownOutcome,
    WatchLost,
)

_RETRY_SECONDS = 1.0


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the etcd client raises into a MeshError with a sentence for a person.

    UnknownOutcome, LeaseExpired and the WatchLost errors pass: only the caller knows what they mean.

    Raises:
        StoreUnavailable: etcd does not answer, or does not let us in.
        InternalError: etcd does not accept what we ask for.
    """
    try:
        yield
    except (UnknownOutcome, LeaseExpired, WatchLost):
        raise
    except (ConnectionFailedError, ConnectionTimeoutError) as error:
        raise unavailable(f"etcd does not answer ({error}). What runs goes on; try again.") from error
    except (AuthenticationFailed, PermissionDenied) as error:
        raise unavailable(f"etcd does not let us in ({error}). Check the configured user and certificate.") from error
    except RequestRefused as error:
        raise InternalError(f"etcd refused a transaction: {error.details}", code=error.code) from error
    except EtcdError as error:
        raise unavailable(f"etcd failed ({error}). What runs goes on; try again.") from error


@contextmanager
def readable(what: object) -> Iterator[None]:
    """Turn a value that the codec cannot read into a MeshError.

    Raises:
        InternalError: It cannot be read by this version.
    """
    try:
        yield
    except ValueError as problem:
        raise InternalError(f"What the store holds of {what} cannot be read by this version: {problem}.") from problem


def unavailable(message: str) -> StoreUnavailable:
    """Return the error for a store that cannot be used now."""
    return StoreUnavailable(message, retry_after_seconds=_RETRY_SECONDS)
