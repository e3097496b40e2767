"""What can go wrong when talking to etcd, in the words of a caller that has to decide what to do next."""

from __future__ import annotations


class EtcdError(Exception):
    """Base of everything this package raises on purpose."""


class ConnectionFailedError(EtcdError):
    """No endpoint could be reached before the deadline. The call was definitely not carried out."""


class ConnectionTimeoutError(EtcdError):
    """No endpoint answered before the deadline.

    Raised only for calls that change nothing, or that were never sent: nothing was written.
    """


class UnknownOutcome(EtcdError):
    """A write was sent and its answer never came: it may have been applied, or may yet be.

    Settle it by reading: the write should carry something by which it is recognised (a token, a lease).
    """


class RequestRefused(EtcdError):
    """etcd understood the request and refused it; the same request will be refused again.

    `code` is the name of the gRPC status, `details` etcd's own sentence.
    """

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"etcd refused the request: {details} ({code})")
        self.code = code
        self.details = details


class PreconditionFailedError(RequestRefused):
    """The state of the store forbids it (for instance a lease id that is already in use)."""


class PermissionDenied(RequestRefused):
    """The user is known but may not do this."""


class AuthenticationFailed(EtcdError):
    """User or password are wrong or missing."""


class LeaseExpired(EtcdError):
    """The lease does not exist (any more)."""

    def __init__(self, lease_id: int, reason: str = "etcd does not know it") -> None:
        super().__init__(f"lease {lease_id:x} is gone: {reason}")
        self.lease_id = lease_id
        self.reason = reason


class WatchTimedOut(EtcdError):
    """A watch was not established within the time that the caller gave."""


class WatchLost(EtcdError):
    """A watch cannot go on without a gap: read the range again and watch from there."""


class RevisionCompactedError(WatchLost):
    """The revision asked for was compacted away.

    `compacted_revision` is the oldest revision that can still be watched; 0 where etcd does not say.
    """

    def __init__(self, compacted_revision: int = 0) -> None:
        super().__init__(f"the revision was compacted away (compacted at {compacted_revision or 'unknown'})")
        self.compacted_revision = compacted_revision


Compacted = RevisionCompactedError


class StoreReset(WatchLost):
    """The store behind the endpoints is not the one that was followed, or it has forgotten revisions."""


class WatcherTooSlow(WatchLost):
    """The consumer of a watch fell so far behind that its backlog was given up."""


class ServerStartError(EtcdError):
    """A local etcd server could not be found or started; the message says what to do."""
