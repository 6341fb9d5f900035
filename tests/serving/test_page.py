"""The page in a real browser: it draws while one types and sketches, and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from tests.helpers import browser as browsers
from tests.helpers.infotext import parse
from tests.helpers.live import Canvas

pytest.importorskip("selenium")
if (reason := browsers.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

COUNT_LINES = """
const context = document.getElementById('canvas').getContext('2d');
const {width, height} = context.canvas;
const data = context.getImageData(0, 0, width, height).data;
let count = 0;
for (let i = 0; i < data.length; i += 4) count += data[i] + data[i + 1] + data[i + 2] < 600;
return count / (width * height);
"""
# Text and its ground, by what the browser computes; translucent grounds are not used.
CONTRAST = """
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((v) => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
  return .2126 * r + .7152 * g + .0722 * b;
};
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const ground = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const colour = parse(getComputedStyle(each).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour.slice(0, 3);
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll('h1, h2, p, label, button, a, output, figcaption, textarea, input')) {
  if (!element.checkVisibility() || element.matches('.hidden, .skip, [type=range], [type=color]')) continue;
  const [a, b] = [parse(getComputedStyle(element).color).slice(0, 3), ground(element)].map(luminance);
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) found.push(`${element.tagName} ${element.id} ${element.textContent.trim()}: ${ratio.toFixed(2)}`);
}
return found;
"""
UNNAMED = """
const found = [];
for (const element of document.querySelectorAll('button, a, input, select, textarea, canvas')) {
  const name = element.ariaLabel || element.labels?.[0]?.textContent || element.textContent || element.title;
  if (!name.trim()) found.push(element.outerHTML);
}
return found;
"""


@pytest.fixture(scope="module")
def address(canvas: Canvas) -> Iterator[str]:
    with canvas.served() as url:
        yield url


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browsers.browser() as opened:
        yield opened


@pytest.fixture
def page(driver: Any, address: str) -> Iterator[Any]:
    """The page, just opened; it must have complained of nothing."""
    driver.get(address)
    until(lambda: version(driver) >= 1)
    yield driver
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def until(true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        time.sleep(0.025)
    raise AssertionError("it never came true")


def version(page: Any) -> int:
    return int(page.execute_script("return document.body.dataset.version ?? 0"))


def click(page: Any, name: str) -> None:
    page.execute_script("document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", name)
    page.find_element("id", name).click()


def settled(page: Any) -> int:
    """The version on the page once no newer one is asked for."""
    until(lambda: page.execute_script("return document.getElementById('stage').ariaBusy") == "false")
    return version(page)


def downloaded(page: Any) -> tuple[Image.Image, Any]:
    """The image that the link saves, with its text."""
    for file in page.downloads.glob("*.png"):
        file.unlink()
    link = page.find_element("id", "download")
    page.execute_script("arguments[0].click()", link)
    file = page.downloads / link.get_attribute("download")
    until(file.exists)
    with Image.open(file) as image:
        image.load()
    return image, parse(image.text["parameters"])  # type: ignore[attr-defined]


def stroke(page: Any, *steps: tuple[int, int]) -> None:
    """A line from the canvas's middle."""
    page.execute_script("document.getElementById('canvas').scrollIntoView({block: 'center'})")
    actions = ActionChains(page, duration=20).move_to_element(page.find_element("id", "canvas")).click_and_hold()
    for x, y in steps:
        actions.move_by_offset(x, y)
    actions.release().perform()


def test_it_draws_while_one_types(page: Any) -> None:
    prompt = page.find_element("id", "prompt")
    assert page.switch_to.active_element == prompt
    before = settled(page)
    prompt.clear()
    for letter in "a blue cat":
        prompt.send_keys(letter)
        time.sleep(0.06)  # or the page would ask once for two keys
    assert settled(page) >= before + 10
    image, text = downloaded(page)
    assert text.bare_prompt == "a blue cat"
    assert text.loras == [("fast", 1.0), ("style", 0.5)]
    assert image.size == (16, 16)
    assert page.find_element("id", "image").get_attribute("alt") == "a blue cat"
    assert page.find_element("id", "download").get_attribute("download") == "a-blue-cat-0.png"
    assert "ms" in page.find_element("id", "caption").text


def test_every_setting_arrives(page: Any) -> None:
    changes = {"steps": "5", "seed": "77", "lora-0": "0.25", "lora-1": "0", "guidance": "3.5"}
    set_value = """
        const element = document.getElementById(arguments[0]);
        element.value = arguments[1];
        element.dispatchEvent(new Event('input', {bubbles: true}));
    """
    for name, value in {**changes, "negative": "red"}.items():
        page.execute_script(set_value, name, value)
    settled(page)
    _, text = downloaded(page)
    assert [text.values[key] for key in ("Steps", "Seed", "CFG scale")] == ["5", "77", "3.5"]
    assert (text.negative, text.loras) == ("red", [("fast", 0.25), ("style", 0.0)])
    click(page, "lock")
    page.find_element("id", "prompt").send_keys("!")
    settled(page)
    assert downloaded(page)[1].values["Seed"] != "77"


def test_a_slider_that_is_dragged_asks_no_more_than_the_server_reads(page: Any) -> None:
    before = settled(page)
    for _ in range(3):
        drag = """
            const slider = document.getElementById('guidance');
            for (let i = 0; i <= 100; i++) {
              slider.value = i / 10;
              slider.dispatchEvent(new Event('input', {bubbles: true}));
            }
        """
        page.execute_script(drag)
        settled(page)
    assert version(page) <= before + 6
    assert page.find_element("id", "status").text == "Ready"
    assert downloaded(page)[1].values["CFG scale"] == "10"


