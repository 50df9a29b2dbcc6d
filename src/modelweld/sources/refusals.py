"""What is refused before anything is read: names that lead out of their directory, and addresses that hold secrets."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, unquote, urlsplit

from modelweld.errors import SourceError

_SECRET_KEY = re.compile(
    r"token|secret|passw|pwd|passphrase|signature|credential|jwt|bearer|session|api_?key|access_?key"
    r"|(^|[^a-z])auth($|[^a-z]|ori[sz]ation)|^(sig|key|sas|pass)$",
    re.IGNORECASE,
)
# In web addresses a user's name alone is often the token; elsewhere (ssh://git@host) it is only a name.
_USERINFO = re.compile(r"https?://[^/?#@\s]*@|://[^/@:\s]*:[^/@\s]+@", re.IGNORECASE)
# What issues tokens makes them known by how they begin: the Hub, GitHub, GitLab, AWS, Google, Slack, OpenAI; then JWT.
_ISSUED = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[opusr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bAIza[\w-]{30,}|\bxox[abposr]-[\w-]{10,}|\bsk-[\w-]{20,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)
_QUERY = re.compile(r"(?<=[^\s?#])[?#][^\s'\"<>)]*")


def refuse_secrets(uri: str, where: str) -> None:
    """Return only when `uri` holds no password, token or signature; the lock is committed, so SourceError otherwise.

    The message never repeats the secret.
    """
    try:
        plain = unquote(uri)
        keys = [key for part in re.split(r"[?#]", uri)[1:] for key, _ in parse_qsl(part.replace(";", "&"))]
        if uri.lower().startswith(("http://", "https://")):
            _ = urlsplit(uri).port  # a password with a slash in it looks like a port that is no number
    except ValueError as error:
        raise SourceError("not a valid address", where=where) from error
    if _USERINFO.search(plain) or _ISSUED.search(plain) or any(_SECRET_KEY.search(key) for key in keys):
        raise SourceError(
            f"credentials inside an address ({uri.partition('://')[0][:16]}://…)",
            where=where,
            hint="remove them: HF_TOKEN, AWS_ACCESS_KEY_ID/AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_TOKEN and similar "
            "are read from the environment, and sources.lock.json is committed",
        )


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for people, without the queries of addresses in it.

    An address that a server redirected to is often signed: its query is a password for some minutes.
    """
    line = (str(error) or type(error).__name__).splitlines()[0]
    return _ISSUED.sub("…", _USERINFO.sub("://…@", _QUERY.sub("?…", line)))


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
