"""Headless Chromium driven by Selenium: a page as a user sees it, with mouse and keyboard."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
KEYS = {
    "right": Keys.ARROW_RIGHT,
    "left": Keys.ARROW_LEFT,
    "down": Keys.ARROW_DOWN,
    "up": Keys.ARROW_UP,
    "tab": Keys.TAB,
    "end": Keys.END,
}
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1200,900",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


class Browser:
    """One browser window; elements are given by CSS selectors."""

    def __init__(self, driver: webdriver.Chrome):
        self._driver = driver

    def open(self, address: str) -> None:
        # about:blank first: another #fragment of the same page would not reload it
        for url in ("about:blank", address):
            self._driver.get(url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self._driver.execute_script(f"return {expression}")

    def point_at(self, selector: str) -> None:
        ActionChains(self._driver, duration=0).move_to_element(self._find(selector)).perform()

    def press(self, *keys: str) -> None:
        """Type on whatever has the focus; names of :data:`KEYS` or characters."""
        ActionChains(self._driver).send_keys(*(KEYS.get(key, key) for key in keys)).perform()

    def click(self, selector: str) -> None:
        self._find(selector).click()

    def resize(self, width: int, height: int) -> None:
        """Give the page a viewport of this size, in CSS pixels, also narrower than a window can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def screenshot(self) -> bytes:
        """Screenshot of the window as PNG."""
        return self._driver.get_screenshot_as_png()

    def _find(self, selector: str) -> WebElement:
        return self._driver.find_element(By.CSS_SELECTOR, selector)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that resolves no host names; its profile and its driver's log are in ``folder``."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(option)
    service = webdriver.ChromeService(DRIVER, log_output=str(folder / "chromedriver.log"))
    driver = webdriver.Chrome(options, service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
