"""The real service, Debian's chromium, and drawn parts."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from benchmarks.running import running
from service.security import new_key
from service.settings import DEFAULT_CHECKPOINT
from training.demo import KINDS, draw_defect, draw_part

GOOD = 6


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """Of the demo model."""
    with running(device="cpu") as process:
        yield f"http://127.0.0.1:{process.port}"


@pytest.fixture(scope="session")
def key_and_line() -> tuple[str, str]:
    return new_key("line-7")


@pytest.fixture(scope="session")
def keyed_service(tmp_path_factory: pytest.TempPathFactory, key_and_line: tuple[str, str]) -> Iterator[str]:
    """Of two products, one in two versions, for those who have a key."""
    folder = tmp_path_factory.mktemp("keyed")
    for version in ("gears/1", "gears/2", "bolts/1"):
        shutil.copytree(DEFAULT_CHECKPOINT, folder / "models" / version)
    (folder / "keys").write_text(key_and_line[1] + "\n")
    with running(device="cpu", checkpoint=folder / "models", api_keys=folder / "keys") as process:
        yield f"http://127.0.0.1:{process.port}"


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six good parts, and one with each kind of defect, named after it."""
    folder = tmp_path_factory.mktemp("parts")
    paths = [folder / f"gear-{number + 1:02}.png" for number in range(GOOD)]
    for number, path in enumerate(paths):
        draw_part(np.random.default_rng([5, number])).image.save(path)
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng([78, number])
        image, _ = draw_defect(draw_part(rng), rng, kind)
        paths.append(folder / f"gear-{GOOD + number + 1:02}-{kind}.png")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, service: str) -> Iterator[Callable[..., Page]]:
    """Opens the page. In the end: no fault in its scripts, nothing against its policy, nothing asked of others."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def opened(address: str = service, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
        page.on("request", lambda request: faults.append(request.url) if not is_own(request.url, address) else None)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def is_own(url: str, address: str) -> bool:
    return url.startswith((f"{address}/", f"blob:{address}/", "data:"))