def test_strokes_are_never_lost(page: Any) -> None:
    """Nor by another tool, another mode, another size of the window, or a lost connection."""
    click(page, "mode-image")
    assert "the prompt alone is drawn" in page.find_element("id", "hint").text
    place = page.find_element("id", "canvas").rect
    stroke(page, (60, 0), (0, 60))
    settled(page)
    assert page.find_element("id", "canvas").rect == place  # it does not move under the pointer
    assert downloaded(page)[1].values["Denoising strength"] == "0.6"
    drawn = page.execute_script(COUNT_LINES)
    assert drawn > 0.005
    click(page, "eraser")
    click(page, "mode-text")
    click(page, "mode-inpaint")
    click(page, "mode-control")
    click(page, "mode-image")
    assert page.execute_script(COUNT_LINES) == pytest.approx(drawn, rel=0.02)
    metrics = {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    until(lambda: page.execute_script("return document.getElementById('canvas').width") > 600)
    assert page.execute_script(COUNT_LINES) == pytest.approx(drawn, rel=0.1)
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "width": 1280, "deviceScaleFactor": 1})
    stroke(page, (30, 0))
    assert page.execute_script(COUNT_LINES) < drawn
    click(page, "undo")
    assert page.execute_script(COUNT_LINES) == pytest.approx(drawn, rel=0.02)
    click(page, "clear")
    assert page.execute_script(COUNT_LINES) == 0
    page.find_element("id", "canvas").send_keys(Keys.CONTROL, "z")
    assert page.execute_script(COUNT_LINES) == pytest.approx(drawn, rel=0.02)


def test_one_can_draw_with_the_keyboard(page: Any) -> None:
    click(page, "mode-control")
    canvas = page.find_element("id", "canvas")
    canvas.send_keys(Keys.SPACE, *[Keys.ARROW_RIGHT] * 10, *[Keys.ARROW_DOWN] * 5, Keys.SPACE)
    settled(page)
    assert page.execute_script(COUNT_LINES) > 0.005
    assert "ControlNet 0" in downloaded(page)[1].values


def test_a_mask_is_painted_over_the_result(page: Any) -> None:
    click(page, "mode-inpaint")
    until(lambda: "Paint over" in page.find_element("id", "hint").text)
    before = version(page)
    stroke(page, (80, 0), (0, 40))
    until(lambda: settled(page) > before)
    assert downloaded(page)[1].values["Denoising strength"] == "0.6"
    assert not page.find_element("id", "hint").is_displayed()


def test_the_camera_is_drawn_from(page: Any) -> None:
    """The one that the browser makes up."""
    click(page, "mode-image")
    settled(page)
    before = version(page)
    click(page, "camera")
    until(lambda: version(page) > before + 2)
    assert "Denoising strength" in downloaded(page)[1].values
    click(page, "camera")
    assert page.find_element("id", "camera").get_attribute("aria-pressed") == "false"


def test_the_teacher_draws_beside_the_student(page: Any) -> None:
    click(page, "compare")
    until(lambda: page.find_element("id", "teacher-image").is_displayed())
    caption = page.find_element("id", "teacher-caption").text
    assert caption.startswith("Teacher, 25 steps (50 calls), ")
    assert " ms" in caption


def test_history_brings_settings_back(page: Any) -> None:
    until(lambda: bool(page.find_elements("css selector", "#shelf button")))
    before = page.find_element("id", "prompt").get_property("value")
    page.find_element("id", "prompt").send_keys(", changed")
    settled(page)
    entry = page.find_elements("css selector", "#shelf button")[-1]
    assert entry.get_attribute("aria-label") == f"Bring back: {before}, seed 0"
    entry.send_keys(Keys.ENTER)
    until(lambda: page.find_element("id", "prompt").get_property("value") == before)
    settled(page)
    assert downloaded(page)[1].bare_prompt == before


def test_modes_are_tabs(page: Any) -> None:
    page.find_element("id", "mode-text").send_keys(Keys.ARROW_LEFT)
    chosen = page.find_element("css selector", "[role=tab][aria-selected=true]")
    assert chosen.get_attribute("id") == "mode-control"
    assert page.switch_to.active_element == chosen


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_everything_has_a_name_a_contrast_and_room(page: Any, theme: str, width: int) -> None:
    feature = [{"name": "prefers-color-scheme", "value": theme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for mode in ("mode-text", "mode-image", "mode-inpaint"):
            click(page, mode)
            time.sleep(0.2)  # colours move
            assert page.execute_script(CONTRAST) == []
            assert page.execute_script(UNNAMED) == []
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "width": 1280, "mobile": False})


def test_nothing_comes_from_another_host(page: Any, address: str) -> None:
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((address, f"blob:{address}")) for name in loaded)


def test_a_lost_connection_is_found_again(driver: Any, canvas: Canvas) -> None:
    with canvas.served() as url:
        driver.get(url)
        until(lambda: version(driver) >= 1)
        click(driver, "mode-image")
        stroke(driver, (60, 0))
        drawn = driver.execute_script(COUNT_LINES)
    until(lambda: "No connection" in driver.find_element("id", "status").text)
    before = version(driver)
    with canvas.served(int(url.strip("/").rpartition(":")[2])):
        until(lambda: version(driver) > before)
        assert driver.find_element("id", "status").text == "Ready"
        assert driver.execute_script(COUNT_LINES) == drawn > 0
        driver.get("about:blank")
    driver.get_log("browser")  # complains of the connection
