"""What of an address may be written down: everything but credentials.

Catalogues, pages, logs, error messages, MLflow and Prefect get `public_address` of where a video or a server is; the
full address is used to connect, and for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus

# Parameters of a query that open a door, by their names in lower case.
_SECRET = re.compile(
    r"(x-(amz|goog|oss|cos|obs|ms)-.*"
    r"|.*(token|signature|secret|password|passwd|passphrase|credentials?|accessid|jwt|hmac|sess(ion)?[-_]?id)"
    r"|.*(secret|access|private|api|app|auth|client|licen[sc]e|subscription|signing|security|encryption|account|shared)"
    r"[-_]?key([-_]?id)?"
    r"|sig|sign|key|pw|pwd|pass|auth|authorization|session|session[-_]key|key-pair-id|hdnts|hdnea|hdntl)"
)
# Those that come with a signature and change when it is renewed. Alone they may say which video is meant.
_RENEWED = {"expires", "policy", "md5"}
# What the parameter `key` may be besides a secret: the name of an object.
_FILE_NAME = re.compile(r".*\.[A-Za-z][A-Za-z0-9]{1,4}", re.DOTALL)
# Where `?` begins a query; elsewhere, as in s3://, it is a character of a name.
_WITH_QUERY = re.compile(r"(.*:)?(https?|wss?|ftps?|(postgres(ql)?|mysql|mariadb|mssql|oracle)(\+\w+)?)", re.IGNORECASE)
# The parameters of an Azure shared access signature beside `sig`.
_AZURE = {
    *("sv", "ss", "srt", "sr", "st", "se", "sp", "spr", "sip", "si", "skoid", "sktid", "skt", "ske", "sks", "skv"),
    *("sdd", "saoid", "suoid", "scid"),
}
# Up to a quotation mark; `'` is allowed in passwords.
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s/?#@\"<>]*@)?[^\s'\"<>]*?(?=[:,;.)\]}]*(?:[\s'\"<>]|$))")


def public_address(address: str) -> str:
    """Return `address` without user and password, and without the secret parameters of its query or fragment.

    A query is one of http(s) and of databases; the keys of objects in `s3://` may have any character. The other
    parameters stay, because they can name the video (`?v=…`). What holds no secret is returned as it is, a path too. A
    renewed signature gives the same result, for example `https://h/a.mp4?v=2` of
    `https://user:pw@h/a.mp4?v=2&X-Amz-Date=…&X-Amz-Signature=…`.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    rest = rest[_end_of_login(rest) :]
    if _WITH_QUERY.fullmatch(scheme):
        place, hash_sign, fragment = rest.partition("#")
        path, mark, query = place.partition("?")
        rest = _with(_with(path, mark, query), hash_sign, fragment)
    return f"{scheme}://{rest}"


def _end_of_login(rest: str) -> int:
    """Return where the host begins. A port that is no number is a password with a `/`, `?` or `#` in it."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in authority and re.search(r"^[^\[\]]*:.*[^\d]", authority):
        return rest.rfind("@") + 1
    return authority.rfind("@") + 1


def _with(place: str, mark: str, query: str) -> str:
    """Append `query`, or a fragment, without what is secret in it."""
    given = re.split("[&;]", query)
    pairs = [tuple(map(unquote_plus, one.partition("=")[::2])) for one in given]
    secret = [_is_secret(name.lower(), value) for name, value in pairs]
    names = {name.lower() for name, _ in pairs}
    beside = (_RENEWED if any(secret) or len(names & _RENEWED) > 1 else set()) | (_AZURE if "sig" in names else set())
    kept = [
        one
        for one, (name, _), hidden in zip(given, pairs, secret, strict=True)
        if not hidden and name.lower() not in beside
    ]
    return place + mark + query if kept == given else place + mark * bool(kept) + "&".join(kept)


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET.fullmatch(name)) and not (name == "key" and _FILE_NAME.fullmatch(value))


def public_text(text: str) -> str:
    """Return `text` with every address in it made public."""
    return _IN_TEXT.sub(lambda found: public_address(found[0]), text) if "://" in text else text


def public_values(value: Any) -> Any:
    """Return mappings, lists and texts, such as the options of a preset, with all addresses in them made public.

    A text that as a whole is an address is one, spaces in it included.
    """
    if isinstance(value, str):
        return public_text(public_address(value)) if re.match(r"\S+://", value) else public_text(value)
    if isinstance(value, Mapping):
        return {key: public_values(item) for key, item in value.items()}
    return [public_values(item) for item in value] if isinstance(value, list | tuple) else value
