"""The page in use: feature cards, mistakes and refusals, keys, keyboard-only use, narrow screens, its own policy."""

import gzip
import hashlib
import json
import re

import pytest
from browsing import card, change_answers, open_page, serious_violations, show_ledger, shown_answer, upload
from playwright.sync_api import expect

from common import ROOT

WEB = ROOT / "service" / "web"
MAX_BYTES = 64_000  # as they are sent, with gzip
LOADED_LATER = ("compared.js", "fit.js", "similar.js", "without.js")  # when it is asked for
MAX_BYTES_LATER = 5_000
HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"
FOCUSED = "document.activeElement.innerText.trim() || document.activeElement.ariaLabel || ''"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve_cards(page, **fields):
    """Serve a card for every feature instead of the bundle's cards."""

    def answer(route):
        layer, index = map(int, route.request.url.partition("?")[0].split("/")[-2:])
        route.fulfill(json=card(layer, index, **fields).model_dump(mode="json"))

    page.route("**/v1/features/*/*", answer)


def open_card(page, answer, layer=11):
    """Open the card of the first feature of a layer, from the ledger; returns its index."""
    show_ledger(page)
    page.get_by_role("button", name=f"CLT {layer}").click()
    page.locator(".features:not([hidden]) button.feature-name").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    return answer["explanations"][0]["layers"][layer]["features"][0]["index"]


# Cards


def test_a_card_says_what_is_known(page, photo):
    serve_cards(page)
    index = open_card(page, upload(page, photo))
    dialog = page.get_by_role("dialog", name="stripes")
    text = dialog.inner_text()
    numbers = ("0.43", "0.12", "0.31", "0.93", "3.10", "0.42")
    for part in (f"Layer 11, feature #{index}", "Confidence: high", "tiger", *numbers):
        assert part in text, part
    assert "5\u202f% below 0.20, 50\u202f% below 1.20, 95\u202f% below 3.90" in text
    question = dialog.get_by_role("button", name="What is Held-out AUROC?")
    assert "how reliable the label is" not in text
    question.press("Enter")
    expect(dialog.get_by_text("how reliable the label is")).to_be_visible()
    expect(question).to_have_attribute("aria-expanded", "true")
    exemplars = dialog.locator(".exemplar")
    assert exemplars.locator("img").count() == 2
    assert [exemplars.nth(place).locator("rect").count() for place in range(3)] == [64, 64, 0]
    assert not exemplars.locator(".shade").first.is_visible()  # to be recognised
    dialog.get_by_label("Darken them where it does not fire").check()
    expect(exemplars.locator(".shade").first).to_be_visible()
    shades = (
        exemplars.nth(0)
        .locator("rect")
        .evaluate_all("all => all.map((one) => Number(one.getAttribute('fill-opacity')))")
    )
    assert shades[63] == 0 < 0.5 < shades[0]  # bright where it fires
    larger, width = dialog.get_by_role("button", name="Enlarge: cat").first, exemplars.nth(0).bounding_box()["width"]
    larger.press("Enter")
    expect(larger).to_have_attribute("aria-pressed", "true")
    assert exemplars.nth(0).bounding_box()["width"] > 2 * width
    assert "strongest at row 8, column 8" in exemplars.nth(0).inner_text()
    assert "fires only at the class token" in exemplars.nth(2).inner_text()
    assert dialog.locator("img.mean").evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert dialog.locator(".histogram > svg rect").count() == 3
    dialog.get_by_text("Histogram as a table").click()
    assert dialog.get_by_role("row", name="1.50 to 3.00 20").is_visible()


