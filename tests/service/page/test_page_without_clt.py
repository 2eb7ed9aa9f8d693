"""The page on a bundle without a CLT: the MLPs' rows, and what it says of features that there are not."""

import pytest
from browsing import open_page, serious_violations, show_ledger, signed, upload
from playwright.sync_api import expect


@pytest.fixture(scope="module")
def plain_server(plain_bundle, start_server):
    with start_server(VITRINE_BUNDLE=plain_bundle.path) as running:
        yield running


def test_the_account_shows_mlps_in_the_place_of_features(browser, plain_server, photo):
    with open_page(browser, plain_server) as page:
        answer = upload(page, photo)
        show_ledger(page)
        account = page.locator("#account")
        for layer, value in enumerate(answer["explanations"][0]["ledger"]["mlp"]):
            line = account.locator(f"[data-row='mlp.{layer}']")
            expect(line.get_by_role("rowheader")).to_contain_text(f"MLP {layer}")
            expect(line.locator("td.value")).to_have_text(signed(value))
        expect(account).to_contain_text("MLPs, by layer")
        expect(account.locator("[data-row=error]")).to_have_count(0)
        expect(account.get_by_text("Features, by layer")).to_have_count(0)
        expect(page.locator("#trust")).to_contain_text("There are no features (no CLT)")
        expect(page.locator("#circuit")).to_be_hidden()
        expect(page.locator("#similar-ask, #residual-ask")).to_have_count(2)
        assert not page.locator("#similar-ask, #residual-ask").filter(visible=True).count()
        expect(page.locator("#lacks")).to_contain_text("does not have: features (it has no CLT")
        assert not serious_violations(page)


def test_a_source_account_calls_what_the_mlps_wrote_by_their_name(browser, plain_server, photo):
    with open_page(browser, plain_server) as page:
        sources = upload(page, photo)["explanations"][0]["sources"]
        account = page.locator("#account")
        expect(account).to_contain_text("followed back through attention to what the MLPs and the patches wrote")
        expect(account.locator("[data-row=mlps] td.value").first).to_have_text(
            signed(sum(layer["error"] for layer in sources["layers"]))
        )
        for absent in ("Errors", "Decoder biases", "All other features"):
            expect(account).not_to_contain_text(absent)
        terms = account.locator("ol.equation li b").all_inner_texts()
        assert sum(float(term.replace("−", "-")) for term in terms[:-1]) == pytest.approx(sources["logit"], abs=0.002)


def test_an_mlp_is_switched_off(browser, plain_server, photo):
    with open_page(browser, plain_server) as page:
        upload(page, photo)
        show_ledger(page)
        page.get_by_label("Without MLP 1").press("Space")
        with page.expect_response("**/v1/intervene") as response_info:
            page.get_by_role("button", name="Try without").press("Enter")
        response = response_info.value.json()
        (edit,) = response["results"][0]["edits"]
        assert (edit["op"], edit["row"], edit["layer"]) == ("ablate", "mlp", 1)
        expect(page.locator("#compared")).to_contain_text("MLP 1")
