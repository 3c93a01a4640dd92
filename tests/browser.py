"""Chromium driven over its DevTools protocol, through a pair of pipes: nothing to install, no port."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving import until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

KEYS = {"Tab": 9, "Enter": 13, "ArrowDown": 40}
"""Codes of the keys that tests press."""


class Page:
    """One page; errors, refusals by a policy and addresses that it asked are noted."""

    def __init__(self, sent: int, received: int) -> None:
        self._sent, self._received, self._number, self._unread = sent, received, 0, b""
        self._session: str | None = None
        self.problems: list[str] = []
        self.addresses: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        session = {} if self._session is None else {"sessionId": self._session}
        os.write(self._sent, json.dumps({**command, **session}).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            piece = os.read(self._received, 1 << 20)
            assert piece, "the browser ended"
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        match event.get("method"):
            case "Log.entryAdded":
                self.problems.append(found["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(found["exceptionDetails"]))
            case "Network.requestWillBeSent":
                self.addresses.append(found["request"]["url"])

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Look at an address in a window of this size."""
        self.resize(width, height, dark)
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def get(self, expression: str) -> Any:
        """The value of a script's expression, which the page's policy does not forbid."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until it is true."""
        until(lambda: bool(self.get(expression)))

    def text(self, selector: str) -> str:
        """What a person reads there; empty where it is hidden or missing."""
        found = f"document.querySelector({json.dumps(selector)})"
        return self.get(f"{found}?.checkVisibility() ? {found}.innerText : ''")

    def press(self, key: str) -> None:
        """A key that is no letter."""
        code = {"windowsVirtualKeyCode": KEYS[key], "key": key, "code": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def tab_to(self, selector: str, most: int = 40) -> None:
        """Go there with the tabulator alone."""
        for _ in range(most):
            if self.get(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            self.press("Tab")
        raise AssertionError(f"{selector} is not reached with the keyboard")

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A page in a Chromium without a window, whose profile is this folder."""
    (read_there, sent), (received, write_there) = os.pipe(), os.pipe()
    script = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'  # the protocol's pipes are 3 and 4
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}")
    command = ["bash", "-c", script, str(read_there), str(write_there), str(CHROMIUM), *options]
    with subprocess.Popen(command, pass_fds=(read_there, write_there), stderr=subprocess.DEVNULL) as process:
        os.close(read_there)
        os.close(write_there)
        try:
            yield Page(sent, received)
        finally:
            process.terminate()
            os.close(sent)
            os.close(received)
