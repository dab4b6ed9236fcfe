"""A page in a real browser, and what every page must be without one."""

import re
import shutil
import subprocess
from pathlib import Path

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
