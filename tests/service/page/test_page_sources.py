"""The source account on the page: its rows, what features saw on the photo, the ledger beside it."""

import io
from itertools import pairwise

import numpy as np
import pytest
from browsing import change_answers, number, open_page, show_ledger, shown_answer, signed, upload
from PIL import Image
from playwright.sync_api import expect

OTHERS = ("others", "error", "embedding", "bias", "constants", "baseline", "silent")
SLOWEST_MS = 400  # from the answer to the account on the screen


def values(page):
    """The account table, in its order: row -> logits."""
    entries = page.locator("#account tr[data-row]:not(.row-part)").evaluate_all(
        "rows => rows.map((row) => [row.dataset.row, row.querySelector('.value').textContent])"
    )
    return {name: float(text.replace("−", "-").replace("e+", "e")) for name, text in entries}


def account_of(answer):
    return answer["explanations"][0]["sources"]


def shades(page):
    """What is drawn on the photo: a signed opacity by patch."""
    return np.array(
        page.locator(".photo .patch").evaluate_all(
            """all => all.map((one) => one.getAttribute("fill-opacity") * (one.matches(".against") ? -1 : 1))"""
        )
    )


def expected_shades(patches, least=0.0, opacity=0.75):
    return opacity * np.array(patches) / (max(least, np.abs(patches).max()) or 1)


def places(feature):
    return np.array(feature["tokens"][1:])


def expected_of(feature):
    """A feature's shades: on the scale of its strongest patch, or of a tenth of its part at the class token."""
    return expected_shades(places(feature), least=abs(feature["tokens"][0]) / 10)


def row_of(page, feature):
    return page.locator(f"[data-row='source.{feature['layer']}/{feature['index']}']")


def seen_at_patches(answer):
    """The account's features that count at patches above all."""
    features = account_of(answer)["features"]
    return [feature for feature in features if np.abs(places(feature)).max() > abs(feature["tokens"][0])]


# Rows


def test_an_answer_opens_on_the_features_that_made_it(page, service, photo):
    upload(page, photo)
    answer = service.attribute(photo, explain={"sources": True, "baseline": "mean"})
    account, shown = account_of(answer), values(page)
    expect(page.get_by_role("tab", name="Source account")).to_have_attribute("aria-selected", "true")
    features = [f"source.{feature['layer']}/{feature['index']}" for feature in account["features"]]
    assert list(shown) == [*features, *OTHERS, "remainder", "logit"]
    sizes = [abs(shown[name]) for name in features]
    assert sizes == sorted(sizes, reverse=True)
    for name, feature in zip(features, account["features"], strict=True):
        assert shown[name] == pytest.approx(feature["contribution"], abs=0.0006)
        text = row_of(page, feature).locator("th").inner_text()
        assert f"#{feature['index']}" in text
        assert f"layer {feature['layer']} · activation {number(feature['activation'], 2)}" in text
        assert (feature["label"] or "") in text
    layers, listed = account["layers"], sum(feature["contribution"] for feature in account["features"])
    expected = {
        "others": sum(layer["features"] for layer in layers) - listed,
        "error": sum(layer["error"] for layer in layers),
        "embedding": sum(account["embedding"]),
        "bias": sum(layer["bias"] for layer in layers),
        "constants": account["constants"],
        "baseline": sum(layer["baseline"] for layer in layers),
        "silent": sum(layer["silent"] for layer in layers),
        "logit": account["logit"],
    }
    assert {name: shown[name] for name in expected} == pytest.approx(expected, abs=0.0006)
    parts = sum(value for name, value in shown.items() if name != "logit")
    assert parts == pytest.approx(account["logit"], abs=0.0005 * len(shown))


def test_bars_join_up_to_the_logit(page, photo):
    """Each bar begins where the one above it ends; the last one's end is the logit's."""
    upload(page, photo)
    ends = page.locator("#account tr[data-row]:not(.row-part) .bar").evaluate_all(
        """bars => bars.map((bar) => [...bar.querySelectorAll(".join")].map(({ attributes }) =>
                                     parseFloat(attributes.x1.value)))"""
    )
    *rows, total = ends
    for (_, end), (start, _) in pairwise(rows):
        assert start == pytest.approx(end, abs=1e-6)
    assert rows[-1][1] == pytest.approx(total[1], abs=1e-3)
    assert rows[0][0] == pytest.approx(total[0], abs=1e-6)


