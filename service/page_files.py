"""The page's files, plain scripts and styles without a library: their folder and load order."""

from pathlib import Path

FOLDER = Path(__file__).parent / "web"

STYLES = ("style.css", "figures.css", "card.css")
# Scripts that draw an answer, in order of their dependencies; the page has more, which send the requests.
DRAWING_SCRIPTS = (
    "dom.js",
    "waterfall.js",
    "account-table.js",
    "ledger.js",
    "sources.js",
    "account.js",
    "heatmap.js",
    "maps.js",
    "photo.js",
    "predictions.js",
    "warnings.js",
    "trust.js",
    "timings.js",
    "residual.js",
    "card-figures.js",
    "card.js",
    "cards.js",
    "answer.js",
    "save.js",
)

# A circuit, which is a page of its own: saved as a file (`service.exports.circuit_page`), or opened from the page.
CIRCUIT_STYLES = (*STYLES, "circuit.css")
CIRCUIT_DRAWING_SCRIPTS = (
    "dom.js",
    "heatmap.js",
    "card-figures.js",
    "card.js",
    "circuit-graph.js",
    "circuit-node.js",
    "circuit.js",
)
SAVED_CIRCUIT_SCRIPTS = (*CIRCUIT_DRAWING_SCRIPTS, "circuit-saved.js")
CIRCUIT_SCRIPTS = (*CIRCUIT_DRAWING_SCRIPTS, "api.js", "still.js", "circuit-groups.js", "circuit-live.js")
