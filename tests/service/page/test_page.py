"""The page at `/`, in a real browser, on a real service with the demo bundle."""

import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browsing import change_answers, number, show_ledger, shown_answer, signed, upload
from PIL import Image, ImageOps
from playwright.sync_api import expect

from common import ROOT
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.images.decode import ImageLimits
from vitrine.models.images.frame import to_pixels

DEMO = ROOT / "models" / "demo"


def trigger(page, act):
    """Run `act`; returns the answer to the request that the page then sends, and its JSON as in the curl line."""
    with page.expect_response("**/v1/attribute") as response_info:
        act()
    answer = shown_answer(page, response_info)
    words = shlex.split(page.locator(".curl code").inner_text())
    return answer, json.loads(words[words.index("--form-string") + 1].removeprefix("request="))


def rows(page):
    """The account table: row -> text of its logits."""
    entries = page.locator("#account [data-row]").evaluate_all(
        "rows => rows.map((row) => [row.dataset.row, row.querySelector('.value').textContent])"
    )
    return {name: text for name, text in entries if not name.startswith(("feature", "others"))}


def value(text):
    return float(text.replace("−", "-"))


# From a picture to its account


def test_an_uploaded_photo_is_accounted_for_as_the_api_accounts_for_it(page, service, photo):
    upload(page, photo)
    show_ledger(page)
    expected = service.attribute(photo)
    explanation, row_texts = expected["explanations"][0], rows(page)
    ledger = explanation["ledger"]
    for name in ("prior", "bias", "error"):
        assert row_texts[name] == signed(ledger[name])
    for name in ("attention", "clt"):
        assert [row_texts[f"{name}.{layer}"] for layer in range(12)] == [signed(part) for part in ledger[name]]
    assert abs(value(row_texts["remainder"])) <= 1e-3
    assert row_texts["logit"] == number(explanation["logit"])
    assert len(row_texts) == 29
    parts = sum(value(text) for name, text in row_texts.items() if name != "logit")
    assert parts == pytest.approx(explanation["logit"], abs=28 * 0.0005)
    top = page.locator(".predictions li")
    assert top.count() == 5
    for index, prediction in enumerate(expected["predictions"]):
        text = top.nth(index).inner_text()
        assert prediction["label"] in text
        assert f"{prediction['probability']:.1%}"[:-1] in text
        assert number(prediction["logit"], 2) in text
    bars = page.locator("#account tbody:not(.features) .bar rect:not([fill])")
    assert bars.count() == 28
    assert page.evaluate("performance.getEntriesByName('vitrine:account').length") == 1


def test_features_of_a_layer_add_up_to_its_row(page, photo):
    answer = upload(page, photo)
    layer = answer["explanations"][0]["layers"][11]
    show_ledger(page)
    page.get_by_role("button", name="CLT 11").click()
    lines = page.locator(".features:not([hidden]) tr")
    texts = lines.locator(".value").all_inner_texts()
    assert texts[:-1] == [signed(feature["contribution"]) for feature in layer["features"]]
    assert sum(map(value, texts)) == pytest.approx(layer["contribution"], abs=0.004)
    first = layer["features"][0]
    assert f"activation {number(first['activation'], 2)}" in lines.first.inner_text()


def test_examples_are_drawn_sent_and_classified_correctly(page):
    for name in ("airplane", "ship", "horse", "frog"):
        with page.expect_response("**/v1/attribute") as response_info:
            page.click(f"[data-example={name}]")
        answer = shown_answer(page, response_info)
        assert answer["predictions"][0]["label"] == name
        assert answer["predictions"][0]["probability"] > 0.75
        expect(page.get_by_role("heading", name=f"Why {name}?")).to_be_visible()
        assert page.get_by_role("link", name=f"Save {name}.png").is_visible()


