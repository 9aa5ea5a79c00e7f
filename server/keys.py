"""Who may do what: API keys for every path, admin keys for what touches other users' data.

Keys come from settings and from files with one key per line; files are read again by ``KeyRing.reload``
(``foveate serve`` calls it on SIGHUP). A key that is given is never kept or logged, only its SHA-256, and it is
compared with every known one, each in constant time, so that the time of an answer tells nothing of which one it was.

A route that only an administrator may use begins with ``require_admin(request)``.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from pydantic import SecretStr

from .errors import ApiError
from .settings import Settings
from .settings_checks import read_keys

OWNER = "foveate.owner"  # scope key: digest of the key that was used, in hex
ADMIN = "foveate.admin"  # scope key: true where that key is an admin's

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a key.

    Attributes:
        owner: Digest of the key, in hex; empty for a key that nobody knows.
        admin: Whether it is an admin's.
    """

    owner: str = ""
    admin: bool = False


class KeyRing:
    """The keys of one server, as SHA-256 digests.

    Raises:
        ValueError: a key file cannot be read or holds no key.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._users, self._admins = _load(settings)

    @property
    def locked(self) -> bool:
        """Whether every path but the open ones needs a key."""
        return bool(self._users)

    @property
    def has_admin(self) -> bool:
        return bool(self._admins)

    def reload(self) -> None:
        """Reads the key files again. Where that fails, the keys stay as they are and the log says why."""
        try:
            # One assignment: a request sees the old keys or the new ones.
            self._users, self._admins = _load(self._settings)
        except ValueError as error:
            _log.error("the key files were not read again, the old keys stay: %s", error)
            return
        _log.info("key files were read again: %d API keys, %d admin keys", len(self._users), len(self._admins))

    def caller(self, authorization: bytes) -> Caller:
        """Who sent this ``Authorization`` header. An admin's key is also good for everything that a user may do."""
        kind, _, token = authorization.partition(b" ")
        digest = _digest(token.strip())
        user = admin = False
        for known in self._users:
            user |= hmac.compare_digest(digest, known)
        for known in self._admins:
            admin |= hmac.compare_digest(digest, known)
        if kind.lower() != b"bearer" or not (user or admin):
            return Caller()
        return Caller(digest.hex(), admin)


def require_admin(request: Request) -> None:
    """Lets a request with an admin key pass.

    Raises:
        ApiError: 401 without a key that is known, 403 for a user's key or where the server has no admin key.
    """
    if request.scope.get(ADMIN, False):
        return
    from .state import state_of

    if not state_of(request).keys.has_admin:
        raise ApiError(
            403,
            "This path is closed: the server has no admin key. Start it with --admin-key-file or --admin-key.",
            type="permission_error",
            code="admin_disabled",
        )
    if request.scope.get(OWNER):
        raise ApiError(403, "This path needs an admin key.", type="permission_error", code="admin_key_required")
    raise unauthorized()


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "Send a valid API key as 'Authorization: Bearer KEY'.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _load(settings: Settings) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    users = _digests(settings.api_key, settings.api_key_file)
    admins = _digests(settings.admin_key, settings.admin_key_file)
    return users, admins


def _digests(keys: list[SecretStr], file: Path | None) -> tuple[bytes, ...]:
    given = [key.get_secret_value() for key in keys]
    if file is not None:
        given += read_keys(file)
        if file.stat().st_mode & stat.S_IROTH:
            _log.warning("every user of this machine can read the keys in %s: chmod o-r it", file)
    return tuple(_digest(key.encode()) for key in dict.fromkeys(given))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
