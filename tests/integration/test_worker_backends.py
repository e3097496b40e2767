"""Backends of a node: installed, upgraded, deleted and listed over gRPC, from folders, archives and packages."""

import asyncio
import contextlib
import hashlib
import subprocess
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.core.errors import (
    BackendExists,
    BackendInstallFailed,
    BackendInUse,
    BackendInvalid,
    BackendNotFound,
    InvalidRequest,
)
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.rpc.errors import from_rpc_error
from localmesh.v1 import backends_pb2 as types
from localmesh.v1 import worker_service_pb2 as pb
from localmesh.v1 import worker_service_pb2_grpc as pb_grpc
from localmesh.worker.agent import Worker
from tests.integration.test_worker_unpack import tar
from tests.integration.worker_kit import Mesh, finished, serving_registry, working

CHUNK = 64 << 10


class Node:
    """A worker that serves, and a caller."""

    def __init__(self, worker: Worker, mesh: Mesh, stub: Any, folder: Path) -> None:
        self.worker = worker
        self.mesh = mesh
        self.stub = stub
        self.folder = folder
        self.installed = folder / "state/backends"

    async def install(self, source: types.BackendSource, name: str = "fake", data: bytes = b"") -> list[Any]:
        return await self._change(self.stub.InstallBackend, pb.InstallBackendRequest, source, name, data)

    async def upgrade(self, source: types.BackendSource, name: str = "fake", data: bytes = b"") -> list[Any]:
        return await self._change(self.stub.UpgradeBackend, pb.UpgradeBackendRequest, source, name, data)

    async def _change(self, method: Any, request: Any, source: Any, name: str, data: bytes) -> list[Any]:
        call, responses = method(timeout=60), []
        await call.write(request(order=types.BackendOrder(name=name, source=source)))
        while (response := await call.read()) is not grpc.aio.EOF:
            if not responses and response.progress.phase == types.BACKEND_PHASE_UPLOADING:
                for start in range(0, len(data), CHUNK):
                    await call.write(request(chunk=data[start : start + CHUNK]))
                await call.done_writing()
            responses.append(response)
        return responses

    async def listed(self) -> dict[str, Any]:
        found = await self.stub.ListBackends(pb.ListBackendsRequest(), timeout=10)
        return {backend.name: backend for backend in found.backends}

    async def told_engine(self, name: str, *, there: bool) -> None:
        """Wait until the registry was told what engines there are."""
        await self.mesh.until(
            lambda: bool(self.mesh.facts) and any(e.name == name for e in self.mesh.facts[-1].engines) is there
        )

    def leftovers(self) -> list[str]:
        return [str(p) for p in (self.installed / ".staging").glob("*")] if self.installed.exists() else []


@contextlib.asynccontextmanager
async def a_node(folder: Path, **changes: Any) -> AsyncIterator[Node]:
    mesh = Mesh()
    async with serving_registry(mesh, "a") as (_, endpoint), working(folder, endpoint, **changes) as worker:
        await mesh.until(lambda: mesh.beats)
        async with grpc.aio.insecure_channel(worker.endpoint) as channel:
            yield Node(worker, mesh, pb_grpc.WorkerServiceStub(channel), folder)
        await finished(worker, mesh)


def backend_folder(folder: Path, text: str = "one") -> types.BackendSource:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.sh").write_text(f"#!/bin/sh\necho {text}\n")
    (folder / "run.sh").chmod(0o755)
    return types.BackendSource(directory=str(folder))


def uploaded(data: bytes) -> types.BackendSource:
    digest = hashlib.sha256(data).hexdigest()
    return types.BackendSource(archive=types.BackendArchive(sha256=digest, size_bytes=len(data)))