def test_a_photo_is_dropped_or_pasted(page, photo):
    for event in (
        "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})",
        "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})",
    ):
        with page.expect_response("**/v1/attribute") as response_info:
            page.evaluate(
                f"""bytes => {{
                    const data = new DataTransfer();
                    data.items.add(new File([new Uint8Array(bytes)], 'a.png', {{type: 'image/png'}}));
                    document.getElementById('labels').dispatchEvent({event});
                }}""",
                list(photo),
            )
        assert shown_answer(page, response_info)["predictions"]


def test_labels_are_edited_and_sets_chosen(page, photo):
    upload(page, photo)
    page.fill("#labels", 'red thing,  blue thing\nred thing, "thing, grey"')
    answer, request = trigger(page, lambda: page.press("#labels", "Control+Enter"))
    assert request["labels"] == ["red thing", "blue thing", "thing, grey"]
    assert {prediction["label"] for prediction in answer["predictions"]} == set(request["labels"])
    answer, request = trigger(page, lambda: page.select_option("#set", "pets"))
    assert request["label_set"] == "pets"
    assert "labels" not in request
    assert page.input_value("#labels") == "cat, dog"
    answer, request = trigger(page, lambda: page.select_option("#set", "default"))
    assert not {"labels", "label_set"} & set(request)


def test_labels_are_warned_of(page, photo):
    page.fill("#labels", "Cat, dog")
    assert upload(page, photo)["warnings"] == []
    assert page.locator(".warnings").count() == 0
    page.fill("#labels", "Cat, dog, cat")
    answer, _ = trigger(page, page.get_by_role("button", name="Use these labels").click)
    (warning,) = answer["warnings"]
    expect(page.get_by_role("list", name="Warnings").get_by_role("listitem")).to_have_text([warning["message"]])
    expect(page.locator("#status")).to_contain_text(f"Warning: {warning['message']}")


def test_labels_survive_the_field(page):
    for labels in (["a"], ["a", "b c"], ["tench, Tinca tinca", 'the "best"', "plain"], ['"', "a,", "b\nc"]):
        assert page.evaluate("labels => Vitrine.labels.parse(Vitrine.labels.format(labels))", labels) == labels


def test_a_prediction_is_explained_and_compared(page, photo):
    first = upload(page, photo)
    other, third = (first["predictions"][place]["label"] for place in (1, 2))
    answer, request = trigger(page, lambda: page.locator(".predictions button").nth(1).click())
    assert request["explain"]["targets"] == [other]
    assert rows(page)["logit"] == number(answer["explanations"][0]["logit"])
    expect(page.locator(".predictions button").nth(1)).to_be_focused()  # focus stays, although everything is redrawn
    answer, request = trigger(page, lambda: page.select_option("#contrast", third))
    always = {"heatmap": True, "sources": True, "baseline": "mean"}
    assert request["explain"] == always | {"targets": [other], "contrast": third}
    expect(page.get_by_role("heading", name=f"Why {other} rather than {third}?")).to_be_visible()
    difference = first["predictions"][1]["logit"] - first["predictions"][2]["logit"]
    assert value(rows(page)["logit"]) == pytest.approx(difference, abs=0.001)
    assert page.locator("#contrast option", has_text=re.compile(f"^{other}$")).count() == 0


def test_the_newest_request_counts(page, photo):
    """The first answer is held back until the second has arrived."""
    held = []
    page.route("**/v1/attribute", lambda route: held.append(route) if not held else route.continue_(), times=2)
    page.set_input_files("#file", {"name": "old.png", "mimeType": "image/png", "buffer": photo})
    with page.expect_event("requestfailed") as failed, page.expect_response("**/v1/attribute") as response_info:
        page.click("[data-example=ship]")
    assert failed.value.failure == "net::ERR_ABORTED"
    assert shown_answer(page, response_info)["predictions"][0]["label"] == "ship"


# The heat map


