"""API keys: the file, the check of a request, and that a key is seen by nobody else."""

import hashlib
import hmac
import logging
import re
import string

import httpx2
import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from models.errors import ConfigError
from service.app import create_app
from service.errors import ServiceError
from service.security import check_exposure, new_key, presented_key, read_keys
from service.settings import Settings


def test_new_key_is_long_and_its_line_has_its_hash_alone():
    key, line = new_key("line-7")
    assert len(key) == 43, "32 bytes, six bits a character"
    assert set(key) <= set(string.ascii_letters + string.digits + "-_")
    assert line == f"{hashlib.sha256(key.encode()).hexdigest()} line-7"
    assert new_key("line-7")[0] != key


@pytest.mark.parametrize("name", ["", "x" * 65, "line 7", "line-7\n", "größe", "#"])
def test_new_key_refuses_a_name(name):
    with pytest.raises(ConfigError, match="allowed are 1 to 64 letters, digits, dots, dashes and underscores"):
        new_key(name)


@pytest.fixture
def files(tmp_path):
    """Writes a file of keys."""

    def write(content: str | bytes):
        path = tmp_path / "keys"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_file_may_have_comments_blank_lines_and_windows_line_ends(files):
    (first, line), (second, other) = new_key("line-7"), new_key("A.b_c-" + "x" * 58)
    upper = other[:64].upper() + "\t  " + other[65:]
    keys = read_keys(files(f"# who may score\r\n\r\n  {line}  \r\n   # not in use: nobody\r\n{upper}"))
    assert keys.owner(first) == "line-7"
    assert keys.owner(second) == "A.b_c-" + "x" * 58


HASHES = [hashlib.sha256(bytes([number])).hexdigest() for number in range(3)]
WRONG_LINES = {
    "short": f"{HASHES[0][:-1]} a",
    "long": f"{HASHES[0]}0 a",
    "not hex": f"{'g' * 64} a",
    "digits of another script": f"{'٣' * 64} a",
    "no name": HASHES[0],
    "two names": f"{HASHES[0]} a b",
    "long name": f"{HASHES[0]} {'x' * 65}",
    "name": f"{HASHES[0]} größe",
    "comment after it": f"{HASHES[0]} a # b",
    "the key": new_key("a")[0],
}


@pytest.mark.parametrize("name", WRONG_LINES)
def test_line_is_refused_and_never_repeated(files, name):
    path = files(f"# keys\n\n{HASHES[1]} first\n{WRONG_LINES[name]}\n{HASHES[2]} last\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert str(caught.value) == (
        f"{path}, line 4, is not the line of a key: allowed are 64 hex digits, a space and a name of "
        "1 to 64 letters, digits, dots, dashes and underscores."
    )


