"""A circuit saved as one HTML file: opened from disk, it sends no requests and shows nodes, edges, tokens, cards."""

import pytest
from browsing import card, serious_violations, signed, visit
from playwright.sync_api import expect

from vitrine.service.answers.circuit_groups import MeanCircuit, grouped
from vitrine.service.exports.circuit_page import draw_circuit, most_influential
from vitrine.service.schemas.circuit import CircuitResponse

LABELS = ["red circle", "</script><script>document.title='hacked'</script>", "<img src=x onerror=alert(1)>"]
HOSTILE = LABELS[1]
COUNT = 25


@pytest.fixture(scope="module")
def photo(picture):
    return picture("PNG", size=(90, 60))


@pytest.fixture(scope="module")
def circuit(server, photo):
    """Nearly all that was followed is kept, so that there are all kinds of nodes; one feature has a hostile label."""
    asked = {"labels": LABELS, "target": HOSTILE, "nodes": 40, "seconds": 60, "node_share": 0.999, "edge_share": 0.999}
    response = server.post("/v1/circuit", photo, asked)
    assert response.status_code == 200
    found = grouped(CircuitResponse.model_validate(response.json()))
    feature = next(group for group in found.groups if group.kind == "feature")
    feature.label = HOSTILE
    return found


def place_of(circuit, kind):
    return next(place for place, group in enumerate(circuit.groups) if group.kind == kind)


@pytest.fixture(scope="module")
def saved(circuit, photo, bundle, tmp_path_factory):
    """The file, with the card of the first feature alone."""
    first = circuit.groups[place_of(circuit, "feature")]
    cards = {f"clt/{first.layer}/{first.index}": card(first.layer, first.index, label=HOSTILE)}
    path = tmp_path_factory.mktemp("saved") / "circuit.html"
    text = draw_circuit([circuit], COUNT, photo, cards, bundle.manifest.preprocessing)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def many(circuit, bundle, tmp_path_factory):
    total = MeanCircuit()
    for _ in range(2):
        total.add(circuit)
    path = tmp_path_factory.mktemp("saved") / "many.html"
    path.write_text(draw_circuit([total.mean()], COUNT, None, {}, bundle.manifest.preprocessing), encoding="utf-8")
    return path


@pytest.fixture
def page(browser, saved):
    with visit(browser, saved.as_uri()) as page:
        expect(page.locator(".photo .overlay")).to_be_visible()
        yield page


def button(page, circuit, place):
    """The box of a group, by its layer and its order there."""
    group = circuit.groups[place]
    before = [other for other in circuit.groups[:place] if other.layer == group.layer]
    name = "Input" if group.layer is None else f"Layer {group.layer}"
    row = page.locator(".rows > li").filter(has=page.get_by_text(name, exact=True))
    return row.locator("button").nth(len(before))


def test_all_nodes_are_boxes_and_the_edges_between_features_lines(page, circuit):
    shown = most_influential(circuit, COUNT)
    assert page.locator("button.box").count() == len(shown.groups) <= COUNT
    between = [edge for edge in shown.edges if shown.groups[edge.source].kind == "feature"]
    assert between
    assert page.locator("path.edge").count() == min(len(between), 120)
    against = sum(edge.weight < 0 for edge in between)
    assert page.locator("path.edge.against").count() == against
    expect(page.locator(".box.target")).to_contain_text(signed(circuit.logit, 2))
    page.get_by_text("The nodes as a table").click()
    assert page.locator(".circuit-column tbody tr").count() == len(shown.groups)


def test_a_node_shows_its_card_its_tokens_and_its_edges(page, circuit):
    shown = most_influential(circuit, COUNT)
    place = place_of(circuit, "feature")
    group = circuit.groups[place]
    box = button(page, circuit, place)
    box.click()
    expect(box).to_have_attribute("aria-pressed", "true")
    chosen = page.locator("#chosen")
    expect(chosen.get_by_role("heading", level=2)).to_have_text(HOSTILE)
    expect(chosen.locator(".kicker")).to_have_text(f"Layer {group.layer}, feature #{group.index}")
    expect(chosen.locator(".exemplar")).to_have_count(3)
    into = [edge for edge in shown.edges if edge.target == place]
    out = [edge for edge in shown.edges if edge.source == place]
    assert page.locator("path.edge").count() == len(into) + len(out)
    fed = chosen.get_by_role("region", name="what feeds it").locator("tbody tr")
    assert fed.count() == min(len(into), 12)
    strongest = max(into, key=lambda edge: abs(edge.weight))
    expect(fed.first.locator(".value")).to_have_text(signed(strongest.weight))
    weights = chosen.get_by_role("region", name="what it feeds").locator(".value").all_text_contents()
    assert sorted(weights) == sorted(signed(edge.weight) for edge in out)
    opacity = "all => all.map((one) => Number(one.getAttribute('fill-opacity')))"
    lit = page.locator(".photo .patch").evaluate_all(opacity)
    assert len(lit) == circuit.rows * circuit.columns
    patches = {node.token - 1 for node in group.where if node.token > 0}
    assert {patch for patch, value in enumerate(lit) if value > 0} <= patches
    assert chosen.locator(".tokens li").count() == len(group.where)
    assert page.title() != "hacked"
    page.get_by_role("button", name="Show the whole circuit").click()
    expect(box).to_have_attribute("aria-pressed", "false")


