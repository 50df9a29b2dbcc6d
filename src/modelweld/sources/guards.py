"""What is refused before anything is read: names that lead out of their directory, and addresses that hold secrets."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, urlsplit

from modelweld.errors import SourceError

_SECRET_KEY = re.compile(r"token|secret|passw|signature|credential|api_?key|access_?key|^sig$|^key$", re.IGNORECASE)
_USERINFO = re.compile(r"://(?P<user>[^/@:\s]*):(?P<password>[^/@\s]+)@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def refuse_secrets(uri: str, where: str) -> None:
    """Return only when `uri` holds no password, token or signature; the lock is committed, so SourceError otherwise.

    The message never repeats the secret.
    """
    try:
        query = urlsplit(uri).query
    except ValueError as error:
        raise SourceError("not a valid address", where=where) from error
    if _USERINFO.search(uri) or _HUB_TOKEN.search(uri) or any(_SECRET_KEY.search(key) for key, _ in parse_qsl(query)):
        raise SourceError(
            f"credentials inside an address ({uri.partition('://')[0]}://…)",
            where=where,
            hint="take them out: HF_TOKEN, AWS_ACCESS_KEY_ID/AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_TOKEN and the "
            "like are read from the environment, and sources.lock.json is committed",
        )


def safe_name(name: str, where: str) -> str:
    """`name` itself when it is a plain relative path that stays inside its directory; SourceError otherwise."""
    path = PurePosixPath(name)
    unsafe = (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or path.as_posix() != name
        or "\\" in name
        or any(ord(character) < 32 or ord(character) == 127 for character in name)
    )
    if unsafe:
        raise SourceError(
            f"unsafe file name {name!r}", where=where, hint="a source's files must lie inside its own directory"
        )
    return name
