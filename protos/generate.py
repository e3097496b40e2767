#!/usr/bin/env python3
"""Write the generated Python code from the protos into a checkout: python protos/generate.py [ROOT].

The code is committed; tests/gates/test_static_checks.py generates it again elsewhere and compares. ROOT is the folder
that holds (or shall hold) the package `localmesh`; it is this checkout unless told otherwise.
"""

import shutil
import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(root: Path) -> None:
    """Generate messages and type stubs for every proto, service stubs for those whose services we serve or call."""
    for stale in (root / "localmesh").rglob("*_pb2*.py*"):
        if stale.suffix in {".py", ".pyi"}:
            stale.unlink()
    ours = sorted((PROTOS / "localmesh").rglob("*.proto"))
    theirs = sorted((PROTOS / "thirdparty").rglob("*.proto"))
    _run(root, PROTOS, [f for f in ours if "store" not in f.parts], services=True)
    _run(root, PROTOS, [f for f in ours if "store" in f.parts], services=False)
    _run(root, PROTOS / "thirdparty", [f for f in theirs if f.stem == "backend"], services=True)
    _run(root, PROTOS / "thirdparty", [f for f in theirs if f.stem != "backend"], services=False)


def _run(root: Path, include: Path, files: list[Path], *, services: bool) -> None:
    plugin = shutil.which("protoc-gen-mypy", path=str(Path(sys.executable).parent)) or shutil.which("protoc-gen-mypy")
    arguments = [
        "protoc",
        f"-I{include}",
        f"-I{WELL_KNOWN}",
        f"--plugin=protoc-gen-mypy={plugin}",
        f"--python_out={root}",
        f"--mypy_out={root}",
    ]
    if services:
        arguments.append(f"--grpc_python_out={root}")
    if protoc.main([*arguments, *(str(f) for f in files)]) != 0:
        raise SystemExit("protoc failed: see above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
