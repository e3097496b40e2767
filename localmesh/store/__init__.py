"""The mesh's state in etcd: keys, values, transactions, the watched snapshot and the locks. See README.md."""

from localmesh.etcd import Leadership
from localmesh.store.codec import revision_of
from localmesh.store.desired import Applied
from localmesh.store.holder import Hold, Holder, HolderConfig, HolderStatistics
from localmesh.store.keys import SELF_HOLDER, Keys
from localmesh.store.leader import LeaderElection
from localmesh.store.membership import LeaseTimes
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.store.placement import Placement
from localmesh.store.registration import DeviceFacts, Registered, Registration, RunningReplica

__all__ = [
    "SELF_HOLDER",
    "Applied",
    "DeviceFacts",
    "Hold",
    "Holder",
    "HolderConfig",
    "HolderStatistics",
    "Keys",
    "LeaderElection",
    "Leadership",
    "LeaseTimes",
    "MeshStore",
    "Mirror",
    "Placement",
    "Registered",
    "Registration",
    "RunningReplica",
    "revision_of",
]
