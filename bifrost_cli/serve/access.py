"""Who may ask: anyone on this machine, or whoever shows a token. Imports no model library, to refuse quickly."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from bifrost_cli.data.images import read_regular
from bifrost_cli.errors import UsageError

SHORTEST = 16  # characters of a token
_MAKE = "python -c 'import secrets; print(secrets.token_urlsafe(32))' > token"


def read_token(file: Path | None, host: str) -> str | None:
    """The token of a file; None without one, for a host that only this machine reaches.

    Raises:
        UsageError: another host without a token; a token that is short, or no text of one line.
    """
    if file is None:
        if not is_loopback(host):
            what = f"{host} is reached by others, so requests need a token"
            raise UsageError(what, fix=f"{_MAKE}; --token-file token")
        return None
    token = read_regular(file, 4096).decode("utf-8", "replace").strip()
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{file} holds no token of {SHORTEST} or more characters on one line", fix=_MAKE)
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
