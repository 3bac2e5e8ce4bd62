"""Headless Chromium over its DevTools protocol, through a pair of pipes."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""The program, where there is one."""
SECONDS = 60.0
"""Most time to wait for anything."""


class Browser:
    """A page in headless Chromium.

    Attributes:
        errors: uncaught exceptions of the page, and what the browser refused to do.
    """

    def __init__(self, folder: Path) -> None:
        """Start the browser; its profile is kept in ``folder``."""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # the browser reads descriptor 3 and writes descriptor 4
        moves = f"exec 3<&{to_browser} 4>&{from_browser}"
        options = f"--headless --no-sandbox --disable-gpu --user-data-dir={folder}"
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'{moves}; exec "$0" "$@"', str(CHROMIUM)),
                *(*options.split(), "--remote-debugging-pipe"),
            ],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.errors: list[str] = []
        self._pending, self._number, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol; return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded":
                entry = answer["params"]["entry"]
                if entry["level"] == "error":
                    self.errors.append(entry["text"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> Any:
        while b"\0" not in self._pending:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has ended"
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, script
            time.sleep(0.02)

    def hover(self, script: str) -> None:
        """Move the mouse to the middle of an element."""
        box = f"const b = ({script}).getClientRects()[0]"
        x, y = self.run(f"(() => {{ {box}; return [b.x + b.width / 2, b.y + b.height / 2] }})()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
