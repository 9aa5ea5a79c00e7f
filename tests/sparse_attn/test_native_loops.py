"""The loops of the AVX-512 kernels keep their sums in registers, which nobody sees on a CPU that cannot run them.

GCC left to itself spilled 18 of the 24 sums of 8-bit linear layers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.sparse_attn.ops import native

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)
if shutil.which("objdump") is None:
    pytest.skip("binutils are not installed", allow_module_level=True)

# What multiplies. Loops of as many are those that prompts spend their time in.
PRODUCTS = {"float32": "vfmadd", "bfloat16": "vdpbf16ps", "bytes": "vpdpbusd"}
LEAST = 24
MOST_SPILLS = 2  # GCC 12 stores one column of queries where floats are multiplied


def loops() -> Iterator[list[str]]:
    """The instructions of each innermost loop: from the target of a jump back to the jump."""
    path = Path(native.__file__).with_name(native.LIBRARY_NAME)
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    addresses: list[int] = []
    code: list[str] = []
    begins = -1  # where the innermost loop so far began
    for line in text.splitlines():
        found = re.match(r" +([0-9a-f]+):\t(.*)", line)
        if not found:
            continue
        address, instruction = int(found[1], 16), found[2]
        addresses.append(address)
        code.append(instruction)
        jump = re.match(r"j\w+ +([0-9a-f]+)", instruction)
        if jump and begins < (target := int(jump[1], 16)) < address:
            first = len(addresses) - 1
            while first > 0 and addresses[first] > target:
                first -= 1
            begins = target
            yield code[first:]


@pytest.fixture(scope="module")
def innermost() -> list[list[str]]:
    return list(loops())


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_sums_of_products_stay_in_registers(product, innermost):
    spills = []
    for body in innermost:
        if sum(line.startswith(product) and "%zmm" in line for line in body) >= LEAST:
            spills.append(sum(re.match(r"vmov\w+ +%zmm\d+,[^,]*\(%r[sb]p\)", line) is not None for line in body))
    if not spills:
        pytest.skip("the compiler did not know this instruction set")
    assert max(spills) <= MOST_SPILLS, spills
