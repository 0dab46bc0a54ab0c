"""Values that are used and never shown: those of environment variables whose names say that they are secret.

A YAML's ``${oc.env:HF_TOKEN}`` is resolved for the run. What prints the configuration or a message shows the
reference in the value's place.
"""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"TOKEN(?!IZ)|SECRET|KEY|PASS|CREDENTIAL|AUTH(?!OR)|PRIVATE|COOKIE|BEARER|SIGNATURE"
    r"|(^|_)(PWD|PW|PAT|PIN|DSN)(_|$)",
    re.IGNORECASE,
)
_WORKING_FOLDERS = ("PWD", "OLDPWD")
_SHORTEST = 4
"""Characters. In a message, a shorter value is found in words that have nothing to do with it."""
_NUMBER = re.compile(r"\d{1,7}")

_hidden: dict[str, str] = {}
"""Value -> what is shown instead. One for the process, as its log and its messages are."""


def looks_secret(name: str) -> bool:
    """Whether the environment variable ``name`` probably holds a secret."""
    return name.upper() not in _WORKING_FOLDERS and _SECRET.search(name) is not None


def hide(value: str, shown: str) -> None:
    """Have ``redact`` write ``shown`` for ``value`` from now on."""
    if len(value) >= _SHORTEST and not _NUMBER.fullmatch(value):
        _hidden[value] = shown


def redact(text: str) -> str:
    """``text`` without any hidden value."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return text
