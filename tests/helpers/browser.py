"""A headless Chromium of the system, driven through its chromedriver; nothing is fetched."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    # A camera that needs no hardware and no permission.
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)


def missing() -> str | None:
    """What a browser test lacks here; None where nothing."""
    if not any(map(shutil.which, NAMES)):
        return "no Chromium is installed"
    if shutil.which("chromedriver") is None:
        return "no chromedriver is installed"
    return None


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 900, *flags: str) -> Iterator[Any]:
    """A browser with an empty profile, whose window's inside has this size in pixels; ``downloads`` is a folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    os.environ["SE_OFFLINE"] = "true"  # Selenium would look for drivers in the network
    options = Options()
    options.binary_location = next(filter(None, map(shutil.which, NAMES)))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", *flags):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            # A window is at least 500 pixels wide; what a page sees is not.
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": profile})
            driver.downloads = Path(profile)
            driver.set_page_load_timeout(30)
            yield driver
        finally:
            driver.quit()
