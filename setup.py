"""Compiles the CPU kernels of ``sparse_attn/ops/native``; everything else is in pyproject.toml.

Each instruction set is a source of its own with flags of its own; which one runs is decided by the CPU that it runs
on. One that the compiler does not know is left out, and without any compiler foveate is installed all the same and
computes attention in torch. ``CXX`` chooses the compiler, and ``CXXFLAGS`` come behind our own flags.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = "foveate.sparse_attn.ops.native"
FOLDER = Path("sparse_attn", "ops", "native")
LIBRARY = "libfoveate_kernels.so.1"  # as native/__init__.py has it; ending in .so it would pass for a Python module
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# Source -> flags. Each that compiles defines FOVEATE_BUILT_<name> for dispatch.cpp.
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": AVX512BF16,
    "amx": AMX,
    "anchor_avx2": AVX2,
    "anchor_avx512": AVX512,
    "anchor_avx512bf16": [*AVX512BF16, "-mavx512vnni"],
    "anchor_amx": AMX,
    "gate_avx2": AVX2,
    "gate_avx512": AVX512,
    "norm_avx2": AVX2,
    "norm_avx512": AVX512,
    "scan_avx2": AVX2,
    "scan_avx512": AVX512,
    "glu_avx2": AVX2,
    "glu_avx512": AVX512,
    "narrow_avx2": AVX2,
    "narrow_avx512": AVX512,
    "write_avx2": AVX2,
    "linear_avx2": AVX2,
    "linear_avxvnni": [*AVX2, "-mavxvnni"],
    "linear_avx512vnni": [*AVX512, "-mavx512vnni"],
    "linear_amx": [*AVX512BF16, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
# Sources that choose among them, or are the same for all.
SHARED = (
    "cpu",
    "dispatch",
    "pool",
    "anchor",
    "gate",
    "scan",
    "pick",
    "keep",
    "norm",
    "glu",
    "narrow",
    "finish",
    "write",
    "whole",
    "decoder",
    "linear",
)


def compiler() -> str:
    """The C++ compiler: ``CXX``, or the first of the usual names.

    Raises:
        CompileError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise CompileError("no C++ compiler was found; attention will be computed in torch")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")


class BuildKernels(build_ext):
    """Builds the library by plain compiler calls: it is loaded by ctypes and is no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def run(self) -> None:
        self.in_tree = bool(self.inplace or self.editable_mode)  # setuptools forgets the first while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            self._build(library)
        except CompileError:
            library.unlink(missing_ok=True)  # what cannot be built again must not serve on
            if self.in_tree:
                (FOLDER / LIBRARY).unlink(missing_ok=True)
            raise

    def _build(self, library: Path) -> None:
        cxx, objects = compiler(), Path(self.build_temp)
        given = shlex.split(os.environ.get("CXXFLAGS", ""))
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(name: str, flags: list[str]) -> str:
            source = FOLDER / f"{name}.cpp"
            target = str(objects / f"{name}.o")
            run([cxx, *COMMON, *flags, *given, "-c", str(source), "-o", target])
            return target

        def compile_isa(name: str) -> str | None:
            try:  # the flags alone: an error in a source is no reason to go without it
                run([cxx, *INSTRUCTION_SETS[name], "-x", "c++", "-fsyntax-only", os.devnull])
            except CompileError:
                self.warn(f"kernels for {name} are left out: the compiler does not know {INSTRUCTION_SETS[name]}")
                return None
            return compile_one(f"isa_{name}", INSTRUCTION_SETS[name])

        with ThreadPoolExecutor() as pool:
            built = dict(zip(INSTRUCTION_SETS, pool.map(compile_isa, INSTRUCTION_SETS), strict=True))
        parts = {name: target for name, target in built.items() if target}
        if not parts:
            raise CompileError("no instruction set could be compiled; attention will be computed in torch")
        defines = [f"-DFOVEATE_BUILT_{name.upper()}" for name in parts]
        shared = [compile_one(name, defines) for name in SHARED]
        library.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: until then the old one serves, and a process that runs on it must not see it change.
        fresh = library.with_suffix(".new")
        run([cxx, "-shared", *parts.values(), *shared, "-o", str(fresh)])
        fresh.replace(library)


class Wheel(bdist_wheel):
    """Tagged for the platform alone: the library does not depend on the Python it was built with."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


HAS_KERNELS = platform.system() == "Linux" and platform.machine() in {"x86_64", "AMD64"}
SOURCES = [str(path) for path in sorted(FOLDER.glob("*.cpp"))]
HEADERS = [str(path) for path in sorted(FOLDER.glob("*.h"))]

if HAS_KERNELS:
    setup(
        ext_modules=[Extension(f"{PACKAGE}.kernels", SOURCES, depends=HEADERS, language="c++", optional=True)],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    )
else:
    setup()
