"""The static checks, as tests: a failure here is a failure of the build."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# `buf build protos --config OUR_PROTOS --exclude-source-info -o protos/released.binpb` makes the baseline anew, at a
# release, or before the first one.
OUR_PROTOS = '{"version": "v1", "breaking": {"use": ["WIRE_JSON"]}, "build": {"excludes": ["thirdparty"]}}'


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_code_is_formatted() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_code_passes_the_linter() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


@pytest.mark.timeout(600)
def test_types_are_strict_and_right() -> None:
    run(sys.executable, "-m", "mypy")


@pytest.mark.timeout(300)
def test_imports_point_down() -> None:
    run(str(BIN / "lint-imports"), "--no-cache")


def test_protos_follow_the_style() -> None:
    run(str(BIN / "buf"), "lint")


def test_protos_are_formatted() -> None:
    run(str(BIN / "buf"), "format", "--diff", "--exit-code", "--path", "protos/localmesh")


def test_protos_do_not_break_released_clients() -> None:
    run(str(BIN / "buf"), "breaking", "protos", "--config", OUR_PROTOS, "--against", "protos/released.binpb")


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    (tmp_path / "localmesh").mkdir()
    run(sys.executable, "protos/generate.py", str(tmp_path))
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*_pb2*") if p.is_file()}
    committed = {
        p.relative_to(ROOT): p.read_bytes()
        for p in (ROOT / "localmesh").rglob("*_pb2*")
        if p.suffix in {".py", ".pyi"} and "__pycache__" not in p.parts
    }
    assert fresh.keys() == committed.keys(), "run: python protos/generate.py"
    stale = [str(p) for p, text in fresh.items() if committed[p] != text]
    assert not stale, f"run: python protos/generate.py ({stale})"
