"""What the node is made of and how much of it is free: GPUs by NVML, RAM, CPU and disk by psutil and cgroups.

Everything here may block for milliseconds: call it in a thread. What cannot be measured is left out, never guessed:
unknown is not full.
"""

import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import psutil
import pynvml

from localmesh.core.budgets import budget_bytes
from localmesh.core.ids import CPU, DeviceId
from localmesh.core.labels import CPU_ARCH, GPU_VENDOR
from localmesh.core.records import MeasuredRecord

_log = logging.getLogger(__name__)
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""Cgroup v1 says "no limit" with a number near 2**63."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU at one moment."""

    id: DeviceId
    """Its UUID."""
    name: str
    total_bytes: int
    """0 when it has no memory of its own."""
    free_bytes: int | None
    """None when it cannot be told."""
    unified: bool = False
    """It shares the node's RAM."""
    vendor: str = ""
    """"nvidia" and the like; empty when it cannot be told."""
    process_bytes: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Bytes by process id, as the driver numbers processes: a container sees the host's numbers."""


class GpuProbe(Protocol):
    """Where GPU facts come from."""

    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs that answer now. Never raises for what a driver or a GPU does."""
        ...


class NvmlProbe:
    """GPUs by NVIDIA's management library. Without a library or a driver there are none."""

    def __init__(self) -> None:
        self._ready = False
        self._said = ""

    def gpus(self) -> tuple[Gpu, ...]:
        """See GpuProbe."""
        if not self._ready:
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError as error:
                self._say(f"no NVIDIA GPU: {error}")
                return ()
            self._ready = True
        try:
            count = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            # e.g. the driver was replaced below us: begin anew at the next look
            self._say(f"NVML does not answer: {error}")
            self.close()
            return ()
        found = (self._gpu(index) for index in range(count))
        return tuple(gpu for gpu in found if gpu is not None)

    def close(self) -> None:
        """Give the library back."""
        if self._ready:
            self._ready = False
            _ask(pynvml.nvmlShutdown)

    def _gpu(self, index: int) -> Gpu | None:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError as error:
            self._say(f"GPU {index} does not answer: {error}")
            return None
        total, free, unified = _gpu_memory(handle)
        return Gpu(
            id=DeviceId(uuid),
            name=_text(_ask(lambda: pynvml.nvmlDeviceGetName(handle)) or "NVIDIA GPU"),
            total_bytes=total,
            free_bytes=free,
            unified=unified,
            vendor="nvidia",
            process_bytes=MappingProxyType(_gpu_processes(handle)),
        )

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            _log.info("%s", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ram:
    """Memory that the node's processes can use: the machine's, or less in a cgroup with a limit."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """The tightest memory limit above a process."""

    limit_bytes: int
    used_bytes: int
    """Without page cache that the system can take back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as the registry is told of it."""

    id: DeviceId
    kind: str
    name: str
    total_bytes: int
    budget_bytes: int
    unified: bool = False
    vendor: str = ""


class Hardware:
    """The node's devices and their free memory.

    Args:
        gpu_probe: Where GPU facts come from.
        disk: Folder whose file system is measured.
        memory_budget: What replicas may claim of the RAM, as in localmesh.core.budgets.
        gpu_memory_budget: The same, of each GPU.
        read_ram: Where RAM facts come from.
    """

    def __init__(
        self,
        *,
        gpu_probe: GpuProbe,
        disk: Path,
        memory_budget: str,
        gpu_memory_budget: str,
        read_ram: Callable[[], Ram] | None = None,
    ) -> None:
        self._gpu_probe = gpu_probe
        self._disk = disk
        self._memory_budget = memory_budget
        self._gpu_memory_budget = gpu_memory_budget
        self._read_ram = read_ram or ram

    def devices(self) -> tuple[Device, ...]:
        """Return the devices, the CPU first.

        Raises:
            ValueError: A budget is written wrongly.
        """
        memory = self._read_ram()
        cpu = Device(
            id=CPU,
            kind="cpu",
            name="RAM",
            total_bytes=memory.total_bytes,
            budget_bytes=budget_bytes(self._memory_budget, total_bytes=memory.total_bytes),
        )
        # a GPU without memory that is not the node's own is lost or cut up: nothing can be placed on it
        usable = (gpu for gpu in self._gpu_probe.gpus() if gpu.total_bytes or gpu.unified)
        return (cpu, *(self._gpu_device(gpu, memory) for gpu in usable))

    def measure(self) -> MeasuredRecord:
        """Return what is free now."""
        memory = self._read_ram()
        free = {CPU: memory.free_bytes}
        for gpu in self._gpu_probe.gpus():
            if gpu.unified:
                free[gpu.id] = memory.free_bytes
            elif gpu.free_bytes is not None:
                free[gpu.id] = gpu.free_bytes
        return MeasuredRecord(
            free_bytes=MappingProxyType(free), cpu_load=_cpu_load(), disk_free_bytes=_disk_usage(self._disk)[1]
        )

    def disk_total_bytes(self) -> int:
        """Return the size of the disk, 0 when it cannot be told."""
        return _disk_usage(self._disk)[0]

    def gpu_bytes_of(self, pids: Iterable[int]) -> Mapping[DeviceId, int]:
        """Return the GPU memory that processes use, by device. Devices whose driver does not know them are left out."""
        wanted = frozenset(pids)
        found = {}
        for gpu in self._gpu_probe.gpus():
            used = sum(n for pid, n in gpu.process_bytes.items() if pid in wanted)
            if used:
                found[gpu.id] = used
        return MappingProxyType(found)

    def _gpu_device(self, gpu: Gpu, memory: Ram) -> Device:
        total = memory.total_bytes if gpu.unified else gpu.total_bytes
        return Device(
            id=gpu.id,
            kind="gpu",
            name=gpu.name,
            total_bytes=total,
            budget_bytes=budget_bytes(self._gpu_memory_budget, total_bytes=total),
            unified=gpu.unified,
            vendor=gpu.vendor,
        )


def hardware_labels(devices: Iterable[Device]) -> dict[str, str]:
    """Return the labels of a node that only the node itself can tell; the mesh adds those that follow from others."""
    vendors = sorted({device.vendor for device in devices if device.kind == "gpu" and device.vendor})
    return {CPU_ARCH: platform.machine(), **({GPU_VENDOR: vendors[0]} if vendors else {})}


def ram() -> Ram:
    """Return the memory of this machine, or of the cgroup that this process is in."""
    memory = psutil.virtual_memory()
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:
        membership = ""
    limited = cgroup_memory(membership, root=_CGROUP_ROOT)
    if limited is None or limited.limit_bytes >= memory.total:
        return Ram(total_bytes=memory.total, free_bytes=memory.available)
    left = max(0, limited.limit_bytes - limited.used_bytes)
    return Ram(total_bytes=limited.limit_bytes, free_bytes=min(memory.available, left))


def cgroup_memory(membership: str, *, root: Path) -> CgroupMemory | None:
    """Return the tightest memory limit of the cgroups that a process is in; None without one.

    Args:
        membership: Text of /proc/PID/cgroup.
        root: Where cgroups are mounted.
    """
    found: list[CgroupMemory] = []
    for line in membership.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "memory":
            base, limit, used, cache = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        elif controllers == "":
            base, limit, used, cache = root, "memory.max", "memory.current", ""
        else:
            continue
        here = base / path.lstrip("/")
        # a container sees its own cgroup at the mount's root under a path that is not there
        for folder in (here, *here.parents):
            if not folder.is_relative_to(base):
                break
            one = _cgroup_folder(folder / limit, folder / used, folder / "memory.stat", f"{cache}inactive_file")
            if one is not None:
                found.append(one)
    return min(found, key=lambda m: m.limit_bytes, default=None)


def _cgroup_folder(limit: Path, used: Path, stat: Path, cache_key: str) -> CgroupMemory | None:
    limit_bytes, used_bytes = _number(limit), _number(used)
    if limit_bytes is None or limit_bytes >= _UNLIMITED or used_bytes is None:
        return None
    cache = 0
    try:
        for line in stat.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == cache_key:
                cache = int(value)
    except (OSError, ValueError):
        cache = 0
    return CgroupMemory(limit_bytes=limit_bytes, used_bytes=max(0, used_bytes - cache))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _cpu_load() -> float:
    return psutil.getloadavg()[0] / (psutil.cpu_count() or 1)


def _disk_usage(folder: Path) -> tuple[int, int]:
    """Return total and free bytes of the folder's file system, or of the nearest folder above that exists."""
    for place in (folder, *folder.parents):
        try:
            usage = psutil.disk_usage(str(place))
        except OSError:
            continue
        return usage.total, usage.free
    return 0, 0


def _gpu_memory(handle: Any) -> tuple[int, int | None, bool]:
    """Return total bytes, free bytes, and whether the GPU shares the node's RAM."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        # GB10, Thor and Jetson have no memory of their own; other errors are of a GPU that is lost or cut up
        return 0, None, getattr(error, "value", None) == pynvml.NVML_ERROR_NOT_SUPPORTED
    total = int(memory.total)
    return (total, int(memory.free), False) if total else (0, None, True)


def _gpu_processes(handle: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    for process in _ask(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ():
        if process.usedGpuMemory is not None:
            found[int(process.pid)] = int(process.usedGpuMemory)
    return found


def _ask(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