WRONG_FILES = {
    "same name": (f"{HASHES[0]} a\n#\n{HASHES[1]} a\n", ", line 3, has the name a again: allowed is one key for each"),
    "same hash": (f"{HASHES[0]} a\n{HASHES[0].upper()} b\n", ", line 2, has the hash of a: allowed is one name for"),
    "empty": ("", " has no key: `hazelnut key NAME` makes one"),
    "comments": ("# none yet\n\n", " has no key: `hazelnut key NAME` makes one"),
    "latin-1": (f"{HASHES[0]} a\n# Gr\xf6\xdfe\n".encode("latin-1"), ", line 2, is not UTF-8: allowed are 64 hex"),
    "utf-16": (f"{HASHES[0]} a\n".encode("utf-16"), ", line 1, is not UTF-8: allowed are 64 hex digits"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_file_is_refused(files, name):
    content, says = WRONG_FILES[name]
    path = files(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}{says}")) as caught:
        read_keys(path)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"cannot read the API keys in {tmp_path / 'none'}: No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(ConfigError, match=f"cannot read the API keys in {tmp_path}: Is a directory"):
        read_keys(tmp_path)


@pytest.fixture
def three(files):
    """Three keys by their names, the file's Keys, and what the file says."""
    made = {name: new_key(name) for name in ("a", "b", "c")}
    content = "\n".join(line for _, line in made.values())
    return {name: key for name, (key, _) in made.items()}, read_keys(files(content)), content


def wrong_keys(right: str) -> dict[str, str]:
    return {
        "another": new_key("a")[0],
        "part": right[:-1],
        "longer": right + "A",
        "other case": right.swapcase(),
        "its hash": hashlib.sha256(right.encode()).hexdigest(),
        "non-ascii": "Schlüssel",
        "surrogate": "\udc80",
        "very long": "x" * 60_000,
    }


def test_owner_is_found_by_the_whole_key_alone(three):
    right, keys, _ = three
    for name, key in right.items():
        assert keys.owner(key) == name
    for what, key in {**wrong_keys(right["a"]), "empty": "", "zero": "\0"}.items():
        assert keys.owner(key) is None, what


def test_owner_compares_with_every_hash(three, monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def counted(known, given):
        compared.append(known)
        return compare(known, given)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    right, keys, _ = three
    for key in (*right.values(), "wrong"):
        compared.clear()
        keys.owner(key)
        assert compared == [hashlib.sha256(each.encode()).digest() for each in right.values()]


def as_received(given: list[tuple[str, str]]) -> Headers:
    """The server puts names into lower case."""
    return Headers(raw=[(name.lower().encode(), value.encode()) for name, value in given])


SAME = [("X-API-Key", "k"), ("Authorization", "Bearer k")]
PRESENTED: dict[str, tuple[list[tuple[str, str]], str | None]] = {
    "none": ([], None),
    "bearer": ([("Authorization", "Bearer k")], "k"),
    "lower case": ([("Authorization", "bearer k")], "k"),
    "upper case": ([("Authorization", "BEARER  k ")], "k"),
    "header": ([("X-API-Key", " k ")], "k"),
    "both": (SAME, "k"),
    "both, twice": (SAME * 2, "k"),
    "empty": ([("X-API-Key", ""), ("Authorization", "Bearer ")], None),
    "no scheme": ([("Authorization", "k")], None),
    "no space": ([("Authorization", "Bearerk")], None),
    "scheme alone": ([("Authorization", "Bearer")], None),
    "one is empty": ([("X-API-Key", ""), ("Authorization", "Bearer k")], "k"),
    "the proxy's own": ([("Authorization", "Basic dTpw"), ("X-API-Key", "k")], "k"),
    "basic": ([("Authorization", "Basic dTpw")], None),
}


@pytest.mark.parametrize("name", PRESENTED)
def test_key_is_presented_in_either_header(name):
    given, key = PRESENTED[name]
    assert presented_key(as_received(given)) == key


@pytest.mark.parametrize(
    "given",
    [
        [("X-API-Key", "k"), ("Authorization", "Bearer l")],
        [("X-API-Key", "k"), ("X-API-Key", "l")],
        [("Authorization", "Bearer k"), ("Authorization", "Bearer l")],
    ],
)
def test_two_keys_that_differ_are_refused(given):
    with pytest.raises(ServiceError, match="two keys that differ") as caught:
        presented_key(as_received(given))
    assert caught.value.code == "unauthorized"


@pytest.fixture
def client(three, files, checkpoint) -> TestClient:
    """Of a service that has the keys. It never starts: what is let in is answered with 503."""
    app = create_app(Settings(device="cpu", api_keys=files(three[2])), checkpoint=checkpoint)
    return TestClient(app)


def assert_unauthorized(response: httpx2.Response, says: str) -> None:
    assert response.status_code == 401, response.text
    assert response.headers["WWW-Authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error["code"] == "unauthorized"
    assert says in error["message"]


def test_right_key_is_let_in_by_either_header_and_its_name_is_logged(client, three, caplog):
    for name, key in three[0].items():
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                assert client.get("/models", headers=headers).json()["error"]["code"] == "not_ready"
            (logged,) = [record for record in caplog.records if record.name == "hazelnut"]
            assert vars(logged)["key_name"] == name
            assert key not in repr(vars(logged))


def test_request_without_a_right_key_is_refused(client, three, caplog):
    key = three[0]["a"]
    with caplog.at_level(logging.DEBUG):
        assert_unauthorized(
            client.get("/models"), "a key is missing: give it as Authorization: Bearer KEY, or as X-API"
        )
        assert_unauthorized(client.get("/models", headers={"X-API-Key": ""}), "missing")
        assert_unauthorized(client.get("/models", headers=[("X-API-Key", key), ("X-API-Key", "other")]), "differ")
        for wrong in wrong_keys(key).values():
            headers = [(b"X-API-Key", wrong.encode("utf-8", "surrogatepass"))]
            response = client.get("/models", headers=headers)
            assert_unauthorized(response, "not one of those")
            assert wrong not in response.text
    assert key not in caplog.text


def test_keys_that_are_off_are_not_asked_for(checkpoint):
    client = TestClient(create_app(Settings(device="cpu"), checkpoint=checkpoint))
    for headers in ({}, {"X-API-Key": "whatever"}):
        assert client.get("/models", headers=headers).json()["error"]["code"] == "not_ready"


def test_routes_that_need_a_key_show_both_ways_in_the_openapi_document(client):
    document = client.get("/openapi.json").json()
    for path, method in (("/score", "post"), ("/models", "get"), ("/models/{name}", "get")):
        assert document["paths"][path][method]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
        assert "`unauthorized`" in document["paths"][path][method]["responses"]["401"]["description"]
        assert_unauthorized(client.request(method, path), "missing")
    schemes = document["components"]["securitySchemes"]
    assert schemes["HTTPBearer"]["scheme"] == "bearer"
    assert (schemes["APIKeyHeader"]["in"], schemes["APIKeyHeader"]["name"]) == ("header", "X-API-Key")


def test_lookout_clients_need_a_key_and_are_told_so_in_their_shape(client, three):
    path = "/2020-11-20/projects/nut/models/1/detect"
    refused = client.post(path, content=b"x", headers={"Content-Type": "image/png"})
    assert (refused.status_code, refused.headers["x-amzn-ErrorType"]) == (403, "AccessDeniedException")
    assert refused.json()["Code"] == "unauthorized"
    right = {"Content-Type": "image/png", "X-API-Key": three[0]["a"]}
    assert client.post(path, content=b"x", headers=right).json()["Code"] == "not_ready"


def test_keys_are_read_again_and_a_file_that_is_wrong_changes_nothing(checkpoint, files, caplog):
    (old, first), (new, second) = new_key("old"), new_key("new")
    app = create_app(Settings(device="cpu", api_keys=files(first)), checkpoint=checkpoint)
    with TestClient(app) as client:

        def known() -> list[bool]:
            return [client.get("/models", headers={"X-API-Key": key}).status_code == 200 for key in (old, new)]

        assert known() == [True, False]
        files(second)
        app.state.service.look_again()
        assert known() == [False, True]
        files("half a line")
        app.state.service.look_again()
        assert known() == [False, True]
    assert "the keys stay as they were" in caplog.text
    assert "line 1, is not the line of a key" in caplog.text


@pytest.mark.parametrize("path", ["/metrics", "/docs"])
def test_what_shows_no_image_needs_no_key(client, path):
    assert client.get(path).status_code == 200


def test_probes_need_no_key(client):
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").json()["error"]["code"] == "not_ready"


def test_keys_show_neither_keys_nor_hashes(three):
    right, keys, _ = three
    shown = repr(keys) + str(keys) + f"{keys}"
    for key in right.values():
        digest = hashlib.sha256(key.encode())
        assert not any(each in shown for each in (key, digest.hexdigest(), repr(digest.digest())))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LocalHost"])
def test_service_without_keys_may_listen_on_the_machine_itself(host):
    check_exposure(host, None, behind_loopback=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.7", "203.0.113.1", "fe80::1", "localhost.example", "no such host", "127.1", ""]
)
def test_service_without_keys_may_not_listen_elsewhere(host, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"HAZELNUT_HOST is {host!r}, ")) as caught:
        check_exposure(host, None, behind_loopback=False)
    assert "set HAZELNUT_API_KEYS to a file of keys" in str(caught.value)
    assert "HAZELNUT_HOST to 127.0.0.1;" in str(caught.value)
    check_exposure(host, tmp_path / "keys", behind_loopback=False)
    check_exposure(host, None, behind_loopback=True)
