"""The wheel holds what the tree holds, and works where the tree is not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import foveate

ROOT = Path(__file__).parents[1]
# What the wheel is made from: the folders, and what pyproject.toml names beside them.
PARTS = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "src", "kv_cache", "sparse_attn", "patches", "server"]


def tree_files(root: Path) -> set[str]:
    """Every module of the tree, by its path in the wheel."""
    homes = {"foveate": root / "src" / "foveate"}
    homes |= {f"foveate/{name}": root / name for name in ("kv_cache", "sparse_attn", "patches", "server")}
    return {f"{home}/{path.relative_to(folder)}" for home, folder in homes.items() for path in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy: building leaves files in the tree it builds."""
    if find_spec("setuptools") is None:  # looked for, not imported: importing it replaces distutils in this process
        pytest.skip("building the wheel needs setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    # Optimising takes three quarters of the time, and nothing here asks how fast the kernels are.
    environment = os.environ | {"CXXFLAGS": "-O0"}
    command += ["--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that has the wheel, and sees third-party libraries but not the tree.

    A ``.pth`` file lends it this environment's libraries. An editable foveate among those stays out, because it hangs
    on a ``.pth`` file of its own, and such files count only in an environment's own folder.
    """
    env = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (own,) = env.glob("lib/python*/site-packages")
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "libraries.pth").write_text("\n".join(sorted(libraries)) + "\n")
    return python


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_module_of_the_tree(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    assert held == tree_files(ROOT)


def test_wheel_holds_the_kernels_for_any_python_and_not_their_sources(wheel):
    if not (platform.system() == "Linux" and platform.machine() == "x86_64"):
        pytest.skip("the kernels are compiled on x86-64 Linux")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if "/native/" in name}
    folder = "foveate/sparse_attn/ops/native"
    assert held == {f"{folder}/__init__.py", f"{folder}/libfoveate_kernels.so.1"}
    assert "-py3-none-linux_x86_64" in wheel.name


def test_every_package_of_the_tree_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {file.rpartition("/")[0].replace("/", ".") for file in tree_files(ROOT)}
    assert set(listed) == found
    assert {file for file in tree_files(ROOT) if file.endswith("__init__.py")} == {
        f"{name.replace('.', '/')}/__init__.py" for name in listed
    }


def test_wheel_is_typed_and_licensed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        metadata = archive.read(f"foveate-{foveate.__version__}.dist-info/METADATA").decode()
    assert "foveate/py.typed" in held
    assert f"foveate-{foveate.__version__}.dist-info/licenses/LICENSE" in held
    assert "License-Expression: Apache-2.0" in metadata


def test_installed_wheel_imports_without_the_tree(installed, tmp_path):
    code = "import foveate, sys; print(foveate.__file__); print('torch' in sys.modules)"
    file, heavy = run([str(installed), "-c", code], tmp_path).split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert heavy == "False"


def test_every_installed_module_imports(installed, tmp_path):
    """All but the kernels' modules, which need the library that they are named for."""
    code = """
import importlib, pkgutil, foveate
for module in pkgutil.walk_packages(foveate.__path__, "foveate."):
    if not module.name.endswith(("_triton", "__main__")) and "flashinfer" not in module.name:
        importlib.import_module(module.name)
        print(module.name)
"""
    names = run([str(installed), "-c", code], tmp_path).split()
    assert {"foveate.server.llm", "foveate.patches.attach", "foveate.kv_cache.pool"} <= set(names)


def test_installed_kernels_load(installed, tmp_path):
    """Also shows that they need nothing of the tree, and no compiler."""
    if not (platform.system() == "Linux" and platform.machine() == "x86_64"):
        pytest.skip("the kernels are compiled on x86-64 Linux")
    code = "from foveate.sparse_attn.ops.native import library; print(library().isa)"
    assert run([str(installed), "-c", code], tmp_path).strip() in {"avx2", "avx512", "avx512bf16", "amx"}


def test_console_script_runs(installed, tmp_path):
    assert foveate.__version__ in run([str(installed.with_name("foveate")), "--version"], tmp_path)
