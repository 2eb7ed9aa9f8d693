"""An account as Jupyter shows it: the page in a frame, which asks nobody for anything."""

from browsing import visit
from playwright.sync_api import expect

import vitrine


def test_a_notebook_shows_the_account(browser, bundle, photo, tmp_path):
    with vitrine.load(bundle.path, decode_threads=1) as explainer:  # while the browser's event loop runs in this thread
        account = explainer.explain(photo)
        (tmp_path / "notebook.html").write_text(f"<!DOCTYPE html><body>{account._repr_html_()}</body>")
    with visit(browser, (tmp_path / "notebook.html").as_uri()) as page:
        shown = page.frame_locator("iframe").locator("body")
        expect(shown).to_contain_text(account.label)
        expect(shown).to_contain_text(f"{account.predictions[0].logit:.2f}")
        assert page.evaluate("document.querySelector('iframe').contentDocument") is None  # shut off from the notebook
