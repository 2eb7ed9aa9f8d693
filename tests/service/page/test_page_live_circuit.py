"""The circuit page of a running service, in the window that the page opens for its answer."""

import json
from contextlib import contextmanager

import pytest
from browsing import open_page, serious_violations, upload
from playwright.sync_api import expect

from vitrine.service.answers.circuit_groups import grouped
from vitrine.service.exports.circuit_page import most_influential
from vitrine.service.schemas.circuit import CircuitResponse


@contextmanager
def opened(page):
    """The window that the answer's button opens; no script may fail in it."""
    with page.expect_popup() as popup:
        page.get_by_role("button", name="Open its circuit").click()
    circuit, problems = popup.value, []
    circuit.set_default_timeout(30_000)
    circuit.on("pageerror", lambda error: problems.append(str(error)))
    yield circuit
    assert not problems


def ready(circuit):
    expect(circuit.locator("#main")).to_have_attribute("aria-busy", "false", timeout=30_000)


def test_an_answers_circuit_opens_with_its_target_and_contrast_photo_and_cards(page, photo):
    answer = upload(page, photo)
    target, other = (prediction["label"] for prediction in answer["predictions"][:2])
    with page.expect_response("**/v1/attribute"):
        page.locator("#contrast").select_option(other)
    expect(page.locator("#circuit-target")).to_have_text(f"{target} rather than {other}")
    with opened(page) as circuit:
        ready(circuit)
        expect(circuit.get_by_role("heading", level=2).first).to_have_text(f"What made {target} rather than {other}")
        expect(circuit.locator(".photo .overlay")).to_be_visible()
        circuit.locator("button.box.of-feature").first.click()
        expect(circuit.locator("#chosen .card")).to_contain_text("Where it fires most")
        assert not serious_violations(circuit)


def test_one_circuit_after_another_is_asked_for_once(page, photo):
    upload(page, photo)
    with opened(page) as circuit:
        asked = []
        circuit.on("request", lambda request: asked.append(request.url) if "v1/circuit" in request.url else None)
        ready(circuit)
        clt, saes = circuit.get_by_role("group", name="Features of").get_by_role("radio").all()
        first = circuit.locator(".box.target").text_content()
        count = len(asked)
        saes.check()
        expect(circuit.locator("#problem")).to_be_empty()
        ready(circuit)
        circuit.locator("button.box.of-error").first.click()
        expect(circuit.locator("#chosen .kicker")).to_have_text("What is in the stream that its autoencoder misses")
        clt.check()
        ready(circuit)
        expect(circuit.locator(".box.target")).to_have_text(first)
        assert len(asked) == count + 1
        circuit.reload()  # asks the first window again
        ready(circuit)
        expect(circuit.locator(".box.target")).to_have_text(first)


def test_what_fails_is_said_and_can_be_asked_again(page, photo):
    upload(page, photo)
    error = {"code": "internal", "message": "no graph today", "details": [], "request_id": "1"}
    page.context.route("**/v1/circuit", lambda route: route.fulfill(status=500, json={"error": error}))
    with opened(page) as circuit:
        expect(circuit.locator("#problem")).to_contain_text("today")
        assert circuit.locator("button.box").count() == 0
        page.context.unroute("**/v1/circuit")
        circuit.get_by_role("button", name="Try again").click()
        expect(circuit.locator("button.box").first).to_be_visible()
        expect(circuit.locator("#problem")).to_be_empty()


def test_a_circuit_page_without_a_question_says_where_to_ask(browser, service):
    with open_page(browser, service) as page:
        page.goto(f"http://127.0.0.1:{service.port}/circuit")
        expect(page.locator("#problem")).to_contain_text("send it again on the main page")


def test_circuits_are_summed_over_tokens_as_elsewhere(browser, service, photo):
    response = service.post("/v1/circuit", photo, {"node_share": 0.99, "leaves": True})
    expected = most_influential(grouped(CircuitResponse.model_validate(response.json())), 30).model_dump(mode="json")
    with open_page(browser, service) as page:
        page.goto(f"http://127.0.0.1:{service.port}/circuit")
        groups = "Vitrine.circuitGroups.mostInfluential(Vitrine.circuitGroups.grouped(JSON.parse(answer)), 30)"
        # As text: as an object it takes playwright most of a minute.
        found = json.loads(page.evaluate(f"(answer) => JSON.stringify({groups})", response.text))
    assert len(expected["groups"]) == 30
    for part in ("groups", "edges"):
        for one, other in zip(found.pop(part), expected.pop(part), strict=True):
            assert one.pop("where", []) == other.pop("where", [])
            assert one == pytest.approx(other)
    assert found.pop("edit") is None
    assert found == {name: expected[name] for name in found}
    assert expected.keys() - found.keys() == {"failed", "unreadable", "skipped"}