@pytest.mark.parametrize("kind", ["others", "error", "bias", "baseline", "silent", "embedding"])
def test_rows_open_into_layers_that_add_up_to_them(page, photo, kind):
    account = account_of(upload(page, photo))
    row = page.locator(f"[data-row={kind}]")
    button = row.get_by_role("button")
    button.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    inner = page.locator(f"[id='{button.get_attribute('aria-controls')}']")
    texts = inner.locator(".value").all_inner_texts()
    assert len(texts) == (2 if kind == "embedding" else 12)
    found = [float(text.replace("−", "-")) for text in texts]
    assert sum(found) == pytest.approx(values(page)[kind], abs=0.0005 * (len(found) + 1))
    if kind in ("error", "bias", "baseline", "silent"):
        assert found == pytest.approx([layer[kind] for layer in account["layers"]], abs=0.0006)
    if kind == "embedding":
        assert found[0] == pytest.approx(account["embedding"][0], abs=0.0006)


def test_an_account_about_zero_has_no_average_picture(page, photo):
    def about_zero(answer):
        for layer in account_of(answer)["layers"]:
            layer.update(baseline=None, silent=None)

    change_answers(page, about_zero)
    upload(page, photo)
    assert not {"baseline", "silent"} & set(values(page))
    expect(page.locator(".account-panel")).not_to_contain_text("average")


def test_a_logit_of_another_precision_is_told_apart(page, photo):
    upload(page, photo)
    expect(page.locator(".account-panel")).not_to_contain_text("float32")
    change_answers(page, lambda answer: account_of(answer).update(logit=account_of(answer)["logit"] + 0.25))
    answer = upload(page, photo)
    assert values(page)["logit"] == pytest.approx(account_of(answer)["logit"], abs=0.0006)
    explained = number(answer["explanations"][0]["logit"])
    expect(page.locator(".account-panel")).to_contain_text(f"its logit is {explained}")


def test_as_a_table_it_says_what_came_from_the_class_token(page, photo):
    feature = seen_at_patches(upload(page, photo))[0]
    page.get_by_role("button", name="Show as table").click()
    cells = row_of(page, feature).locator(".more").all_inner_texts()
    assert cells[1:] == [signed(feature["tokens"][0]), signed(places(feature).sum())]


def test_a_card_opens_from_a_feature(page, photo):
    feature = account_of(upload(page, photo))["features"][0]
    row_of(page, feature).locator("button.feature-name").press("Enter")
    expect(page.get_by_role("dialog").locator(".kicker")).to_have_text(
        f"Layer {feature['layer']}, feature #{feature['index']}"
    )


def test_it_is_on_the_screen_soon(page, photo):
    """The quickest of a few: other processes share the processors."""
    for _ in range(5):
        upload(page, photo)
        page.wait_for_timeout(200)
    times = page.evaluate("performance.getEntriesByName('vitrine:account').map((one) => one.duration)")
    assert len(times) == 5
    assert min(times) <= SLOWEST_MS


# On the photo


def test_the_photo_shows_where_it_came_from(page, photo):
    account = account_of(upload(page, photo))
    assert shades(page) == pytest.approx(expected_shades(account["map"][1:]), abs=1e-3)
    caption = page.locator(".caption")
    expect(caption).to_contain_text("Where it came from.")
    expect(caption).to_contain_text(
        f"patches {signed(sum(account['map'][1:]))}, class token {signed(account['map'][0])}"
    )
    others = signed(account["logit"] - sum(account["map"]))
    expect(caption).to_contain_text(f"The other rows, {others}, have no place in the photo.")


def test_what_a_feature_saw_is_drawn_while_it_is_pointed_at(page, photo):
    answer = upload(page, photo)
    whole = shades(page)
    first, second = seen_at_patches(answer)[:2]
    for feature in (first, second):
        row_of(page, feature).hover()
        assert shades(page) == pytest.approx(expected_of(feature), abs=1e-3)
        expect(page.locator(".caption")).to_contain_text(f"#{feature['index']}, layer {feature['layer']} contributed.")
        expect(page.locator(".caption")).to_contain_text(
            f"class token, which has no place in the photo, {signed(feature['tokens'][0])}"
        )
    page.mouse.move(2, 2)
    assert shades(page) == pytest.approx(whole)
    row_of(page, first).get_by_role("button").first.focus()
    assert shades(page) == pytest.approx(expected_of(first), abs=1e-3)
    page.locator("#labels").focus()
    assert shades(page) == pytest.approx(whole)


def test_a_chosen_feature_stays_drawn(page, photo):
    answer = upload(page, photo)
    whole, feature = shades(page), seen_at_patches(answer)[0]
    button = row_of(page, feature).get_by_role("button", name="Show on the photo")
    button.press("Enter")
    page.locator("#labels").focus()
    expect(button).to_have_attribute("aria-pressed", "true")
    assert shades(page) == pytest.approx(expected_of(feature), abs=1e-3)
    assert page.locator(".map-panel select").input_value() == f"{feature['layer']}/{feature['index']}"
    expect(page.locator(".map-panel [role=status]")).to_contain_text(
        f"#{feature['index']}, layer {feature['layer']} contributed"
    )
    cells = page.locator(".patches td").all_text_contents()[1:]
    assert [text.rstrip("*") for text in cells] == [signed(value) for value in places(feature)]
    page.locator(".photo .map").focus()
    expect(page.locator(".readout")).to_contain_text(f"Row 1, column 1: {signed(places(feature)[0])} logits")
    button.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "false")
    page.locator("#labels").focus()
    assert shades(page) == pytest.approx(whole)


