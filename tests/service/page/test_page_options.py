"""What the page offers of a bundle, how labels are compared, links that set options, and what an error leaves."""

import pytest
from browsing import open_page, serious_violations, show_ledger, upload
from playwright.sync_api import expect

PHONE = {"viewport": {"width": 360, "height": 740}}


@pytest.fixture(scope="module")
def bare(bundle, start_server):
    """The service on a bundle with a CLT and without cards."""
    with start_server(VITRINE_BUNDLE=bundle.path) as running:
        yield running


@pytest.fixture
def bare_page(browser, bare):
    with open_page(browser, bare, **PHONE) as page:
        yield page


def asked(page, act):
    """Run `act`; the answer to the request that it makes, once it is drawn."""
    with page.expect_response("**/v1/attribute") as found:
        act()
    answer = found.value.json()
    expect(page.locator("#take")).to_contain_text(answer["request_id"])
    return answer


def press_ask(page):
    return asked(page, page.get_by_role("button", name="Use these labels").click)


def test_without_cards_nothing_leads_to_one(bare_page, photo):
    page = bare_page
    upload(page, photo)
    for show in (lambda: None, lambda: show_ledger(page)):
        show()
        assert page.locator(".feature-name").count() > 0
        assert page.locator("button.feature-name").count() == 0
    assert not page.locator("#similar-ask").is_visible()
    expect(page.locator("#lacks")).to_contain_text("cards of its features (the command “vitrine cards” makes them)")
    expect(page.locator("#lacks")).to_contain_text("reference images for finding similar ones")
    assert "−0.000" not in page.locator("#account").inner_text()


def test_the_labels_stand_after_the_account_on_a_phone_and_the_answer_comes_into_sight(bare_page, photo):
    page = bare_page
    upload(page, photo)
    form, time = page.locator("#labels-section").bounding_box(), page.locator("#timings").bounding_box()
    assert form["y"] > time["y"]
    page.fill("#labels", "red circle, a ship")
    press_ask(page)
    expect(page.locator(".predictions li").first).to_be_in_viewport()
    expect(page.locator("#predictions")).to_be_focused()
    expect(page.locator(".predictions + .note")).to_contain_text("these 2 labels")
    other = page.locator(".predictions button").nth(1)
    answer = asked(page, lambda: other.press("Enter"))
    expect(page.locator("#why")).to_be_in_viewport()
    expect(page.locator("#status")).to_contain_text(f"The account explains why {answer['explanations'][0]['target']}")
    page.set_viewport_size({"width": 1200, "height": 740})
    assert page.locator(".ask-column #labels-section").count() == 1


