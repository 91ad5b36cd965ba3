"""Reads a built site as its readers do: its links, and each page in a narrow browser window."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import tempfile
import threading
from collections import defaultdict
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Faults = dict[str, list[str]]  # by page
WIDTH = 390  # pixels: a telephone
SMALLEST = 12  # pixels of a letter
TIME_LIMIT_S = 120
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

# Loads every page in a frame, a few at a time, measures it, and posts what it finds.
CHECKER = """<!doctype html><meta charset="utf-8"><body><script>
const pages = %s, found = {};
function faults(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, out = [];
  for (const box of page.querySelectorAll("html, body, .page, .main, .content"))
    if (box.scrollWidth > Math.min(box.clientWidth, %d) + 1)
      out.push(`${box.tagName} is ${box.scrollWidth} pixels wide`);
  for (const image of page.images) {
    if (!image.complete || image.naturalWidth === 0) out.push(`no picture ${image.src}`);
    if (!image.alt.trim()) out.push(`no alt text: ${image.src}`);
  }
  for (const entry of view.performance.getEntriesByType("resource"))
    if (!entry.name.startsWith(location.origin)) out.push(`asks for ${entry.name}`);
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), small = new Set();
  while (texts.nextNode()) {
    const parent = texts.currentNode.parentElement;
    if (texts.currentNode.data.trim() && parent.getClientRects().length) {
      const size = parseFloat(view.getComputedStyle(parent).fontSize);
      if (size < %d) small.add(`${parent.tagName} ${parent.className} has letters of ${size} px`);
    }
  }
  return out.concat([...small]);
}
async function read(page) {
  const frame = document.createElement("iframe");
  frame.style.cssText = "width: %dpx; height: 800px; border: 0";
  const loaded = new Promise(done => { frame.onload = done; });
  frame.src = page;
  document.body.append(frame);
  await loaded;
  try { found[page] = faults(frame); } catch (error) { found[page] = [String(error)]; }
  frame.remove();
}
async function work() { while (pages.length) await read(pages.pop()); }
Promise.all([work(), work(), work(), work()]).then(() =>
  fetch("/report", { method: "POST", body: JSON.stringify(found) }));
</script>"""


class _Page(HTMLParser):
    """The ids, links and files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.files: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given:
            self.files.append(given["href"])
        self.files += [given[name] for name in ("src", "srcset") if name in given]


def faults_of_links(site: Path) -> Faults:
    """Links and fragments that lead nowhere, and files that are missing or lie elsewhere."""
    paths = {path.resolve(): path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in paths}
    found: Faults = defaultdict(list)
    for path, page in pages.items():
        for link in page.links + page.files:
            if re.match(r"(\w+:|//)", link):
                if link in page.files and not link.startswith("data:"):
                    found[paths[path]].append(f"asks for {link}")
                continue
            name, _, fragment = link.partition("#")
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            if not target.exists():
                found[paths[path]].append(f"dead link {link}")
            elif fragment and fragment not in pages[target].ids:
                found[paths[path]].append(f"dead fragment {link}")
    for file in site.rglob("*.css"):
        for url in re.findall(
            r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^)'\"]+)", file.read_text()
        ):
            found[file.relative_to(site).as_posix()].append(f"asks for {url}")
    return dict(found)


class _Handler(SimpleHTTPRequestHandler):
    """Serves the site and the checker, and takes the report."""

    def __init__(self, reports: queue.Queue[Any], checker: bytes, *args: Any, **more: Any) -> None:
        self._reports, self._checker = reports, checker
        super().__init__(*args, **more)

    def do_GET(self) -> None:
        if self.path != "/_checker.html":
            super().do_GET()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self._checker)

    def do_POST(self) -> None:
        self._reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def faults_in_browser(site: Path) -> tuple[int, Faults]:
    """How many pages were read, and what is wrong with how they look. Needs BROWSER."""
    assert BROWSER is not None
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    checker = CHECKER % (json.dumps(pages), WIDTH, SMALLEST, WIDTH)
    reports: queue.Queue[Any] = queue.Queue()
    handler = partial(_Handler, reports, checker.encode(), directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        browser = subprocess.Popen(
            [
                BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"--user-data-dir={profile}",
                f"http://127.0.0.1:{server.server_port}/_checker.html",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": profile},
        )  # fmt: skip
        try:
            report: Faults = reports.get(timeout=TIME_LIMIT_S)
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    return len(report), {page: faults for page, faults in report.items() if faults}
