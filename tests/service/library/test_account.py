"""What an `Account` can be made into: tables, a drawing, a page."""

import html
import itertools
import re

import pytest

import vitrine

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
LABELS = ["cat", "dog", "frog"]


@pytest.fixture(scope="module")
def account(loaded, picture):
    return loaded.explain(picture(), labels=LABELS, targets=["cat", "frog"], contrast="dog", sources=True, features=3)


@pytest.fixture(scope="module")
def of_plain(plain_bundle, picture):
    with vitrine.load(plain_bundle.path, decode_threads=1) as explainer:
        return explainer.explain(picture(), labels=LABELS)


def test_properties_are_the_answer(account):
    answer, first = account.answer, account.answer.explanations[0]
    assert (account.label, account.probability) == (answer.predictions[0].label, answer.predictions[0].probability)
    assert (account.ledger, account.logit, account.sources) == (first.ledger, first.logit, first.sources)
    assert account.heatmap is None
    assert type(answer).model_validate_json(account.to_json()) == answer
    assert account.label in repr(account)
    assert f"{account.logit:.3f}" in str(account)


@pytest.mark.parametrize("of", ["ledger", "sources"])
def test_tables_add_up_to_the_logit(account, of):
    frame = account.to_frame(of)
    sums = frame.groupby("target").logits.sum()
    assert dict(sums) == pytest.approx({one.target: one.logit for one in account.explanations}, abs=1e-5)
    assert set(frame.contrast) == {"dog"}
    assert frame.layer.max() == 2


def test_a_table_without_features_adds_up(of_plain):
    frame = of_plain.to_frame()
    assert frame.logits.sum() == pytest.approx(of_plain.logit, abs=1e-5)
    assert {"mlp", "attention"} <= set(frame.row)
    assert of_plain.to_frame("features").empty


def test_the_table_of_features(account):
    frame = account.to_frame("features")
    listed = [f for one in account.explanations for layer in one.layers for f in layer.features]
    assert list(frame["index"]) == [feature.index for feature in listed]
    assert list(frame.logits) == [feature.contribution for feature in listed]
    with pytest.raises(vitrine.VitrineError, match="ledger, features and sources"):
        account.to_frame("rows")


def test_sources_have_to_be_asked_for(of_plain):
    with pytest.raises(vitrine.VitrineError, match="sources=True"):
        of_plain.to_frame("sources")


def test_the_waterfall_ends_at_the_logit(account):
    axes = account.plot("frog")
    *steps, total = axes.patches
    explanation = account.explanations[1]
    assert total.get_width() == pytest.approx(explanation.logit)
    assert steps[-1].get_x() + steps[-1].get_width() == pytest.approx(explanation.logit, abs=1e-5)
    for before, after in itertools.pairwise(steps):
        assert after.get_x() == pytest.approx(before.get_x() + before.get_width())
    names = [label.get_text() for label in axes.get_yticklabels()]
    widths = {name: bar.get_width() for name, bar in zip(names, axes.patches, strict=True)}
    assert widths["attention 1"] == pytest.approx(explanation.ledger.attention[1])
    assert "frog rather than dog" in axes.get_title()
    assert account.plot(ax=axes) is axes
    matplotlib.pyplot.close(axes.figure)
    with pytest.raises(vitrine.VitrineError, match="only cat, frog"):
        account.plot("dog")


def test_the_page_stands_alone(account, tmp_path):
    frame = account._repr_html_()
    assert frame.count("<") == 2  # the iframe and its end: nothing of the page gets out
    assert 'sandbox="allow-scripts"' in frame
    page = html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1])
    assert page == account.save_html(tmp_path / "account.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page
    assert '"heatmap": {' in page or '"heatmap":{' in page  # asked for by the page itself
    assert '"cards": {"' in page
