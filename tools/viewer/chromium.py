"""A headless Chromium driven through the DevTools protocol: what tests of the page and its screenshots are made with.

Needs a Chromium or Chrome on this machine and the websocket-client package (`pip install fp8c[test]`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"),
    "--force-color-profile=srgb",
)
_KEYS = {"Enter": ("\r", 13), "Escape": ("", 27), "ArrowDown": ("", 40), "ArrowUp": ("", 38)}
_KEYS |= {"ArrowLeft": ("", 37), "ArrowRight": ("", 39), "Tab": ("", 9)}


def find_chromium() -> str | None:
    """Path of a browser: $FP8C_CHROMIUM, or the first of the usual names."""
    named = os.environ.get("FP8C_CHROMIUM")
    return named or next((path for name in _NAMES if (path := shutil.which(name))), None)


class PageError(RuntimeError):
    """A script of the page, or one given to `evaluate`, raised."""


@dataclass
class Browser:
    """One page. `requests` are the URLs it asked for, `problems` what it wrote to the console as an error."""

    socket: Any
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _last: int = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        self.socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self._last:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description", details["text"]))
            case "Log.entryAdded":
                if params["entry"]["level"] == "error":
                    self.problems.append(params["entry"]["text"])

    def evaluate(self, script: str) -> Any:
        """Value of a script's last expression; a promise is waited for. Raises: PageError."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def open(self, address: str, ready: str = "document.body && document.body.dataset.ready") -> None:
        self.requests.clear()
        self.problems.clear()
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait(ready)

    def wait(self, condition: str, timeout_s: float = 60.0) -> Any:
        """Wait until a script's value is true and return it. Raises: TimeoutError."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = self.evaluate(condition)
            if found:
                return found
            time.sleep(0.02)
        raise TimeoutError(f"{condition} stayed false; the page said {self.problems}")

    def click(self, selector: str) -> None:
        """Scroll an element into view and click its middle, as a person does. Raises: PageError when there is none."""
        place = self.evaluate(
            "(() => { const e = document.querySelector(" + json.dumps(selector) + ");"
            " if (!e) throw new Error('no element ' + " + json.dumps(selector) + ");"
            " e.scrollIntoView({block: 'center', inline: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        text, code = _KEYS.get(key, (key, ord(key.upper()[0])))
        down = {"key": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"
        )
        return found

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, is_dark: bool) -> None:
        value = "dark" if is_dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def busy_s(self) -> float:
        """Seconds of processor time the page's main thread has used: what a busy machine does not stretch."""
        metrics = {m["name"]: m["value"] for m in self.call("Performance.getMetrics")["metrics"]}
        return float(metrics["TaskDuration"])

    def screenshot(self, path: Path) -> None:
        """Write what the window shows, as PNG or WebP by the name's ending."""
        options = {"format": "webp", "quality": 88} if path.suffix == ".webp" else {"format": "png"}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))


@contextlib.contextmanager
def chromium(width: int = 1440, height: int = 900) -> Iterator[Browser]:
    """A browser with one empty page. Raises: FileNotFoundError without a browser, ImportError without the package."""
    import websocket

    program = find_chromium()
    if program is None:
        raise FileNotFoundError(f"no browser: none of {', '.join(_NAMES)} is on the path")
    with tempfile.TemporaryDirectory(prefix="fp8c-chromium-", ignore_cleanup_errors=True) as profile:
        arguments = [program, *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile) / "DevToolsActivePort", process)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                target = next(t for t in json.load(answer) if t["type"] == "page")
            address = target["webSocketDebuggerUrl"]
            socket = websocket.create_connection(address, suppress_origin=True, timeout=120)
            browser = Browser(socket)
            for domain in ("Page", "Runtime", "Network", "Log"):
                browser.call(f"{domain}.enable")
            browser.call("Performance.enable", timeDomain="threadTicks")
            browser.resize(width, height)
            yield browser
            socket.close()
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the browser ended with {process.returncode}")
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        time.sleep(0.05)
    raise TimeoutError("the browser did not open its port")
