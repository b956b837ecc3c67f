"""The page over HTTP: its files, their headers, and that it needs nothing which the policy forbids."""

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.pages import FOLDER, HEADERS

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.name for path in FOLDER.iterdir())
TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
SCRIPTS = [name for name in NAMES if name.endswith(".js")]
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nothing fetches


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    return Elements((FOLDER / "index.html").read_text()).found


def test_every_file_of_the_page_comes_with_its_type_and_the_policy(client):
    for path in ("/", *(f"/web/{name}" for name in NAMES)):
        response = client.get(path)
        assert response.status_code == 200
        name = Path(path).name or "index.html"
        assert response.content == (FOLDER / name).read_bytes()
        assert response.headers["Content-Type"].partition(";")[0] == TYPES[Path(name).suffix]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        policy = dict(rule.strip().split(" ", 1) for rule in response.headers["Content-Security-Policy"].split(";"))
        for nothing in ("default-src", "base-uri", "form-action", "frame-ancestors"):
            assert policy[nothing] == "'none'"
        for own in ("script-src", "style-src", "connect-src"):
            assert policy[own] == "'self'"


def test_the_page_of_the_api_asks_nothing_of_any_address_but_the_services(client):
    """FastAPI's own would load its scripts from a public server: in a plant it would stay white."""
    response = client.get("/docs")
    assert response.status_code == 200
    assert response.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
    asked = [
        element["src" if tag == "script" else "href"]
        for tag, element in Elements(response.text).found
        if tag in ("script", "link", "a")
    ]
    assert {"web/swagger-ui-bundle.js", "web/swagger-ui.css", "openapi.json"} <= set(asked)
    for address in asked:
        assert client.get(f"/{address}").status_code == 200
    assert len(client.get("/web/swagger-ui-bundle.js").content) > 1_000_000


def test_a_file_that_is_none_of_the_pages_is_not_found(client):
    for name in (
        "nothing.js",
        "pages.py",
        "%2e%2e",
        "%2e%2e%2fpages.py",
        "..%2f..%2fpyproject.toml",
        ".%5cpage.js",
        "",
    ):
        response = client.get(f"/web/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found"), name


def test_the_page_needs_no_key(client):
    client.app.state.service.keys = object()
    assert client.get("/").status_code == client.get("/web/page.js").status_code == 200


def test_the_page_has_one_label_in_the_metrics_for_all_its_files(client):
    before = routes(client)
    for path in ("/", "/web/page.js", "/web/page.css", "/web/nothing", "/web/nothing-else"):
        client.get(path)
    assert routes(client) - before == {"/", "/web/{name}", "/metrics"}


def routes(client: TestClient) -> set[str]:
    return set(re.findall(r'hazelnut_requests_total\{.*?route="([^"]*)"', client.get("/metrics").text))


def test_the_page_has_no_inline_script_style_or_handler(elements):
    assert [tag for tag, _ in elements if tag == "style"] == []
    assert [attributes for tag, attributes in elements if tag == "script" and not attributes.get("src")] == []
    names = {name for _, attributes in elements for name in attributes}
    assert {name for name in names if name == "style" or name.startswith("on")} == set()


def test_everything_that_the_page_loads_is_a_file_of_the_page(elements):
    loaded = {value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")}
    assert loaded - {"docs"} <= {f"web/{name}" for name in NAMES}
    for name in SCRIPTS:
        assert set(re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text())) <= set(SCRIPTS)


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_the_page_names_an_address_or_makes_code_or_html_of_text(name):
    text = (FOLDER / name).read_text().replace(NAMESPACE, "")
    assert re.findall(r"https?:|//[\w-]+\.\w|@import|url\(", text) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text) == []


def test_every_element_that_a_script_asks_for_is_in_the_page(elements):
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = {name for script in SCRIPTS for name in re.findall(r'\bat\("([^"]+)"\)', (FOLDER / script).read_text())}
    assert asked <= set(ids)


def test_the_files_of_the_page_are_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    packaged = {path for pattern in patterns for path in (ROOT / "service").glob(pattern)}
    assert packaged == set(FOLDER.iterdir())