def test_every_map_is_in_the_list(page, photo):
    answer = upload(page, photo)
    explanation, maps = answer["explanations"][0], page.locator(".map-panel select")
    features = [f"{feature['layer']}/{feature['index']}" for feature in account_of(answer)["features"]]
    options = maps.locator("option").evaluate_all("all => all.map((one) => one.value)")
    assert options == ["sources", *features, "", *map(str, range(12))]
    for key, expected in (
        (features[0], expected_of(account_of(answer)["features"][0])),
        ("", expected_shades(explanation["heatmap"]["total"])),
        ("3", expected_shades(explanation["heatmap"]["patches"][3])),
        ("sources", expected_shades(account_of(answer)["map"][1:])),
    ):
        maps.select_option(key)
        assert shades(page) == pytest.approx(expected, abs=1e-3)
        pressed = page.locator(".where-button[aria-pressed=true]")
        assert pressed.evaluate_all("all => all.map((one) => one.dataset.map)") == [key] * (key in features)


def test_a_feature_at_the_class_token_alone_is_put_into_words(page, photo):
    def at_class_token(answer):
        feature = account_of(answer)["features"][0]
        feature["tokens"] = [feature["contribution"]] + [0.0] * 64

    change_answers(page, at_class_token)
    feature = account_of(upload(page, photo))["features"][0]
    row_of(page, feature).get_by_role("button", name="Show on the photo").click()
    assert not shades(page).any()
    said = f"only at the class token, which has no place in the photo: {signed(feature['contribution'])}."
    expect(page.locator(".caption")).to_contain_text(said)
    expect(page.locator(".legend")).to_be_hidden()


def test_next_to_nothing_at_patches_does_not_look_like_much(page, photo):
    def all_but_at_class_token(answer):
        account_of(answer)["features"][0]["tokens"] = [1.0, 0.001] + [0.0] * 63

    change_answers(page, all_but_at_class_token)
    row_of(page, account_of(upload(page, photo))["features"][0]).hover()
    assert shades(page)[0] == pytest.approx(0.75 * 0.01, abs=1e-3)
    assert page.locator(".legend").inner_text().split()[0] == "−0.100"


def test_the_photo_stays_in_sight(browser, service, photo):
    with open_page(browser, service, viewport={"width": 1280, "height": 900}) as page:
        answer = upload(page, photo)
        page.mouse.wheel(0, 700)
        row_of(page, account_of(answer)["features"][-1]).hover()
        expect(page.locator(".photo")).to_be_in_viewport(ratio=0.99)
        expect(page.locator(".caption")).to_be_in_viewport(ratio=0.99)
        button = page.locator(".predictions button").last
        page.evaluate("by => scrollBy(0, by)", button.bounding_box()["y"] - 100)
        end_of_photo = page.locator(".others").bounding_box()
        assert button.bounding_box()["y"] < end_of_photo["y"]  # it lies under the photo
        button.focus()
        end_of_photo = page.locator(".others").bounding_box()
        assert button.bounding_box()["y"] >= end_of_photo["y"] + end_of_photo["height"]
    with open_page(browser, service, viewport={"width": 360, "height": 740}) as page:
        answer = upload(page, photo)
        row_of(page, account_of(answer)["features"][-1]).get_by_role("button", name="Show on the photo").click()
        expect(page.locator(".photo")).to_be_in_viewport(ratio=0.99)


# The two accounts


