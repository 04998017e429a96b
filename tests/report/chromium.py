"""A headless Chromium without a driver: JSON commands over two pipes, as its developer tools speak it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


_TILE = 3000  # CSS pixels per screenshot
_LOOK = """
async (shot, boxes, scale) => {
  const bytes = Uint8Array.from(atob(shot), c => c.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes], {type: "image/png"}));
  const paint = new OffscreenCanvas(image.width, image.height).getContext("2d", {willReadFrequently: true});
  paint.drawImage(image, 0, 0);
  const light = c => 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2];
  return boxes.map(box => {
    const [x, y, width, height] = box.map(v => Math.floor(v * scale));
    const pixels = paint.getImageData(x, y, Math.max(width, 1), Math.max(height, 1)).data, counts = new Map();
    for (let i = 0; i < pixels.length; i += 4) {
      const color = (pixels[i] << 16) | (pixels[i + 1] << 8) | pixels[i + 2];
      counts.set(color, (counts.get(color) || 0) + 1);
    }
    const colors = [...counts].sort((a, b) => b[1] - a[1]).map(([c]) => [c >> 16, (c >> 8) & 255, c & 255]);
    const apart = c => Math.abs(light(c) - light(colors[0]));
    const far = colors.reduce((best, c) => apart(c) > apart(best) ? c : best);
    return [colors[0], far];
  });
}
"""


def find_chromium() -> str | None:
    """Return the path of a Chromium, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page; commands as in the DevTools protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._commands = map(_high, os.pipe())
        self._answers, answers = map(_high, os.pipe())
        launch = f'exec "$@" 3<&{commands} 4>&{answers} {commands}<&- {answers}>&-'
        flags = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", launch, "bash", program, *flags, "about:blank"],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._commands)
        os.close(self._answers)
        self._process.terminate()
        self._process.wait(20)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; what happens meanwhile goes to ``events``."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, page: Path, *, width: int, dark: bool, scale: float = 2.0) -> None:
        """Load a file in a window of this width, in light or in dark, without a network."""
        self.events.clear()
        self("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": width < 600}
        self("Emulation.setDeviceMetricsOverride", **metrics)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media="screen", features=[theme])
        self("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, top: float, width: float, height: float) -> str:
        """Return a PNG of a part of the page, in CSS pixels, in base 64."""
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        return self("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]

    def colors(self, boxes: list[dict[str, float]], scale: float = 2.0) -> list[list[list[int]]]:
        """Return, for each box of the page, its most frequent color and the one whose luminance is furthest from it."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        found: list[list[list[int]]] = [[] for _ in boxes]
        for top in range(0, math.ceil(size["height"]), _TILE):
            inside = [k for k, box in enumerate(boxes) if top <= box["y"] < top + _TILE]
            if not inside:
                continue
            shot = self.screenshot(top, size["width"], _TILE + 100)
            sought = [[boxes[k]["x"], boxes[k]["y"] - top, boxes[k]["width"], boxes[k]["height"]] for k in inside]
            answer = self.evaluate(f"({_LOOK})({json.dumps(shot)}, {json.dumps(sought)}, {scale})")
            for k, colors in zip(inside, answer, strict=True):
                found[k] = colors
        return found

    def _read(self, seconds: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"chromium did not answer within {seconds} s"
            block = os.read(self._answers, 1 << 20)
            assert block, "chromium has ended"
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(line)
        if "method" in answer:
            self.events.append(answer)
        return answer


def _high(descriptor: int) -> int:
    """Move a file descriptor out of the way of 3 and 4, which the browser reads and writes."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
