"""The worker's pure parts: budgets, ports, presence, rotation, environments, what engines and measurements say."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.core.budgets import budget_bytes
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import MeasuredRecord
from localmesh.worker.agent import differs
from localmesh.worker.engines import LlamaAbility, llama_engine, minilm_engine, read_probe
from localmesh.worker.hardware import Device, hardware_labels
from localmesh.worker.launch import ReplicaFolder, folder_of, replica_environment
from localmesh.worker.ports import QUARANTINE_SECONDS, PortAllocator, PortRange, PortsExhausted
from localmesh.worker.presence import BACKOFF_MOST_SECONDS, Presence, Rotation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80%", 800),
        ("12.5 %", 125),
        ("100%", 1000),
        ("500", 500),
        ("0", 0),
        ("0.5KB", 500),
        ("2000", 1000),
        ("1GiB", 1000),
    ],
)
def test_a_budget_is_a_part_or_an_amount_and_at_most_all(text: str, expected: int) -> None:
    """F9."""
    assert budget_bytes(text, total_bytes=1000) == expected


def test_units_are_read_in_both_kinds() -> None:
    total = 1 << 50
    assert budget_bytes("12GiB", total_bytes=total) == 12 << 30
    assert budget_bytes("12 gb", total_bytes=total) == 12 * 10**9
    assert budget_bytes("9007199254740993", total_bytes=1 << 60) == 9007199254740993


@pytest.mark.parametrize("text", ["", "%", "-1", "101%", "12 parsecs", "1e9", "nan%", "½", "1,5GiB", "9" * 5 + "%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a memory budget"):
        budget_bytes(text, total_bytes=1000)


@given(st.text(max_size=12), st.integers(0, 1 << 50))
def test_any_text_is_a_budget_within_the_total_or_refused(text: str, total: int) -> None:
    try:
        found = budget_bytes(text, total_bytes=total)
    except ValueError:
        return
    assert 0 <= found <= total


def test_a_range_of_ports_is_read() -> None:
    """F46."""
    assert PortRange.parse(" 9600-9699 ") == PortRange(9600, 9699)
    assert PortRange.parse("9600") == PortRange(9600, 9600)


@pytest.mark.parametrize("text", ["9700-9600", "0-5", "1-70000", "-1", "a-b", "9600-"])
def test_what_is_no_range_of_ports_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a range of ports"):
        PortRange.parse(text)


def test_a_port_rests_after_its_use_and_foreign_listeners_are_passed_over() -> None:
    """F46."""
    ports = PortAllocator(PortRange(10, 12), is_free=lambda port: port != 11)
    assert (ports.take(now=0), ports.take(now=0)) == (10, 12)
    ports.give_back(10, now=1)
    with pytest.raises(PortsExhausted, match="every port from 10 to 12"):
        ports.take(now=QUARANTINE_SECONDS)
    assert ports.take(now=1 + QUARANTINE_SECONDS) == 10


def test_without_a_range_the_system_chooses() -> None:
    """F46."""
    ports = PortAllocator(None, is_free=lambda port: False)
    assert ports.take(now=0) == 0
    ports.give_back(0, now=0)
    assert ports.take(now=0) == 0


@given(st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=40))
def test_no_port_is_handed_out_twice_at_a_time(steps: list[int | None]) -> None:
    """F46."""
    ports, taken, now = PortAllocator(PortRange(1, 5), is_free=lambda port: True), set[int](), 0.0
    for step in steps:
        now += 5
        if step is not None and step + 1 in taken:
            taken.discard(step + 1)
            ports.give_back(step + 1, now=now)
            continue
        try:
            port = ports.take(now=now)
        except PortsExhausted:
            continue
        assert port not in taken
        taken.add(port)


def test_a_registration_lives_from_the_sending_of_the_last_answered_heartbeat() -> None:
    """F4."""
    presence = Presence()
    assert not presence.alive(now=0)
    presence.registered(7, ttl_seconds=5, sent_at=100)
    presence.sent(1, now=102)
    presence.sent(2, now=103)
    assert presence.alive(now=104.9)
    assert not presence.alive(now=105)
    presence.acknowledged(1)
    assert presence.alive(now=106.9)
    assert not presence.alive(now=107)
    presence.acknowledged(99)
    assert not presence.alive(now=107)
    presence.acknowledged(2)
    assert presence.alive(now=107.9)
    presence.lost()
    assert not presence.alive(now=104)


def test_an_answer_counts_for_its_own_stream_only() -> None:
    """F4."""
    presence = Presence()
    presence.registered(7, ttl_seconds=5, sent_at=100)
    presence.sent(1, now=104)
    presence.new_stream()
    presence.acknowledged(1)
    assert not presence.alive(now=105)


def test_registries_rotate_and_waits_grow_to_a_limit() -> None:
    """F4."""
    rotation = Rotation(("a", "b"), chance=Random(1))
    waits = []
    for expected in ("a", "b", "a", "b", "a", "b", "a", "b"):
        assert rotation.endpoint == expected
        waits.append(rotation.failed(rotate=True))
    assert 0 < waits[0] <= 0.1
    assert max(waits) > 0.3
    assert max(waits) <= BACKOFF_MOST_SECONDS
    rotation.worked()
    assert rotation.failed(rotate=False) <= 0.1
    assert rotation.endpoint == "a"


def test_a_worker_without_registries_is_refused() -> None:
    with pytest.raises(ValueError, match="no registry"):
        Rotation((), chance=Random(1))


def test_a_replica_gets_no_secrets_and_its_gpus_only() -> None:
    """F46."""
    folder = ReplicaFolder(path=Path("/r/x"))
    given_ = {"PATH": "/bin", "LOCALMESH_JOIN": "secret", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    devices = {DeviceId("GPU-2"): 1, CPU: 1, DeviceId("GPU-1"): 1}
    found = replica_environment(given_, folder=folder, devices=devices)
    assert found == {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2",
        "LOCALMESH_REPLICA_DIR": "/r/x",
        "PYTHONUNBUFFERED": "1",
    }
    assert replica_environment(given_, folder=folder, devices={CPU: 1})["CUDA_VISIBLE_DEVICES"] == ""


def test_replicas_have_short_folders_of_their_own() -> None:
    """F46."""
    long = ModelName("a:" + "x" * 120)
    folders = {
        folder_of(Path("/r"), ReplicaId(model, NodeName("n"), index)).path.name
        for model in (long, ModelName(long + "y"), ModelName("a"))
        for index in (0, 1)
    }
    assert len(folders) == 6
    assert all(len(name) <= 30 and ":" not in name for name in folders)


def test_a_cpu_build_on_a_gpu_node_says_which_wheel_to_install() -> None:
    engine = llama_engine(LlamaAbility(version="1.2"), gpus=True)
    assert engine.available
    assert engine.device_kinds == ("cpu",)
    assert "cu128" in engine.detail
    assert "wheel" not in llama_engine(LlamaAbility(version="1.2"), gpus=False).detail
    assert llama_engine(LlamaAbility(version="1.2", gpu=True), gpus=True).device_kinds == ("cpu", "gpu")


def test_an_engine_that_is_missing_says_what_to_install() -> None:
    assert "localmesh[engines]" in llama_engine(LlamaAbility(version=""), gpus=False).detail
    minilm = minilm_engine(LlamaAbility(version="1"), missing=["gguf", "numpy"])
    assert (minilm.available, minilm.device_kinds) == (False, ())
    assert "gguf, numpy" in minilm.detail


@pytest.mark.parametrize(
    ("code", "output", "errors", "gpu", "problem"),
    [
        (0, b'noise\n\n["GGML_BACKEND_DEVICE_TYPE_CPU"]\n', b"", False, ""),
        (0, b'["..._TYPE_CPU", "..._TYPE_GPU"]', b"", True, ""),
        (0, b'["..._TYPE_IGPU"]', b"", True, ""),
        (1, b"", b"Traceback\nImportError: libgomp.so.1", False, "does not start here: ImportError: libgomp.so.1"),
        (-4, b"", b"", False, "does not start here: exit code -4"),
        (0, b"", b"", False, "does not start here: exit code 0"),
        (0, b"3", b"", False, "does not start here: exit code 0"),
    ],
)
def test_what_the_engine_s_probe_says_is_read(code: int, output: bytes, errors: bytes, gpu: bool, problem: str) -> None:
    assert read_probe("1", code, output, errors) == LlamaAbility(version="1", gpu=gpu, problem=problem)


def test_noise_is_no_change_of_a_measurement() -> None:
    """F9."""
    base = MeasuredRecord(free_bytes={CPU: 1000}, cpu_load=0.5, disk_free_bytes=10_000)
    assert not differs(base, MeasuredRecord(free_bytes={CPU: 1009}, cpu_load=0.52, disk_free_bytes=10_050))
    assert differs(base, MeasuredRecord(free_bytes={CPU: 900}, cpu_load=0.5, disk_free_bytes=10_000))
    assert differs(base, MeasuredRecord(free_bytes={}, cpu_load=0.5, disk_free_bytes=10_000))
    assert differs(base, MeasuredRecord(free_bytes={CPU: 1000}, cpu_load=0.9, disk_free_bytes=10_000))
    assert differs(base, MeasuredRecord(free_bytes={CPU: 1000}, cpu_load=0.5, disk_free_bytes=9_000))


def test_a_node_labels_what_only_it_can_tell() -> None:
    """F6."""
    ram = Device(id=CPU, kind="cpu", name="RAM", total_bytes=1, budget_bytes=1)
    gpu = Device(id=DeviceId("GPU-1"), kind="gpu", name="G", total_bytes=1, budget_bytes=1, vendor="nvidia")
    assert set(hardware_labels((ram,))) == {"cpu.arch"}
    assert hardware_labels((ram, gpu))["gpu.vendor"] == "nvidia"
