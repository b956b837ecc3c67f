"""The page in a real browser, against the real service, with drawn parts."""

import base64
import csv
import io
import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from models.checkpoint import load_checkpoint
from service.settings import DEFAULT_CHECKPOINT

GOOD = 6  # of the parts; the defective ones follow
PICTURES = Path(__file__).parents[2] / "docs" / "images"
SECONDS = 1000
PATIENCE = 60 * SECONDS
WIDER_THAN_THE_WINDOW = "document.documentElement.scrollWidth > innerWidth"

expect.set_options(timeout=20 * SECONDS)


def add(page: Page, *paths: Path) -> None:
    """Choose files, and wait until the page is done with them."""
    page.set_input_files("#files", paths)
    expect(page.locator("#bar")).to_be_hidden(timeout=PATIENCE)


def row(page: Page, name: str) -> Locator:
    return page.locator("#list li", has_text=name)


def look_at(page: Page, name: str) -> None:
    row(page, name).click()
    expect(page.locator("#detail-title")).to_have_text(name)
    expect(page.locator("#picture img")).to_be_visible()
    expect(page.locator("#chart svg")).to_be_visible()


def scored(service: str, part: Path) -> dict[str, Any]:
    """What the service says of an image."""
    request = urllib.request.Request(f"{service}/score", part.read_bytes(), {"Content-Type": "image/png"})
    with urllib.request.urlopen(request) as answer:
        (result,) = json.load(answer)["results"]
    found: dict[str, Any] = result
    return found


