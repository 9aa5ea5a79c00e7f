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
# The same for quantised linear layers: ``foveate_linear_isa`` of linear.h.
LINEAR_ISAS = ("avx2", "avxvnni", "avx512vnni", "amx")
# The fastest of them beside an instruction set for attention, so that one variable holds both back.
LINEAR_WITH = {"avx2": "avxvnni", "avx512": "avx512vnni", "avx512bf16": "avx512vnni", "amx": "amx"}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # ``foveate_activation`` of glu.h
DROPPED_SUMS = {"none": 0, "exact": 1, "bound": 2, "given": 3}  # ``foveate_dropped_sum``
NO_END = 2**31 - 1  # ``farthest`` of a band without end


class ThresholdCall(ctypes.Structure):
    """``foveate_threshold`` of kernels.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("theta", "expected", "value_mean", "value_sums", "kept")),
        ("dropped_sum", ctypes.c_int32),
        ("dropped_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("read_together", "sink_tokens", "recent_tokens")),
    )


class Call(ctypes.Structure):
    """``foveate_attention`` of kernels.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales", "out", "lse", "sinks")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("indices", "counts")),
        *((f"tile_{name}", ctypes.c_void_p) for name in ("sequence", "start", "count", "position")),
        ("threshold", ctypes.c_void_p),
        *((f"query_{name}_stride", ctypes.c_int64) for name in ("token", "head")),
        ("table_stride", ctypes.c_int64),
        ("selected_width", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_sequences", "num_heads", "num_kv_heads", "head_dim", "page_size")),
        *((name, ctypes.c_int32) for name in ("num_tiles", "selected_heads", "granularity", "nearest", "farthest")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "num_threads")),
    )


class AnchorCall(ctypes.Structure):
    """``foveate_anchor`` of anchor_call.h, field by field."""

    _fields_ = (
        ("attention", Call),
        *((name, ctypes.c_void_p) for name in ("first", "end", "budgets", "scores", "indices", "counts")),
        *((name, ctypes.c_int64) for name in ("score_width", "index_width", "query_step")),
        ("pool_all", ctypes.c_int32),
    )


class GateCall(ctypes.Structure):
    """``foveate_gate`` of gate.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "means", "first", "end", "indices", "counts")),
        *((name, ctypes.c_int64) for name in ("query_token_stride", "query_head_stride", "queries", "position")),
        *((name, ctypes.c_int64) for name in ("blocks", "block_tokens", "top_k")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "kinds", "head_dim")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "num_threads")),
    )


class ScanCall(ctypes.Structure):
    """``foveate_scan`` of scan.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "key_scales", "sums", "low", "high")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens", "start", "length", "out")),
        *((name, ctypes.c_int64) for name in ("query_token_stride", "query_head_stride", "table_stride")),
        *((name, ctypes.c_int64) for name in ("runs", "pages")),
        *((name, ctypes.c_int32) for name in ("num_sequences", "num_heads", "num_kv_heads", "head_dim", "page_size")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "num_threads")),
    )


class PickCall(ctypes.Structure):
    """``foveate_pick`` of pick.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "first", "end", "start", "length", "limit")),
        *((name, ctypes.c_void_p) for name in ("indices", "counts")),
        *((name, ctypes.c_int64) for name in ("rows", "kinds", "units", "width")),
        *((name, ctypes.c_int32) for name in ("higher_ties", "num_threads")),
    )


class SelectionCall(ctypes.Structure):
    """``foveate_selection`` of pick.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("indices", "sinks", "first", "last", "kept", "counts")),
        *((f"tile_{name}", ctypes.c_void_p) for name in ("sequence", "count", "position")),
        ("pairs", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "kinds", "width", "kept_width", "granularity")),
        *((name, ctypes.c_int64) for name in ("nearest", "farthest")),
    )


class NormCall(ctypes.Structure):
    """``foveate_norm`` of norm.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "out", "weight")),
        *((name, ctypes.c_int64) for name in ("input_stride", "rows", "width")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("from_one", "dtype", "isa", "num_threads")),
    )


class GluCall(ctypes.Structure):
    """``foveate_glu`` of glu.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "out")),
        *((name, ctypes.c_int64) for name in ("input_stride", "rows", "width")),
        *((name, ctypes.c_int32) for name in ("activation", "dtype", "isa", "num_threads")),
    )


