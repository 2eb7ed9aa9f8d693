"""One circuit of many images: the mean of each image's own, broken ones left out and named."""

import asyncio
import shutil

import pytest

from vitrine.models.inputs.opening import open_inputs
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.circuit import answer_circuit
from vitrine.service.answers.circuit_groups import grouped
from vitrine.service.errors import ServiceError
from vitrine.service.offline.class_circuit import ClassCircuitError, class_circuit
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.circuit import CircuitRequest

LABEL = "green square"


@pytest.fixture(scope="module")
def folder(data_root, tmp_path_factory):
    """Two images of one class in a folder of its name, a file that is no image, and one that is not there."""
    folder = tmp_path_factory.mktemp("class") / LABEL
    folder.mkdir()
    for number, path in enumerate(sorted((data_root / "val" / LABEL).iterdir())[:2]):
        shutil.copy(path, folder / f"{number}{path.suffix}")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (folder / "missing.png").symlink_to("nowhere.png")
    return folder


def run(bundle, inputs, *, count=None, track=iter, **request):
    request = CircuitRequest(**{"nodes": 8, "seconds": 60} | request)
    settings = Settings(bundle=bundle.path, decode_threads=1)
    return asyncio.run(class_circuit(bundle, settings, open_inputs(str(inputs)), request, count, track=track))


def each(bundle, files, **request):
    """The circuits of single images."""

    async def answers():
        async with Attributor(bundle, Settings(bundle=bundle.path)) as attributor:
            asked = CircuitRequest(nodes=8, seconds=60, **request)
            return [grouped(await answer_circuit(attributor, file.read_bytes(), asked, "test")) for file in files]

    return asyncio.run(answers())


def key(group):
    return group.kind, group.layer, group.index


def test_it_is_the_mean_of_the_images_circuits(carded, folder):
    seen = []
    found = run(carded, folder, track=lambda numbers: (seen.append(number) or number for number in numbers))
    assert len(seen) == 4
    one, other = each(carded, sorted(folder.glob("?.png")), target=LABEL)
    assert found.images == 2
    assert found.targets == {LABEL: 2}, "the folder's name is a label"
    groups = [{key(group): group for group in circuit.groups} for circuit in (one, other)]
    assert {key(group) for group in found.groups} == set(groups[0]) | set(groups[1])
    for group in found.groups:
        here = [of[key(group)] for of in groups if key(group) in of]
        assert group.images == len(here)
        assert group.influence == pytest.approx(sum(part.influence for part in here) / 2, abs=1e-6)
        assert group.contribution == pytest.approx(sum(part.contribution for part in here) / 2, abs=1e-5)
    assert found.logit == pytest.approx((one.logit + other.logit) / 2, abs=1e-5)
    assert found.scores.left_out == pytest.approx((one.scores.left_out + other.scores.left_out) / 2, abs=1e-5)
    into_target = sum(edge.weight for edge in found.edges if edge.target is None)
    assert into_target == pytest.approx(
        sum(edge.weight for circuit in (one, other) for edge in circuit.edges if edge.target is None) / 2, abs=1e-4
    )


def test_what_cannot_be_read_is_left_out_and_named(carded, folder):
    found = run(carded, folder)
    assert found.failed == {"invalid_image": 1, "unreadable": 1}
    assert [line.partition(":")[0] for line in found.unreadable] == ["broken.png", "missing.png"]


def test_without_a_folders_name_each_image_has_its_own_target(carded, data_root, folder):
    found = run(carded, data_root / "val", count=3)
    assert found.images == sum(found.targets.values()) == 3
    others = run(carded, folder, target="red circle", contrast=LABEL)
    assert (others.targets, others.contrast) == ({"red circle": 2}, LABEL)


def test_no_image_at_all_is_an_error(carded, folder, tmp_path):
    shutil.copy(folder / "broken.png", tmp_path / "only.png")
    with pytest.raises(ClassCircuitError, match=r"none of 1 images can be used; the first: only\.png: "):
        run(carded, tmp_path)


def test_what_cannot_be_asked_is_refused_before_any_image(carded, folder):
    seen = []
    for request, said in (({"target": "unicorn"}, "not among the labels"), ({"nodes": 10_000}, "at most 512")):
        with pytest.raises(ServiceError, match=said):
            run(carded, folder, track=lambda numbers: seen.extend(numbers) or [], **request)
    assert not seen
