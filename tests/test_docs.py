"""The documents say what is so: the README's answer, every recipe key, every command and its flags."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.main import get_command

from hazelnut import app
from service.app import create_app
from service.settings import Settings
from training.config import Recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_the_readmes_curl_gets_the_readmes_answer():
    (shown,) = [json.loads(block) for block in blocks(ROOT / "README.md", "json")]
    curl = next(line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines() if "curl" in line)
    match = re.fullmatch(r"curl -F files=@(\S+) http://127\.0\.0\.1:8000/score", curl)
    assert match is not None
    with TestClient(create_app(Settings())) as client, (ROOT / match[1]).open("rb") as file:
        answer = client.post("/score", files={"files": (Path(match[1]).name, file)}).json()
    assert answer["model"].keys() == shown["model"].keys()
    assert answer["model"]["sha256"] == shown["model"]["sha256"]
    assert answer["model"]["map_level"] == pytest.approx(shown["model"]["map_level"], rel=1e-3)
    (result,), (expected,) = answer["results"], shown["results"]
    assert result.keys() == expected.keys()
    for name in ("anomaly_score", "p_value"):
        assert result[name] == pytest.approx(expected[name], rel=1e-2)
    assert result["scores"] == pytest.approx(expected["scores"], rel=1e-2)
    assert result["is_anomalous"] is expected["is_anomalous"] is True
    assert len(result["regions"]) == len(expected["regions"])


def test_every_recipe_key_is_documented():
    text = (ROOT / "docs/training.md").read_text()
    assert [field.name for field in fields(Recipe) if f"`{field.name}`" not in text] == []


def commands_in(path: Path) -> list[list[str]]:
    """Of `hazelnut`, with or without a folder before it: in blocks, set off by four spaces, or in a line of text."""
    text = path.read_text()
    lines = re.findall(r"^(?: {4})?(?:\S*/)?(hazelnut [a-z].*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`(hazelnut [a-z][^`]*)`", text)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_document_exists_with_its_flags(path):
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for _, verb, *words in commands_in(path):
        flags = {flag for option in commands[verb].params for flag in [*option.opts, *option.secondary_opts]}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= flags, (verb, words)


def test_the_documents_have_commands():
    assert {words[1] for path in DOCUMENTS for words in commands_in(path)} == set(get_command(app).commands)  # type: ignore[attr-defined]


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_in_a_document_leads_somewhere(path):
    links = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', path.read_text())
    targets = [link or source for link, source in links if not (link or source).startswith("http")]
    for target in targets:
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def test_every_make_verb_in_the_documents_exists():
    makefile = (ROOT / "Makefile").read_text()
    for path in DOCUMENTS:
        quoted = " ".join(re.findall(r"`[^`]*`|```.*?```", path.read_text()))
        for verb in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", quoted):
            assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE), f"make {verb} in {path}"
