"""The rules of the house that no linter knows."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import localmesh

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "localmesh"
GENERATED = {"v1", "thirdparty"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def own_code() -> Iterator[Path]:
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        if "_pb2" not in path.name and "__pycache__" not in path.parts:
            yield path


def packages() -> list[str]:
    return sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in {"__pycache__", *GENERATED})


def test_top_level_is_the_house() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: the top level cannot be told from build outputs")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    folders = {name for name in top if (ROOT / name).is_dir()}
    assert folders <= {"protos", "localmesh", "cmd", "tests", "deploy", ".ci"}


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in own_code() if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES}
    assert not long


def test_functions_are_short() -> None:
    long = {}
    for path in own_code():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                first = node.body[0]
                start = first.end_lineno if ast.get_docstring(node) and first.end_lineno else node.lineno
                if node.end_lineno - start > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - start
    assert not long


def test_no_module_is_a_drawer() -> None:
    drawers = [str(p) for p in own_code() if p.stem in {"utils", "util", "helpers", "helper", "common", "misc"}]
    assert not drawers


@pytest.mark.parametrize("package", packages())
def test_every_package_explains_itself(package: str) -> None:
    readme = PACKAGE / package / "README.md"
    assert readme.is_file(), f"localmesh/{package}/README.md is missing"
    assert 5 <= len(readme.read_text().splitlines()) <= 120


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(p.relative_to(ROOT)) for p in own_code() if ast.get_docstring(ast.parse(p.read_text())) is None]
    assert not silent


def test_cmd_holds_flat_scripts_of_ten_lines() -> None:
    files = [p for p in (ROOT / "cmd").iterdir() if p.name != "__pycache__"]
    assert files
    for path in files:
        assert re.fullmatch(r"localmesh_[a-z]+\.py", path.name), path.name
        assert len(path.read_text().splitlines()) <= 10, path.name


def test_changelog_knows_the_version() -> None:
    assert f"## {localmesh.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_lock_file_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[\[<>=!~ ]", d)[0].lower() for d in asked} - {"localmesh"}
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert names <= locked
