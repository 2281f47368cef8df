"""Pages of MiniWoB++ in headless Chromium: instruction, picture, and what a right click hits.

    pip install --no-deps miniwob
    python -m recipes.clicks.pages          # build/clicks/{train,validation,test}.npz

MiniWoB++ (Liu et al., 1802.08802; MIT licence) generates a page of 160 × 210 px from a seed, and
rewards the actions on it. An element is *right* if one click on it ends the episode with a reward
above 0, which is tried on every element. The picture leaves out the instruction above the page.
Chromium is driven by the DevTools protocol over two pipes.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "build" / "clicks"
TASKS = (
    "click-test-2", "click-button", "click-link", "click-dialog-2", "click-tab", "click-color",
    "click-shape", "click-widget", "focus-text-2", "grid-coordinate",
)  # fmt: skip
SPLITS = {"train": (0, 300), "validation": (10_000, 12), "test": (20_000, 40)}
"""First seed, and pages of every task."""
SIDE, TOP, SCALE = 160, 50, 1.625
"""px of a page, px of the instruction above it, and device pixels per px."""

PREPARE = """
window.show = seed => { Math.seedrandom('' + seed); core.startEpisodeReal(); };
window.all = () => [...document.querySelectorAll('#wrap *, .ui-dialog, .ui-dialog *')]
  .filter(e => !e.closest('#query'));
window.press = e => {
  for (const kind of ['mousedown', 'mouseup', 'click'])
    e.dispatchEvent(new MouseEvent(kind, {bubbles: true, cancelable: true, view: window}));
  if (e.focus) e.focus();
};
window.page = seed => {
  show(seed);
  const count = all().length;
  const found = [];
  for (let k = 0; k < count; k++) {
    show(seed);
    const e = all()[k];
    if (!e) continue;
    const r = e.getBoundingClientRect();
    if (!r.width || !r.height || getComputedStyle(e).visibility == 'hidden') continue;
    const text = (e.textContent || '').trim();
    press(e);
    const right = WOB_DONE_GLOBAL && WOB_RAW_REWARD_GLOBAL > 0;
    const name = e.tagName + ' ' + (e.getAttribute('class') || '');
    found.push([name, text, r.left, r.top, r.right, r.bottom, right]);
  }
  show(seed);
  if (document.activeElement) document.activeElement.blur();
  return {text: core.getUtterance(), found: found};
};
core.EPISODE_MAX_TIME = 1e6;
"""


class Chromium:
    """A headless browser with one page."""

    def __init__(self, path: str = "chromium") -> None:
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        self._home = tempfile.TemporaryDirectory()

        def pipes() -> None:  # Chromium reads from 3 and writes to 4
            os.dup2(read, 100), os.dup2(write, 101)
            os.dup2(100, 3), os.dup2(101, 4)

        options = ["--headless", "--no-sandbox", "--remote-debugging-pipe", "--hide-scrollbars"]
        options += ["--allow-file-access-from-files", f"--user-data-dir={self._home.name}"]
        self._process = subprocess.Popen(
            [path, *options, "about:blank"],
            preexec_fn=pipes, close_fds=False, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._count, self._rest, self._session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        size = {"width": SIDE, "height": TOP + SIDE, "deviceScaleFactor": SCALE, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events are ignored."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._from, 1 << 16)
            one, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("id") == self._count:
                return answer.get("result") or {"error": answer.get("error")}

    def run(self, script: str) -> Any:
        """The JSON value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"])[:600])
        return answer["result"].get("value")

    def open(self, file: Path) -> None:
        self.call("Page.navigate", url=file.as_uri())
        while not self.run("document.readyState == 'complete' && typeof core != 'undefined'"):
            pass
        self.run(PREPARE)

    def picture(self) -> np.ndarray:
        """uint8 (SIDE · SCALE, SIDE · SCALE, 3), without the instruction."""
        clip = {"x": 0, "y": TOP, "width": SIDE, "height": SIDE, "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def collect(browser: Chromium, html: Path, task: str, first: int, count: int) -> list[Any]:
    """(task, instruction, elements, picture) of the first `count` seeds that one click solves."""
    browser.open(html / f"{task}.html")
    out: list[Any] = []
    for seed in range(first, first + 2 * count):
        page = browser.run(f"page({seed})")
        found = [
            [n, t, x0, y0 - TOP, x1, y1 - TOP, ok] for n, t, x0, y0, x1, y1, ok in page["found"]
        ]
        inside = [f for f in found if f[6] and min(f[2:4]) >= 0 and max(f[4:6]) <= SIDE]
        if inside and len(out) < count:
            out.append((task, page["text"], found, browser.picture()))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--splits", nargs="*", default=[*SPLITS][::-1])
    parser.add_argument("--count", type=int)
    args = parser.parse_args()
    found = find_spec("miniwob")  # importing it needs gymnasium and selenium
    assert found and found.origin, "pip install --no-deps miniwob"
    html = Path(found.origin).parent / "html" / "miniwob"
    FOLDER.mkdir(parents=True, exist_ok=True)
    browser = Chromium()
    for split in args.splits:
        first, count = SPLITS[split]
        pages = []
        for task in args.tasks:
            one = collect(browser, html, task, first, args.count or count)
            print(split, task, len(one), one and one[0][1], flush=True)
            pages += one
        facts = json.dumps([page[:3] for page in pages])
        pictures = np.stack([page[3] for page in pages])
        np.savez_compressed(FOLDER / f"{split}.npz", facts=facts, pictures=pictures)
    browser.close()


if __name__ == "__main__":
    main()
