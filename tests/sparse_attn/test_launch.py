"""One launch of a Triton kernel as a value: where it runs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from foveate.sparse_attn.ops.launch import Launch
from foveate.sparse_attn.ops.tiling import Tiling


class OnSecondGpu(torch.Tensor):
    """A tensor that says it lies there."""

    device = torch.device("cuda:1")


class Kernel:
    """Tells where it would be launched.

    Attributes:
        current: Index of the thread's GPU.
    """

    def __init__(self):
        self.current = 0
        self.launched = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launched.append((self.current, grid))


@pytest.mark.parametrize(("tensor", "expected"), [(torch.zeros(1).as_subclass(OnSecondGpu), 1), (torch.zeros(1), 0)])
def test_a_kernel_runs_on_the_gpu_of_its_arguments(tensor, expected, monkeypatch):
    kernel = Kernel()

    @contextmanager
    def device(wanted):
        before, kernel.current = kernel.current, wanted.index
        yield
        kernel.current = before

    monkeypatch.setattr(torch.cuda, "device", device)
    Launch(kernel, (2,), {"sums": None, "count": 3, "keys": tensor}, Tiling(16, 16, 4, 1)).run()
    assert kernel.launched == [(expected, (2,))]
    assert kernel.current == 0