def test_many_images_of_which_one_is_broken(open_page, parts, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(parts[0].read_bytes()[:9000])
    page = open_page()
    add(page, *parts, broken)
    assert page.locator("#progress").text_content() == "11 images done · 4 anomalous, 6 normal · 1 not scored"
    assert page.locator("#announcement").text_content() == page.locator("#progress").text_content()
    for part in parts[:GOOD]:
        expect(row(page, part.name)).to_contain_text("Normal")
    for part in parts[GOOD:]:
        expect(row(page, part.name)).to_contain_text("Anomalous")
    row(page, "broken.png").click()
    expect(page.locator("#detail-verdict")).to_contain_text("Not scored")
    expect(page.locator("#detail-error")).to_have_text("the PNG ends within a chunk. (image_truncated)")
    expect(page.locator("#detail-scored")).to_be_hidden()
    expect(page.locator("#again")).to_be_hidden()  # it would be broken again
    page.click("#clear")
    expect(page.locator("#results")).to_be_hidden()


def test_the_numbers_of_an_image_are_the_services(open_page, service, parts):
    result = scored(service, parts[GOOD])
    page = open_page()
    add(page, parts[GOOD])
    look_at(page, parts[GOOD].name)
    shown = page.locator("#scores td").all_text_contents()
    expected = [result["anomaly_score"], *result["scores"].values()]
    assert [float(text) for text in shown] == pytest.approx(expected, rel=1e-3)
    expect(page.locator("#detail-sentence")).to_contain_text("None of 48 good images scored as high or higher")
    expect(page.locator("#detail-sentence")).to_contain_text("p = 1 / 49 = 0.02041, at most alpha, 0.05.")
    rows = page.locator("#regions tbody tr")
    assert rows.count() == len(result["regions"]) == page.locator("#picture .frame").count() == 1
    box = result["regions"][0]
    cells = [float(text) for text in rows.nth(0).locator("td").all_text_contents()]
    assert cells == pytest.approx([box[key] for key in ("left", "top", "width", "height", "peak")], rel=1e-3)
    frame = page.locator("#picture .frame")
    assert [int(frame.get_attribute(key)) for key in ("x", "y")] == [box["left"], box["top"]]


def test_the_threshold_that_the_chart_shows_is_where_verdicts_change(open_page):
    calibration = load_checkpoint(DEFAULT_CHECKPOINT).calibration
    page = open_page()
    for alpha in (calibration.smallest_alpha, 0.05, 0.1, 0.5, 0.98):
        call = "([good, alpha]) => import('/web/chart.js').then(({ threshold }) => threshold(good, alpha))"
        limit = page.evaluate(call, [calibration.good_scores.tolist(), alpha])
        assert calibration.p_value(limit) > alpha >= calibration.p_value(limit + 1e-9)


def test_the_map_lies_over_the_picture_as_the_slider_says(open_page, parts):
    page = open_page()
    add(page, parts[GOOD])
    look_at(page, parts[GOOD].name)
    page.uncheck("#boxes")
    picture = page.locator("#picture")
    page.fill("#opacity", "0")
    expect(page.locator("#opacity-value")).to_have_text("0 %")
    without = picture.screenshot()
    page.fill("#opacity", "100")
    assert picture.screenshot() != without
    page.evaluate("document.querySelector('#picture .over').remove()")
    assert picture.screenshot() == without


def test_the_map_is_coloured_where_the_defect_is_and_nowhere_else(open_page, service, parts):
    box = scored(service, parts[GOOD])["regions"][0]
    page = open_page()
    add(page, parts[GOOD])
    look_at(page, parts[GOOD].name)
    pixel = "([x, y]) => [...document.querySelector('#picture .over').getContext('2d').getImageData(x, y, 1, 1).data]"
    inside = [box["left"] + box["width"] // 2, box["top"] + box["height"] // 2]
    assert page.evaluate(pixel, inside) == [255, 240, 120, 255]
    assert page.evaluate(pixel, [2, 2])[3] == 0


def test_an_image_that_the_browser_cannot_show_is_drawn_by_the_service(open_page, parts, tmp_path):
    scan = tmp_path / "scan.tif"
    Image.open(parts[GOOD]).save(scan)
    page = open_page()
    add(page, scan)
    look_at(page, "scan.tif")
    expect(page.locator("#detail-verdict")).to_contain_text("Anomalous")
    expect(page.locator("#picture-note")).to_be_visible()
    expect(page.locator("#opacity")).to_be_disabled()
    assert page.evaluate("document.querySelector('#picture img').naturalWidth") == 192
    page.fill("#alpha", "0.2")
    page.press("#alpha", "Enter")
    page.click("#again")
    expect(page.locator("#detail-origin")).to_contain_text("at alpha 0.2")
    expect(page.locator("#picture-note")).to_be_visible()


def test_an_alpha_that_is_too_small_is_refused_with_the_reason(open_page, parts):
    page = open_page()
    expect(page.locator("#alpha")).to_have_value("0.05")
    page.fill("#alpha", "0.001")
    expect(page.locator("#alpha-problem")).to_have_text(
        "Alpha is 0.001: the smallest for this model is 0.02041. Its calibration has 48 good images, and the least "
        "share that they can tell is 1 in 49."
    )
    page.set_input_files("#files", parts[:2])
    expect(page.locator("#progress")).to_have_text("0 of 2 images done · waiting: alpha has to be put right")
    page.fill("#alpha", "0.1")
    page.press("#alpha", "Enter")
    expect(page.locator("#progress")).to_contain_text("2 images done")
    expect(page.locator("#detail-origin")).to_contain_text("at alpha 0.1")
    page.fill("#alpha", "0.99")
    expect(page.locator("#again")).to_have_text("Score 2 images again with these settings")
    page.press("#alpha", "Enter")
    page.click("#again")
    expect(page.locator("#progress")).to_have_text("2 images done · 2 anomalous, 0 normal")


def test_a_key_is_asked_for_and_the_model_can_be_chosen(open_page, keyed_service, key_and_line, parts):
    key, _ = key_and_line
    page = open_page(keyed_service)
    expect(page.locator("#key")).to_be_focused()
    page.set_input_files("#files", parts[0])
    expect(page.locator("#progress")).to_contain_text("waiting: a key is needed")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    expect(page.locator("#key-hint")).to_contain_text("the key is not one of those that the service knows")
    page.fill("#key", key)
    page.press("#key", "Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#detail-origin")).to_contain_text("Scored by bolts, version 1")
    options = page.locator("#model option")
    expect(options).to_have_text(["bolts, version 1", "gears, version 2 (current)", "gears, version 1"])
    page.select_option("#model", "gears:1")
    with page.expect_request("**/score?model=gears%3A1&*") as sent:
        page.click("#again")
    assert sent.value.headers["x-api-key"] == key
    expect(page.locator("#detail-origin")).to_contain_text("Scored by gears, version 1")
    assert key not in page.content()
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.reload()
    expect(page.locator("#key")).to_be_focused()


def test_the_csv_has_every_image_and_no_formula(open_page, parts, tmp_path):
    formula = tmp_path / '=HYPERLINK("x")&1,2.png'
    formula.write_bytes(parts[GOOD].read_bytes())
    broken = tmp_path / "@broken.png"
    broken.write_bytes(b"no image")
    page = open_page()
    add(page, parts[0], formula, broken)
    with page.expect_download() as download:
        page.click("#csv")
    assert download.value.suggested_filename == "hazelnut-results.csv"
    content = Path(download.value.path()).read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    assert b"\n" not in content.replace(b"\r\n", b"")
    good, bad, none = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    assert (good["file"], good["verdict"], good["regions"]) == (parts[0].name, "normal", "0")
    assert (good["model"], good["version"], good["alpha"], good["width"]) == ("gears", "1", "0.05", "192")
    assert (bad["file"], bad["verdict"]) == ("'" + formula.name, "anomalous")
    assert float(bad["p_value"]) == pytest.approx(1 / 49)
    assert float(bad["anomaly_score"]) > 10
    assert float(bad["anomaly_map"]) > float(good["anomaly_map"])
    assert (none["file"], none["error"], none["verdict"]) == ("'@broken.png", "image_format", "")
    for line in (good, bad, none):
        assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in line.values())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_at_400_pixels_nothing_has_to_be_scrolled_sideways(open_page, parts, scheme):
    page = open_page(width=400, height=850, scheme=scheme)
    assert not page.evaluate(WIDER_THAN_THE_WINDOW)
    long = {"name": "a" * 200 + ".png", "mimeType": "image/png", "buffer": parts[GOOD].read_bytes()}
    page.set_input_files("#files", [long])
    expect(page.locator("#chart svg")).to_be_visible()
    assert not page.evaluate(WIDER_THAN_THE_WINDOW)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] > 128")
    assert light == (scheme == "light")