def test_the_map_lies_over_what_the_model_saw(page):
    """Sent through the service's own preprocessing, a gradient shows where each column of the model's input is from."""
    demo = open_bundle(DEMO).manifest.preprocessing
    plain = Preprocessing(**{**demo.model_dump(), "mean": (0, 0, 0), "std": (1, 1, 1)})
    for size in ((900, 600), (580, 500), (500, 580), (333, 1000), (64, 64)):
        ramps = [np.linspace(0, 1, length) * 255 for length in size]
        seen = page.evaluate(
            "([size, how]) => Vitrine.heatmap.seen(...size, how)", [size, json.loads(demo.model_dump_json())]
        )
        for axis, (start, extent) in enumerate((("x", "width"), ("y", "height"))):
            image = Image.fromarray(
                np.broadcast_to(ramps[0][None], size[::-1])
                if axis == 0
                else np.broadcast_to(ramps[1][:, None], size[::-1])
            ).convert("RGB")
            levels = to_pixels(image, plain, ImageLimits(10**7, 10**4))[0]
            line = (levels[0] if axis == 0 else levels[:, 0]) * (size[axis] - 1)
            scale = seen[extent] / len(line)
            edges = [line[10] - 10.5 * scale, line[21] + 10.5 * scale]  # away from the ramp's clipped ends
            assert edges == pytest.approx([seen[start], seen[start] + seen[extent]], abs=0.4 * scale + 2)


def test_the_map_is_drawn_where_it_lies(page, photo):
    answer = upload(page, photo)
    heatmap = answer["explanations"][0]["heatmap"]
    image = page.locator(".photo img").bounding_box()
    boxes = [box.bounding_box() for box in page.locator(".photo .patch").all()]
    assert len(boxes) == heatmap["rows"] * heatmap["columns"]
    assert image["width"] / image["height"] == pytest.approx(1.5, abs=0.02)
    left, right = min(box["x"] for box in boxes), max(box["x"] + box["width"] for box in boxes)
    assert left - image["x"] == pytest.approx(image["width"] * 15 / 90, abs=1)
    assert right - image["x"] == pytest.approx(image["width"] * 75 / 90, abs=1)
    assert max(box["y"] + box["height"] for box in boxes) == pytest.approx(image["y"] + image["height"], abs=1.5)


