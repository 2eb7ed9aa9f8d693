"""A real service with the demo bundle, and a real browser.

The browser has module scope: while Playwright runs, an event loop runs in this thread, and `asyncio.run` of other
tests would fail.
"""

import pytest
from browsing import chromium, open_page

from common import ROOT

DEMO = ROOT / "models" / "demo"


@pytest.fixture(scope="session")
def service(start_server, tmp_path_factory):
    """The service on the demo bundle, with one label set in addition to the bundle's own."""
    sets = tmp_path_factory.mktemp("label-sets")
    (sets / "pets.json").write_text('{"labels": ["cat", "dog"], "templates": ["a photo of my {}"]}')
    with start_server(VITRINE_BUNDLE=DEMO, VITRINE_LABEL_SETS=sets) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser, service):
    with open_page(browser, service) as page:
        yield page


@pytest.fixture(scope="module")
def photo(picture):
    return picture("PNG", size=(90, 60))
