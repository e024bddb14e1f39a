"""A real browser: what it shows, what it asks for, and what it complains about."""

import shutil
from contextlib import contextmanager

TIMEOUT_MS = 300_000  # of a single wait; the machine may be busy


class Visit:
    """A page in Chromium.

    Attributes:
        page: playwright's.
        requests: addresses that were asked for, data: and blob: left out.
        complaints: errors and warnings of the console, exceptions, answers from 400 on.
    """

    def __init__(self, page):
        self.page, self.requests, self.complaints = page, [], []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("request", self._on_request)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("response", self._on_response)

    def _on_request(self, request):
        if not request.url.startswith(("data:", "blob:")):
            self.requests.append(request.url)

    def _on_console(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _on_response(self, response):
        if response.status >= 400:
            self.complaints.append(f"{response.status} {response.url}")

    def pictures(self, selector):
        """Sources of the images that were decoded."""
        shown = self.page.locator(selector).evaluate_all(
            "images => images.map(i => [i.src, i.complete && i.naturalWidth > 0])"
        )
        return [source for source, is_decoded in shown if is_decoded]


@contextmanager
def visit(address):
    """Open an address in headless Chromium."""
    from playwright.sync_api import sync_playwright  # only these tests need it

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        try:
            found = Visit(chromium.new_page(viewport={"width": 1280, "height": 1000}))
            found.page.goto(address, timeout=TIMEOUT_MS)
            yield found
        finally:
            chromium.close()
