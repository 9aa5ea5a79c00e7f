"""From the fields of a request to its compiled grammar, with errors in the caller's words."""

from __future__ import annotations

from collections.abc import Callable

from .errors import ApiError
from .grammar.guard import TrialUnavailable
from .grammar.matcher import Grammar
from .grammar.source import GrammarRefused, GrammarSource
from .grammar.store import GrammarsBusy, GrammarsUnavailable
from .state import Served


async def constraint(served: Served, write: Callable[[], GrammarSource | None]) -> Grammar | None:
    """The grammar that ``write`` describes, compiled; ``None`` if it describes none.

    Raises:
        ApiError: 400, the grammar is wrong or too large, ``param`` names its field; 503, too many are being compiled.
    """
    param = None
    try:
        source = write()
        if source is None:
            return None
        param = source.param
        return await served.grammars.compile(source)
    except GrammarRefused as error:
        raise ApiError(400, f"{error.param}: {error}", param=error.param, code="invalid_grammar") from None
    except GrammarsUnavailable as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="unsupported_parameter") from None
    except (GrammarsBusy, TrialUnavailable) as error:
        raise ApiError(
            503, f"{param}: {error}", type="server_error", code="grammar_timeout", headers={"retry-after": "5"}
        ) from None
