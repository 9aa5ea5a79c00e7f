"""A file from a multipart body to the disk, piece by piece: nothing of it is held in memory but the last piece."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..errors import ApiError
from .database import reason

FIELD_BYTES = 4096
FIELDS = 16
MAX_FILENAME_CHARS = 255


@dataclass(slots=True)
class Form:
    """What a multipart body held beside the file's content, which is at the path given.

    Attributes:
        fields: By name; of a name that comes twice the last.
        filename: As the client calls it, a label only; ``None`` where no file came.
        size: Bytes of the file.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0


async def receive_form(content_type: str, stream: AsyncIterator[bytes], path: Path, max_bytes: int) -> Form:
    """Reads a multipart body; its part ``file`` goes to ``path``, and is on the disk at the end.

    Raises:
        ApiError: 400, the body is no such form; 413, the file is too large; 415, another content type; 507, the disk
            is full.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind.lower() != b"multipart/form-data" or not boundary:
        raise ApiError(415, "Send the file as 'multipart/form-data'.", code="unsupported_media_type")
    try:
        with path.open("xb", buffering=0) as file:
            reader = _Reader(file, boundary, max_bytes)
            async for piece in stream:
                await asyncio.to_thread(reader.take, piece)
            await asyncio.to_thread(reader.finish)
    except FormParserError:
        raise _bad("The body is not a valid form.") from None
    except OSError as error:
        raise ApiError(
            507, f"The file cannot be stored: {reason(error)}.", type="server_error", code="storage_failed"
        ) from error
    return reader.form


class _Reader:
    """Takes the pieces of a body in turn."""

    def __init__(self, file: BinaryIO, boundary: bytes, max_bytes: int) -> None:
        self.form = Form()
        self._file = file
        self._max_bytes = max_bytes
        self._name: str | None = None  # of the field that is being read
        self._value = bytearray()
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._name_part,
                    "on_part_data": self._data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _bad("The body is not a valid form.") from None

    def take(self, piece: bytes) -> None:
        self._parser.write(piece)

    def finish(self) -> None:
        self._parser.finalize()
        if not self._ended:
            raise _bad("The form is not complete.")
        os.fsync(self._file.fileno())

    def _begin(self) -> None:
        self._disposition = b""
        self._value.clear()

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _name_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._name = name
        if name != "file":
            if len(self.form.fields) >= FIELDS:
                raise _bad(f"A form may have {FIELDS} fields.")
            return
        if self.form.filename is not None:
            raise _bad("One file at a time.", "file")
        given = options.get(b"filename")
        if given is None:
            raise _bad("file: this part is no file; it has no file name.", "file")
        label = "".join(char if char.isprintable() else "_" for char in given.decode("utf-8", "replace"))
        self.form.filename = label[:MAX_FILENAME_CHARS]

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name != "file":
            if len(self._value) + end - start > FIELD_BYTES:
                raise _bad(f"A field may have {FIELD_BYTES} bytes.")
            self._value += data[start:end]
            return
        self.form.size += end - start
        if self.form.size > self._max_bytes:
            raise too_large(self._max_bytes)
        rest = memoryview(data)[start:end]
        while rest:
            rest = rest[self._file.write(rest) :]

    def _end_part(self) -> None:
        if self._name not in (None, "file"):
            self.form.fields[str(self._name)] = self._value.decode("utf-8", "replace")
        self._name = None

    def _end(self) -> None:
        self._ended = True


def too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"A file may have {max_bytes} bytes (--max-file-bytes).", param="file", code="file_too_large")


def _bad(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_form")