async def to_end(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


@contextlib.contextmanager
def refused(kind: type[Exception], words: str = "") -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    error = from_rpc_error(caught.value)
    assert isinstance(error, kind), error
    assert words in error.message


async def test_a_backend_is_installed_from_a_folder_and_its_engine_is_told_at_once(tmp_path: Path) -> None:
    """F48."""
    async with a_node(tmp_path) as node:
        source = backend_folder(tmp_path / "source")
        *_, last = await node.install(source)
        assert last.progress.phase == types.BACKEND_PHASE_DONE
        assert (last.backend.name, last.backend.generation, last.unchanged) == ("fake", 1, False)
        assert last.backend.runnable
        await node.told_engine("process:fake", there=True)
        again = (await node.install(source))[-1]
        assert (again.unchanged, again.backend.generation) == (True, 1)
        backend_folder(tmp_path / "source", "two")
        with refused(BackendExists, "upgrade it"):
            await node.install(source)
        found = (await node.listed())["fake"]
        assert found.source == f"folder {tmp_path / 'source'}"
        assert found.size_bytes == len("#!/bin/sh\necho one\n")
        assert not node.leftovers()
        await node.stub.DeleteBackend(pb.DeleteBackendRequest(name="fake"), timeout=10)
        await node.told_engine("process:fake", there=False)
        assert await node.listed() == {}
        with refused(BackendNotFound):
            await node.stub.DeleteBackend(pb.DeleteBackendRequest(name="fake"), timeout=10)
        assert (await node.install(source))[-1].backend.generation == 2


async def test_an_uploaded_archive_is_checked_and_not_asked_for_twice(tmp_path: Path) -> None:
    """F48."""
    path = tar(tmp_path / "a.tar", ("run.sh", b"#!/bin/sh\n"), ("weights", b"x" * 500_000), compression="")
    data = path.read_bytes()
    async with a_node(tmp_path) as node:
        with refused(BackendInvalid, "damaged on its way"):
            await node.install(uploaded(data), data=data[:-1])
        assert not node.leftovers()
        with refused(InvalidRequest):
            await node.install(types.BackendSource(archive=types.BackendArchive(sha256="abc")), data=data)
        responses = await node.install(uploaded(data), data=data)
        assert responses[0].progress.phase == types.BACKEND_PHASE_UPLOADING
        assert responses[-1].backend.sha256 == hashlib.sha256(data).hexdigest()
        again = await node.install(uploaded(data))  # not one byte is sent
        assert again[-1].unchanged
        on_node = types.BackendArchive(path=str(path), sha256=hashlib.sha256(data).hexdigest())
        upgraded = (await node.upgrade(types.BackendSource(archive=on_node)))[-1]
        assert upgraded.backend.generation == 2
        path.write_bytes(data + b"tampered")
        with refused(BackendInvalid, "another file"):
            await node.upgrade(types.BackendSource(archive=on_node))
        assert (await node.listed())["fake"].generation == 2
        assert not node.leftovers()


async def test_an_upgrade_stops_what_runs_the_old_one_and_is_never_a_no_op(tmp_path: Path) -> None:
    """F48: neither an upgrade that does nothing, nor a process that goes on in a deleted folder."""
    async with a_node(tmp_path) as node:
        source = backend_folder(tmp_path / "source")
        await node.install(source)
        key = await node.mesh.place()
        await node.mesh.serving()
        old = (node.installed / "fake").resolve()
        spec = next((tmp_path / "run").rglob("spec.json")).read_text()
        assert f'"{old}"' in spec
        assert [r.index for r in (await node.listed())["fake"].replicas] == [0]
        with refused(BackendInUse, "m/n1/0"):
            await node.stub.DeleteBackend(pb.DeleteBackendRequest(name="fake"), timeout=10)
        with refused(BackendInvalid):
            await node.upgrade(types.BackendSource(directory=str(tmp_path / "nowhere")))
        assert not node.mesh.exits
        last = (await node.upgrade(source))[-1]
        assert (last.backend.generation, [r.index for r in last.stopped]) == (2, [0])
        await node.mesh.until(lambda: node.mesh.exits)
        assert (node.mesh.exits[0].exited.reason, node.mesh.exits[0].exited.message) == (
            "",
            "its backend fake is upgraded",
        )
        assert not old.exists()
        assert (node.installed / "fake").resolve().name == "fake-2"
        assert key not in node.mesh.wanted
        node.mesh.reports.clear()
        await node.mesh.place()
        await node.mesh.serving()
        deleted = await node.stub.DeleteBackend(pb.DeleteBackendRequest(name="fake", force=True), timeout=20)
        assert [r.index for r in deleted.stopped] == [0]
        assert await node.listed() == {}


async def test_a_replica_that_is_wanted_during_a_change_waits_for_its_end(tmp_path: Path) -> None:
    """F48."""
    async with a_node(tmp_path) as node:
        await node.install(backend_folder(tmp_path / "source"))
        await node.mesh.place()
        await node.mesh.serving()
        runner = node.worker._runner
        with runner.held_back("fake"):
            await runner.vacate("fake", "for a test")
            await node.mesh.until(lambda: node.mesh.exits)
            node.mesh.reports.clear()
            await node.mesh.place()
            await node.mesh.until(lambda: node.mesh.reports)
            assert not runner.users("fake")
        await node.mesh.serving()
        assert runner.users("fake") == {ReplicaId(ModelName("m"), NodeName("n1"), 0)}


async def test_two_requests_for_the_same_install_share_one_that_outlives_its_caller(tmp_path: Path) -> None:
    """F48."""
    source = backend_folder(tmp_path / "source")
    async with a_node(tmp_path) as node:
        backends = node.worker.backends
        request = pb.InstallBackendRequest(order=types.BackendOrder(name="fake", source=source))
        async with backends.lock("fake"):
            first, second = (node.stub.InstallBackend(timeout=60) for _ in range(2))
            for call in (first, second):
                await call.write(request)
            assert (await first.read()).progress.phase == types.BACKEND_PHASE_WAITING
            assert (await second.read()).progress.phase == types.BACKEND_PHASE_WAITING
            first.cancel()
        responses = await to_end(second)
        assert (responses[-1].backend.generation, responses[-1].unchanged) == (1, False)
        assert (backends.folder.last_generation("fake"), node.leftovers()) == (1, [])


async def test_a_long_change_of_one_backend_holds_up_no_other(tmp_path: Path) -> None:
    """F48."""
    source = backend_folder(tmp_path / "source")
    async with a_node(tmp_path) as node:
        await node.install(source, name="slow")
        async with asyncio.TaskGroup() as group:
            async with node.worker.backends.lock("slow"):
                waiting = group.create_task(node.upgrade(source, name="slow"))
                assert (await node.install(source, name="quick"))[-1].backend.generation == 1
                assert not waiting.done()
        assert waiting.result()[-1].backend.generation == 2


async def test_a_worker_that_is_told_to_stop_gives_up_an_install_and_leaves_nothing(tmp_path: Path) -> None:
    """F48."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "setup.py").write_text("import signal; signal.pause()")
    async with a_node(tmp_path) as node:
        call = node.stub.InstallBackend(timeout=60)
        order = types.BackendOrder(name="slow", source=_pip([str(slow)], module="slow"))
        await call.write(pb.InstallBackendRequest(order=order))
        progress = await call.read()
        while "installing" not in progress.progress.message:
            progress = await call.read()
        node.worker.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await to_end(call)
    assert not node.leftovers()


async def test_a_failed_install_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    """F48."""
    async with a_node(tmp_path) as node:
        (tmp_path / "empty").mkdir()
        evil = tar(tmp_path / "evil.tgz", ("../evil", b"x")).read_bytes()
        for source, data, kind, words in (
            (types.BackendSource(directory=str(tmp_path / "empty")), b"", BackendInvalid, "run.sh"),
            (types.BackendSource(directory="relative"), b"", InvalidRequest, "absolute"),
            (types.BackendSource(directory=str(tmp_path)), b"", BackendInvalid, "own backends"),
            (types.BackendSource(), b"", InvalidRequest, "no source"),
            (uploaded(evil), evil, BackendInvalid, "leads out"),
            (_pip(["--index-url=http://x"], module="m"), b"", BackendInvalid, "not a requirement"),
            (_pip(["x"]), b"", BackendInvalid, "either the module or"),
            (_pip([str(tmp_path / "no.whl")], module="m"), b"", BackendInstallFailed, "no.whl"),
        ):
            with refused(kind, words):
                await node.install(source, data=data)
        with refused(InvalidRequest, "name of a backend"):
            await node.install(backend_folder(tmp_path / "source"), name="../up")
        with refused(InvalidRequest, "the first message"):
            call = node.stub.InstallBackend(timeout=10)
            await call.write(pb.InstallBackendRequest(chunk=b"x"))
            await call.read()
        with refused(BackendNotFound):
            await node.upgrade(backend_folder(tmp_path / "source"), name="other")
        assert await node.listed() == {}
        assert not node.leftovers()
        assert not (tmp_path / "evil").exists()


async def test_a_backend_put_there_by_hand_is_seen_but_not_changed(tmp_path: Path) -> None:
    """F48."""
    async with a_node(tmp_path) as node:
        source = backend_folder(tmp_path / "backends/fake")
        await node.told_engine("process:fake", there=True)
        found = (await node.listed())["fake"]
        assert (found.generation, found.source, found.runnable) == (0, "put there by hand", True)
        with refused(BackendExists, "by hand"):
            await node.install(source)
        with refused(BackendNotFound, "by hand"):
            await node.upgrade(source)
        with refused(BackendNotFound, "by hand"):
            await node.stub.DeleteBackend(pb.DeleteBackendRequest(name="fake", force=True), timeout=10)
        assert (tmp_path / "backends/fake/run.sh").exists()


async def test_what_a_killed_worker_left_half_done_is_swept(tmp_path: Path) -> None:
    """F48."""
    async with a_node(tmp_path) as node:
        await node.install(backend_folder(tmp_path / "source"))
    backends = tmp_path / "state/backends"
    (backends / ".staging/fake-xyz").mkdir(parents=True)
    (backends / ".versions/fake-7").mkdir()
    (backends / "broken").symlink_to(".versions/broken-1")
    async with a_node(tmp_path) as node:
        assert list(await node.listed()) == ["fake"]
    assert not list((backends / ".staging").glob("*"))
    assert [p.name for p in (backends / ".versions").iterdir() if p.is_dir()] == ["fake-1"]
    assert not (backends / "broken").is_symlink()


async def test_a_backend_is_made_of_a_package_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """F48."""
    wheel = _wheel(tmp_path)
    async with a_node(tmp_path) as node:
        responses = await node.install(_pip([str(wheel)], module="toybackend"), name="module")
        assert any(r.progress.phase == types.BACKEND_PHASE_INSTALLING and r.progress.message for r in responses)
        await node.install(_pip([str(wheel)], script="toy-backend"), name="script")
        with refused(BackendInvalid, "no module 'toybackends'"):
            await node.install(_pip([str(wheel)], module="toybackends"), name="third")
        for name in ("module", "script"):
            done = await asyncio.to_thread(
                subprocess.run,
                [str(node.installed / name / "run.sh"), "--addr", "127.0.0.1:1"],
                capture_output=True,
                text=True,
                env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "/nowhere"},
                cwd="/",
            )
            words = done.stdout.split()
            assert words[:3] == ["toy", "--addr", "127.0.0.1:1"], done
            assert Path(words[3]).resolve().is_relative_to((node.installed / name).resolve())
        assert not node.leftovers()


def _pip(requirements: list[str], *, module: str = "", script: str = "") -> types.BackendSource:
    return types.BackendSource(pip=types.BackendRequirement(requirements=requirements, module=module, script=script))


def _wheel(folder: Path) -> Path:
    path = folder / "toybackend-1.0-py3-none-any.whl"
    code = (
        "import sys\ndef main():\n    print('toy', *sys.argv[1:], sys.prefix)\nif __name__ == '__main__':\n    main()\n"
    )
    files = {
        "toybackend.py": code,
        "toybackend-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toybackend\nVersion: 1.0\n",
        "toybackend-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toybackend-1.0.dist-info/entry_points.txt": "[console_scripts]\ntoy-backend = toybackend:main\n",
    }
    files["toybackend-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path
