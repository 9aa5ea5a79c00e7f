"""What tests of the compiled kernels share."""

from __future__ import annotations

import pytest

from foveate.sparse_attn.ops import native


@pytest.fixture(params=getattr(native.library(), "isas", ()))
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that was built and that this CPU has; the run's last lines name the others."""
    return request.param
