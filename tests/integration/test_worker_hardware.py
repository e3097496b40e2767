"""What a node is made of: NVML with a stand-in library in a process of its own, cgroups as files, this very machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from localmesh.core.ids import CPU, DeviceId
from localmesh.worker.hardware import Gpu, Hardware, NvmlProbe, Ram, cgroup_memory, ram

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30

PROBE = """
import json, sys
from pathlib import Path
from localmesh.worker.hardware import Hardware, NvmlProbe, Ram

hardware = Hardware(
    gpu_probe=NvmlProbe(), disk=Path("/"), memory_budget="90%", gpu_memory_budget="50%",
    read_ram=lambda: Ram(total_bytes=1000, free_bytes=600),
)
for line in sys.stdin:
    devices, measured = hardware.devices(), hardware.measure()
    print(json.dumps({
        "devices": [[d.id, d.kind, d.name, d.total_bytes, d.budget_bytes, d.unified] for d in devices],
        "free": dict(measured.free_bytes),
        "used": dict(hardware.gpu_bytes_of([7, 8])),
    }), flush=True)
"""


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the stand-in for libnvidia-ml")
    folder = tmp_path_factory.mktemp("nvml")
    source = ROOT / "tests/nvml/fake_nvml.c"
    target = folder / "libnvidia-ml.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(target), str(source)], check=True
    )
    return folder


class Probed:
    """A process that looks at the hardware each time it is asked."""

    def __init__(self, folder: Path, state: Path, **environment: str) -> None:
        self.state = state
        env = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROBE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**env, "FAKE_NVML_STATE": str(state), **environment},
        )

    def look(self, state: str) -> dict[str, Any]:
        self.state.write_text(state)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=20)
        assert self._process.returncode == 0


def test_gpus_are_devices_with_a_budget_and_what_is_free_is_measured_anew(nvml_folder: Path, tmp_path: Path) -> None:
    """F9."""
    with Probed(nvml_folder, tmp_path / "state") as probed:
        found = probed.look("GPU-1|Fast 1|1000|100|7:60,9:40\nGPU-2|Fast 2|2000|0|\n")
        assert found["devices"] == [
            ["cpu", "cpu", "RAM", 1000, 900, False],
            ["GPU-1", "gpu", "Fast 1", 1000, 500, False],
            ["GPU-2", "gpu", "Fast 2", 2000, 1000, False],
        ]
        assert found["free"] == {"cpu": 600, "GPU-1": 900, "GPU-2": 2000}
        assert found["used"] == {"GPU-1": 60}
        found = probed.look("GPU-1|Fast 1|1000|700|7:60,8:500\nGPU-2|Fast 2|2000|0|\n")
        assert found["free"]["GPU-1"] == 300
        assert found["used"] == {"GPU-1": 560}


def test_a_gpu_without_memory_of_its_own_shares_the_ram(nvml_folder: Path, tmp_path: Path) -> None:
    """F9."""
    with Probed(nvml_folder, tmp_path / "state") as probed:
        found = probed.look("GPU-1|Unified|0|0|\n")
    assert found["devices"][1] == ["GPU-1", "gpu", "Unified", 1000, 500, True]
    assert found["free"] == {"cpu": 600, "GPU-1": 600}


def test_a_lost_gpu_is_not_full_but_unknown(nvml_folder: Path, tmp_path: Path) -> None:
    """F9."""
    with Probed(nvml_folder, tmp_path / "state") as probed:
        probed.look("GPU-1|Fast|1000|0|\nGPU-2|Fast|1000|0|\n")
        found = probed.look("GPU-1|Fast|-1|0|\nGPU-2|Fast|1000|0|\n")
    assert found["free"] == {"cpu": 600, "GPU-2": 1000}
    assert [d[0] for d in found["devices"]] == ["cpu", "GPU-2"]


def test_a_library_without_a_driver_means_no_gpu(nvml_folder: Path, tmp_path: Path) -> None:
    """F9."""
    with Probed(nvml_folder, tmp_path / "state", FAKE_NVML_INIT="9") as probed:
        found = probed.look("GPU-1|Fast|1000|0|\n")
    assert [d[0] for d in found["devices"]] == ["cpu"]


def test_this_machine_has_memory_and_a_disk(tmp_path: Path) -> None:
    """F9, F1."""
    hardware = Hardware(
        gpu_probe=NvmlProbe(), disk=tmp_path / "not/there/yet", memory_budget="80%", gpu_memory_budget="90%"
    )
    cpu, measured = hardware.devices()[0], hardware.measure()
    assert cpu.id == CPU
    assert 0 < cpu.total_bytes <= psutil.virtual_memory().total
    assert cpu.budget_bytes == cpu.total_bytes * 80 // 100
    assert 0 < measured.free_bytes[CPU] <= cpu.total_bytes
    assert 0 < measured.disk_free_bytes <= hardware.disk_total_bytes()
    assert measured.cpu_load >= 0
    assert ram().total_bytes == cpu.total_bytes


class FixedGpus:
    """GPUs by hand."""

    def gpus(self) -> tuple[Gpu, ...]:
        return (Gpu(id=DeviceId("g"), name="G", total_bytes=10, free_bytes=None),)


def test_a_gpu_that_does_not_tell_what_is_free_is_left_out_of_the_measurement(tmp_path: Path) -> None:
    """F9."""
    hardware = Hardware(
        gpu_probe=FixedGpus(),
        disk=tmp_path,
        memory_budget="100",
        gpu_memory_budget="90%",
        read_ram=lambda: Ram(total_bytes=50, free_bytes=5),
    )
    assert [d.budget_bytes for d in hardware.devices()] == [50, 9]
    assert hardware.measure().free_bytes == {CPU: 5}


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_tightest_limit_above_a_process_counts_in_cgroup_v2(tmp_path: Path) -> None:
    """F9."""
    _write(
        tmp_path,
        {
            "a/memory.max": str(4 * GIB),
            "a/memory.current": str(3 * GIB),
            "a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "5",
        },
    )
    found = cgroup_memory("0::/a/b\n", root=tmp_path)
    assert found is not None
    assert (found.limit_bytes, found.used_bytes) == (4 * GIB, 2 * GIB)


def test_limits_of_cgroup_v1_are_read_too_and_no_limit_is_none(tmp_path: Path) -> None:
    """F9."""
    _write(
        tmp_path,
        {
            "memory/c/memory.limit_in_bytes": str(2 * GIB),
            "memory/c/memory.usage_in_bytes": str(GIB),
            "memory/d/memory.limit_in_bytes": "9223372036854771712",
            "memory/d/memory.usage_in_bytes": "1",
        },
    )
    found = cgroup_memory("8:memory:/c\n3:cpuset:/x\n0::/\n", root=tmp_path)
    assert found is not None
    assert (found.limit_bytes, found.used_bytes) == (2 * GIB, GIB)
    assert cgroup_memory("8:memory:/d\n", root=tmp_path) is None
    assert cgroup_memory("", root=tmp_path) is None
    assert cgroup_memory("nonsense\n0::/not/there\n", root=tmp_path) is None


def test_a_container_sees_its_own_limit_at_the_root(tmp_path: Path) -> None:
    """F9."""
    _write(tmp_path, {"memory.max": str(GIB), "memory.current": "7"})
    found = cgroup_memory("0::/docker/abc\n", root=tmp_path)
    assert found is not None
    assert found.limit_bytes == GIB
