"""The loops of the AVX-512 kernels keep their sums in registers, which nobody sees on a CPU that cannot run them.

GCC left to itself moved the 24 sums of 8-bit linear layers 48 times in a turn, and stored 18 of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.sparse_attn.ops import native

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)
if shutil.which("objdump") is None:
    pytest.skip("binutils are not installed", allow_module_level=True)

# The loops that prompts spend their time in, by function: what multiplies, how often in a turn, and how many vectors it
# may store (where floats are multiplied, GCC 12 stores a column of queries).
LOOPS = {
    "attention-float32": (r"prefill_item.*FmaEngine.*Vec16Eff", "vfmadd", 24, 2),
    "attention-bfloat16": (r"prefill_item.*DotEngine", "vdpbf16ps", 24, 0),
    "anchors-bfloat16": (r"pool_part.*DotEngine", "vdpbf16ps", 24, 0),
    "anchors-bytes": (r"ByteEngine.*multiply", "vpdpbusd", 24, 0),
    "linear-8-bits": (r"Lanes16.*multiply8ILi6ELi1ELi4", "vpdpbusd", 24, 0),
    "linear-4-bits": (r"Lanes16.*multiply4ILi4ELi1ELi2", "vpdpbusd", 64, 0),
    "linear-4-bits-as-bytes": (r"Lanes16.*add_groupsILi4ELi2", "vpdpbusd", 64, 0),
}


def objdump(*options: str) -> str:
    path = Path(native.__file__).with_name(native.LIBRARY_NAME)
    return subprocess.run(["objdump", *options, str(path)], capture_output=True, text=True, check=True).stdout


def compilers() -> str:
    """What the library says of who compiled it: the right-hand column of a dump in hexadecimal."""
    return "".join(line[43:] for line in objdump("-s", "-j", ".comment").splitlines() if line.startswith(" "))


def loops(text: str) -> Iterator[tuple[str, list[str]]]:
    """Function and instructions of each innermost loop: from the target of a jump back to the jump."""
    addresses: list[int] = []
    code: list[str] = []
    function, begins = "", -1  # where the innermost loop so far began
    for line in text.splitlines():
        if named := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = named[1]
        if not (found := re.match(r" +([0-9a-f]+):\t(.*)", line)):
            continue
        address, instruction = int(found[1], 16), found[2]
        addresses.append(address)
        code.append(instruction)
        jump = re.match(r"j\w+ +([0-9a-f]+)", instruction)
        if jump and begins < (target := int(jump[1], 16)) < address:
            begins = target
            yield function, code[bisect_left(addresses, target) :]


@pytest.fixture(scope="module")
def innermost() -> list[tuple[str, list[str]]]:
    if "clang" in compilers():
        pytest.skip("functions and loops are those that GCC makes")
    return list(loops(objdump("-d", "--no-show-raw-insn")))


@pytest.mark.parametrize("name", LOOPS)
def test_sums_of_products_stay_in_registers(name, innermost):
    function, product, count, most = LOOPS[name]
    if not any(line.startswith(product) and "%zmm" in line for _, body in innermost for line in body):
        pytest.skip("the compiler did not know this instruction set")
    bodies = [
        body
        for owner, body in innermost
        if re.search(function, owner) and sum(line.startswith(product) and "%zmm" in line for line in body) >= count
    ]
    assert bodies, f"no loop of {count} products: sums are kept in memory"
    for body in bodies:
        stored = [line for line in body if re.match(r"vmov\w+ +%zmm\d+,[^,]*\(%r[sb]p\)", line)]
        assert len(stored) <= most, stored
