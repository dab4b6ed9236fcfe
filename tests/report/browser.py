"""A page in a real browser, and what every page must be without one."""

import base64
import fcntl
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import html5lib
import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; apt-get install chromium")


def check_page(text: str) -> None:
    """Valid HTML, distinct ids, no reference to anything outside the page or to nothing inside it."""
    document = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)  # raises at the first mistake
    elements = list(document.iter())
    ids = [element.attrib["id"] for element in elements if "id" in element.attrib]
    assert len(ids) == len(set(ids)), "ids are distinct"
    for element in elements:
        for name, value in element.attrib.items():
            if name in ("href", "src") or name.endswith("}href"):
                assert value.startswith(("#", "data:")), f"{element.tag} refers to {value[:80]}"
                assert not value.startswith("#") or value[1:] in ids, f"{value} leads nowhere"
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.startswith("#"), f"{element.tag} refers to {target[:80]}"
                assert target[1:] in ids, f"{target} leads nowhere"
    style = "".join(element.text or "" for element in elements if element.tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text, "the browser itself forbids the network"


def document_after(page: Path, script: str, *, width: int = 1200, folder: Path) -> str:
    """The document as HTML after chromium has opened a page and run a script at its end."""
    changed = folder / f"changed-{page.name}"
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    changed.write_text(text.replace("</body>", f"<script>{{ {script} }}</script></body>"), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--dump-dom", changed.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


class Tab:
    """A page that is open in a headless chromium, which is told what to do through a pipe, in its DevTools' language."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._numbers, self._rest = read, write, itertools.count(1), b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    _session: str | None = None

    def open(self, address: str, *, width: int = 1200, height: int = 800) -> None:
        """Go to an address; it may not be there yet when this returns."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """What an expression gives, as JSON has it; of a promise, what that gives."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression gives something true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script} stays {found!r} on {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def screenshot(self, file: Path) -> None:
        """What the window shows."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **values: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": values}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "chromium says nothing"
            part = os.read(self._read, 1 << 20)
            assert part, "chromium has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A headless chromium with its profile in a folder."""
    assert CHROMIUM is not None
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for pair in (os.pipe(), os.pipe()) for end in pair]
    to_it, us_to_it, from_it, it_to_us = pipes
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{to_it} 4>&{it_to_us}', CHROMIUM, *flags]
    command += [f"--user-data-dir={folder / 'profile'}"]
    started = subprocess.Popen(
        command, pass_fds=(to_it, it_to_us), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    os.close(to_it)
    os.close(it_to_us)
    try:
        yield Tab(from_it, us_to_it)
    finally:
        started.kill()
        started.wait()
        os.close(from_it)
        os.close(us_to_it)
