"""An asyncio client of etcd v3, and a launcher of local servers. See README.md."""

from localmesh.etcd import txn as transactions
from localmesh.etcd.client import EtcdClient
from localmesh.etcd.config import EtcdConfig
from localmesh.etcd.election import Election, Leadership
from localmesh.etcd.errors import (
    AuthenticationFailed,
    Compacted,
    ConnectionFailedError,
    ConnectionTimeoutError,
    EtcdError,
    LeaseExpired,
    PermissionDenied,
    PreconditionFailedError,
    RequestRefused,
    RevisionCompactedError,
    ServerStartError,
    StoreReset,
    UnknownOutcome,
    WatcherTooSlow,
    WatchLost,
    WatchTimedOut,
)
from localmesh.etcd.keepalive import Refresh
from localmesh.etcd.keys import Key, as_bytes, prefix_end
from localmesh.etcd.lease import LeaseSession
from localmesh.etcd.lock import Lock
from localmesh.etcd.messages import (
    DeleteResult,
    Event,
    EventKind,
    KeyValue,
    Lease,
    LeaseInfo,
    Member,
    PutResult,
    RangeResult,
    Statistics,
    Status,
    TxnResult,
    WatchBatch,
)
from localmesh.etcd.server import EtcdBinary, EtcdServer, ServerTls, find_etcd
from localmesh.etcd.txn import Compare, Op
from localmesh.etcd.watcher import Watcher

__all__ = [
    "AuthenticationFailed",
    "Compacted",
    "Compare",
    "ConnectionFailedError",
    "ConnectionTimeoutError",
    "DeleteResult",
    "Election",
    "EtcdBinary",
    "EtcdClient",
    "EtcdConfig",
    "EtcdError",
    "EtcdServer",
    "Event",
    "EventKind",
    "Key",
    "KeyValue",
    "Leadership",
    "Lease",
    "LeaseExpired",
    "LeaseInfo",
    "LeaseSession",
    "Lock",
    "Member",
    "Op",
    "PermissionDenied",
    "PreconditionFailedError",
    "PutResult",
    "RangeResult",
    "Refresh",
    "RequestRefused",
    "RevisionCompactedError",
    "ServerStartError",
    "ServerTls",
    "Statistics",
    "Status",
    "StoreReset",
    "TxnResult",
    "UnknownOutcome",
    "WatchBatch",
    "WatchLost",
    "WatchTimedOut",
    "Watcher",
    "WatcherTooSlow",
    "as_bytes",
    "find_etcd",
    "prefix_end",
    "transactions",
]