def test_cards_lead_to_cards_and_back(page, photo):
    serve_cards(page)
    entry = {"layer": 3, "index": 4, "label": "stripes", "label_score": 0.4, "label_auroc": None, "frequency_cls": 0.01}
    page_of = {"model": {"name": "demo", "digest": "x"}, "offset": 0, "limit": 1, "total": 2}
    second = page_of | {"features": [entry | {"index": 5}], "next": None}
    first = page_of | {"features": [entry], "next": "/v1/features?label=stripes&offset=1"}
    page.route("**/v1/features?*", lambda route: route.fulfill(json=second if "offset" in route.request.url else first))
    index = open_card(page, upload(page, photo))
    dialog = page.get_by_role("dialog")
    kicker = dialog.locator(".kicker")
    back = dialog.get_by_role("button", name="Back")
    expect(back).to_be_hidden()
    dialog.get_by_role("button", name="#7 layer 10 #7").click()
    expect(kicker).to_have_text("Layer 10, feature #7")
    dialog.get_by_role("button", name="Other features labelled “stripes”").click()
    expect(dialog.get_by_text("2 found")).to_be_visible()
    dialog.get_by_role("button", name="More").click()
    dialog.get_by_role("button", name="stripes layer 3 #5").click()
    expect(kicker).to_have_text("Layer 3, feature #5")
    for place in ("Features whose label contains", "Layer 10, feature #7", f"Layer 11, feature #{index}"):
        back.click()
        expect(kicker).to_have_text(place)
    expect(back).to_be_hidden()


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("too_few_exemplars", "too few images"),
        ("score", "well enough"),
        ("clarity", "the same thing"),
        ("margin", "two words"),
    ],
)
def test_a_card_without_a_label_says_why(page, photo, reason, said):
    nothing = dict.fromkeys(("label", "label_score", "label_margin", "label_clarity", "label_auroc", "writes"))
    empty = {"histogram": None, "exemplars": [], "mean_picture": None, "coactive": [], "quantiles": {}}
    serve_cards(page, abstained=reason, **nothing, **empty)
    index = open_card(page, upload(page, photo))
    dialog = page.get_by_role("dialog", name=f"#{index}")
    expect(dialog.locator(".confidence")).to_contain_text(said)
    assert dialog.get_by_role("button", name="Other features").count() == 0


def test_what_cannot_be_had_of_a_card_is_said_in_it(page, photo):
    error = {"code": "internal", "message": "the cards cannot be read", "details": [], "request_id": "x"}
    page.route("**/v1/features/*/*", lambda route: route.fulfill(status=500, json={"error": error}))
    open_card(page, upload(page, photo))
    expect(page.get_by_role("dialog").get_by_role("alert")).to_have_text("The cards cannot be read.")


def test_similar_images_are_shown_layer_by_layer(page, photo):
    images = [image.model_dump(include={"name", "class_name", "thumbnail"}) for image in card(0, 0).exemplars]
    layers = [{"layer": layer, "images": [image | {"similarity": 0.875} for image in images]} for layer in range(9, 12)]
    model = {"name": "demo", "digest": "x"}
    answer = {"request_id": "x", "model": model, "references": 5000, "layers": layers, "timings_ms": {}}
    page.route("**/v1/similar", lambda route: route.fulfill(json=answer))
    upload(page, photo)
    page.get_by_role("button", name="Find them").click()
    expect(page.locator("#similar")).to_contain_text("Of 5,000 reference images")
    shown = page.locator("#similar h3")
    assert shown.all_text_contents() == ["Layer 11", "Layer 10", "Layer 9"]
    assert [heading.is_visible() for heading in shown.all()] == [True, True, False]
    assert not page.get_by_text("train/0.png").first.is_visible()
    page.get_by_text("Earlier layers").click()
    assert shown.last.is_visible()
    assert page.locator(".neighbours li").count() == 9
    assert page.locator(".neighbours img").count() == 6


def test_features_of_the_stream_are_listed_layer_by_layer(browser, service, photo):
    look = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    for options in ({}, look):
        with open_page(browser, service, **options) as page:
            upload(page, photo)
            with page.expect_response("**/v1/attribute") as response:
                page.get_by_role("button", name="List them, layer by layer").click()
            layers = response.value.json()["residual"]["layers"]
            rows = page.locator("#residual tbody tr")
            expect(rows).to_have_count(11)
            for row, layer in zip(rows.all(), layers, strict=True):
                assert row.get_by_role("img").count() == len(layer["patches"]) == 4
                expect(row).to_contain_text(f"#{layer['cls'][0]['index']}")
            place = layers[0]["patches"][0]["tokens"].index(layers[0]["patches"][0]["activation"])
            where = f"strongest in row {place // 8 + 1}, column {place % 8 + 1}"
            assert rows.first.get_by_role("img").first.get_attribute("aria-label") == where
            assert not serious_violations(page)
            width, scrolled = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
            assert scrolled <= width


@pytest.mark.parametrize("dictionaries", [["clt"], ["clt", "residual"]])
def test_features_of_the_stream_open_their_cards_where_there_are_any(page, photo, dictionaries):
    serve_cards(page, dictionary="residual")
    known = {"card_dictionaries": dictionaries}
    page.route("**/v1/model", lambda route: route.fulfill(json=route.fetch().json() | known))
    page.reload()
    expect(page.locator("#model")).not_to_be_empty()
    upload(page, photo)
    page.get_by_role("button", name="List them, layer by layer").click()
    expect(page.locator("#residual tbody tr")).to_have_count(11)
    features = page.locator("#residual tbody button")
    if "residual" not in dictionaries:
        assert features.count() == 0
        return
    assert not serious_violations(page)
    with page.expect_request("**/v1/features/0/*") as request:
        features.first.click()
    address, _, query = request.value.url.partition("?")
    assert query == "dictionary=residual"
    kicker = page.get_by_role("dialog").locator(".kicker")
    expect(kicker).to_have_text(f"Residual stream after layer 0, feature #{address.split('/')[-1]}")
    page.get_by_role("dialog").get_by_role("button", name="#7 layer 10 #7").click()
    expect(kicker).to_have_text("Residual stream after layer 10, feature #7")


