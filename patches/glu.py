"""Gated activations of a model on a CPU by one compiled kernel: ``activation(gate) * up`` (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from foveate.sparse_attn.ops.native import ACTIVATIONS, DTYPES, ISAS, GluCall, library

# How far an activation may be off; exact GELU and its tanh form are 5e-4 apart.
_ERROR = 1e-5


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The reference: ``[M, K]`` each, computed in float32 and rounded once; ``activation`` is a key of ACTIVATIONS."""
    exact = gate.float()
    acted = functional.silu(exact) if activation == "silu" else functional.gelu(exact, approximate="tanh")
    return (acted * up.float()).to(gate.dtype)


def name_of(activation: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Which activation of the kernel a module computes, found by trying; ``None`` if it is another."""
    x = torch.linspace(-8, 8, 64)
    acted = activation(x)
    for name in ACTIVATIONS:
        if bool(((glu(x, torch.ones_like(x), name) - acted).abs() <= _ERROR).all()):
            return name
    return None


def supports(joint: torch.Tensor) -> bool:
    """Were the kernels compiled, and do they take this input?"""
    return joint.device.type == "cpu" and joint.dtype in DTYPES and library() is not None


class NativeGlu:
    """``glu`` of the two halves of ``[M, 2 K]``.

    Args:
        activation: A key of ``ACTIVATIONS``.
        isa: For tests.

    Attributes:
        call: What is the same in all calls.

    Raises:
        RuntimeError: the kernels were not compiled.
    """

    def __init__(self, activation: str, *, isa: str | None = None) -> None:
        kernels = library()
        if kernels is None:
            raise RuntimeError("the native CPU kernels were not built")
        self._kernels = kernels
        self.call = GluCall(activation=ACTIVATIONS[activation], isa=ISAS.index(isa or kernels.isa))

    def __call__(self, joint: torch.Tensor) -> torch.Tensor:
        """``joint [M, 2 K]``, dense, to ``[M, K]``."""
        rows, width = joint.shape[0], joint.shape[1] // 2
        out = torch.empty((rows, width), dtype=joint.dtype)
        call = GluCall.from_buffer_copy(self.call)  # its own: other threads may run the layer too
        call.gate = address = joint.data_ptr()
        call.up, call.out = address + width * joint.element_size(), out.data_ptr()
        call.input_stride, call.rows, call.width = 2 * width, rows, width
        call.dtype, call.num_threads = DTYPES[joint.dtype], torch.get_num_threads()
        self._kernels.glu(call)
        return out
