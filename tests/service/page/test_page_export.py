"""An account saved as one HTML file: opened from disk, it sends no requests and shows the same as the page."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from browsing import card, number, serious_violations, signed, visit
from PIL import Image
from playwright.sync_api import expect

from vitrine.models.images.errors import ImageError
from vitrine.service.exports.page import draw_page
from vitrine.service.schemas.attribute import AttributeResponse

LABELS = ["red circle", "</script><script>document.title='hacked'</script>", "<img src=x onerror=alert(1)>"]
HOSTILE = LABELS[1]


@pytest.fixture(scope="module")
def photo(picture):
    return picture("PNG", size=(90, 60)) + HOSTILE.encode()  # what follows a PNG's end is not read


@pytest.fixture(scope="module")
def answer(server, photo):
    """Every label explained, with heat maps; the first feature of the last layer has a hostile label."""
    response = server.attribute(photo, labels=LABELS, explain={"targets": LABELS, "heatmap": True})
    for explanation in response["explanations"]:
        explanation["layers"][2]["features"][0].update(label=HOSTILE, label_score=0.5)
    return AttributeResponse.model_validate(response)


@pytest.fixture(scope="module")
def saved(answer, photo, bundle, tmp_path_factory):
    """The file, with cards of all features of the last layer except the second."""
    features = answer.explanations[0].layers[2].features
    cards = {f"clt/2/{feature.index}": card(2, feature.index, label=HOSTILE) for feature in features}
    cards.pop(f"clt/2/{features[1].index}")
    path = tmp_path_factory.mktemp("saved") / "account.html"
    path.write_text(draw_page(answer, photo, cards, bundle.manifest.preprocessing), encoding="utf-8")
    return path


@pytest.fixture
def page(browser, saved):
    with visit(browser, saved.as_uri()) as page:
        expect(page.locator(".question")).to_be_visible()
        yield page


def test_it_shows_the_same_account(page, answer):
    def check(explanation):
        ledger = explanation.ledger
        expect(page.locator("[data-row=logit] .value")).to_have_text(number(explanation.logit))
        for name, parts in (("attention", ledger.attention), ("clt", ledger.clt)):
            texts = page.locator(f"[data-row^='{name}.'] .value").all_text_contents()
            assert texts == [signed(part) for part in parts]
        for name in ("prior", "bias", "error"):
            assert page.locator(f"[data-row={name}] .value").text_content() == signed(getattr(ledger, name))

    check(answer.explanations[0])
    buttons = page.locator(".predictions button")
    assert buttons.count() == 3
    for explanation in answer.explanations[1:]:
        buttons.filter(has_text=explanation.target).click()
        check(explanation)
    assert page.locator(".photo .patch").count() == 16
    assert page.locator(".photo img").evaluate("image => image.naturalWidth") == 90
    expect(page.locator(".verdict")).to_be_visible()
    assert page.locator(".timings tbody tr").count() == len(answer.timings_ms)


def test_what_is_hostile_stays_text(page, saved, answer):
    assert saved.read_text(encoding="utf-8").count("</script>") == 2  # the data's and the script's own
    assert page.get_by_text(HOSTILE).first.is_visible()
    assert page.title() != "hacked"
    assert page.locator("img").count() == 1
    assert answer.warnings[0].code == "labels_cut"
    assert page.locator(".warnings li").all_text_contents() == [warning.message for warning in answer.warnings]
    assert "</script>" in answer.warnings[0].message


def test_cards_that_came_along_open(page, answer):
    page.get_by_role("button", name="CLT 2").click()
    names = page.locator(".features:not([hidden]) .feature-name")
    kinds = names.evaluate_all("all => all.map((one) => one.tagName)")
    assert kinds == ["BUTTON", "SPAN", "BUTTON", "BUTTON", "BUTTON"]
    names.first.click()
    dialog = page.get_by_role("dialog", name=HOSTILE)
    expect(dialog.locator(".kicker")).to_have_text(
        f"Layer 2, feature #{answer.explanations[0].layers[2].features[0].index}"
    )
    assert dialog.locator(".list button").count() == 0  # the feature that fires with it has no card here
    assert dialog.get_by_role("button", name="Other features").count() == 0
    page.keyboard.press("Escape")
    expect(names.first).to_be_focused()


def test_the_answer_is_saved_again(page, answer):
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the answer (JSON)").click()
    assert json.loads(Path(download.value.path()).read_text()) == answer.model_dump(mode="json")


@pytest.fixture(scope="module")
def with_sources(server, photo, bundle, tmp_path_factory):
    """(answer with source accounts, the file), with the card of the first feature of the first account alone."""
    explain = {"targets": LABELS, "heatmap": True, "sources": True, "baseline": "mean"}
    response = server.attribute(photo, labels=LABELS, explain=explain)
    for explanation in response["explanations"]:
        explanation["sources"]["features"][0].update(label=HOSTILE, label_score=0.5)
    first = response["explanations"][0]["sources"]["features"][0]
    cards = {f"clt/{first['layer']}/{first['index']}": card(first["layer"], first["index"], label=HOSTILE)}
    path = tmp_path_factory.mktemp("saved") / "sources.html"
    answer = AttributeResponse.model_validate(response)
    path.write_text(draw_page(answer, photo, cards, bundle.manifest.preprocessing), encoding="utf-8")
    return answer, path


def test_it_opens_on_the_source_account_that_the_answer_has(browser, with_sources):
    answer, path = with_sources
    with visit(browser, path.as_uri()) as page:
        buttons = page.locator(".predictions button")
        for explanation in answer.explanations:
            buttons.filter(has_text=explanation.target).click()
            shown = page.locator(".row-source .value").all_text_contents()
            assert shown == [signed(feature.contribution) for feature in explanation.sources.features]
            expect(page.locator("[data-row=logit] .value")).to_have_text(number(explanation.sources.logit))
        buttons.filter(has_text=answer.explanations[0].target).click()
        assert page.locator("button.feature-name").count() == 1
        page.locator("button.feature-name").click()
        expect(page.get_by_role("dialog", name=HOSTILE)).to_be_visible()
        page.keyboard.press("Escape")
        page.locator(".where-button").first.click()
        expect(page.locator(".caption")).to_contain_text(HOSTILE)
        assert page.title() != "hacked"
        page.get_by_role("tab", name="Direct ledger").click()
        ledger = answer.explanations[0].ledger
        expect(page.locator("[data-row=prior] .value")).to_have_text(signed(ledger.prior))


@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("look", [{}, {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}])
def test_axe_finds_nothing_serious(browser, saved, with_sources, look, sources):
    path = with_sources[1] if sources else saved
    with visit(browser, path.as_uri(), **look) as page:
        expect(page.locator(".question")).to_be_visible()
        assert page.get_by_role("tab").count() == 2 * sources
        assert not serious_violations(page)
        width, scrolled = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert scrolled <= width


def test_its_policy_lets_no_other_script_run(browser, saved, tmp_path):
    """Neither an inserted script nor a modified version of its own."""
    html = saved.read_text(encoding="utf-8")
    inserted = tmp_path / "more.html"
    inserted.write_text(html.replace("</body>", "<script>document.title = 'more'</script></body>"), encoding="utf-8")
    modified = tmp_path / "other.html"
    modified.write_text(
        html.replace("const Vitrine = {};", "document.title = 'other'; const Vitrine = {};"), encoding="utf-8"
    )
    page = browser.new_page()
    for path in (inserted, modified):
        page.goto(path.as_uri())
        assert "account of a prediction" in page.title()
    assert page.locator(".question").count() == 0
    page.close()


def test_it_holds_the_photo_in_any_format(browser, answer, picture, bundle, tmp_path):
    for format, kind in {"JPEG": "jpeg", "PNG": "png", "WEBP": "png", "TIFF": "png", "HEIF": "png"}.items():
        path = tmp_path / f"{format}.html"
        text = draw_page(answer, picture(format, size=(64, 48)), {}, bundle.manifest.preprocessing)
        path.write_text(text, encoding="utf-8")
        assert re.search(r'"image": "data:image/(\w+);base64,', text)[1] == kind
        with visit(browser, path.as_uri()) as page:
            expect(page.locator(".photo img")).to_be_visible()
            assert page.locator(".photo img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 48]
            assert page.locator("button.feature-name").count() == 0


def test_what_browsers_show_otherwise_is_drawn_anew(answer, encode, bundle):
    """The first frame of an animation; a WebP with an EXIF orientation."""
    frames = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]
    exif = Image.Exif()
    exif[0x112] = 6
    moving = {"save_all": True, "append_images": frames[1:], "duration": 50}
    for file, size in (
        (encode(frames[0], "GIF", **moving), (40, 20)),
        (encode(frames[0], "WEBP", **moving), (40, 20)),
        (encode(frames[0], "WEBP", exif=exif), (20, 40)),
    ):
        text = draw_page(answer, file, {}, bundle.manifest.preprocessing)
        data = re.search(r'"image": "data:image/png;base64,([^"]*)"', text)[1]
        drawn = Image.open(io.BytesIO(base64.b64decode(data)))
        assert drawn.size == size
        assert drawn.getpixel((5, 5))[0] > 200


def test_a_file_that_is_not_an_image_is_refused(answer, bundle):
    with pytest.raises(ImageError, match=r"not an image in a supported format \(JPEG, PNG, WEBP, GIF, BMP"):
        draw_page(answer, b"text", {}, bundle.manifest.preprocessing)
