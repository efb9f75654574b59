"""Errors that say what went wrong, where, what was expected and found, and what to try."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence


class IsofoldError(Exception):
    """Base of every error isofold raises on purpose.

    `what` is one sentence. `where` names the place (module path, the user's source line, file, option).
    `expected`, `got` and `hint` are optional sentences or values.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message, one fact a line."""
        facts = (("where", self.where), ("expected", self.expected), ("got", self.got), ("try", self.hint))
        return "\n".join([self.what, *(f"  {label}: {value}" for label, value in facts if value is not None)])


class CaptureError(IsofoldError):
    """The model could not be captured into a Program."""


class InputError(IsofoldError):
    """Inputs, calibration data or options do not fit the model."""


class RecipeError(IsofoldError):
    """A recipe is not valid, or selects nothing."""


class VerificationError(IsofoldError):
    """A pass changed the program by more than its guarantee allows."""


class UnsupportedError(IsofoldError):
    """Operators, dtypes or targets that cannot be handled; the message lists all of them at once."""


class ArtefactError(IsofoldError):
    """An artefact on disk is missing, damaged, too new, or cannot be written."""


class ToolchainError(IsofoldError):
    """A tool that building needs (g++, TVM) is missing or failed."""


def refuse_options(unknown: Collection[str], known: Sequence[str], of: str) -> None:
    """Raise InputError for the first option that is not known; `of` says whose options they are."""
    for name in unknown:
        raise InputError(
            f"Unknown option {name!r} of {of}", expected=" | ".join(known), hint=near_misses(name, known)
        )


def near_misses(name: str, known: Iterable[str], most: int = 5) -> str | None:
    """A hint that lists the known names most like `name`, or None where there are none."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.4)
    return f"did you mean {', '.join(repr(c) for c in close)}?" if close else None