def test_the_keyboard_alone_does_it_all(open_page, parts):
    page = open_page()
    page.on("filechooser", lambda _: None)  # from now on: playwright misses a dialog that opens as it begins to listen
    expect(page.locator("#alpha")).to_have_value("0.05")
    tab_to(page, "choose")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([str(parts[0]), str(parts[GOOD])])
    expect(page.locator("#progress")).to_contain_text("2 images done")
    while page.evaluate("document.activeElement.getAttribute('role')") != "option":
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#detail-title")).to_have_text(parts[GOOD].name)
    expect(page.locator("#picture img")).to_be_visible()
    tab_to(page, "opacity")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#opacity-value")).to_have_text("64 %")
    assert page.evaluate("document.querySelector('#picture .over').style.opacity") == "0.64"
    tab_to(page, "boxes")
    page.keyboard.press("Space")
    expect(page.locator("#picture svg")).to_be_hidden()


def tab_to(page: Page, name: str) -> None:
    for _ in range(30):
        if page.evaluate("document.activeElement.id") == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"the tab key does not reach {name}")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_images_can_be_dropped_and_pasted(open_page, parts, way):
    page = open_page()
    data = base64.b64encode(parts[0].read_bytes()).decode()
    page.evaluate(
        """([way, data]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "given.png", { type: "image/png" }));
            const event = way === "drop"
                ? new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: dataTransfer, bubbles: true });
            document.body.dispatchEvent(event);
        }""",
        [way, data],
    )
    expect(row(page, "given.png")).to_contain_text("Normal")


