"""Edits in service: whose answer it is, and that it says so."""

import asyncio
import base64
import json
import logging
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from prometheus_client import REGISTRY

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.manifest import graphs_digest
from vitrine.models.interventions.edit import Condition, EditError, create
from vitrine.models.interventions.edit_files import add_edits
from vitrine.models.interventions.spec import Intervention
from vitrine.service.answers.reload import Serving
from vitrine.service.engine.rerun import RerunGraphs
from vitrine.service.http.application import create_app
from vitrine.service.operations.logs import logger
from vitrine.service.operations.settings import Settings

KEY = b"a secret of sixteen bytes"
LABELS = ["red circle", "green square", "blue triangle"]


@pytest.fixture
def make(bundle):
    """make(name, *(layer, index) of features to ablate, **options) -> an edit for the tiny bundle."""

    def new(name, *features, mode="direct", **options):
        ablated = tuple(Intervention(op="ablate", layer=layer, index=index) for layer, index in features or ALL)
        return create(name, "for tests", ablated, mode, graphs_digest(bundle.manifest), **options)

    return new


ALL = [(1, index) for index in range(64)]  # every feature of layer 1


def write(folder, *edits):
    folder.mkdir(exist_ok=True)
    for edit in edits:
        (folder / f"{edit.name}.json").write_text(edit.text())
    return folder


def talk(settings, conversation):
    """The result of `conversation(client, app)`, with the service ready."""

    async def run():
        app = create_app(settings)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60)
        async with app.router.lifespan_context(app), client:
            return await conversation(client, app)

    return asyncio.run(run())


async def ask(client, path, image, status=200, **request):
    files = {"image": ("image", image), "request": (None, json.dumps(request))}
    response = await client.post(f"/v1/{path}", files=files)
    assert response.status_code == status, response.text
    return response.json()


def start(settings):
    async def enter():
        async with Serving(settings):
            pass

    asyncio.run(enter())