def test_the_ledger_is_one_step_away_and_stays(page, photo):
    answer = upload(page, photo)
    heatmap = answer["explanations"][0]["heatmap"]
    tabs = page.get_by_role("tab")
    panel = page.get_by_role("tabpanel", name="Source account")
    expect(panel).to_be_visible()
    assert [tabs.nth(place).get_attribute("tabindex") for place in (0, 1)] == ["0", "-1"]
    tabs.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tabs.nth(1)).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Direct ledger")).to_be_visible()
    assert "prior" in values(page)
    assert shades(page) == pytest.approx(expected_shades(heatmap["total"]), abs=1e-3)
    with page.expect_response("**/v1/attribute") as response_info:
        page.locator(".predictions button").nth(1).click()
    answer = shown_answer(page, response_info)
    expect(tabs.nth(1)).to_have_attribute("aria-selected", "true")
    assert values(page)["prior"] == pytest.approx(answer["explanations"][0]["ledger"]["prior"], abs=0.0006)
    tabs.nth(1).focus()
    for key, place in (("Home", 0), ("End", 1), ("ArrowRight", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        expect(tabs.nth(place)).to_be_focused()
        expect(tabs.nth(place)).to_have_attribute("aria-selected", "true")
    assert shades(page) == pytest.approx(expected_shades(account_of(answer)["map"][1:]), abs=1e-3)


def test_what_is_open_and_drawn_stays_with_another_target(page, photo):
    upload(page, photo)
    errors = page.get_by_role("button", name="Errors")
    errors.click()
    page.locator(".map-panel select").select_option("5")
    with page.expect_response("**/v1/attribute") as response_info:
        page.locator(".predictions button").nth(1).click()
    answer = shown_answer(page, response_info)
    expect(errors).to_have_attribute("aria-expanded", "true")
    assert shades(page) == pytest.approx(expected_shades(answer["explanations"][0]["heatmap"]["patches"][5]), abs=1e-3)


# Where there is none


def serve_baselines(page, *baselines, **fields):
    """Let the service say that source accounts may be about these."""

    def answer(route):
        route.fulfill(json=route.fetch().json() | {"source_baselines": baselines} | fields)

    page.route("**/v1/model", answer)
    page.reload()
    expect(page.locator("#model")).not_to_be_empty()


def test_a_bundle_without_them_is_not_asked(page, photo):
    serve_baselines(page)
    answer = upload(page, photo)
    assert account_of(answer) is None
    assert page.get_by_role("tab").count() == 0
    assert "prior" in values(page)
    expect(page.locator(".caption")).to_be_hidden()
    expect(page.locator(".map-panel h3")).to_have_text("Where attention read")
    maps = page.get_by_label("Layer")
    assert maps.locator("optgroup").count() == 0
    assert maps.locator("option").all_text_contents() == ["all, summed", *map(str, range(12))]


def test_a_bundle_without_an_average_picture_is_asked_about_zero(page, photo):
    serve_baselines(page, "zero")
    account = account_of(upload(page, photo))
    assert account["layers"][0]["baseline"] is None
    assert "baseline" not in values(page)


def test_a_bundle_that_went_out_of_service_is_not_asked_twice(page, photo):
    """The page knows the old bundle's abilities; refused, it looks at the new one's and asks for what that has."""
    serve_baselines(page, "zero", "mean", digest="sha256:old")
    page.unroute_all()
    serving, asked = {"source_baselines": []}, []

    def attribute(route):
        asked.append(route.request.post_data_buffer)
        if b'"sources"' in asked[-1]:
            error = {"code": "invalid_request", "message": "no sources", "details": [], "request_id": "x"}
            route.fulfill(status=400, json={"error": error})
        else:
            route.continue_()

    page.route("**/v1/model", lambda route: route.fulfill(json=route.fetch().json() | serving))
    page.route("**/v1/attribute", attribute)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo})
    expect(page.locator("[data-row=prior]")).to_be_visible()
    expect(page.locator("#error")).to_be_empty()
    assert len(asked) == 2
    page.get_by_role("button", name="Use these labels").click()
    page.wait_for_timeout(300)
    assert [b'"sources"' in body for body in asked] == [True, False, False]
    page.fill("#labels", "a" * 400)  # refused for another reason: once
    page.get_by_role("button", name="Use these labels").click()
    expect(page.locator("#error")).not_to_be_empty()
    assert len(asked) == 4


def test_drawn_pixels_are_the_features(page, photo):
    """What can be seen, not only what is in the document: the strongest patch is blue or orange, an empty one grey."""
    feature = max(seen_at_patches(upload(page, photo)), key=lambda one: (places(one) == 0).sum())
    page.locator("input[type=range]").fill("100")
    row_of(page, feature).get_by_role("button", name="Show on the photo").click()
    page.locator("#labels").focus()
    page.mouse.move(2, 2)
    seen = np.asarray(Image.open(io.BytesIO(page.locator(".photo").screenshot())).convert("RGB")).astype(int)
    side = seen.shape[1] * 60 / 90 / 8

    def colour(patch):
        x, y = seen.shape[1] / 6 + (patch % 8) * side, (patch // 8) * side
        return seen[int(y) + 3 : int(y + side) - 3, int(x) + 3 : int(x + side) - 3].mean((0, 1))

    strongest = int(np.abs(places(feature)).argmax())
    red, _, blue = colour(strongest)
    assert (blue > red + 40) if places(feature)[strongest] > 0 else (red > blue + 10)
    empty = colour(int(np.flatnonzero(places(feature) == 0)[0]))
    assert np.ptp(empty) < 12


def test_the_tabs_survive_a_new_photo(page, photo):
    upload(page, photo)
    show_ledger(page)
    upload(page, photo)
    expect(page.get_by_role("tab", name="Direct ledger")).to_have_attribute("aria-selected", "true")
