"""RMS norms of a model on a CPU by one compiled kernel, where ``transformers`` makes six passes and two casts."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from foveate.sparse_attn.ops.native import DTYPES, ISAS, NormCall, library

# Rows on which a replacement is compared with the original, and how far it may be off in steps of the element type.
_ROWS_COMPARED = 4
_STEPS = 4


class NativeNorm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dimension (RMSNorm, arXiv:1910.07467).

    Args:
        weight: ``[K]``, dense, float32 or bfloat16 on the CPU; kept.
        epsilon: Added to the mean.
        from_one: The weight is what is added to one, and multiplied before anything is rounded (Gemma).
        isa: For tests.

    Attributes:
        call: What is the same in all calls.

    Raises:
        RuntimeError: the kernels were not compiled.
    """

    def __init__(self, weight: torch.Tensor, epsilon: float, from_one: bool, *, isa: str | None = None) -> None:
        super().__init__()
        kernels = library()
        if kernels is None:
            raise RuntimeError("the native CPU kernels were not built")
        self._kernels = kernels
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._width, self._dtype = len(weight), weight.dtype  # asking the parameter costs more than the norm of a token
        self.call = NormCall(
            weight=self.weight.data_ptr(),
            width=len(weight),
            epsilon=epsilon,
            from_one=from_one,
            dtype=DTYPES[weight.dtype],
            isa=ISAS.index(isa or kernels.isa),
        )

    def widened(self) -> NativeNorm:
        """The same of float32 rows."""
        if self._dtype is torch.float32:
            return self
        return NativeNorm(self.weight.float(), self.call.epsilon, bool(self.call.from_one))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` of the weight's type to the same."""
        shape, width = x.shape, x.shape[-1]
        if x.dtype is not self._dtype or width != self._width:
            raise TypeError(f"a norm of {self._width} {self._dtype} got {tuple(x.shape)} of {x.dtype}")
        stride = width
        if not x.is_contiguous():
            rows = x.reshape(-1, width)
            x = rows if rows.stride(1) == 1 else rows.contiguous()
            stride = x.stride(0)
        out = torch.empty(shape, dtype=self._dtype)
        call = NormCall.from_buffer_copy(self.call)  # its own: other threads may run the layer too
        call.input, call.out = x.data_ptr(), out.data_ptr()
        call.input_stride, call.rows = stride, out.numel() // width
        call.num_threads = torch.get_num_threads()
        self._kernels.norm(call)
        return out


@torch.inference_mode()
def replace_norms(model: PreTrainedModel) -> None:
    """Replaces, in place, every norm that is an RMS norm by its name and by what it computes."""
    if model.device.type != "cpu" or library() is None:
        return
    kinds: dict[type, bool | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            epsilon = getattr(child, "variance_epsilon", getattr(child, "eps", None))
            weight = getattr(child, "weight", None)
            if not type(child).__name__.endswith("RMSNorm") or weight is None or not isinstance(epsilon, float):
                continue
            # A norm that is kept in another type than the model (gpt-oss in float16) gets rows of the model's.
            if weight.dtype is not model.dtype or weight.dtype not in DTYPES:
                continue
            if weight.dim() != 1 or not weight.is_contiguous():
                continue
            if type(child) not in kinds:
                kinds[type(child)] = _from_one(child, weight, epsilon)
            from_one = kinds[type(child)]
            if from_one is not None:
                setattr(parent, name, NativeNorm(weight, epsilon, from_one))


def _from_one(norm: nn.Module, weight: torch.Tensor, epsilon: float) -> bool | None:
    """Which of the two kinds ``norm`` is, found by trying; ``None`` if it is neither."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS_COMPARED, len(weight), generator=generator).to(weight.dtype)
    expected = norm(x).float()
    allowed = _STEPS * torch.finfo(weight.dtype).eps * expected.abs() + 1e-9
    for from_one in (False, True):
        if bool(((NativeNorm(weight, epsilon, from_one)(x).float() - expected).abs() <= allowed).all()):
            return from_one
    return None
