"""The log: one object a line, whatever clients send, and lines that a person can read on a terminal."""

import datetime
import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars

from service.logs import SHOWN_CHARACTERS, log_config, log_request

HOSTILE = "a\nb\r\x1b[2J\x9b1m\u2028\u202e\udc80\x00\x7f"
COLOURS = re.compile(r"\x1b\[\d+m")


@pytest.fixture
def log(request):
    """A logger of its own whose lines come from the formatter of log_config, and those lines.

    Not by dictConfig: that would take pytest's own handlers away.
    """
    settings = dict(log_config(terminal=request.param)["formatters"]["line"])
    formatter = settings.pop("()")(**settings)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(formatter.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("hazelnut")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield logger, lines
    logger.removeHandler(handler)
    logger.setLevel(level)


as_json = pytest.mark.parametrize("log", [False], indirect=True, ids=["json"])
on_terminal = pytest.mark.parametrize("log", [True], indirect=True, ids=["terminal"])
both = pytest.mark.parametrize("log", [False, True], indirect=True, ids=["json", "terminal"])


def only(lines: list[str]) -> dict[str, Any]:
    (line,) = lines
    assert "\n" not in line
    entry: dict[str, Any] = json.loads(line)
    return entry


@as_json
def test_line_is_an_object(log):
    logger, lines = log
    with bound_contextvars(request_id="seven"):
        logger.info("%d images of %s", 3, "nut", extra={"free_places": 61})
    entry = only(lines)
    assert list(entry) == ["timestamp", "level", "logger", "event", "request_id", "free_places"]
    written = datetime.datetime.fromisoformat(entry.pop("timestamp"))
    assert written.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(minutes=1)
    assert entry == {
        "level": "info",
        "logger": "hazelnut",
        "event": "3 images of nut",
        "request_id": "seven",
        "free_places": 61,
    }


@as_json
def test_line_without_a_request_has_no_id(log):
    logger, lines = log
    logger.warning("serving", extra={"color_message": "\x1b[1mserving"})
    entry = only(lines)
    assert set(entry) == {"timestamp", "level", "logger", "event"}
    assert entry["level"] == "warning"


def fail(key: str) -> None:
    raise ValueError(f"cannot score {HOSTILE}\n2026-01-01T00:00:00Z [info     ] all is well [hazelnut]{key[:0]}")


@as_json
def test_traceback_is_a_string_without_variables(log):
    logger, lines = log
    try:
        fail("the-secret-key")
    except ValueError:
        logger.exception("request failed")
    entry = only(lines)
    assert entry["level"] == "error"
    assert entry["exception"].startswith("Traceback (most recent call last):\n")
    assert "in fail" in entry["exception"]
    assert "the-secret-key" not in entry["exception"].replace('fail("the-secret-key")', "")


@on_terminal
def test_traceback_on_a_terminal_forges_no_line_and_shows_no_variables(log):
    logger, lines = log
    try:
        fail("the-secret-key")
    except ValueError:
        logger.exception("request failed")
    first, *others = lines[0].split("\n")
    assert "request failed" in first
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in others)
    assert all(line.isprintable() for line in others)
    assert any("all is well" in line for line in others)
    assert "the-secret-key" not in lines[0].replace('fail("the-secret-key")', "")


def request(**changes) -> None:
    fields = {"method": "POST", "route": "/score", "path": "/score", "status": 200, "seconds": 0.25}
    log_request(**{**fields, **changes})


@as_json
def test_request_is_a_line(log):
    request(key_name="line-7", images=4, seconds=0.12345678)
    entry = only(log[1])
    del entry["timestamp"]
    assert entry == {
        "level": "info",
        "logger": "hazelnut",
        "event": "request",
        "method": "POST",
        "route": "/score",
        "path": "/score",
        "status": 200,
        "seconds": 0.123457,
        "key_name": "line-7",
        "images": 4,
    }


@as_json
def test_request_without_an_answer_has_no_status(log):
    request(status=None)
    entry = only(log[1])
    assert entry["status"] is None
    assert not {"key_name", "images"} & set(entry)


