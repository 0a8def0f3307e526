"""Headless Chromium by its driver's W3C WebDriver protocol: a page as a person meets it, with mouse and keyboard."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
KEYS = {"right": "\ue014", "left": "\ue012", "down": "\ue015", "up": "\ue013", "tab": "\ue004"}
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element


class Browser:
    """One window. Elements are named by CSS selectors."""

    def __init__(self, session: str):
        self._session = session

    def open(self, address: str) -> None:
        # about:blank between: another #fragment of the same page would not load it again
        for url in ("about:blank", address):
            _ask(f"{self._session}/url", {"url": url})

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return _ask(f"{self._session}/execute/sync", {"script": f"return {expression}", "args": []})

    def point_at(self, selector: str) -> None:
        origin = {_ELEMENT: self._find(selector)}
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}
        _ask(
            f"{self._session}/actions",
            {
                "actions": [
                    {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
                ]
            },
        )

    def press(self, *keys: str) -> None:
        """Type on whatever has the focus; names of :data:`KEYS` or characters."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        _ask(f"{self._session}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def click(self, selector: str) -> None:
        _ask(f"{self._session}/element/{self._find(selector)}/click", {})

    def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode(_ask(f"{self._session}/screenshot"))

    def _find(self, selector: str) -> str:
        return _ask(f"{self._session}/element", {"using": "css selector", "value": selector})[_ELEMENT]


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that resolves no host name and keeps its profile and its driver's log in ``folder``."""
    log = folder / "chromedriver.log"
    driver = subprocess.Popen([DRIVER, "--port=0", f"--log-path={folder / 'driver.log'}"], stdout=open(log, "w"))
    try:
        address = f"http://127.0.0.1:{_port(log)}/session"
        options = {
            "binary": CHROMIUM,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--window-size=1200,900",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={folder / 'profile'}",
            ],
        }
        session = (
            f"{address}/"
            + _ask(
                address, {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
            )["sessionId"]
        )
        yield Browser(session)
        _ask(session, method="DELETE")
    finally:
        driver.terminate()
        driver.wait()


def _port(log: Path) -> int:
    deadline = time.monotonic() + 60
    while not (started := re.search(r"started successfully on port (\d+)", log.read_text())):
        assert time.monotonic() < deadline, f"chromedriver does not start: {log.read_text()}"
        time.sleep(0.05)
    return int(started[1])


def _ask(address: str, content: dict | None = None, method: str | None = None) -> Any:
    request = urllib.request.Request(address, None if content is None else json.dumps(content).encode(), method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{address}: {error.read().decode()[:500]}") from None