class NarrowCall(ctypes.Structure):
    """``foveate_narrow`` of narrow.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "weight", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("input_stride", "residual_stride")),
        *((name, ctypes.c_int64) for name in ("rows", "in_channels", "out_channels")),
        *((name, ctypes.c_int32) for name in ("isa", "num_threads")),
    )


class ProductCall(ctypes.Structure):
    """``foveate_product`` of product.h, field by field."""

    _fields_ = (("narrow", ctypes.c_void_p), ("linear", ctypes.c_void_p))


class FinishCall(ctypes.Structure):
    """``foveate_finish`` of finish.h, field by field."""

    _fields_ = (
        *(("output", ProductCall), ("norm", NormCall), ("gates", ProductCall)),
        *(("glu", GluCall), ("down", ProductCall)),
    )


# The statistics that the kernels keep, by name.
STATS = (
    *(f"{source}_{fold}" for source in ("key", "value") for fold in ("sum", "min", "max")),
    "key_sum_16",
)


class WriteCall(ctypes.Structure):
    """``foveate_write`` of write.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "slots", "query", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in STATS),
        *(
            (f"{rows}_{name}_stride", ctypes.c_int64)
            for rows in ("query", "key", "value")
            for name in ("token", "head")
        ),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_pages")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        *((name, ctypes.c_int32) for name in ("page_size", "dtype", "num_threads")),
    )


class WholeStep(ctypes.Structure):
    """``foveate_whole_step`` of whole.h, field by field."""

    _fields_ = (
        ("write", WriteCall),
        ("attention", Call),
        *((name, ctypes.c_void_p) for name in ("owners", "keys_read")),
    )


class WholeLayer(ctypes.Structure):
    """``foveate_whole_layer`` of whole.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in STATS),
        ("sinks", ctypes.c_void_p),
        *((f"{rows}_token_stride", ctypes.c_int64) for rows in ("query", "key", "value")),
        *((name, ctypes.c_int32) for name in ("rotates", "farthest")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


class WholeChoice(ctypes.Structure):
    """``foveate_whole_choice`` of whole.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("indices", "counts")),
        *((f"tile_{name}", ctypes.c_void_p) for name in ("sequence", "start", "count", "position")),
        *((name, ctypes.c_void_p) for name in ("rank", "keep", "from_indices", "from_counts", "head_map")),
        ("selected_width", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_tiles", "selected_heads", "granularity", "from_heads", "whole")),
    )


class DecoderCall(ctypes.Structure):
    """``foveate_decoder`` of decoder.h, field by field."""

    _fields_ = (
        *(("norm", NormCall), ("projections", ProductCall * 3)),
        *(("query_norm", NormCall), ("key_norm", NormCall), ("finish", FinishCall)),
    )