@pytest.mark.parametrize(
    ("route", "status", "level"),
    [
        ("/score", 200, "info"),
        ("/score", 401, "info"),
        ("/score", None, "info"),
        ("/score", 500, "warning"),
        ("/models/{name}", 503, "warning"),
        ("unmatched", 404, "info"),
        ("/health/live", 200, "debug"),
        ("/health/ready", 503, "debug"),
        ("/metrics", 200, "debug"),
        ("/metrics/x", 404, "info"),
    ],
)
@as_json
def test_level_of_a_request(log, route, status, level):
    request(route=route, status=status)
    assert only(log[1])["level"] == level


@both
def test_probes_do_not_fill_the_log(log):
    logger, lines = log
    logger.setLevel(log_config(terminal=False)["loggers"]["hazelnut"]["level"])
    request(route="/health/live")
    request(route="/metrics")
    assert lines == []


@as_json
def test_path_and_method_are_cut(log):
    request(path="/" + "x" * 10_000, method="M" * 10_000)
    entry = only(log[1])
    assert entry["path"] == "/" + "x" * (SHOWN_CHARACTERS - 1) + "..."
    assert entry["method"] == "M" * SHOWN_CHARACTERS + "..."
    log[1].clear()
    request(path="x" * SHOWN_CHARACTERS)
    assert only(log[1])["path"] == "x" * SHOWN_CHARACTERS


@both
def test_hostile_text_is_escaped(log):
    logger, lines = log
    request(path=f"/{HOSTILE}", method=HOSTILE, key_name=HOSTILE)
    logger.info("no file %s", HOSTILE, extra={"filename_given": HOSTILE})
    for line in lines:
        line.encode()  # a lone surrogate would not do
        assert COLOURS.sub("", line).isprintable()
        for escape in (r"a\nb\r", r"\x1b[2J", r"\x9b1m", r"\u2028", r"\u202e", r"\udc80", r"\x00", r"\x7f"):
            assert escape in line.replace(r"\\", "\\")


@both
@pytest.mark.parametrize("character", sorted(set(HOSTILE) - set("ab2J[1m")), ids=ascii)
def test_every_hostile_character_is_escaped(log, character):
    request(path=character)
    assert COLOURS.sub("", log[1][0]).isprintable()


@as_json
def test_value_read_back_from_json_is_still_safe_to_print(log):
    request(path=f"/{HOSTILE}")
    path = only(log[1])["path"]
    assert path.isprintable()
    assert path.startswith(r"/a\nb\r\x1b[2J")


@both
def test_other_scripts_are_left_alone(log):
    request(path="/größe/部品")
    line = log[1][0]
    assert "/größe/部品" in (line if "\x1b" in line else json.loads(line)["path"])


@on_terminal
def test_terminal_gets_a_line_for_a_person(log):
    with bound_contextvars(request_id="seven"):
        request(path="/sc ore status=500", images=4)
    (line,) = log[1]
    assert COLOURS.search(line)
    plain = COLOURS.sub("", line)
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z \[info     \] request +\[hazelnut\] request_id=seven method=POST", plain)
    assert "path='/sc ore status=500' status=200 seconds=0.25 images=4" in plain


SCRIPT = """
import logging, uvicorn
from service.logs import log_config, log_request
logging.getLogger("uvicorn.access").addHandler(logging.StreamHandler())  # as of an earlier configuration
uvicorn.Config("nowhere:app", log_config=log_config(terminal=False))
assert not logging.getLogger("uvicorn.access").hasHandlers()
logging.getLogger("uvicorn.access").info("twice")
logging.getLogger("uvicorn.error").info("Started server process [%d]", 7, extra={"color_message": "colours"})
logging.getLogger("uvicorn.error").debug("not shown")
logging.getLogger("hazelnut").info("ours")
log_request(method="GET", route="/health/live", path="/health/live", status=200, seconds=0.1)
logging.getLogger("python_multipart.multipart").warning("malformed")
logging.getLogger("python_multipart.multipart").error("broken")
logging.getLogger("asyncio").warning("slow")
logging.getLogger("asyncio").info("not shown")
"""


def test_all_loggers_write_one_object_a_line_on_stderr():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    entries = [json.loads(line) for line in result.stderr.splitlines()]
    assert [(entry["logger"], entry["level"], entry["event"]) for entry in entries] == [
        ("uvicorn.error", "info", "Started server process [7]"),
        ("hazelnut", "info", "ours"),
        ("python_multipart.multipart", "error", "broken"),
        ("asyncio", "warning", "slow"),
    ]
    assert all(set(entry) == {"timestamp", "level", "logger", "event"} for entry in entries)