# Mistakes and refusals


def test_a_file_that_is_not_an_image_is_reported_in_a_sentence(page, photo):
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not a picture"})
    expect(page.locator("#error")).to_contain_text("not an image in a supported format (JPEG, PNG, WEBP, GIF, BMP,")
    assert page.locator("#answer").is_hidden()
    upload(page, photo)
    expect(page.locator("#error")).to_be_empty()


def test_without_labels_no_request_is_sent(page, photo):
    upload(page, photo)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.fill("#labels", " ,\n ,")
    page.get_by_role("button", name="Use these labels").click()
    expect(page.locator("#error")).to_have_text("Enter at least one label, or choose a label set.")
    assert not requests


def test_an_unreachable_service_is_reported(page, photo):
    page.route("**/v1/attribute", lambda route: route.abort("connectionrefused"))
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo})
    expect(page.locator("#error")).to_contain_text("cannot be reached")
    page.unroute_all()
    upload(page, photo)
    expect(page.locator("#error")).to_be_empty()


def refuse_requests(page, status, code, times, **headers):
    """Refuse the first `times` requests; returns the list of the requested URLs."""
    urls = []

    def answer(route):
        urls.append(route.request.url)
        error = {"code": code, "message": "too many images are waiting", "details": [], "request_id": "the-id"}
        if len(urls) > times:
            route.continue_()
        else:
            route.fulfill(status=status, headers=headers, json={"error": error})

    page.route("**/v1/attribute", answer)
    return urls


def test_a_request_to_a_busy_service_is_retried(page, photo):
    urls = refuse_requests(page, 429, "queue_full", 1, **{"Retry-After": "1"})
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo})
    expect(page.locator("#status")).to_have_text("The service is busy; trying again in 1 s.")
    expect(page.locator("#answer")).to_be_visible()
    assert len(urls) == 2


def test_retries_are_limited(page, photo):
    urls = refuse_requests(page, 429, "queue_full", 99, **{"Retry-After": "0"})
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo})
    expect(page.locator("#error")).to_contain_text("still busy after 3 retries")
    assert len(urls) == 4


@pytest.mark.parametrize(
    ("status", "code", "said"), [(503, "not_ready", "not ready"), (413, "body_too_large", "Too many")]
)
def test_refusals_are_reported_with_their_id(page, photo, status, code, said):
    refuse_requests(page, status, code, 1)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo})
    expect(page.locator("#error")).to_contain_text(said)
    expect(page.locator("#error")).to_contain_text("Request the-id.")


def test_a_key_is_asked_for_and_kept_nowhere(browser, service, photo):
    def guard(route):
        if route.request.headers.get("authorization") == "Bearer the-key":
            route.continue_()
        else:
            error = {
                "code": "unauthorized",
                "message": "the key is missing or not valid",
                "details": [],
                "request_id": "x",
            }
            route.fulfill(status=401, json={"error": error})

    with open_page(browser, service) as page:
        page.route("**/v1/**", guard)
        page.reload()
        field = page.get_by_label("Key of this service")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#error")).to_contain_text("requires a key")
        field.fill("the-key")
        field.press("Enter")
        expect(field).to_be_hidden()
        upload(page, photo)
        line = page.locator(".curl code").inner_text()
        assert 'Authorization: Bearer $VITRINE_KEY"' in line
        assert "the-key" not in page.content()
        stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert json.loads(stored) == [{}, {}, ""]


def test_nothing_that_comes_from_elsewhere_is_run(page, photo):
    """Labels, file names, features and cards that would be markup stay text."""

    def insert_markup(answer):
        for layer in answer["explanations"][0]["layers"]:
            layer["features"][0].update(label=HOSTILE, label_score=0.5)
        for feature in answer["explanations"][0]["sources"]["features"]:
            feature.update(label=HOSTILE, label_score=0.5)
        answer["timings_ms"][HOSTILE] = 1.0
        answer["model"]["name"] = HOSTILE

    change_answers(page, insert_markup)
    serve_cards(page, label=HOSTILE, writes={"label": HOSTILE, "score": 0.1, "margin": 0.1})
    page.fill("#labels", f"{HOSTILE}, cat")
    answer = upload(page, photo, f"{HOSTILE}.png")
    page.locator(".where-button").first.click()
    expect(page.locator(".caption")).to_contain_text(HOSTILE)
    open_card(page, answer)
    assert page.get_by_role("dialog").get_by_text(HOSTILE).count() == 3  # label, written, the link to others
    page.keyboard.press("Escape")
    assert page.locator(".predictions").get_by_text(HOSTILE).is_visible()
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "Vitrine: a prediction and its account"


