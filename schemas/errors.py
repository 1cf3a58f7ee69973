"""Errors a user can cause, each with the exit code the command line gives it.

Messages are one readable line: what was got, what was expected, which file or sample, and what to
do about it. A fault only we can cause is an ``assert``, never one of these.
"""

import os
import re

_LONGEST = 300  # characters of a library's own line
_HIDDEN = "***"
# What stands before the host of a URL, values in its query that let somebody in, and headers.
_SECRETS = (
    (
        re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s'\"@]+|[^/:\s'\"@]+:[^\s'\"@]+)@"),
        rf"\1{_HIDDEN}@",
    ),
    (
        re.compile(
            r"(?i)([?&][\w-]*(?:token|secret|signature|password|credential|key)=)[^&\s'\"]+"
        ),
        rf"\1{_HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic) [A-Za-z0-9._~+/=-]{6,}"), rf"\1 {_HIDDEN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), _HIDDEN),
)
_SECRET_NAME = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|ACCESS_KEY_ID)$")
_SHORTEST = 8  # characters of a variable's value that is taken for a secret


def redacted(text: str) -> str:
    """Return a text without what lets somebody in, ``***`` in its place.

    That is user information and keys in URLs, tokens of the hub, values of headers, and the values
    of this process's variables whose names end as those of secrets do.
    """
    for pattern, hidden in _SECRETS:
        text = pattern.sub(hidden, text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, _HIDDEN)
    return text


def first_line(error: Exception) -> str:
    """Return what an error of a library says, without the lines below; its name if nothing.

    The first line of pydantic's errors only counts them: of those it is what the first one says.
    A line of more than 300 characters is cut.
    """
    said, faults = str(error), getattr(error, "errors", None)
    if callable(faults) and (found := faults()):
        said = str(found[0]["msg"]).removeprefix("Value error, ")
    line = (said.splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."


class TeacherCacheError(Exception):
    """Base of every error that the command line prints as one line instead of a traceback.

    Whatever a library or a setting brought into its text, there is no secret in it: ``redacted``.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        """Keep the message without secrets."""
        super().__init__(redacted(str(message)))


class ConfigError(TeacherCacheError):
    """The recipe, a command-line value or an input file is wrong: running again cannot help."""

    exit_code = 2


class SchemaMismatch(TeacherCacheError):
    """A shard's columns or table version are not the ones this code reads."""

    exit_code = 2


class IdentityMismatch(TeacherCacheError):
    """Signals and student do not belong together: another tokenizer, vocabulary or input."""

    exit_code = 2


class StoreError(TeacherCacheError):
    """A shard, record or manifest is missing, torn, damaged, locked, or cannot be written."""

    exit_code = 1


class RejectLimitError(TeacherCacheError):
    """More rows of a shard were rejected than the recipe allows."""

    exit_code = 3


class EngineError(TeacherCacheError):
    """The model engine cannot be started, disagrees with its reference, or has died."""

    exit_code = 70
