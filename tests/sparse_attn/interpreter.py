"""What Triton's interpreter lacks, for scripts that run kernels in it; not collected by pytest."""

from __future__ import annotations

from .script import INTERPRETED


def teach_interpreter() -> None:
    """Products of bfloat16 and quick sorting; nothing where kernels are compiled."""
    if INTERPRETED:
        _teach_bfloat16_products()
        _teach_exclusive_or()


def _teach_bfloat16_products() -> None:
    """Triton 3.9's interpreter keeps bfloat16 as its bits in uint16, and multiplies those; this widens them first."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _teach_exclusive_or() -> None:
    """The interpreter sums by exclusive or, which sorting is made of, element by element in Python: here, at once."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import ReduceOps

    plain = ReduceOps.generic_reduce

    def generic_reduce(self, given):
        if self.combine_fn is not tl.standard._xor_combine or len(given) != 1 or self.axis is None:
            return plain(self, given)
        found = np.bitwise_xor.reduce(given[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(found, given[0].dtype)]

    ReduceOps.generic_reduce = generic_reduce