# Keyboard and display


def test_everything_is_done_with_the_keyboard(page):
    """From the empty page to an account, a card and back, with only Tab, Enter, Escape and an arrow key."""
    serve_cards(page)

    def tab_to(name):
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate(FOCUSED).startswith(name):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", f"the focus on {name} cannot be seen"
                return
        pytest.fail(f"Tab does not come to {name}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the account"
    for _ in range(3):
        page.keyboard.press("Tab")
    with page.expect_response("**/v1/attribute") as response_info:
        page.keyboard.press("Enter")
    assert shown_answer(page, response_info)["predictions"][0]["label"] == "airplane"
    tab_to("Heat map of 8 by 8 patches")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".readout")).to_contain_text("Row 1, column 2")
    tab_to("Source account")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Direct ledger")).to_be_focused()
    tab_to("CLT 11")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # the switch
    page.keyboard.press("Tab")
    opener = page.evaluate("document.activeElement.dataset.key")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="stripes")
    expect(dialog).to_be_visible()
    assert dialog.evaluate("dialog => dialog.contains(document.activeElement)")
    tab_to("?")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.key") == opener
    expect(page.locator("#status")).to_contain_text("airplane, ")


LOOKS = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "narrow": {"viewport": {"width": 360, "height": 740}},
    "narrow and dark": {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "reduced_motion": "reduce"},
}


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(browser, service, photo, look):
    def fits():
        width, scrolled = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert scrolled <= width

    with open_page(browser, service, **LOOKS[look]) as page:
        serve_cards(page)
        assert not serious_violations(page)
        fits()
        page.fill("#labels", f"cat, dog, {'long' * 30}, {'many words ' * 12}")
        answer = upload(page, photo)
        page.select_option("#contrast", index=2)
        expect(page.locator(".question em").nth(1)).to_be_visible()
        fits()
        page.locator(".where-button").first.click()
        for name in ("All other features", "Errors", "Embeddings", "Silent here"):
            page.get_by_role("button", name=name).click()
        page.get_by_text("What the rows mean").click()
        fits()
        assert not serious_violations(page)
        page.get_by_role("button", name="Show as table").click()
        fits()
        assert not serious_violations(page)
        page.get_by_role("button", name="Show as table").click()
        open_card(page, answer)
        page.get_by_role("button", name="What is Score?").click()
        fits()
        assert not serious_violations(page)
        page.keyboard.press("Escape")
        page.get_by_text("What the rows mean").click()
        page.get_by_text("Patch values as a table").click()
        assert not serious_violations(page)
        page.get_by_role("button", name="Show as table").click()
        fits()
        page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
        expect(page.locator("#error")).not_to_be_empty()
        assert not serious_violations(page)


# Served files


def test_the_page_and_its_files_have_a_strict_policy_and_are_not_fetched_twice(service):
    for path in ("/", "/web/app.js", "/web/style.css", "/web/examples/ship.svg"):
        response = service.http.get(path)
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"
        etag = response.headers["etag"]
        assert hashlib.sha256(response.content).hexdigest().startswith(etag.removeprefix("W/").strip('"'))
        again = service.http.get(path, headers={"If-None-Match": f'W/"other", {etag}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert service.http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        head = service.http.head(path)
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", etag)


def test_nothing_else_is_served(service):
    for path in ("", "nothing.js", "../page.py", "%2e%2e/page.py", "saved.html", "index.html", "examples"):
        response = service.http.get(f"/web/{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found"), path
    assert service.http.post("/").status_code == 405


def test_the_page_is_small_and_writes_no_markup():
    files = [path for path in WEB.rglob("*") if path.is_file()]
    index = WEB / "index.html"
    of_page = {index, *(WEB / name for name in re.findall(r'(?:href|src)="web/([^"]+)"', index.read_text()))}

    def sent(paths):
        return sum(len(gzip.compress(path.read_bytes())) for path in paths)

    assert sent(of_page) <= MAX_BYTES  # what it loads at once
    assert sent(WEB / name for name in LOADED_LATER) <= MAX_BYTES_LATER
    for path in files:
        text = path.read_text()
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert sink not in text, path
        without_namespace = text.replace('"http://www.w3.org/2000/svg"', "")
        assert "http://" not in without_namespace, path
        assert "https://" not in without_namespace, path
        assert " style=" not in text, path
