"""Immutable answers of etcd. Nothing outside this package sees a protobuf message."""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as of one revision. `lease` is 0 where the key has none; `version` counts puts since creation."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class RangeResult:
    """`revision` is the store's revision when it was read: watch from `revision + 1` to miss nothing.

    `count` is the number of keys in the range whatever the limit; `more` says that the limit cut some off.
    """

    kvs: tuple[KeyValue, ...]
    revision: int
    more: bool = False
    count: int = 0


@dataclass(frozen=True, slots=True)
class PutResult:
    """`prev` is the key before the put, where it was asked for and existed."""

    revision: int
    prev: KeyValue | None = None


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """`prev_kvs` are the deleted keys, where they were asked for."""

    revision: int
    deleted: int
    prev_kvs: tuple[KeyValue, ...] = ()


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`responses` has one answer per operation of the branch that ran: Put-, Delete-, Range- or TxnResult."""

    succeeded: bool
    revision: int
    responses: tuple[RangeResult | PutResult | DeleteResult | TxnResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease. `ttl_seconds` is what etcd granted, which may be more than was asked for."""

    id: int
    ttl_seconds: int


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """What etcd knows of a lease. `ttl_seconds` is what is left of `granted_ttl_seconds`."""

    id: int
    ttl_seconds: int
    granted_ttl_seconds: int
    keys: tuple[bytes, ...] = ()


class EventKind(enum.Enum):
    """What happened to a key."""

    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Event:
    """`kv` of a DELETE has only its key and mod_revision; `prev_kv` is there where it was asked for."""

    kind: EventKind
    kv: KeyValue
    prev_kv: KeyValue | None = None


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Everything up to and including `revision` has been delivered with this batch.

    A batch without events is news too: the follower is as fresh as `revision`. A revision is never split
    over two batches.
    """

    revision: int
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """State of the member that answered. `leader` is 0 while it knows none."""

    endpoint: str
    cluster_id: int
    member_id: int
    revision: int
    raft_term: int
    version: str
    leader: int
    db_size_bytes: int
    db_in_use_bytes: int
    errors: tuple[str, ...] = ()
    is_learner: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """One member of the cluster."""

    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    is_learner: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Counters since the client was opened, and its present state."""

    endpoint: str  # the endpoint that calls are sent to first
    calls: int  # unary calls made by callers
    retries: int  # further tries of those
    rotations: int  # changes to another endpoint
    unknown_outcomes: int
    authentications: int
    watch_streams: int  # upstream watches that are open now
    watchers: int  # local subscribers of them
    watch_resumes: int  # times that an upstream watch was taken up again after a loss
    keep_alive_streams: int  # streams opened so far
    leases_waiting: int  # refreshes that are not acknowledged yet