def test_one_walks_from_node_to_node_by_keyboard(page, circuit):
    box = button(page, circuit, place_of(circuit, "feature"))
    box.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("of the influence")
    expect(box).to_be_focused()
    link = page.get_by_role("region", name="what feeds it").get_by_role("button").first
    name = link.text_content()
    link.focus()
    page.keyboard.press("Enter")
    heading = page.locator("#chosen h2").text_content()
    assert name.startswith(heading)
    expect(page.locator("#chosen")).to_be_focused()
    assert page.locator("button.box[aria-pressed=true]").count() == 1


def test_one_switches_to_the_circuit_of_another_dictionary(browser, circuit, photo, bundle, tmp_path):
    """By keyboard; the features of each have cards of their own."""
    first = circuit.groups[place_of(circuit, "feature")]
    of_clt = card(first.layer, first.index, label=HOSTILE)
    of_saes = card(first.layer, first.index, dictionary="residual", exemplars=[])
    cards = {f"{one.dictionary}/{first.layer}/{first.index}": one for one in (of_clt, of_saes)}
    error = circuit.groups[place_of(circuit, "error")]
    residual = {"dictionary": "residual", "groups": [first, error], "edges": [], "logit": 1.25}
    circuits = [circuit, circuit.model_copy(update=residual)]
    path = tmp_path / "both.html"
    path.write_text(draw_circuit(circuits, COUNT, photo, cards, bundle.manifest.preprocessing), encoding="utf-8")
    for look in ({}, {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}):
        with visit(browser, path.as_uri(), **look) as page:
            clt, saes = page.get_by_role("group", name="Features of").get_by_role("radio").all()
            button(page, circuit, place_of(circuit, "feature")).click()
            expect(page.locator("#chosen .exemplar")).to_have_count(3)
            clt.focus()
            page.keyboard.press("ArrowDown")
            expect(saes).to_be_checked()
            expect(page.locator(".box.target")).to_contain_text("1.25")
            assert page.locator("button.box").count() == 2
            expect(page.locator("#chosen")).to_contain_text("How to read this")
            page.locator("button.box.of-feature").click()
            kicker = f"Residual stream after layer {first.layer}, feature #{first.index}"
            expect(page.locator("#chosen .kicker")).to_have_text(kicker)
            expect(page.locator("#chosen .card")).to_contain_text("It fired on none of the images")
            page.locator("button.box.of-error").click()
            expect(page.locator("#chosen .kicker")).to_have_text("What is in the stream that its autoencoder misses")
            assert not serious_violations(page)
            width, scrolled = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
            assert scrolled <= width
            clt.check()
            expect(page.locator(".box.target")).to_contain_text(signed(circuit.logit, 2))


def test_the_mean_of_many_images_has_no_photo(browser, many, circuit):
    with visit(browser, many.as_uri()) as page:
        expect(page.get_by_role("heading", level=2).first).to_have_text(f"What made {HOSTILE} in 2 images")
        assert page.locator("img").count() == 0
        button(page, circuit, place_of(circuit, "feature")).click()
        expect(page.locator("#chosen")).to_contain_text("2 of 2")
        assert page.title() != "hacked"


@pytest.mark.parametrize("look", [{}, {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}])
@pytest.mark.parametrize("is_chosen", [False, True])
def test_axe_finds_nothing_serious_in_a_circuit(browser, saved, circuit, look, is_chosen):
    with visit(browser, saved.as_uri(), **look) as page:
        expect(page.locator(".photo .overlay")).to_be_visible()
        if is_chosen:
            button(page, circuit, place_of(circuit, "feature")).click()
        assert not serious_violations(page)
        width, scrolled = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert scrolled <= width
