"""A run of full pages as one file: what is in it, how it is written, and how every damage is found.

::

    0     8   magic
    8     8   bytes of the JSON header, little endian
    16    8   where the pages begin, a multiple of 4096
    24    32  SHA-256 of bytes 0 to 23 and of bytes 56 to where the pages begin
    56        JSON header (``RunHeader``)
              token ids, u32 each: of the run, and of everything before it
              zeros
    begin     pages, each padded by zeros to a multiple of 4096; the SHA-256 of each is in the header

Each byte is covered by a digest or by the length of the file, so no flipped bit and no cut goes unseen. A file is
only ever made whole: written under another name, synced, then renamed. Nothing in it is executed to read it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import DamagedRun

FORMAT_VERSION = 1
ALIGNMENT = 4096
MAX_HEAD_BYTES = 2**30  # of a header that claims more, nothing is believed

_MAGIC = b"FVTRUN" + bytes((FORMAT_VERSION, 0x0A))
_START = struct.Struct("<8sQQ")
_DIGEST_BYTES = 32
_JSON_START = _START.size + _DIGEST_BYTES
_MADV_POPULATE_READ = 22  # Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


def padded(size: int) -> int:
    """``size`` bytes rounded up to whole memory pages."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as they stand in a file."""
    packed = array("I", token_ids)
    if packed.itemsize != 4:
        raise RuntimeError("this platform has no unsigned integers of 4 bytes under the code I")
    return packed.tobytes()


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What a file says of its pages.

    Attributes:
        namespace: What K and V depend on beside the tokens; see ``prefix``.
        parent: Chained key of the page before the first, empty where there is none.
        first_page: Logical index of the first page.
        page_tokens: Tokens per page.
        page_bytes: Bytes per page, not padded.
        keys: Chained key of each page.
        checksums: SHA-256 of each page, padding included.
        created: Unix time in seconds.
        about: For people who list the cache: names and sizes, nothing of the contents.
    """

    namespace: bytes
    parent: bytes
    first_page: int
    page_tokens: int
    page_bytes: int
    keys: tuple[bytes, ...]
    checksums: tuple[bytes, ...]
    created: float
    about: Mapping[str, str | int]

    @property
    def num_pages(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        """Tokens from the beginning of the prompt to the end of the run."""
        return (self.first_page + self.num_pages) * self.page_tokens

    @property
    def stride(self) -> int:
        """Bytes from one page to the next."""
        return padded(self.page_bytes)

    def to_json(self) -> bytes:
        return json.dumps(
            {
                "namespace": self.namespace.hex(),
                "parent": self.parent.hex(),
                "first_page": self.first_page,
                "page_tokens": self.page_tokens,
                "page_bytes": self.page_bytes,
                "keys": [key.hex() for key in self.keys],
                "checksums": [digest.hex() for digest in self.checksums],
                "created": self.created,
                "about": dict(self.about),
            },
            sort_keys=True,
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> RunHeader:
        """
        Raises:
            DamagedRun: it is not such a header.
        """
        try:
            found: dict[str, Any] = json.loads(data)
            header = cls(
                bytes.fromhex(found["namespace"]),
                bytes.fromhex(found["parent"]),
                _count(found["first_page"], 0),
                _count(found["page_tokens"], 1),
                _count(found["page_bytes"], 1),
                tuple(map(bytes.fromhex, found["keys"])),
                tuple(map(bytes.fromhex, found["checksums"])),
                float(found["created"]),
                {str(name): value if isinstance(value, int) else str(value) for name, value in found["about"].items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise DamagedRun(f"its header cannot be read: {type(error).__name__}") from None
        if not header.keys or len(header.keys) != len(header.checksums):
            raise DamagedRun("it lists no pages, or not a checksum for each")
        return header


def _count(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value < 2**48:
        raise ValueError("not a size")
    return value


def checksum(page: torch.Tensor) -> bytes:
    """SHA-256 of the bytes ``[stride]`` uint8 of a page. Lets other threads run."""
    return hashlib.sha256(page.numpy().data).digest()


def head_of(header: RunHeader, token_ids: bytes) -> bytes:
    """Everything in front of the pages.

    Args:
        header: Of the run.
        token_ids: ``header.num_tokens`` ids, packed by ``pack_tokens``.
    """
    text = header.to_json()
    begin = padded(_JSON_START + len(text) + len(token_ids))
    start = _START.pack(_MAGIC, len(text), begin)
    rest = (text + token_ids).ljust(begin - _JSON_START, b"\0")
    return start + hashlib.sha256(start + rest).digest() + rest


def peek(descriptor: int) -> RunHeader:
    """The header of an open file, its length checked but no digest: enough to know what to look for in it.

    Raises:
        DamagedRun: it is no such file, or not of the length that it must have.
        OSError: it cannot be read.
    """
    size = os.fstat(descriptor).st_size
    json_bytes, begin = _starts(os.pread(descriptor, _START.size, 0), size)
    header = RunHeader.from_json(os.pread(descriptor, json_bytes, _JSON_START))
    _check_sizes(header, json_bytes, begin, size)
    return header


class OpenRun:
    """A file whose header was verified, mapped into memory. Pages are verified when they are read.

    Args:
        descriptor: Of the file; it may be closed at once.

    Raises:
        DamagedRun: the header is damaged, or the file's length is wrong.
        OSError: it cannot be read.

    Attributes:
        header: As it was written.
        token_ids: Ids from the beginning of the prompt, packed by ``pack_tokens``.
    """

    def __init__(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size < _JSON_START:
            raise DamagedRun("it is too short")
        # A private mapping: shared with the page cache until it is written, which nobody does.
        self._bytes = torch.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        self._array = self._bytes.numpy()
        self._populate(0, min(size, ALIGNMENT))
        json_bytes, self._begin = _starts(self._slice(0, _START.size), size)
        self._populate(0, self._begin)
        rest = self._slice(_JSON_START, self._begin)
        digest = hashlib.sha256(self._slice(0, _START.size) + rest).digest()
        if digest != self._slice(_START.size, _JSON_START):
            raise DamagedRun("its header does not match its digest")
        self.header = RunHeader.from_json(rest[:json_bytes])
        _check_sizes(self.header, json_bytes, self._begin, size)
        self.token_ids = rest[json_bytes : json_bytes + 4 * self.header.num_tokens]

    def page(self, index: int, pin: bool = False) -> torch.Tensor:
        """A copy ``[stride]`` uint8 of a page, ``pin``ned for a GPU. What is verified is the copy.

        Raises:
            DamagedRun: its contents do not match its checksum.
            OSError: the file was cut since, or the disk does not give it.
        """
        stride = self.header.stride
        start = self._begin + index * stride
        self._populate(start, stride)
        page = torch.empty(stride, dtype=torch.uint8, pin_memory=pin)
        page.numpy()[:] = self._array[start : start + stride]  # torch would wake a pool of threads for it
        if checksum(page) != self.header.checksums[index]:
            raise DamagedRun(f"page {index} does not match its checksum")
        return page

    def _slice(self, start: int, stop: int) -> bytes:
        data: bytes = self._array[start:stop].tobytes()
        return data

    def _populate(self, start: int, length: int) -> None:
        """Reads a part of the file into memory, with an error where touching the mapping would kill the process.

        Raises:
            OSError: the file was cut since, or the disk does not give it.
        """
        before = start % mmap.PAGESIZE
        address = ctypes.c_void_p(self._bytes.data_ptr() + start - before)
        if _libc.madvise(address, ctypes.c_size_t(length + before), _MADV_POPULATE_READ) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINVAL:  # a kernel that does not know this advice
            raise OSError(code, os.strerror(code))


def _starts(data: bytes, size: int) -> tuple[int, int]:
    """Bytes of the JSON header, and where the pages begin."""
    if len(data) < _START.size:
        raise DamagedRun("it is too short")
    magic, json_bytes, begin = _START.unpack(data)
    if magic != _MAGIC:
        raise DamagedRun("it is of another kind or version")
    if begin % ALIGNMENT or not _JSON_START + json_bytes <= begin <= min(size, MAX_HEAD_BYTES):
        raise DamagedRun("its header does not fit into it")
    return json_bytes, begin


def _check_sizes(header: RunHeader, json_bytes: int, begin: int, size: int) -> None:
    if begin != padded(_JSON_START + json_bytes + 4 * header.num_tokens):
        raise DamagedRun("its token ids do not fit into it")
    if size != begin + header.num_pages * header.stride:
        raise DamagedRun(f"it is {size} bytes long and should be {begin + header.num_pages * header.stride}")
