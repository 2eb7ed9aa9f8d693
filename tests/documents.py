"""The fences of the documents: commands, line by line, and the answers that are shown beneath them."""

import math
import re
from typing import NamedTuple

import yaml

from common import ROOT

PATHS = ("README.md", "service/README.md", "training/README.md", "deploy/README.md")
MORE = "…"
CHANGING = {"request_id", "timings_ms"}  # from one answer to the next
WITHIN = {"rel_tol": 0.02, "abs_tol": 0.01}  # what another processor's rounding may do to the embedded bundle's numbers


class Fence(NamedTuple):
    """A block between ``` lines."""

    path: str
    line: int
    language: str
    text: str

    @property
    def name(self):
        return f"{self.path}:{self.line}"

    @property
    def commands(self):
        """Lines of the shell up to an empty one, continued ones joined, without comments."""
        text = re.sub(r"\s*\\\n\s*", " ", self.text.split("\n\n")[0])
        lines = (re.sub(r"(^|\s+)#\s.*$", "", line).strip() for line in text.splitlines())
        return [line for line in lines if line]

    @property
    def output(self):
        """What is shown below the commands, if anything."""
        return self.text.partition("\n\n")[2].strip()


def fences(*languages):
    """Every fence of these languages. A fence of JSON is the output of the one before it."""
    found = []
    for path in PATHS:
        text = (ROOT / path).read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            language, content = match[1], match[2]
            if language == "json":
                found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{content}")
            else:
                found.append(Fence(path, text[: match.start()].count("\n") + 1, language, content))
    return [fence for fence in found if fence.language in languages]


def table(path, *header):
    """The rows of a document's table with this header, as lists of cells."""
    lines, rows = (ROOT / path).read_text().splitlines(), []
    for line in lines[lines.index(f"| {' | '.join(header)} |") + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def shown_answer(text):
    """An answer as a document shows it, with `…` for what is left out; a part of one, if it has no braces."""
    whole = text if text.startswith("{") else f"{{{text}, {MORE}}}"
    return yaml.safe_load(whole)  # JSON is YAML, which also has words without quotes, such as `…`


def differences(shown, answer, at="answer"):
    """Where an answer is not as it is shown: fields that are missing or not shown, and values."""
    if isinstance(shown, dict):
        keys = {key for key in shown if key != MORE}
        if missing := keys - answer.keys():
            return [f"{at} has no {', '.join(sorted(missing))}"]
        more = [] if MORE in shown else [f"{at}.{key} is not shown" for key in sorted(answer.keys() - keys)]
        return more + [line for key in keys - CHANGING for line in differences(shown[key], answer[key], f"{at}.{key}")]
    if isinstance(shown, list):
        kept, first = [one for one in shown if one != MORE], 0
        if shown[:1] == [MORE]:  # the last ones are shown
            first = max(0, len(answer) - len(kept))
        if len(answer) < len(kept) or (MORE not in shown and len(answer) > len(kept)):
            return [f"{at} has {len(answer)} items, {len(kept)} are shown"]
        pairs = enumerate(zip(kept, answer[first:], strict=False), first)
        return [line for index, (one, other) in pairs for line in differences(one, other, f"{at}[{index}]")]
    if isinstance(shown, str) and shown.endswith(MORE):
        return [] if str(answer).startswith(shown.removesuffix(MORE)) else [f"{at} is {answer!r}, not {shown}"]
    if isinstance(shown, float) and isinstance(answer, int | float):
        return [] if math.isclose(shown, answer, **WITHIN) else [f"{at} is {answer:.4g}, not {shown}"]
    return [] if shown == answer else [f"{at} is {answer!r}, not {shown!r}"]


def part_of(answer, key):
    """The first object, at any depth, that has a key."""
    if isinstance(answer, dict) and key in answer:
        return answer
    inside = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list) else ()
    return next((found for one in inside if (found := part_of(one, key)) is not None), None)