def test_a_folder_that_is_dropped_is_named(open_page, parts):
    page = open_page()
    browser = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(parts[0].parent), str(parts[0])], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 120, "data": data})
    expect(page.locator("#folder")).to_have_text(f"{parts[0].parent.name}: a folder. Drop the images that are in it.")
    expect(page.locator("#list li")).to_have_count(1)
    expect(row(page, parts[0].name)).to_contain_text("Normal")


def test_a_service_that_is_busy_is_asked_again_when_it_says(open_page, parts):
    page = open_page()
    answers = iter([503, 429])

    def refuse_twice(route):
        status = next(answers, None)
        if status is None:
            route.continue_()
        else:
            route.fulfill(status=status, headers={"Retry-After": "1"}, json={"error": {"code": "busy", "message": ""}})

    page.route("**/score?*", refuse_twice)
    page.set_input_files("#files", parts[0])
    expect(row(page, parts[0].name)).to_contain_text("Busy, again in 1 s")
    expect(row(page, parts[0].name)).to_contain_text("Normal")


def test_a_service_that_is_gone_is_named_and_images_can_be_tried_again(open_page, parts):
    page = open_page()
    page.route("**/score?*", lambda route: route.abort())
    add(page, parts[0])
    expect(page.locator("#detail-error")).to_contain_text("The service cannot be reached")
    page.unroute("**/score?*")
    expect(page.locator("#again")).to_have_text("Try 1 image again")
    page.click("#again")
    expect(row(page, parts[0].name)).to_contain_text("Normal")

    page.route("**/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#trouble")).to_have_text("The service cannot be reached.")
    page.unroute("**/models")
    page.click("#reload")
    expect(page.locator("#alpha")).to_have_value("0.05")
    expect(page.locator("#trouble")).to_be_hidden()


def test_a_file_that_is_too_large_is_refused_in_the_services_words(open_page, tmp_path, parts):
    large = tmp_path / "large.png"
    large.write_bytes(parts[0].read_bytes() + bytes(40 * 2**20))
    page = open_page()
    add(page, large)
    expect(page.locator("#detail-error")).to_have_text(re.compile(r"the body is too large: .*\(body_too_large\)"))


def test_the_page_of_the_api_tries_a_request(open_page):
    page = open_page()
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("heading", name="Hazelnut")).to_be_visible()
    page.locator("#operations-default-score_score_post").wait_for()
    page.get_by_role("button", name="GET /health/ready The models").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response .response-col_status").first).to_have_text("200")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page, parts, scheme, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page = open_page(scheme=scheme)
    expect(page.locator("#alpha")).to_have_value("0.05")
    assert violations(page) == ""
    add(page, *parts[GOOD - 1 :], broken)
    for part in parts[GOOD - 1 : GOOD + 1]:
        look_at(page, part.name)
        assert violations(page) == ""
    row(page, "broken.png").click()
    page.fill("#alpha", "0.001")
    assert violations(page) == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_where_a_key_is_asked_for(open_page, keyed_service, scheme):
    page = open_page(keyed_service, scheme=scheme)
    expect(page.locator("#key")).to_be_focused()
    assert violations(page) == ""


def violations(page: Page) -> str:
    results = Axe().run(page)
    return results.generate_report() if results.violations_count else ""


@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"),
    [("light", 1280, 1230, "light"), ("dark", 1280, 1230, "dark"), ("narrow", 400, 1100, "light")],
)
def test_the_pictures_in_the_readme_are_of_this_page(open_page, parts, name, width, height, scheme):
    page = open_page(width=width, height=height, scheme=scheme)
    add(page, *parts)
    look_at(page, parts[GOOD].name)
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    screenshot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    path = PICTURES / f"page-{name}.png"
    palette = screenshot.quantize(256, method=Image.Quantize.FASTOCTREE)
    screenshot.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    assert path.stat().st_size < 200_000
