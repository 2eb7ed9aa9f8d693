"""A real browser for page tests, the system's Chromium driven by Playwright, and checks that every page must pass."""

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
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        missing = pytest.fail if os.environ.get("VITRINE_REQUIRE_BROWSER") else pytest.skip
        missing(f"no Chromium: none of {', '.join(NAMES)} is on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser, url, **options):
    """A page at `url`, in its own browser context. Checks at the end that no script failed, that nothing violated the
    page's policy and that all requests went to the page's own origin (for a file: to the file itself)."""
    context = browser.new_context(accept_downloads=True, **options)
    context.set_default_timeout(10_000)
    context.add_init_script(WATCH)
    page = context.new_page()
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: requests.append(request.url))
    try:
        page.goto(url)
        yield page
        # Tests check refused requests themselves; the browser logs each one on the console.
        assert not [text for text in problems if not text.startswith("Failed to load resource")]
        assert requests
        assert not [address for address in requests if not address.startswith((url, "blob:", "data:"))]
    finally:
        context.close()


@contextmanager
def open_page(browser, server, **options):
    """The page of a running service, once it shows the model's name."""
    with visit(browser, f"http://127.0.0.1:{server.port}/", **options) as page:
        expect(page.locator("#model")).not_to_be_empty()
        yield page


def upload(page, image, name="photo.png"):
    """Choose a file; returns the API's answer once the page shows it."""
    with page.expect_response("**/v1/attribute") as response_info:
        page.set_input_files("#file", {"name": name, "mimeType": "application/octet-stream", "buffer": image})
    return shown_answer(page, response_info)


def shown_answer(page, response_info):
    """The answer to a request, once the page shows it."""
    answer = response_info.value.json()
    expect(page.locator("#take")).to_contain_text(answer["request_id"])
    return answer


def show_ledger(page):
    """From the source account, on which an answer opens, to the direct ledger; it stays until another is chosen."""
    page.get_by_role("tab", name="Direct ledger").click()


def change_answers(page, change):
    """From now on, apply `change` to each answer before the page receives it."""

    def answer(route):
        body = route.fetch().json()
        change(body)
        route.fulfill(json=body)

    page.unroute_all()
    page.route("**/v1/attribute", answer)


def serious_violations(page):
    """axe-core's violations of serious or critical impact, once the page waits for nothing and nothing fades in."""
    page.wait_for_function(
        """() => !document.querySelector("[aria-busy=true]") &&
                 document.getAnimations().every((part) => part.playState !== "running")"""
    )
    results = Axe().run(page, options={"resultTypes": ["violations"]})
    return [
        (violation["id"], [node["html"][:200] for node in violation["nodes"]])
        for violation in results.response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]


def signed(value, digits=3):
    """A signed number of logits, as pages format it: what is rounded to nothing has no sign."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if float(f"{value:.{digits}f}") else text[1:]


def number(value, digits=3):
    """The same without a plus sign."""
    return signed(value, digits).removeprefix("+")


def card(layer, index, **fields):
    """A feature's card with all fields set, as the API returns it. One exemplar lacks a picture, one a mask."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).save(buffer, "WEBP")
    picture = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    masks = ([0.0] * 63 + [2.5], [0.1 * (patch % 8) for patch in range(64)], [0.0] * 64)
    exemplars = [
        {"name": f"train/{place}.png", "class_name": "cat", "thumbnail": None if place == 1 else picture}
        | {"activation": 4.5 - place, "mask": mask}
        for place, mask in enumerate(masks)
    ]
    defaults = {
        "model": {"name": "demo", "digest": "sha256:00"},
        "dictionary": "clt",
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
    return CardResponse.model_validate(defaults | fields)
