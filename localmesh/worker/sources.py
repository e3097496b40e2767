"""What this node knows of the models' files: are they there, how big, and how much memory will a replica take.

Everything here reads files: call it in a thread. Nothing is imported from the packages that provide models.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from localmesh.core.gguf import GgufError, estimate, read_header
from localmesh.core.ids import ModelName
from localmesh.core.records import ModelSpec, SourceRecord

_MIB = 1 << 20
_PIP = "pip:"
_MINILM_FIXED = 60 * _MIB
_PROCESS_FIXED = 512 * _MIB
"""An interpreter with a big framework in it, as foreign backends are."""
_MAX_FILES = 10_000
"""Of a folder, for its size."""


class SourceProblem(Exception):
    """A source cannot be used on this node; the message says why.

    Args:
        message: Why.
        path: Where it was looked for.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogItem:
    """A declared model."""

    revision: str
    spec: ModelSpec


def resolve(spec: ModelSpec, *, models_dir: Path) -> Path | None:
    """Return the absolute path of a model's file or folder, with links followed.

    Returns:
        None where the engine takes the source as it is: a foreign backend, and no such file.

    Raises:
        SourceProblem: There is no such file, or it is not one of those that a source may name.
    """
    foreign = spec.backend.startswith("process:")
    if foreign and not spec.source:
        return None
    try:
        if spec.source.startswith(_PIP):
            return _in_package(spec.source.removeprefix(_PIP))
        return _in_folder(spec.source, models_dir)
    except SourceProblem:
        if foreign:
            return None
        raise


def facts(item: CatalogItem, *, models_dir: Path) -> SourceRecord:
    """Return what this node knows of one model. Never raises for what is in the files."""
    try:
        path = resolve(item.spec, models_dir=models_dir)
        weights, memory = _sizes(item.spec, path)
    except SourceProblem as problem:
        return SourceRecord(revision=item.revision, present=False, path=problem.path, problem=str(problem))
    return SourceRecord(
        revision=item.revision,
        present=True,
        path=str(path) if path is not None else item.spec.source,
        weights_bytes=weights,
        memory_bytes=memory,
    )


class SourceBook:
    """Facts of all declared models, looked up again only when a file changed.

    Args:
        models_dir: Folder that plain sources are relative to.
    """

    def __init__(self, models_dir: Path) -> None:
        self._models_dir = models_dir
        self._known: dict[ModelName, tuple[tuple[object, ...], SourceRecord]] = {}

    def look(self, catalog: Iterable[CatalogItem]) -> MappingProxyType[ModelName, SourceRecord]:
        """Return the facts of every model of the catalog. Blocks: opens files whose time or size is new."""
        importlib.invalidate_caches()  # a package may have been installed meanwhile
        known = {}
        for item in catalog:
            stamp = (item.revision, self._stamp(item.spec))
            before = self._known.get(item.spec.name)
            if before is not None and before[0] == stamp:
                known[item.spec.name] = before
            else:
                known[item.spec.name] = (stamp, facts(item, models_dir=self._models_dir))
        self._known = known
        return MappingProxyType({name: record for name, (_, record) in known.items()})

    def _stamp(self, spec: ModelSpec) -> tuple[object, ...]:
        try:
            path = resolve(spec, models_dir=self._models_dir)
            if path is None:
                return ("as it is",)
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            return tuple((str(f), s.st_mtime_ns, s.st_size) for f in files[:_MAX_FILES] if (s := f.stat()))
        except (SourceProblem, OSError) as problem:
            return (str(problem),)


def _in_folder(source: str, models_dir: Path) -> Path:
    pure = PurePosixPath(source)
    if not source or "\0" in source:
        raise SourceProblem(f"{source!r} is not a path")
    looked_at = str(models_dir / source)
    if pure.is_absolute() or ".." in pure.parts:
        raise SourceProblem(
            f"the source {source!r} must be a path inside the models folder {models_dir}", path=looked_at
        )
    try:
        root = models_dir.resolve()
        path = (root / source).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise SourceProblem(f"there is no {looked_at}", path=looked_at) from error
    if not path.is_relative_to(root):
        raise SourceProblem(f"{looked_at} is a link to {path}, outside of the models folder", path=looked_at)
    return path


def _in_package(text: str) -> Path:
    name, _, inside = text.partition("/")
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise SourceProblem(f"not a Python package: {name!r}", path=f"{_PIP}{text}")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise SourceProblem(f"the Python package {name} cannot be looked up: {error}", path=f"{_PIP}{text}") from error
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise SourceProblem(
            f"the Python package {name} is not installed here: pip install --no-deps {name.replace('_', '-')}",
            path=f"{_PIP}{text}",
        )
    try:
        return _in_folder(inside or ".", Path(folders[0]))
    except SourceProblem as problem:
        raise SourceProblem(f"in the Python package {name}: {problem}", path=problem.path) from problem


def _sizes(spec: ModelSpec, path: Path | None) -> tuple[int, int]:
    """Return bytes of weights, and of memory that a replica will take.

    Raises:
        SourceProblem: The file is not what the engine needs.
    """
    if path is None:
        return 0, spec.memory_bytes or _PROCESS_FIXED
    try:
        if spec.backend == "llama":
            weights, memory = _gguf_sizes(spec, path)
        elif spec.backend == "minilm":
            weights, memory = _minilm_sizes(path)
        else:
            weights = _bytes_of(path)
            memory = weights * 6 // 5 + _PROCESS_FIXED
    except OSError as error:
        raise SourceProblem(f"{path} cannot be read: {error.strerror or error}", path=str(path)) from error
    return weights, spec.memory_bytes or memory


def _gguf_sizes(spec: ModelSpec, path: Path) -> tuple[int, int]:
    if path.is_dir():
        raise SourceProblem(f"{path} is a folder; the engine llama takes a GGUF file", path=str(path))
    try:
        with path.open("rb") as stream:
            header = read_header(stream)
        estimated = estimate(
            header,
            context_tokens=spec.context_tokens,
            slots=spec.slots or 1,
            cache_type=spec.cache_type,
            embeddings=spec.embeddings,
        )
    except GgufError as error:
        raise SourceProblem(f"{path}: {error}", path=str(path)) from error
    # of a split model the header of the first file tells its own tensors only
    others = sum(p.stat().st_size for p in _other_parts(path, header.split_count))
    return estimated.weights + others, estimated.total + others


def _other_parts(first: Path, count: int) -> list[Path]:
    """Return the further files of a split model, "NAME-00001-of-0000N.gguf" being the first.

    Raises:
        SourceProblem: One of them is missing.
    """
    if count <= 1:
        return []
    head, separator, _ = first.name.rpartition(f"-00001-of-{count:05}")
    parts = [first.with_name(f"{head}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)] if separator else []
    missing = next((p for p in parts if not p.is_file()), None)
    if missing is not None or not separator:
        raise SourceProblem(
            f"{first} is split into {count} files: "
            + (f"{missing} is missing" if missing else "name the first of them"),
            path=str(first),
        )
    return parts


def _minilm_sizes(path: Path) -> tuple[int, int]:
    weights = _bytes_of(path) if path.is_file() else sum(p.stat().st_size for p in path.glob("*.safetensors"))
    if not weights:
        raise SourceProblem(f"{path} holds no *.safetensors; the engine minilm needs one", path=str(path))
    return weights, weights * 6 // 5 + _MINILM_FIXED


def _bytes_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for count, found in enumerate(path.rglob("*")):
        if count >= _MAX_FILES:
            break
        if found.is_file():
            total += found.stat().st_size
    return total
