"""How much can be claimed on a node's devices.

Every device has a budget of its own. Devices that share the node's RAM, which are `cpu` and every GPU that is
`unified`, share the budget of `cpu` besides: what is claimed on all of them together never exceeds it. Filters, the
last check before T1 and the adoption of running replicas (T0) all ask here.
"""

from collections.abc import Mapping

from localmesh.core.ids import CPU, DeviceId, ReplicaId
from localmesh.core.records import DeviceRecord

Devices = Mapping[DeviceId, DeviceRecord]
"""All devices of one node."""


def sharing(devices: Devices, device: DeviceId) -> tuple[DeviceRecord, ...]:
    """Return the devices whose claims come from the same memory as those on a device: that one, if it has its own."""
    if CPU not in devices or not _in_ram(devices[device]):
        return (devices[device],)
    return tuple(d for d in devices.values() if _in_ram(d))


def unclaimed_bytes(devices: Devices, device: DeviceId, *, claimant: ReplicaId | None = None) -> int:
    """Return what can be claimed on a device; negative after its budget was lowered.

    Args:
        devices: All of the node.
        device: Which.
        claimant: Who asks: claims that were handed over to it are its to take.
    """
    return left_bytes(devices, {device: 0}, claimant=claimant)[device]


def left_bytes(
    devices: Devices, sizes: Mapping[DeviceId, int], *, claimant: ReplicaId | None = None
) -> dict[DeviceId, int]:
    """Return what is left of each device once all the sizes are claimed together; negative where they do not fit.

    Args:
        devices: All of the node; those of `sizes` are among them.
        sizes: Bytes for each device.
        claimant: Who claims.
    """
    left = {}
    for device, size in sizes.items():
        record = devices[device]
        room = record.unclaimed_bytes + _handed_over(record, claimant) - size
        shared = sharing(devices, device)
        if len(shared) > 1:
            claimed = sum(d.claimed_bytes - _handed_over(d, claimant) + sizes.get(d.id, 0) for d in shared)
            room = min(room, devices[CPU].budget_bytes - claimed)
        left[device] = room
    return left


def _in_ram(device: DeviceRecord) -> bool:
    return device.id == CPU or device.unified


def _handed_over(device: DeviceRecord, claimant: ReplicaId | None) -> int:
    return device.claims.get(claimant, 0) if claimant is not None else 0
