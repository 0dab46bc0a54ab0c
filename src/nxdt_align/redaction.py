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

_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|xox[abpr]-[A-Za-z0-9-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
    r"|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"
    r"|(?i:(?<=bearer )[\w.~+/-]{8,}=*)"
)
"""Forms of the best-known services' tokens, and user and password in an address."""
# Anchored and bounded: from each letter of a long word on, the search would take the square of its length.
_SETTING = re.compile(
    r"(?<![\w.-])(?P<name>[\w.-]{1,64})(?P<sign>['\"]?\s*[:=]\s*['\"]?)(?P<value>[^\s'\",;]{4,})"
)
_PLAIN = re.compile(r"[\d.,eE+%-]{1,12}|true|false|null|none|[<$].*", re.IGNORECASE)
"""Values that tell nothing: numbers, switches, references."""

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


def scrub(text: str) -> str:
    """``text`` without what looks like a token, and without the values of settings whose names are those of
    secrets: for what leaves this machine, where nobody has said which values are secret."""

    def setting(found: re.Match[str]) -> str:
        value = found["value"]
        if not looks_secret(found["name"]) or _PLAIN.fullmatch(value):
            return found[0]
        return f"{found['name']}{found['sign']}<hidden>"

    return _SETTING.sub(setting, _TOKENS.sub("<hidden>", text))
