"""Pages on disk: files that come and go whole, bounded in bytes, shared by any number of processes.

The directory is the truth, ``RunIndex`` a picture of it. A file is written under a name that begins with a dot, synced
and renamed, so a killed process leaves whole files and parts that nobody reads; parts are locked while their writer
lives, and swept up when it does not. Files are never changed, only removed: a reader keeps what it has open. The time
of last use is the file's own modification time, so all processes on a directory agree on what is oldest.

Nothing here raises for what a disk does: a store that cannot be read finds nothing, one that cannot be written keeps
nothing, and says so once in the log.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .disk_format import FORMAT_VERSION, OpenRun, RunHeader, head_of, peek
from .disk_index import Document, RunIndex, Span, StoredRun
from .errors import DamagedRun

log = logging.getLogger(__name__)

FOLDER = f"foveate-pages-v{FORMAT_VERSION}"
RETRY_SECONDS = 60.0  # without a try to write, after the disk refused one
REFRESH_SECONDS = 5.0  # after which the directory is looked at again for what other processes did

_RUN_NAME = re.compile(r"[0-9a-f]{64}\.[0-9]{1,12}\.run")
_PART_NAME = re.compile(r"\.[0-9a-f]{16}\.part")
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DISK_GIVES_NOTHING = (errno.EIO, errno.EFAULT)  # EFAULT: a mapped part of a file cannot be had


@dataclass(slots=True)
class StoreCounts:
    """What a store did since it was opened. Only grows.

    Attributes:
        written_bytes: Of files that this process wrote.
        evicted: Files removed to keep the bound.
        corrupt: Files found damaged, and dropped.
        write_errors: Files that the disk refused.
    """

    written_bytes: int = 0
    evicted: int = 0
    corrupt: int = 0
    write_errors: int = 0


class PageStore:
    """Runs of pages as files of one directory. Every method may be called from any thread.

    Args:
        directory: Where the store makes a folder of its own, mode 0700; files are of mode 0600.
        limit_bytes: Bound of all files together.
        pin: Whether pages are read into pinned memory, for a GPU.

    Attributes:
        folder: Its folder.
        limit_bytes: As given.
        counts: What it did.
    """

    def __init__(self, directory: Path, limit_bytes: int, *, pin: bool = False) -> None:
        self.folder = directory / FOLDER
        self.limit_bytes = limit_bytes
        self.counts = StoreCounts()
        self._pin = pin
        self._index = RunIndex()
        self._lock = threading.Lock()  # of the index and the counts; never held while the disk works
        self._sweeping = threading.Lock()
        self._complained: set[str] = set()
        self._no_writes_before = 0.0
        self._refreshed = 0.0
        self._usable = self._prepare()
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._index.nbytes

    @property
    def num_files(self) -> int:
        return len(self._index.runs)

    @property
    def takes_writes(self) -> bool:
        """False where nothing can be kept, and for a while after the disk refused a file."""
        return self._usable and time.monotonic() >= self._no_writes_before

    def count(self, keys: Sequence[bytes]) -> int:
        """How many pages of a chain, from the first on, are kept."""
        with self._lock:
            return self._index.count(keys)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Which of ``keys`` are not kept."""
        with self._lock:
            return [index for index, key in enumerate(keys) if key not in self._index]

    def spans(self, keys: Sequence[bytes]) -> list[Span]:
        """Where the pages of a chain are, up to the first that is missing."""
        with self._lock:
            return self._index.spans(keys)

    def documents(self) -> list[Document]:
        """What is kept, the latest used first."""
        self.refresh()
        with self._lock:
            return self._index.documents()

    def read(self, span: Span, first_page: int, namespace: bytes, token_ids: bytes) -> list[torch.Tensor]:
        """Pages of a file, verified: their contents, their namespace, and every token from the beginning on.

        Args:
            span: Which ones.
            first_page: Logical index that the first of them must have.
            namespace: That they must be of.
            token_ids: The whole prompt, packed by ``disk_format.pack_tokens``.

        Returns:
            ``[stride]`` uint8 each; fewer than wanted, or none, where the file is gone, damaged or of another prompt.
            A damaged file is removed.
        """
        pages: list[torch.Tensor] = []
        try:
            with _opened(self.folder / span.name) as descriptor:
                run = OpenRun(descriptor)
            header = run.header
            used = 4 * (first_page + span.count) * header.page_tokens
            if (
                header.namespace != namespace
                or header.first_page + span.first != first_page
                or len(token_ids) < used
                or run.token_ids[:used] != token_ids[:used]
            ):
                return []
            for index in range(span.first, min(span.first + span.count, header.num_pages)):
                pages.append(run.page(index, self._pin))
        except FileNotFoundError:
            with self._lock:
                self._index.remove(span.name)
        except DamagedRun as error:
            self._drop(span.name, str(error))
        except OSError as error:
            if error.errno in _DISK_GIVES_NOTHING:
                self._drop(span.name, f"the disk does not give it: {error.strerror}")
            else:
                self._complain("read", f"cannot read {span.name}: {error.strerror}")
        return pages

    def write(self, header: RunHeader, token_ids: bytes, pages: torch.Tensor) -> bool:
        """Keeps a run, and removes the files used longest ago to make room for it, but none that it continues.

        Args:
            header: Of the run.
            token_ids: From the beginning of the prompt to the end of the run, packed.
            pages: ``[n, stride]`` uint8, as their checksums were taken.

        Returns:
            Whether it is kept now. It is not where the page before it is not, since nobody would find it.
        """
        if not self.takes_writes:
            return False
        head = head_of(header, token_ids)
        size = len(head) + pages.numel()
        try:
            if not self._make_room(size, header.parent):
                return False
            self._write_run(header, head, pages, time.time_ns())
        except FileNotFoundError:  # somebody removed the folder, or took the part for an orphan
            self._usable = self._prepare()
            return False
        except OSError as error:
            self._refuse_writes(error)
            return False
        with self._lock:
            self.counts.written_bytes += size
        return True

    def touch(self, names: Sequence[str]) -> None:
        """Says that files are wanted now."""
        used = time.time_ns()
        for name in names:
            with suppress(OSError):
                os.utime(self.folder / name, ns=(used, used), follow_symlinks=False)
            with self._lock:
                if name in self._index.runs:
                    self._index.runs[name].used = used

    def remove(self, names: Sequence[str] | None) -> list[str]:
        """Removes files, all of them for ``None``; returns those that the disk does not let go."""
        if names is None:
            self.refresh()
            with self._lock:
                names = list(self._index.runs)
        left: list[str] = []
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                self._complain("remove", f"cannot remove files of {self.folder}: {error.strerror}")
                left.append(name)
                continue
            with self._lock:
                self._index.remove(name)
        return left

    def delete(self, keys: Sequence[bytes]) -> list[str]:
        """Removes pages and all that continue them; returns files that the disk does not let go. Not beside ``write``.

        Of a file that begins with other pages these are kept: they are written anew with their tokens, and it goes.
        """
        self.refresh()
        with self._lock:
            spans = self._index.ends(keys)
        for span in spans:
            if span.first:
                self._keep_beginning(span.name, span.first)
        return self.remove([span.name for span in spans])

    def make_room(self) -> None:
        """Removes the files used longest ago until all are within the bound."""
        self._make_room(0, b"")

    def _make_room(self, nbytes: int, parent: bytes) -> bool:
        """Removes the files used longest ago until ``nbytes`` more are within the bound.

        Args:
            nbytes: Of the file that is to come.
            parent: Page that it continues, if any. What this page needs stays.

        Returns:
            Whether it may come. Nothing is removed for one that may not.
        """
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.refresh()
        with self._lock:
            if parent and parent not in self._index:
                return False
            excess = self._index.nbytes + nbytes - self.limit_bytes
            old: list[str] = []
            if excess > 0:
                kept = self._index.front(parent)
                for run in self._index.oldest():
                    if excess > 0 and run.name not in kept:
                        old.append(run.name)
                        excess -= run.nbytes
        if excess > 0:
            words = f"a prompt is larger than the whole bound of {self.limit_bytes} bytes: its end is not kept"
            self._complain("size", words)
            return False
        left = self.remove(old)
        with self._lock:
            self.counts.evicted += len(old) - len(left)
        return True

    def refresh(self) -> None:
        """Looks at the directory for what other processes wrote and removed; drops what cannot be ours or whole."""
        if not self._usable or not self._sweeping.acquire(blocking=False):
            return
        try:
            self._sweep()
        except OSError as error:
            self._complain("list", f"cannot list {self.folder}: {error.strerror}")
        finally:
            self._refreshed = time.monotonic()
            self._sweeping.release()

    def _sweep(self) -> None:
        with self._lock:
            known = {name: (run.nbytes, run.used) for name, run in self._index.runs.items()}
        seen: set[str] = set()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _PART_NAME.fullmatch(entry.name):
                    _remove_orphan(self.folder / entry.name)
                if not _RUN_NAME.fullmatch(entry.name):
                    continue
                with suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    seen.add(entry.name)
                    if entry.name not in known or known[entry.name][0] != about.st_size:
                        self._look_into(entry.name, about)
                    elif known[entry.name][1] < about.st_mtime_ns:
                        with self._lock:
                            if entry.name in self._index.runs:
                                self._index.runs[entry.name].used = about.st_mtime_ns
        for name in known.keys() - seen:
            # It may have been written after the directory was read, or again.
            if not (self.folder / name).exists():
                with self._lock:
                    self._index.remove(name)

    def _look_into(self, name: str, about: os.stat_result) -> None:
        try:
            with _opened(self.folder / name) as descriptor:
                header = peek(descriptor)
            if name != f"{header.keys[-1].hex()}.{header.first_page}.run":
                raise DamagedRun("it is not of its name")
        except DamagedRun as error:
            self._drop(name, str(error))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain("read", f"cannot read {name}: {error.strerror}")
        else:
            with self._lock:
                self._index.add(StoredRun(name, header, about.st_size, about.st_mtime_ns))

    def _keep_beginning(self, name: str, count: int) -> None:
        """Writes the first ``count`` pages of a file as one of their own; not if the disk refuses."""
        try:
            with _opened(self.folder / name) as descriptor:
                run, used = OpenRun(descriptor), os.fstat(descriptor).st_mtime_ns
            header = replace(run.header, keys=run.header.keys[:count], checksums=run.header.checksums[:count])
            pages = torch.stack([run.page(index) for index in range(count)])
            self._write_run(header, head_of(header, run.token_ids[: 4 * header.num_tokens]), pages, used)
        except (OSError, DamagedRun) as error:
            log.warning("document cache: pages in front of deleted ones go, too: %s", error)

    def _write_run(self, header: RunHeader, head: bytes, pages: torch.Tensor, used: int) -> None:
        """Writes a run to a file of its name, and notes it.

        Raises:
            OSError: the disk refuses; nothing is left of it.
        """
        name = f"{header.keys[-1].hex()}.{header.first_page}.run"
        self._write_file(name, (memoryview(head), pages.numpy().data.cast("B")), used)
        with self._lock:
            self._index.add(StoredRun(name, header, len(head) + pages.numel(), used))

    def _write_file(self, name: str, parts: Sequence[memoryview], used: int) -> None:
        part = self.folder / f".{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(part, flags, 0o600)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for data in parts:
                while data:
                    data = data[os.write(descriptor, data) :]
            os.utime(descriptor, ns=(used, used))
            os.fsync(descriptor)
            part.rename(self.folder / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _prepare(self) -> bool:
        """Makes the folder, which must be ours: who writes there chooses what is read. False if it cannot be used."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = self.folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
                log.error("no pages are kept on disk: %s is not a folder of this user", self.folder)
                return False
            if about.st_mode & 0o077:
                self.folder.chmod(0o700)
        except OSError as error:
            log.error("no pages are kept on disk: %s: %s", self.folder, error.strerror)
            return False
        return True

    def _refuse_writes(self, error: OSError) -> None:
        self._no_writes_before = time.monotonic() + RETRY_SECONDS
        with self._lock:
            self.counts.write_errors += 1
        self._complain("write", f"cannot write to {self.folder}: {error.strerror}; pages are not kept until it can")

    def _drop(self, name: str, reason: str) -> None:
        log.warning("dropping %s from the document cache: %s", name, reason)
        with self._lock:
            self.counts.corrupt += 1
            self._index.remove(name)
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._complain("remove", f"cannot remove files of {self.folder}: {error.strerror}")

    def _complain(self, about: str, words: str) -> None:
        """Says a thing once: a disk that is full stays so for a while."""
        if about not in self._complained:
            self._complained.add(about)
            log.warning("document cache: %s", words)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, for reading.

    Raises:
        OSError: it cannot be opened.
        DamagedRun: it is no regular file.
    """
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedRun("it is a link") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedRun("it is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_orphan(part: Path) -> None:
    """Removes a part whose writer is dead: nobody holds its lock any more."""
    with suppress(OSError):
        descriptor = os.open(part, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
        finally:
            os.close(descriptor)
