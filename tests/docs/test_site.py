"""The site of the documentation: it builds without a warning, no link is dead, and a browser shows its pages."""

import contextlib
import functools
import html.parser
import http.server
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse

import pytest


ROOT = pathlib.Path(__file__).parents[2]


def test_every_message_of_the_troubleshooting_is_one_of_the_package():
    said = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    folders = ("modeling_vitreg", "examples")
    source = "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # one message in several lines
    assert len(said) > 15
    assert not [message for message in said if message not in source]


def test_the_site_lists_every_page_of_the_docs():
    listed = set(re.findall(r"docs/\S+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} == listed


class _Page(html.parser.HTMLParser):
    """Links, sources and anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.names = [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        self.links += [attributes[key] for key in ("href", "src") if attributes.get(key)]


@pytest.fixture
def serve():
    """Serve a folder on this machine; gives its address."""
    with contextlib.ExitStack() as stack:

        def start(folder: pathlib.Path) -> str:
            handler = functools.partial(_Quiet, directory=folder)
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_the_site_builds_and_no_link_is_dead_and_a_browser_shows_it(tmp_path, open_page, serve):
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    pages = {path: _Page(path.read_text()) for path in tmp_path.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (target in pages and parts.fragment not in pages[target].names):
                dead.append(f"{path.relative_to(tmp_path)}: {link}")
    assert len(pages) > 35 and not dead, dead

    reference = (tmp_path / "docs" / "reference" / "model.html").read_text()
    assert "num_register_tokens" in reference and "ViTWithRegistersPreTrainedModel.attention_maps" in reference
    address = serve(tmp_path)
    for name in ("index", "docs/start", "docs/use/look", "docs/use/analyze", "docs/choose", "docs/reference/model"):
        for width, scheme in ((400, "light"), (1300, "dark")):
            page = open_page(f"{address}/{name}.html", width=width, scheme=scheme)
            assert not page.problems, (name, page.problems)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)"), name
            red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
            assert (int(red) > 128) == (scheme == "light")
            page.context.close()
    page = open_page(f"{address}/index.html")
    page.locator("input.md-search__input").fill("massive activation")
    page.locator(".md-search-result__link").first.wait_for(timeout=120_000)  # the index is read by a worker
    assert not page.problems
