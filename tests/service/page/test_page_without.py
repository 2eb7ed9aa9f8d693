"""Rows of the account switched off: what the page asks, before and after side by side, the command that keeps it."""

import json
import shlex

from browsing import change_answers, number, open_page, serious_violations, show_ledger, signed, upload
from playwright.sync_api import expect


def edits_of(command):
    """What the interventions of a shell command are."""
    words = shlex.split(command)
    return [json.loads(words[place + 1]) for place, word in enumerate(words) if word == "--edit"]


def tried(page):
    """Press the question's button, by the keyboard; the answer once the page shows it."""
    with page.expect_response("**/v1/intervene") as response_info:
        page.get_by_role("button", name="Try without").press("Enter")
    expect(page.locator("#compared h2")).to_be_focused()
    return response_info.value.json()


def asked(answer):
    """The mode, and of each intervention what is not the default."""
    names = ("op", "row", "layer", "index")
    edits = answer["results"][0]["edits"]
    return answer["mode"], [{name: edit[name] for name in names if edit[name] is not None} for edit in edits]


def cells(page, name):
    """A line of the tables of before and after: its numbers."""
    line = page.locator("#compared tr", has=page.get_by_role("rowheader", name=name, exact=True))
    return line.locator("td.value").all_inner_texts()


def test_rows_are_switched_off_and_the_network_is_asked_again(browser, server, photo):
    with open_page(browser, server, viewport={"width": 360, "height": 740}) as page:
        feature = upload(page, photo)["explanations"][0]["sources"]["features"][0]
        panel, result = page.locator("#without"), page.locator("#compared")
        expect(panel).to_be_hidden()
        page.locator(".off").first.press("Space")
        expect(panel.get_by_label("in the running network")).to_be_checked()  # the feature acts at patches, too
        expect(panel).to_contain_text(f"#{feature['index']} of layer {feature['layer']}")
        answer = tried(page)
        edits = [{"op": "ablate", "layer": feature["layer"], "index": feature["index"]}]
        assert asked(answer) == ("rerun", edits)
        before, after = answer["before"], answer["results"][0]["after"]
        first, second = before["explanations"][0], after["explanations"][0]
        expect(result).to_contain_text(f"{after['predictions'][0]['label']}, ")
        change = second["logit"] - first["logit"]
        assert cells(page, "= Logit") == [number(first["logit"]), number(second["logit"]), signed(change)]
        pairs = list(zip(first["ledger"]["attention"], second["ledger"]["attention"], strict=True))
        layer, most = max(enumerate(pairs), key=lambda item: abs(item[1][1] - item[1][0]))
        assert cells(page, f"Attention {layer}") == [*map(number, most), signed(most[1] - most[0])]
        one = answer["results"][0]["difference"]["probabilities"][0]
        assert cells(page, one["label"])[2] == f"{signed(100 * (one['after'] - one['before']), 1)} pp"
        result.get_by_text("Save as an edit").press("Enter")
        assert edits_of(result.locator("code").inner_text()) == edits
        assert not serious_violations(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

        show_ledger(page)
        page.get_by_label("Without Attention 1", exact=True).check()
        page.get_by_label("Without Error").check()  # which nothing in the running network computes
        expect(panel.get_by_role("radio")).to_have_count(1)
        error = {"code": "internal", "message": "no memory left", "details": [], "request_id": "1"}
        page.route("**/v1/intervene", lambda route: route.fulfill(status=500, json={"error": error}))
        page.get_by_role("button", name="Try without").click()
        expect(panel.get_by_role("alert")).to_have_text("No memory left.")
        expect(result).to_contain_text("Removed in the running network.")  # the last answer stays
        page.unroute("**/v1/intervene")
        rows = [{"op": "ablate", "row": "attention", "layer": 1}, {"op": "ablate", "row": "error"}]
        assert asked(tried(page)) == ("direct", [*edits, *rows])
        panel.get_by_role("button", name="Put all back").click()
        expect(panel).to_be_hidden()
        assert page.locator(".off:checked").count() == 0


def test_an_edited_answer_says_so_and_has_no_switches(browser, server, photo):
    def edited(answer):
        answer["edit"] = {"name": "no-snow", "digest": "sha256:00", "mode": "direct", "applied": True}
        del answer["explanations"][0]["sources"]
        answer["explanations"][0]["ledger"]["edit"] = -0.125

    with open_page(browser, server) as page:
        upload(page, photo)
        assert page.locator(".off").count() > 0
        change_answers(page, edited)
        upload(page, photo)
        expect(page.locator(".result")).to_contain_text("edit no-snow, applied")
        expect(page.locator("[data-row=edit] .value")).to_have_text("−0.125")
        assert page.locator(".off").count() == 0


def test_a_bundle_without_interventions_has_no_switches(browser, server, photo):
    with open_page(browser, server) as page:
        older = server.http.get("/v1/model").json() | {"interventions": []}
        page.route("**/v1/model", lambda route: route.fulfill(json=older))
        page.reload()
        expect(page.locator("#model")).not_to_be_empty()
        upload(page, photo)
        assert page.locator(".off").count() == 0
