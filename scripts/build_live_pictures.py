"""Take the pictures of the live canvas in docs/images, with a headless Chromium on the embedded model.

python scripts/build_live_pictures.py docs/images

live-desktop.png, live-phone.png, and live.webp, which shows a prompt being typed at eight keys a second: a frame for
each key, taken when its image is there.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402

from tests.helpers.browser import browser  # noqa: E402

TYPED = ("lion, noto style", ", blue background", "", "red apple, fluent flat style")
KEY_MILLISECONDS, PAUSE_MILLISECONDS = 125, 1600
SHOWN, SCALE = (700, 690), 0.7  # of the page, in the recording
SKETCH = "red apple, fluent flat style"
STROKES = (("#d8352a", 30, 0.2, (0.0, 0.05)), ("#d8352a", 30, 0.06, (0.0, 0.05)), ("#4d9b3f", 8, 0.05, (0.1, -0.33)))


def main() -> None:
    """Start the server, and take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    command = [sys.executable, "-m", "hypersd_jax", "serve", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with browser(1280, 800) as page:
            page.get(url)
            sketched(page)
            save(screenshot(page, 1280, 800), output / "live-desktop.png")
        with browser(375, 812) as page:
            page.get(url)
            settle(page)
            save(screenshot(page, 375, 812), output / "live-phone.png")
        with browser(*SHOWN) as page:
            page.get(url)
            record(page, output / "live.webp")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)


def sketched(page: Any) -> None:
    """An apple in a few strokes, drawn by the student beside the teacher."""
    settle(page)
    type_prompt(page, SKETCH)
    set_value(page, "strength", 0.75)
    page.find_element("id", "mode-image").click()
    page.find_element("id", "compare").click()
    for colour, width, radius, middle in STROKES:
        set_value(page, "colour", colour)
        set_value(page, "width", width)
        circle(page, radius, middle)
    settle(page)
    deadline = time.monotonic() + 30
    while not page.find_element("id", "teacher-image").is_displayed() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)  # for the history
    page.execute_script("document.activeElement.blur(); scrollTo(0, 0)")


def circle(page: Any, radius: float, middle: tuple[float, float]) -> None:
    """A round stroke on the canvas; lengths are shares of its side, the middle is counted from its own."""
    canvas = page.find_element("id", "canvas")
    side = canvas.size["width"]
    at = [
        (round((middle[0] + radius * math.cos(angle)) * side), round((middle[1] + radius * math.sin(angle)) * side))
        for angle in (2 * math.pi * i / 12 for i in range(13))
    ]
    actions = ActionChains(page, duration=10).move_to_element_with_offset(canvas, *at[0]).click_and_hold()
    for (x, y), (to_x, to_y) in itertools.pairwise(at):
        actions.move_by_offset(to_x - x, to_y - y)
    actions.release().perform()


def record(page: Any, file: Path) -> None:
    """Save the recording: frames of the same region, each with the time until the next."""
    settle(page)
    frames: list[Image.Image] = []
    durations: list[int] = []
    for text in typed():
        type_prompt(page, text)
        settle(page)
        frames.append(screenshot(page, *SHOWN, SCALE))
        durations.append(KEY_MILLISECONDS if text not in ends() else PAUSE_MILLISECONDS)
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=72, method=6)
    print(file, f"{file.stat().st_size / 1000:.0f} kB, {len(frames)} frames")


def typed() -> Iterator[str]:
    """The prompt after each key."""
    text = ""
    for part in TYPED:
        if not part:
            text = ""
            continue
        for letter in part:
            text += letter
            yield text


def ends() -> set[str]:
    """The prompts at which the typist looks up."""
    return {TYPED[0], TYPED[0] + TYPED[1], TYPED[3]}


def type_prompt(page: Any, text: str) -> None:
    """Put a prompt into its box, the caret at its end."""
    set_value(page, "prompt", text)
    page.execute_script("const box = document.getElementById('prompt'); box.setSelectionRange(9999, 9999)")


def set_value(page: Any, name: str, value: Any) -> None:
    """Set an input, as if by hand."""
    script = """
        const element = document.getElementById(arguments[0]);
        element.value = arguments[1];
        element.dispatchEvent(new Event('input', {bubbles: true}));
    """
    page.execute_script(script, name, str(value))


def settle(page: Any) -> None:
    """Wait until the newest image is shown."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if page.execute_script(
            "return document.body.dataset.version && document.getElementById('stage').ariaBusy === 'false'"
        ):
            time.sleep(0.05)  # it is decoded
            return
        time.sleep(0.02)
    raise TimeoutError("no image came")


def screenshot(page: Any, width: int, height: int, scale: float = 1.0) -> Image.Image:
    """The upper left of the page."""
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
    taken = page.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "clip": clip})
    return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


def save(image: Image.Image, file: Path) -> None:
    """Save a picture in 256 colours, which a page is not far from."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, optimize=True)
    print(file, f"{file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