def test_sign_opacity_and_layer_change_what_is_seen(page, photo):
    answer = upload(page, photo)
    show_ledger(page)
    explanation = answer["explanations"][0]
    heatmap = explanation["heatmap"]

    def look():
        return np.asarray(Image.open(io.BytesIO(page.locator(".photo").screenshot())).convert("RGB")).astype(int)

    def fade(percent):
        page.locator("input[type=range]").fill(str(percent))
        return look()

    clear = fade(0)
    page.locator(".photo .layer").evaluate("layer => { layer.hidden = true; }")
    photo_alone = look()
    page.locator(".photo .layer").evaluate("layer => { layer.hidden = false; }")
    full = fade(100)
    best = max(range(64), key=lambda patch: heatmap["total"][patch])
    worst = min(range(64), key=lambda patch: heatmap["total"][patch])
    side = full.shape[1] * 60 / 90 / 8

    def patch(picture, index):
        x, y = full.shape[1] / 6 + (index % 8) * side, (index // 8) * side
        return picture[int(y) + 3 : int(y + side) - 3, int(x) + 3 : int(x + side) - 3].mean((0, 1))

    for index in (best, worst):
        assert np.allclose(patch(clear, index), patch(photo_alone, index), atol=1)
        assert abs(patch(full, index) - patch(clear, index)).max() > 20
    red, _, blue = patch(full, best)
    assert blue > red + 60  # for: blue
    red, _, blue = patch(full, worst)
    assert red > blue + 10  # against: orange
    page.get_by_label("for", exact=True).check()
    assert page.locator(".photo .patch.against").count() == 0
    assert np.allclose(patch(look(), worst), patch(clear, worst).mean(), atol=30)
    page.get_by_label("against", exact=True).check()
    assert page.locator(".photo .patch.for").count() == 0
    page.get_by_label("both").check()
    page.get_by_role("button", name="Attention 5").click()
    assert page.locator(".map-panel select").input_value() == "5"
    cells = page.locator(".patches td").all_text_contents()
    assert [text.rstrip("*") for text in cells[1:]] == [signed(part) for part in heatmap["patches"][5]]
    full_scale = max(map(abs, heatmap["patches"][5]))
    assert page.locator(".legend").inner_text().split()[0] == signed(-full_scale)
    assert signed(explanation["ledger"]["attention"][5]) in page.locator(".caption").inner_text()


def test_patches_are_read_with_the_arrow_keys(page, photo):
    answer = upload(page, photo)
    show_ledger(page)
    total, target = answer["explanations"][0]["heatmap"]["total"], answer["explanations"][0]["target"]
    readout = page.locator(".readout")
    assert readout.get_attribute("aria-live") == "polite"
    page.focus(".photo .map")
    for key, place in (("ArrowRight", 1), ("ArrowDown", 9), ("End", 15), ("ArrowRight", 15), ("ArrowUp", 7)):
        page.keyboard.press(key)
        row, column = divmod(place, 8)
        expect(readout).to_have_text(f"Row {row + 1}, column {column + 1}: {signed(total[place])} logits for {target}")
    page.locator(".photo .map").click(position={"x": 2, "y": 2})  # beside what the model saw
    expect(readout).to_contain_text("Row 1, column 8")


def test_outliers_are_marked(page, photo):
    change_answers(page, lambda answer: answer["explanations"][0]["heatmap"].update(outliers=[0, 63]))
    upload(page, photo)
    assert page.locator(".photo .outlier:not(.under)").count() == 2
    assert page.get_by_text("Circles mark outlier patches").is_visible()
    page.focus(".photo .map")
    expect(page.locator(".readout")).to_contain_text("an outlier")


def test_photos_are_shown_upright(page):
    """As the service reads them, in every EXIF orientation."""
    corners = Image.fromarray(np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8))
    for format, orientation in [("JPEG", 6), ("PNG", 6), *(("WEBP", turned) for turned in range(1, 9))]:
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x112] = orientation
        corners.resize((60, 40), Image.Resampling.NEAREST).save(file, format, exif=exif, quality=100)
        upload(page, file.getvalue())
        expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        photo = page.locator(".photo img")
        assert (
            tuple(photo.evaluate("({naturalWidth, naturalHeight}) => [naturalWidth, naturalHeight]")) == expected.size
        )
        drawn = photo.evaluate(
            """image => {
                const canvas = document.createElement('canvas');
                [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
                const context = canvas.getContext('2d');
                context.drawImage(image, 0, 0);
                return [...context.getImageData(5, 5, 1, 1).data].slice(0, 3);
            }"""
        )
        assert np.allclose(drawn, expected.getpixel((5, 5)), atol=40), (format, orientation)


