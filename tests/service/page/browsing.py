"""A real browser for the tests of pages: the system's Chromium, driven by Playwright; and what no page may do in it."""

import base64
import io
import os
import shutil
from contextlib import contextmanager

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from vitrine.service.schemas.features import CardResponse

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WATCH = """document.addEventListener("securitypolicyviolation",
    (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));"""


@contextmanager
def chromium():
    """A running browser. Skips, or fails with VITRINE_REQUIRE_BROWSER, where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing = pytest.fail if os.environ.get("VITRINE_REQUIRE_BROWSER") else pytest.skip
        missing(f"no Chromium: none of {', '.join(NAMES)} is on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser, url, **options):
    """A page at `url`, in a context of its own. At the end: no script failed, nothing broke the page's policy, and
    nothing was asked of anybody but the page's own origin (of a file: but itself)."""
    context = browser.new_context(accept_downloads=True, **options)
    context.set_default_timeout(10_000)
    context.add_init_script(WATCH)
    page = context.new_page()
    wrong, requests = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: requests.append(request.url))
    try:
        page.goto(url)
        yield page
        # A refused request is the test's business; the browser notes each on the console.
        assert not [text for text in wrong if not text.startswith("Failed to load resource")]
        assert requests
        assert not [asked for asked in requests if not asked.startswith((url, "blob:", "data:"))]
    finally:
        context.close()


@contextmanager
def opened(browser, server, **options):
    """The page of a running service, once it knows which model it asks."""
    with visit(browser, f"http://127.0.0.1:{server.port}/", **options) as page:
        expect(page.locator("#model")).not_to_be_empty()
        yield page


def upload(page, image, name="photo.png"):
    """Choose a file; the API's answer to it, once the page shows it."""
    with page.expect_response("**/v1/attribute") as asked:
        page.set_input_files("#file", {"name": name, "mimeType": "application/octet-stream", "buffer": image})
    return shown(page, asked)


def shown(page, asked):
    """The answer to what was asked, once the page shows it."""
    answer = asked.value.json()
    expect(page.locator("#take")).to_contain_text(answer["request_id"])
    return answer


def changed(page, change):
    """From now on answers come to the page as `change(answer)` leaves them."""

    def answer(route):
        given = route.fetch().json()
        change(given)
        route.fulfill(json=given)

    page.unroute_all()
    page.route("**/v1/attribute", answer)


def grave_violations(page):
    """What axe-core finds in the page as it is now, of serious or critical impact."""
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    return [
        (violation["id"], [node["html"][:200] for node in violation["nodes"]])
        for violation in found.response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]


def signed(value, digits=3):
    """A number of logits, as pages write it."""
    return f"{value:+.{digits}f}".replace("-", "−")


def number(value, digits=3):
    """The same without a plus."""
    return f"{value:.{digits}f}".replace("-", "−")


def card(layer, index, **fields):
    """A feature's card with everything on it, as the API gives it. One exemplar lacks a picture, one a mask."""
    drawn = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).save(drawn, "WEBP")
    picture = "data:image/webp;base64," + base64.b64encode(drawn.getvalue()).decode()
    masks = ([0.0] * 63 + [2.5], [0.1 * (patch % 8) for patch in range(64)], [0.0] * 64)
    exemplars = [
        {"name": f"train/{place}.png", "class_name": "cat", "thumbnail": None if place == 1 else picture}
        | {"activation": 4.5 - place, "mask": mask}
        for place, mask in enumerate(masks)
    ]
    known = {
        "model": {"name": "demo", "digest": "sha256:00"},
        "layer": layer,
        "index": index,
        "label": "stripes",
        "abstained": None,
        "label_score": 0.43,
        "label_margin": 0.12,
        "label_clarity": 0.31,
        "label_auroc": 0.93,
        "writes": {"label": "tiger", "score": 0.5, "margin": 0.02},
        "read_at": "cls",
        "frequency": {"cls": 0.031, "patches": 0.0042},
        "quantiles": {"0.05": 0.2, "0.5": 1.2, "0.95": 3.9},
        "histogram": {"edges": [0.0, 1.5, 3.0, 4.5], "counts": [90, 20, 1]},
        "exemplars": exemplars,
        "mean_picture": picture,
        "rows": 8,
        "columns": 8,
        "coactive": [{"layer": 10, "index": 7, "label": None, "jaccard": 0.41}],
    }
    return CardResponse.model_validate(known | fields)
