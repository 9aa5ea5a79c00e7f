"""Errors of the attention schemes.

SchemeError
├── UnknownScheme        no scheme of that name; the message lists those that exist
├── SchemeConfigError    an option is unknown or out of range; the message names it
├── CalibrationMissing   the scheme needs a profile; the message is the command that makes it
└── ProfileError         a profile cannot be read, or was made for another model
"""

from __future__ import annotations


class SchemeError(ValueError):
    """Base of every error that ``foveate.sparse_attn`` raises for a caller's choice of scheme."""


class UnknownScheme(SchemeError):
    """No scheme of that name."""


class SchemeConfigError(SchemeError):
    """An option of a scheme is unknown or out of range."""


class CalibrationMissing(SchemeError):
    """The scheme needs a profile that was not given.

    Attributes:
        scheme: Its name.
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        super().__init__(
            f"{scheme} needs a profile of this model. Make one with "
            f"`foveate calibrate MODEL --scheme {scheme} -o PROFILE` and give it: `--profile PROFILE`, "
            "in Python `profile=[PROFILE]`"
        )


class ProfileError(SchemeError):
    """A profile cannot be read, or does not fit."""