@pytest.mark.parametrize("format", ["GIF", "PNG", "AVIF"])
def test_of_a_moving_picture_the_first_frame_is_shown(page, encode, format):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    loop = {} if format == "AVIF" else {"loop": 0}
    upload(page, encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **loop), "film")
    page.wait_for_timeout(120)
    page.locator("input[type=range]").fill("0")
    seen = Image.open(io.BytesIO(page.locator(".photo").screenshot())).convert("RGB")
    red, _, blue = seen.getpixel((seen.width // 2, seen.height // 2))
    assert red > 200 > 50 > blue


def test_what_is_transparent_is_shown_white_as_the_model_saw_it(page, encode):
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (20, 0, 40, 40))
    page.emulate_media(color_scheme="dark")
    upload(page, encode(clear), "clear.png")
    page.locator("input[type=range]").fill("0")
    seen = Image.open(io.BytesIO(page.locator(".photo").screenshot())).convert("RGB")
    assert min(seen.getpixel((seen.width // 4, seen.height // 2))) > 240


# Tables, fidelity, timings, exports


def test_the_table_is_always_there_and_can_be_shown(page, photo):
    answer = upload(page, photo)
    show_ledger(page)
    table = page.get_by_role("table", name="Why")
    assert table.get_by_role("row").count() >= 30
    hidden = page.locator("[data-row='clt.11'] .more").first
    assert not hidden.is_visible()
    toggle = page.get_by_role("button", name="Show as table")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    ledger = answer["explanations"][0]["ledger"]
    running_total = ledger["prior"] + sum(ledger["attention"]) + sum(ledger["clt"])
    cells = page.locator("[data-row='clt.11'] .more").all_inner_texts()
    layer = answer["explanations"][0]["layers"][11]
    assert cells[0] == signed(running_total)
    assert cells[1][:-2] == f"{layer['share']:.1%}"[:-1]
    assert cells[2] == f"{signed(100 * layer['drop_effect'], 1)} points"


def test_trust_is_put_into_words(page, photo):
    for (r2, cosine, error_share, agrees), verdict in {
        (0.9, 0.95, 0.05, True): "Good",
        (0.899, 0.95, 0.05, True): "Fair",
        (0.95, 0.96, 0.151, True): "Poor",
        (-0.2, 0.96, 0.01, True): "Poor",
        (0.95, 0.96, 0.01, False): "Poor",
    }.items():
        fidelity = {"r2": r2, "cosine": cosine, "error_share": error_share, "reconstructed_top1_agrees": agrees}
        change_answers(page, lambda answer, fidelity=fidelity: answer.update(fidelity=fidelity))
        upload(page, photo)
        expect(page.locator(".verdict")).to_contain_text(f"{verdict}:")
        assert number(r2) in page.locator("[data-measure=r2]").inner_text()
        assert "good from 0.9, fair from 0.6" in page.locator("[data-measure=r2]").inner_text()


def test_timings_are_drawn_and_added_up(page, photo):
    timings = upload(page, photo)["timings_ms"]
    assert page.locator(".stages rect").count() == len(timings)
    table = page.locator(".timings")
    assert table.locator("tbody .value").all_inner_texts() == [number(ms, 1) for ms in timings.values()]
    assert table.locator("tfoot .value").inner_text() == number(sum(timings.values()), 1)


def test_the_answer_is_saved_as_it_came(page, photo):
    """Byte for byte: here with whitespace that no script would write."""
    spaced = []

    def answer(route):
        spaced.append(json.dumps(route.fetch().json(), indent=3))
        route.fulfill(body=spaced[0], content_type="application/json")

    page.route("**/v1/attribute", answer)
    upload(page, photo, "my photo.png")
    with page.expect_download() as saved:
        page.get_by_role("link", name="Save the answer (JSON)").click()
    assert saved.value.suggested_filename == "my photo.account.json"
    assert Path(saved.value.path()).read_text() == spaced[0]


def test_the_curl_line_asks_for_the_same(page, photo, tmp_path):
    for name in ("photo.png", """it's; a "photo", $(no) \\.png""", "-", "@b=c;type=x"):
        upload(page, photo, name)
        page.fill("#labels", "the cat's paw; 100 %, dog, @home, <html>")
        answer, _ = trigger(page, lambda: page.press("#labels", "Control+Enter"))
        (tmp_path / name).write_bytes(photo)
        line = page.locator(".curl code").inner_text()
        finished = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        again = json.loads(finished.stdout)
        assert again["predictions"] == answer["predictions"]
        assert again["explanations"] == answer["explanations"]
    page.get_by_role("button", name="Copy").click()
    expect(page.locator(".curl [role=status]")).to_have_text(re.compile("Copied|Selected"))
