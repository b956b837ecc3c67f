"""API keys: the file that holds their hashes, and the check that a request has one of them."""

import hashlib
import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import Request

from models.errors import ConfigError
from service.errors import ServiceError

KEY_BYTES = 32
KEY_HEADER = "X-API-Key"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
LINE = re.compile(rf"([0-9A-Fa-f]{{64}})[ \t]+({NAME.pattern})", re.ASCII)
NAME_ALLOWED = "1 to 64 letters, digits, dots, dashes and underscores"
LINE_ALLOWED = f"allowed are 64 hex digits, a space and a name of {NAME_ALLOWED}"

# For the OpenAPI document alone, and so for the Authorize button of /docs: they see one header of each kind only.
BEARER = HTTPBearer(auto_error=False, description="Where the service has keys.")
HEADER = APIKeyHeader(name=KEY_HEADER, auto_error=False, description="The same key in another header.")


@dataclass(frozen=True)
class Keys:
    """Whose the keys are: a name for the SHA-256 of each key."""

    names: dict[bytes, str] = field(repr=False)

    def owner(self, presented: str) -> str | None:
        """The name that goes with a key; None where it is none of ours. Takes as long whichever key it is."""
        digest = _digest(presented)
        found = None
        for known, name in self.names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def read_keys(path: Path) -> Keys:
    """Raises ConfigError, which never repeats a line: it may be a key that was put there by mistake."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {number}, is not UTF-8: {LINE_ALLOWED}.") from error
    names: dict[bytes, str] = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}, line {number}, is not the line of a key: {LINE_ALLOWED}.")
        digest, name = bytes.fromhex(match[1]), match[2]
        if name in names.values():
            raise ConfigError(f"{path}, line {number}, has the name {name} again: allowed is one key for each name.")
        if digest in names:
            raise ConfigError(f"{path}, line {number}, has the hash of {names[digest]}: allowed is one name for each.")
        names[digest] = name
    if not names:
        raise ConfigError(f"{path} has no key: `hazelnut key NAME` makes one and prints the line for this file.")
    return Keys(names)


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the line for the file of keys. Raises ConfigError for a name that does not do."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"the name of the key is {name!r}: allowed are {NAME_ALLOWED}.")
    key = secrets.token_urlsafe(KEY_BYTES)
    return key, f"{_digest(key).hex()} {name}"


def presented_key(headers: Headers) -> str | None:
    """The key of a request; None where it has none.

    Raises ServiceError where the headers name two that differ: whose request it is must not hang on their order.
    """
    keys = {value.strip() for value in headers.getlist(KEY_HEADER)}
    for value in headers.getlist("Authorization"):
        scheme, _, credentials = value.strip().partition(" ")
        if scheme.lower() == "bearer":  # another scheme may be for the proxy in front
            keys.add(credentials.strip())
    keys.discard("")
    if len(keys) > 1:
        raise _unauthorized("the request has two keys that differ: give one.")
    return keys.pop() if keys else None


def check_key(request: Request) -> None:
    """Refuses a request without a right key, and notes for the log whose it is. Nothing if keys are off.

    Raises ServiceError.
    """
    keys: Keys | None = request.app.state.service.keys
    if keys is None:
        return
    presented = presented_key(request.headers)
    if presented is None:
        raise _unauthorized(f"a key is missing: give it as Authorization: Bearer KEY, or as {KEY_HEADER}: KEY.")
    name = keys.owner(presented)
    if name is None:
        raise _unauthorized("the key is not one of those that the service knows.")
    request.state.key_name = name


def check_exposure(host: str, keys: Path | None, *, behind_loopback: bool) -> None:
    """Raises ConfigError where machines other than this one could reach a service without keys.

    behind_loopback: the operator's word that they cannot, because they reach a container by its loopback port alone.
    """
    if keys is None and not behind_loopback and not _is_loopback(host):
        raise ConfigError(
            f"HAZELNUT_HOST is {host!r}, where other machines may reach it, and anybody could use it: "
            "set HAZELNUT_API_KEYS to a file of keys, which `hazelnut key NAME` makes, or HAZELNUT_HOST to 127.0.0.1; "
            "in a container whose port is published on the loopback alone, HAZELNUT_BEHIND_LOOPBACK to true."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: what it will resolve to is anybody's guess
        return host.lower() == "localhost"


def _digest(key: str) -> bytes:
    # Plain SHA-256, without salt or stretching: those are for passwords, which can be guessed. Keys are 32 random bytes
    # of our own making: nobody finds one from its hash, and two are never the same.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _unauthorized(message: str) -> ServiceError:
    return ServiceError("unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
