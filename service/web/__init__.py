"""The page's files: plain scripts and styles, without a library. Where they lie, and in which order they are read."""

from pathlib import Path

FOLDER = Path(__file__).parent

STYLES = ("style.css", "figures.css", "card.css")
# What draws an answer, in the order in which the scripts need one another; the page has more, which ask for it.
DRAWING = (
    "dom.js",
    "waterfall.js",
    "account.js",
    "heatmap.js",
    "photo.js",
    "predictions.js",
    "trust.js",
    "timings.js",
    "card-figures.js",
    "card.js",
    "cards.js",
    "answer.js",
    "save.js",
)
