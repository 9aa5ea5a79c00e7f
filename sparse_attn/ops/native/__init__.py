"""The compiled CPU kernels, loaded without a compiler and without torch headers.

``library()`` finds and opens the shared library that the installation built beside this file. Where there is none
(no compiler at install time, or not an x86-64 machine) the torch paths do the work.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

LIBRARY_NAME = "libfoveate_kernels.so.1"
ISA_VARIABLE = "FOVEATE_CPU_ISA"
# By rising speed; their places are the numbers of ``foveate_isa`` in kernels.h.
ISAS = ("avx2", "avx512", "avx512bf16", "amx")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
NO_END = 2**31 - 1  # ``farthest`` of a band without end


class Call(ctypes.Structure):
    """``foveate_attention`` of kernels.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out", "lse", "sinks")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("indices", "counts")),
        *((f"tile_{name}", ctypes.c_void_p) for name in ("sequence", "start", "count", "position")),
        *((f"query_{name}_stride", ctypes.c_int64) for name in ("token", "head")),
        ("table_stride", ctypes.c_int64),
        ("selected_width", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_sequences", "num_heads", "num_kv_heads", "head_dim", "page_size")),
        *((name, ctypes.c_int32) for name in ("num_tiles", "selected_heads", "granularity", "nearest", "farthest")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "num_threads")),
    )


class Library:
    """The opened library.

    Attributes:
        isas: Instruction sets that were compiled in and that this CPU has, by rising speed.
        isa: The one in use: the fastest, or what ``FOVEATE_CPU_ISA`` names.
        prefill: ``foveate_prefill``.
        decode: ``foveate_decode``.

    Raises:
        OSError: it cannot be opened, is of another version, or has no code for this CPU.
        ValueError: ``FOVEATE_CPU_ISA`` names none of ``isas``.
    """

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        if self._handle.foveate_attention_size() != ctypes.sizeof(Call):
            raise OSError(f"{path} was built from other sources; install again")
        self.isas = tuple(name for number, name in enumerate(ISAS) if self._handle.foveate_has_isa(number))
        if not self.isas:
            raise OSError("it has no code for this CPU")
        self.isa = os.environ.get(ISA_VARIABLE, self.isas[-1])
        if self.isa not in self.isas:
            raise ValueError(f"{ISA_VARIABLE}={self.isa}: this machine has {', '.join(self.isas)}")
        self.prefill = self._function("foveate_prefill")
        self.decode = self._function("foveate_decode")
        self._share_threads()

    def _function(self, name: str) -> ctypes._NamedFuncPointer:
        function: ctypes._NamedFuncPointer = getattr(self._handle, name)
        function.argtypes = (ctypes.POINTER(Call),)
        function.restype = ctypes.c_int32
        return function

    def _share_threads(self) -> None:
        """Hands over the thread pool that torch itself runs on, so that there is no second one beside it."""
        folder = Path(torch.__file__).parent / "lib"
        try:
            # Looked up through torch's own library, the symbol is that of the OpenMP runtime it is linked to.
            parallel = ctypes.CDLL(str(folder / "libtorch_cpu.so")).GOMP_parallel
        except (OSError, AttributeError):
            logger.warning("torch's thread pool was not found: the native kernels run on one thread")
            return
        self._handle.foveate_set_parallel(parallel)


@cache
def library() -> Library | None:
    """The kernels, or ``None`` with one line in the log.

    Raises:
        ValueError: ``FOVEATE_CPU_ISA`` names an instruction set that this machine does not have.
    """
    try:
        return Library(Path(__file__).with_name(LIBRARY_NAME))
    except OSError as error:
        logger.warning("native CPU kernels are not available (%s): attention runs in torch", error)
        return None