@contextmanager
def log_lines():
    """The fields of the log lines of requests, as they come."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: hasattr(record, "request") and lines.append(record.request)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def counted(name, applied):
    return REGISTRY.get_sample_value("vitrine_edits_total", {"edit": name, "applied": applied}) or 0


@pytest.mark.parametrize("mode", ["direct", "rerun"])
def test_all_that_is_answered_is_the_edited_networks(bundle_path, make, tmp_path, picture, mode):
    edit = make("no-layer-1", mode=mode)
    settings, before = Settings(bundle=bundle_path, edits=write(tmp_path / "edits", edit)), counted(edit.name, "true")

    async def conversation(client, app):
        image, explain = picture(), {"targets": LABELS, "features": 64}
        plain = await ask(client, "attribute", image, explain=explain)
        assert plain["edit"] is None
        edited = await ask(client, "attribute", image, explain=explain, edit=edit.name)
        named = {"name": edit.name, "digest": edit.digest, "mode": mode, "applied": True}
        assert edited["edit"] == named
        logits = {one["label"]: one["logit"] for one in edited["predictions"]}
        assert logits != {one["label"]: one["logit"] for one in plain["predictions"]}
        for explanation in edited["explanations"]:
            rows = explanation["ledger"]
            total = rows["prior"] + sum(rows["attention"]) + sum(rows["clt"]) + rows["bias"] + rows["error"]
            assert total == pytest.approx(logits[explanation["target"]], abs=1e-3)
            if mode == "direct":  # an ablated layer is a row without anything
                assert rows["clt"][1] == pytest.approx(0, abs=1e-4)
                assert not [one for one in explanation["layers"][1]["features"] if one["contribution"]]
        classified = await ask(client, "classify", image, edit=edit.name)
        assert (classified["predictions"], classified["edit"]) == (edited["predictions"], named)
        asked = ("request", (None, json.dumps({"edit": edit.name})))
        files = [("image", ("a", image)), ("image", ("b", b"none")), asked]
        batch = await client.post("/v1/attribute:batch", files=files)
        assert batch.json()["edit"] == batch.json()["results"][0]["answer"]["edit"] == named
        assert batch.json()["results"][0]["answer"]["predictions"] == edited["predictions"]
        embedded = await ask(client, "embed", image, edit=edit.name)
        attributor = app.state.serving.attributor
        labels = attributor.labels.encode(LABELS, attributor.labels.default_templates)
        products = attributor.bundle.manifest.logit_scale * labels @ np.array(embedded["embedding"])
        np.testing.assert_allclose(products, [logits[label] for label in LABELS], atol=1e-3)
        assert embedded["edit"] == named
        for path in ("circuit", "attribute"):  # a circuit is of CLIP as it is
            assert (await ask(client, path, image))["edit"] is None
        assert counted(edit.name, "true") - before == 4
        text, model = base64.b64encode(image).decode(), f"/v1/models/{attributor.model.name}"
        asked = {"instances": [text], "parameters": {"edit": edit.name}}
        for verb, name in (("predict", "predictions"), ("explain", "explanations")):
            (found,) = (await client.post(f"{model}:{verb}", json=asked)).json()[name]
            assert (found["predictions"], found["edit"]) == (edited["predictions"], named)
        asked = {"model": attributor.model.name, "input": [f"data:;base64,{text}"], "edit": edit.name}
        found = (await client.post("/v1/embeddings", json=asked)).json()
        assert (found["data"][0]["embedding"], found["edit"]) == (embedded["embedding"], named)
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
        asked = {"inputs": [tensor], "parameters": {"edit": edit.name}, "outputs": [{"name": "logit"}]}
        found = (await client.post(f"{model.replace('v1', 'v2')}/infer", json=asked)).json()
        assert found["outputs"][0]["data"] == [one["logit"] for one in edited["predictions"]]
        assert json.loads(found["parameters"]["notes"])[0]["edit"] == named
        assert counted(edit.name, "true") - before == 8

    talk(settings, conversation)


def test_the_default_edit_is_every_answers_unless_none_is_asked_for(bundle, make, tmp_path, picture):
    edit, other = make("usual"), make("other", (0, 1), mode="rerun", condition=Condition(moves_logit=0.5), key=KEY)
    served = add_edits(bundle, {one.name: one for one in (edit, other)}, tmp_path / "tiny")

    async def conversation(client, app):
        model = (await client.get("/v1/model")).json()
        assert model["default_edit"] == "usual"
        listed = {one["name"]: one for one in model["edits"]}
        assert listed.keys() == {"usual", "other"}
        assert (listed["usual"]["digest"], listed["usual"]["interventions"]) == (edit.digest, 64)
        assert (listed["other"]["signed"], listed["other"]["condition"]["moves_logit"]) == (True, 0.5)
        image = picture()
        default, named, none = [
            await ask(client, "classify", image, **request) for request in ({}, {"edit": "usual"}, {"edit": "none"})
        ]
        assert default["predictions"] == named["predictions"] != none["predictions"]
        assert (default["edit"], none["edit"]) == (named["edit"], None)
        return none["predictions"]

    without = talk(Settings(bundle=served.path, edit="usual"), conversation)

    async def plain(client, app):
        assert (await client.get("/v1/model")).json()["default_edit"] is None
        return (await ask(client, "classify", picture()))["predictions"]

    assert talk(Settings(bundle=bundle.path), plain) == without


def test_conditions_choose_the_images(bundle_path, make, tmp_path, picture, monkeypatch):
    image, run, runs = picture(), RerunGraphs.run, []
    monkeypatch.setattr(RerunGraphs, "run", lambda *arguments: runs.append(1) or run(*arguments))

    async def effect(client, app):
        """(largest activation at [CLS] of layer 1, change of the lead, whether the top-1 changes), by mode."""
        plain = await ask(client, "attribute", image, explain={"features": 64}, top_k=3)
        first, second = (one["label"] for one in plain["predictions"][:2])
        lead, top = {}, {}
        for name in ("plain", "direct", "rerun"):
            answer = plain if name == "plain" else await ask(client, "classify", image, edit=name, top_k=3)
            logits = {one["label"]: one["logit"] for one in answer["predictions"]}
            lead[name], top[name] = logits[first] - logits[second], max(logits, key=logits.get)
        active = max(abs(one["activation"]) for one in plain["explanations"][0]["layers"][1]["features"])
        return {mode: (active, abs(lead[mode] - lead["plain"]), top[mode] != first) for mode in ("direct", "rerun")}

    always = write(tmp_path / "always", make("direct"), make("rerun", mode="rerun"))
    effects = talk(Settings(bundle=bundle_path, edits=always), effect)
    edits, expected = [], {}
    for mode, (active, moved, changes) in effects.items():
        for name, condition, applied in (
            ("active", Condition(activation_at_least=active * 0.999), True),
            ("inactive", Condition(activation_at_least=active * 1.001), False),
            ("moved", Condition(moves_logit=moved * 0.99), True),
            ("unmoved", Condition(moves_logit=moved * 1.01), False),
            ("changes", Condition(changes_prediction=True), changes),
        ):
            edits.append(make(f"{mode}-{name}", mode=mode, condition=condition))
            expected[edits[-1].name] = applied
    folder = write(tmp_path / "some", *edits, make("direct"), make("rerun", mode="rerun"))

    async def conversation(client, app):
        always = {}
        for name in effects:
            always[name] = (await ask(client, "classify", image, edit=name))["predictions"]
        plain = (await ask(client, "classify", image))["predictions"]
        for name, applied in expected.items():
            before, counts = len(runs), counted(name, str(applied).lower())
            answer = await ask(client, "classify", image, edit=name)
            assert answer["edit"]["applied"] is applied, name
            assert answer["predictions"] == (always[name.split("-")[0]] if applied else plain), name
            assert counted(name, str(applied).lower()) == counts + 1
            assert (len(runs) > before) == (name.startswith("rerun") and name != "rerun-inactive")
        embedded = await ask(client, "embed", image, edit="rerun-moved")  # by the bundle's own labels
        assert embedded["edit"]["applied"] is True
        alone = await ask(client, "classify", image, edit="direct-moved", labels=["cat"])  # there is no runner-up
        assert alone["edit"]["applied"] is False

    talk(Settings(bundle=bundle_path, edits=folder), conversation)


def test_what_cannot_be_answered_with_an_edit_is_refused_and_its_line_names_the_edit(
    bundle_path, make, tmp_path, picture
):
    edit = make("usual")
    settings = Settings(bundle=bundle_path, edits=write(tmp_path / "edits", edit), edit="usual")

    async def conversation(client, app):
        for explain in ("heatmap", "lens", "matrix", "sources"):
            refused = await ask(client, "attribute", picture(), 400, explain={explain: True})
            assert f"`explain.{explain}` can only explain the unmodified CLIP" in refused["error"]["message"]
            await ask(client, "attribute", picture(), explain={explain: True}, edit="none")
        for path in ("classify", "attribute", "embed", "attribute:batch"):
            error = (await ask(client, path, picture(), 400, edit="Usual"))["error"]
            assert (error["code"], error["message"]) == (
                "unknown_edit",
                "there is no edit 'Usual'; the edits are: none, usual",
            )
        assert (await ask(client, "circuit", picture(), 400, edit="usual"))["error"]["code"] == "invalid_request"
        await ask(client, "classify", b"no image", 415)

    with log_lines() as lines:
        talk(settings, conversation)
    named = [line for line in lines if line.get("edit")]
    assert all((line["edit"], line["edit_digest"]) == ("usual", edit.digest) for line in named)
    unnamed = [line for line in lines if not line.get("edit")]
    assert {line.get("error") for line in unnamed} == {None, "unknown_edit", "invalid_request"}
    assert named[-1]["error"] == "unsupported_image"


WRONG = {
    "missing": ({"edit": "nowhere"}, (), "VITRINE_EDIT=nowhere: there is no such edit; the edits are: usual"),
    "of another bundle": ({}, ("other",), "edit 'other' was made for a different bundle"),
    "tampered": ({}, ("tampered",), r"tampered\.json was changed after it was made"),
    "not signed": ({"edit_key_file": "key"}, (), "edit 'usual' is not signed"),
    "no key": ({"edit_key_file": "nowhere"}, (), "nowhere cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_stops_the_start(bundle_path, make, tmp_path, case):
    options, more, message = WRONG[case]
    other = create("other", "for tests", (Intervention(op="ablate", layer=0, index=1),), "direct", f"sha256:{64 * '0'}")
    folder = write(tmp_path / "edits", make("usual"), *([other] if "other" in more else []))
    if "tampered" in more:
        (folder / "tampered.json").write_text(make("tampered").text().replace("for tests", "for others"))
    (tmp_path / "key").write_bytes(KEY)
    options = {name: tmp_path / value if name.endswith("file") else value for name, value in options.items()}
    with pytest.raises(EditError, match=message):
        start(Settings(bundle=bundle_path, edits=folder, **options))


def test_a_bundle_from_before_interventions_is_served_without_edits(bundle_path, monkeypatch):
    monkeypatch.setattr(Bundle, "encoders", None)
    start(Settings(bundle=bundle_path))


def test_what_a_bundle_brings_unsigned_is_out_of_use_where_a_key_is_asked_for(bundle, make, tmp_path, picture):
    edits = {"signed": make("signed", key=KEY), "unsigned": make("unsigned")}
    served = add_edits(bundle, edits, tmp_path / "tiny")
    (tmp_path / "key").write_bytes(KEY + b"\n")
    settings = Settings(bundle=served.path, edit_key_file=tmp_path / "key")

    async def conversation(client, app):
        assert (await ask(client, "classify", picture(), edit="signed"))["edit"]["applied"]
        refused = await ask(client, "classify", picture(), 400, edit="unsigned")
        assert "edit 'unsigned' is not signed" in refused["error"]["message"]
        problems = {one["name"]: one["problem"] for one in (await client.get("/v1/model")).json()["edits"]}
        assert problems["signed"] is None
        assert refused["error"]["message"] == f"edit: {problems['unsigned']}"

    talk(settings, conversation)
    with pytest.raises(EditError, match="edit 'unsigned' is not signed"):
        start(settings.model_copy(update={"edit": "unsigned"}))


def test_a_reload_under_load_never_mixes_and_every_answer_and_line_names_the_edit(bundle_path, make, tmp_path, picture):
    versions = [make("usual"), make("usual", *[(2, index) for index in range(64)])]
    folder, image = write(tmp_path / "edits", versions[0]), picture()
    settings = Settings(bundle=bundle_path, edits=folder, edit="usual")

    async def conversation(client, app):
        expected, answers, stop = {}, [], asyncio.Event()
        first = await ask(client, "classify", image)

        async def load():
            while not stop.is_set():
                answers.append(await ask(client, "classify", image))

        clients = [asyncio.create_task(load()) for _ in range(6)]
        write(folder, versions[1])
        await app.state.serving.reload()
        second = await ask(client, "classify", image)
        (folder / "usual.json").write_text("{}")
        with pytest.raises(EditError, match=r"usual\.json is not an edit"):  # what is in service stays
            await app.state.serving.reload()
        assert (await ask(client, "classify", image))["edit"] == second["edit"]
        write(folder, versions[0])
        await app.state.serving.reload()
        stop.set()
        await asyncio.gather(*clients)
        for version, answer in zip(versions, (first, second), strict=True):
            assert answer["edit"]["digest"] == version.digest
            expected[version.digest] = [one["logit"] for one in answer["predictions"]]
        assert not np.allclose(*expected.values(), atol=1e-3)
        assert {answer["edit"]["digest"] for answer in answers} == expected.keys()
        for answer in answers:
            logits = [one["logit"] for one in answer["predictions"]]
            np.testing.assert_allclose(logits, expected[answer["edit"]["digest"]], atol=1e-4)

    with log_lines() as lines:
        talk(settings, conversation)
    assert len(lines) > 10
    assert {line["edit"] for line in lines} == {"usual"}
    assert {line["edit_digest"] for line in lines} == {version.digest for version in versions}