def test_each_label_for_itself_and_a_link_that_asks_so_again(browser, bare, bare_page, photo):
    page = bare_page
    cosine = upload(page, photo)["predictions"][0]["cosine"]
    field = page.get_by_label("Threshold: minimum cosine")
    assert not field.is_visible()
    page.get_by_label("Probability", exact=True).select_option("independent")
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.get_by_role("button", name="Use these labels").click()  # the browser asks for the threshold
    assert field.evaluate("field => !field.validity.valid")
    assert requests == []
    field.fill(str(cosine - 0.01))
    (above, *_) = press_ask(page)["verdict"]["above"]
    expect(page.locator("#predictions .verdict")).to_contain_text(f"Labels that reach their threshold: {above}")
    field.fill("0.99")
    page.fill("#labels", 'red circle, "a, b"')
    assert press_ask(page)["verdict"]["none_of_these"]
    expect(page.locator("#predictions .verdict")).to_contain_text("None of these: no label reaches its threshold")
    expect(page.locator("#status")).to_contain_text("None of these")
    assert not serious_violations(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    link = page.get_by_role("link", name="Link to these options").evaluate("link => link.href")
    assert "photo" not in link
    page.locator(".off").first.check()  # what is asked beside the account knows the softmax alone
    with page.expect_response("**/v1/intervene") as changed:
        page.get_by_role("button", name="Try without").press("Enter")
    assert changed.value.status == 200
    with open_page(browser, bare) as other:
        other.goto(link)
        expect(other.locator("#labels")).to_have_value('red circle, "a, b"')
        assert other.get_by_label("Threshold: minimum cosine").input_value() == "0.99"
        assert upload(other, photo)["verdict"]["none_of_these"]
        expect(other.locator(".curl code")).to_contain_text('"scoring":"independent","threshold":0.99')


def test_a_link_names_what_the_service_has_not(bare_page):
    bare_page.evaluate("location.hash = 'label_set=gone&edit=no-snow'")
    expect(bare_page.locator("#error")).to_contain_text("does not have: label set “gone”, edit “no-snow”")


def test_labels_that_are_too_long_for_a_link(bare_page, photo):
    page = bare_page
    page.fill("#labels", ", ".join(f"a label of number {number}" for number in range(500)))
    upload(page, photo)
    expect(page.locator("#take")).to_contain_text("The labels are too long for a link.")
    assert page.get_by_role("link", name="Link to these options").count() == 0
    assert page.evaluate("location.hash") == ""
    page.fill("#labels", "red circle, a ship")
    press_ask(page)
    assert page.get_by_role("link", name="Link to these options").count() == 1
    assert page.evaluate("location.hash") != ""


def test_what_a_new_bundle_has_is_offered_and_choices_stay(bare_page, photo):
    page = bare_page
    upload(page, photo)
    page.fill("#labels", "red circle, a ship")
    edit = {"name": "no-snow", "digest": "sha256:00", "mode": "direct", "description": "", "problem": None}
    renewed, sets = {"digest": "sha256:new", "edits": [edit]}, [{"name": "pets", "labels": ["cat", "dog"]}]

    def with_sets(found):
        return found | {"label_sets": found["label_sets"] + sets}

    def served(route):
        answer = route.fetch()
        changed = (
            answer.json() | {"model": {"name": "tiny", "digest": renewed["digest"]}} if answer.ok else answer.json()
        )
        route.fulfill(response=answer, json=changed)

    page.route("**/v1/model", lambda route: route.fulfill(json=route.fetch().json() | renewed))
    page.route("**/v1/labels", lambda route: route.fulfill(json=with_sets(route.fetch().json())))
    page.route("**/v1/attribute", served)
    press_ask(page)
    edits, chosen = page.locator("select[name=edit] option"), page.locator("select[name=set]")
    assert page.locator("#labels").input_value() == "red circle, a ship"
    assert edits.all_inner_texts() == ["none: the unmodified CLIP", "no-snow"]
    chosen.select_option("pets")  # which the service refuses, since only the page was told of it
    expect(page.locator("#error")).to_contain_text("pets")
    expect(chosen).to_have_value("pets")
    sets.clear()
    renewed["digest"], renewed["edits"] = "sha256:newer", []
    page.get_by_role("button", name="Use these labels").click()  # refused, and asked again with what is there now
    expect(chosen).to_have_value("default")
    expect(page.locator("#error")).to_be_empty()
    assert edits.all_inner_texts() == ["none: the unmodified CLIP"]


def test_labels_of_ones_own_are_compared_with_the_bundles(bare_page, photo):
    page = bare_page
    first, *_, last = upload(page, photo)["predictions"]
    assert page.locator(".fit").count() == 0
    page.fill("#labels", last["label"])
    with page.expect_response("**/v1/classify") as classified:
        press_ask(page)
    own = classified.value.json()["predictions"]
    assert own[0]["label"] == first["label"]
    hint = page.locator(".fit")
    expect(hint).to_contain_text(f"{len(own) - 1} are closer to this picture, closest {first['label']}")
    expect(hint).to_contain_text(f"{first['cosine']:.2f}".replace("-", "−"))
    answer = asked(page, page.get_by_role("button", name="Use those labels").click)
    assert answer["predictions"][0]["label"] == first["label"]
    assert page.locator(".fit").count() == 0


def test_an_error_keeps_the_last_answer_and_can_be_tried_again(bare_page, photo, picture):
    page = bare_page
    before = upload(page, photo, "first.png")
    page.route("**/v1/attribute", lambda route: route.abort("connectionrefused"))
    page.set_input_files(
        "#file", {"name": "second.png", "mimeType": "image/png", "buffer": picture("PNG", size=(60, 60))}
    )
    error = page.locator("#error")
    expect(error).to_contain_text("cannot be reached")
    expect(error).to_contain_text("The answer below is still about first.png.")
    expect(page.locator("#take")).to_contain_text(before["request_id"])
    assert page.locator(".photo img").evaluate("image => image.naturalWidth") == 90
    page.unroute_all()
    answer = asked(page, page.get_by_role("button", name="Try again").click)
    assert answer["request_id"] != before["request_id"]
    assert page.locator(".photo img").evaluate("image => image.naturalWidth") == 60
    expect(error).to_be_empty()
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
    expect(error).to_contain_text("still about second.png")
    assert page.get_by_role("button", name="Try again").count() == 0  # it would be refused again
    assert answer["predictions"][0]["label"] in page.locator(".predictions").inner_text()


def test_an_edit_is_chosen_where_there_is_one(page, photo):
    upload(page, photo)
    choice = page.get_by_label("Edit of the network")
    name = choice.locator("option").nth(1).get_attribute("value")
    choice.select_option(name)
    answer = press_ask(page)
    assert answer["edit"]["name"] == name
    assert f"edit={name}" in page.url
    for absent in ("#circuit", "#stream"):
        assert not page.locator(absent).is_visible()
