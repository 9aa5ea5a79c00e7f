"""The arrows between the folders, read from the imports.

server -> patches -> sparse_attn -> kv_cache -> torch; an arrow may jump down, never up. Across folders imports are
absolute, inside a folder relative. Third-party libraries have their places too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["kv_cache", "sparse_attn", "patches", "server"]  # lowest first
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))

# Libraries that may be used in some places only; every other library is free above kv_cache.
HTTP = {"fastapi", "pydantic", "pydantic_settings", "uvicorn", "starlette", "prometheus_client"}
TRANSFORMERS_IN_SERVER = {"loader.py", "packaged.py", "doctor.py"}
BACKENDS = ("triton", "flashinfer")  # each only in files with its name in theirs


class Import(NamedTuple):
    """One import: the module as an absolute name, how many dots led to it, and whether loading the file runs it."""

    module: str
    names: tuple[str, ...]
    level: int
    line: int
    at_load: bool

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def read_imports(path: Path, source: str | None = None) -> list[Import]:
    package = ["foveate", *path.relative_to(ROOT).parts[:-1]]

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, (), 0, child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                names = tuple(alias.name for alias in child.names)
                yield Import(module, names, child.level, child.lineno, at_load)
            else:
                inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_load and not inner and not is_type_checking(child))

    return list(walk(ast.parse(source or path.read_text(encoding="utf-8")), True))


def violations(path: Path, source: str | None = None) -> list[str]:
    layer = path.relative_to(ROOT).parts[0]
    allowed_below = LAYERS[: LAYERS.index(layer)]
    found = []
    for entry in read_imports(path, source):
        problem = None
        if entry.library == "foveate":
            problem = _own_import(entry, layer, allowed_below)
            problem = problem or _backend_module(entry, path)
        elif entry.library not in sys.stdlib_module_names:
            problem = _third_party(entry.library, layer, path)
        if problem:
            found.append(f"{path.relative_to(ROOT)}:{entry.line}: {entry.module}: {problem}")
    return found


def _own_import(entry: Import, layer: str, allowed_below: list[str]) -> str | None:
    parts = entry.module.split(".")
    if len(parts) == 1:  # `from foveate import x`, or relative out of the folder
        if entry.level:
            return "across folders imports are absolute"
        targets = set(entry.names)
        return None if layer == "server" and targets == {"__version__"} else "only server may ask for the version"
    target = parts[1]
    if target == layer:
        return None if entry.level else "inside a folder imports are relative"
    if entry.level:
        return "across folders imports are absolute"
    return None if target in allowed_below else f"{layer} may not import {target}"


def _backend_module(entry: Import, path: Path) -> str | None:
    """A module of a kernel backend is imported where it is called, so that the others work without its library."""
    for backend in BACKENDS:
        named = [name for name in (entry.module.rpartition(".")[2], *entry.names) if backend in name]
        if named and entry.at_load and backend not in path.stem:
            return f"{named[0]} must be imported inside the function that calls it"
    return None


def _third_party(library: str, layer: str, path: Path) -> str | None:
    if library == "triton" and not path.stem.endswith("_triton"):
        return "triton belongs in *_triton.py"
    if library == "flashinfer" and "flashinfer" not in path.stem:
        return "flashinfer belongs in files with its name"
    if library in HTTP and layer != "server":
        return f"{library} belongs in server"
    if library == "transformers" and layer != "patches":
        inside = layer == "server" and path.name in TRANSFORMERS_IN_SERVER
        return None if inside else f"transformers belongs in patches and server/{sorted(TRANSFORMERS_IN_SERVER)}"
    if layer == "kv_cache" and library not in {"torch", *BACKENDS}:
        return "kv_cache knows torch only"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    assert violations(path) == []


def test_root_loads_nothing_at_import():
    (root,) = (ROOT / "src" / "foveate").glob("*.py")
    package = Path("foveate", root.name)
    loaded = [entry.library for entry in read_imports(ROOT / package, root.read_text()) if entry.at_load]
    assert set(loaded) <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("kv_cache/pool.py", "from foveate.sparse_attn import registry", "kv_cache may not import sparse_attn"),
        ("sparse_attn/attend.py", "import foveate.server.engine", "sparse_attn may not import server"),
        ("patches/attach.py", "from foveate import __version__", "only server"),
        ("server/engine.py", "from foveate.server.request import Delta", "relative"),
        ("server/engine.py", "from ..kv_cache.pool import PagePool", "absolute"),
        ("sparse_attn/schemes/dense.py", "from ... import kv_cache", "absolute"),
        ("kv_cache/pool.py", "import numpy", "torch only"),
        ("patches/attach.py", "def f():\n    import fastapi", "belongs in server"),
        ("server/engine.py", "from transformers import AutoConfig", "belongs in patches"),
        ("sparse_attn/ops/write.py", "import triton.language as tl", "_triton.py"),
        ("sparse_attn/ops/attention.py", "from .decode_triton import decode", "inside the function"),
        ("sparse_attn/ops/attention.py", "from . import prefill_flashinfer", "inside the function"),
        ("sparse_attn/ops/attention.py", "def f():\n    import flashinfer", "with its name"),
    ],
)
def test_wrong_import_is_found(file, line, said):
    (found,) = violations(ROOT / file, line)
    assert said in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("server/engine.py", "from foveate.kv_cache.pool import PagePool"),
        ("server/engine.py", "from foveate import __version__"),
        ("sparse_attn/schemes/dense.py", "from ..protocol import Scheme"),
        ("sparse_attn/ops/attention.py", "def f():\n    from .decode_triton import decode"),
        ("sparse_attn/ops/decode_triton.py", "import triton\nfrom .layout_triton import load"),
        ("kv_cache/pool.py", "import math\nimport torch"),
    ],
)
def test_right_import_is_let_pass(file, line):
    assert violations(ROOT / file, line) == []