class LinearCall(ctypes.Structure):
    """``foveate_linear`` of linear.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "out", "weight", "scales", "sums", "groups", "bias")),
        *((name, ctypes.c_int64) for name in ("input_stride", "rows", "in_channels", "out_channels")),
        *((name, ctypes.c_int32) for name in ("weight_bits", "activation_bits", "dtype", "isa", "num_threads")),
        ("as_bytes", ctypes.c_int32),
    )


class Library:
    """The opened library.

    Attributes:
        isas: Instruction sets that were compiled in and that this CPU has, by rising speed.
        isa: The one in use: the fastest, or what ``FOVEATE_CPU_ISA`` names.
        prefill: ``foveate_prefill``.
        decode: ``foveate_decode``.
        anchor: ``foveate_anchor_run``.
        gate: ``foveate_gate_run``.
        scan_sums: ``foveate_scan_sums``.
        scan_bounds: ``foveate_scan_bounds``.
        pick_units: ``foveate_pick_units``.
        pick_walk: ``foveate_pick_walk``.
        keep: ``foveate_selection_keep``.
        pairs: ``foveate_selection_pairs``.
        norm: ``foveate_norm_run``.
        glu: ``foveate_glu_run``.
        narrow: ``foveate_narrow_run``.
        finish: ``foveate_finish_run``.
        write: ``foveate_write_run``.
        whole: ``foveate_whole_run``.
        decoder_begin: ``foveate_decoder_begin``.
        decoder_end: ``foveate_decoder_end``.
        decoder_run: ``foveate_decoder_run``.
        linear_isas: Like ``isas``, for quantised linear layers.
        linear_isa: The one of them in use, no faster a kind than ``isa``.
        linear: ``foveate_linear_run``.
        widen: ``foveate_linear_widen``.

    Raises:
        OSError: it cannot be opened, is of another version, or has no code for this CPU.
        ValueError: ``FOVEATE_CPU_ISA`` names none of ``isas``.
    """

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        if not (
            self._size("foveate_attention_size") == ctypes.sizeof(Call)
            and self._size("foveate_threshold_size") == ctypes.sizeof(ThresholdCall)
            and self._size("foveate_anchor_size") == ctypes.sizeof(AnchorCall)
            and self._size("foveate_gate_size") == ctypes.sizeof(GateCall)
            and self._size("foveate_scan_size") == ctypes.sizeof(ScanCall)
            and self._size("foveate_pick_size") == ctypes.sizeof(PickCall)
            and self._size("foveate_selection_size") == ctypes.sizeof(SelectionCall)
            and self._size("foveate_norm_size") == ctypes.sizeof(NormCall)
            and self._size("foveate_glu_size") == ctypes.sizeof(GluCall)
            and self._size("foveate_narrow_size") == ctypes.sizeof(NarrowCall)
            and self._size("foveate_finish_size") == ctypes.sizeof(FinishCall)
            and self._size("foveate_write_size") == ctypes.sizeof(WriteCall)
            and self._size("foveate_whole_step_size") == ctypes.sizeof(WholeStep)
            and self._size("foveate_whole_layer_size") == ctypes.sizeof(WholeLayer)
            and self._size("foveate_whole_choice_size") == ctypes.sizeof(WholeChoice)
            and self._size("foveate_decoder_size") == ctypes.sizeof(DecoderCall)
            and self._size("foveate_linear_size") == ctypes.sizeof(LinearCall)
        ):
            raise OSError(f"{path} was built from other sources; install again")
        self.isas = tuple(name for number, name in enumerate(ISAS) if self._handle.foveate_has_isa(number))
        if not self.isas:
            raise OSError("it has no code for this CPU")
        self.isa = os.environ.get(ISA_VARIABLE, self.isas[-1])
        if self.isa not in self.isas:
            raise ValueError(f"{ISA_VARIABLE}={self.isa}: this machine has {', '.join(self.isas)}")
        self.prefill = self._function("foveate_prefill", Call)
        self.decode = self._function("foveate_decode", Call)
        self.anchor = self._function("foveate_anchor_run", AnchorCall)
        self.gate = self._function("foveate_gate_run", GateCall)
        self.scan_sums = self._function("foveate_scan_sums", ScanCall)
        self.scan_bounds = self._function("foveate_scan_bounds", ScanCall)
        self.pick_units = self._function("foveate_pick_units", PickCall)
        self.pick_walk = self._function("foveate_pick_walk", PickCall)
        self.keep = self._function("foveate_selection_keep", SelectionCall)
        self.pairs = self._function("foveate_selection_pairs", SelectionCall)
        self.norm = self._function("foveate_norm_run", NormCall)
        self.glu = self._function("foveate_glu_run", GluCall)
        self.narrow = self._function("foveate_narrow_run", NarrowCall)
        self.finish = self._function("foveate_finish_run", FinishCall)
        self.finish.argtypes = (*(self.finish.argtypes or ()), *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int32)
        self.write = self._function("foveate_write_run", WriteCall)
        self.whole = self._function("foveate_whole_run", WholeStep, WholeLayer, WholeChoice)
        self.whole.argtypes = (*(self.whole.argtypes or ()), *[ctypes.c_void_p] * 4)
        layer = (DecoderCall, WholeStep, WholeLayer)
        self.decoder_begin = self._function("foveate_decoder_begin", *layer)
        self.decoder_end = self._function("foveate_decoder_end", *layer, WholeChoice)
        for function, addresses in ((self.decoder_begin, 2), (self.decoder_end, 3)):
            function.argtypes = (*(function.argtypes or ()), *[ctypes.c_void_p] * addresses)
        self.decoder_run = self._function("foveate_decoder_run", WholeStep)
        pointers = ctypes.POINTER(ctypes.c_void_p)
        self.decoder_run.argtypes = (
            *(pointers, ctypes.POINTER(WholeStep), pointers, pointers),
            *(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
        )
        self.linear_isas = tuple(
            name for number, name in enumerate(LINEAR_ISAS) if self._handle.foveate_linear_has_isa(number)
        )
        fastest = LINEAR_ISAS.index(LINEAR_WITH[self.isa])
        allowed = (name for name in reversed(self.linear_isas) if LINEAR_ISAS.index(name) <= fastest)
        self.linear_isa = next(allowed, None)
        self.linear = self._function("foveate_linear_run", LinearCall)
        self.widen = self._function("foveate_linear_widen", LinearCall)
        self._share_threads()

    def _size(self, name: str) -> int:
        function = getattr(self._handle, name, None)  # a library of an older version lacks the newer functions
        return -1 if function is None else int(function())

    def _function(self, name: str, *calls: type[ctypes.Structure]) -> ctypes._NamedFuncPointer:
        function: ctypes._NamedFuncPointer = getattr(self._handle, name)
        function.argtypes = tuple(ctypes.POINTER(call) for call in calls)
        function.restype = ctypes.c_int32
        return function

    def _share_threads(self) -> None:
        """Hands over the thread pool that torch itself runs on, so that a guest in a process needs no second one."""
        folder = Path(torch.__file__).parent / "lib"
        try:
            # Looked up through torch's own library, the symbol is that of the OpenMP runtime it is linked to.
            parallel = ctypes.CDLL(str(folder / "libtorch_cpu.so")).GOMP_parallel
        except (OSError, AttributeError) as error:  # on one thread they would be slower than torch on all
            raise OSError("torch's thread pool was not found") from error
        self._handle.foveate_set_parallel(parallel)

    def keep_threads(self, keep: bool = True) -> None:
        """From now on the kernels of this process run on threads of their own (native/pool.h), or on torch's again.

        For a process that serves, not for a guest in somebody's: torch's threads then sleep soon between two calls.
        """
        self._handle.foveate_keep_threads(int(keep))


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
