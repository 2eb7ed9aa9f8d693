"""New labels beside everybody else's requests."""

import asyncio

from vitrine.service.answers.reload import Serving
from vitrine.service.engine.batcher import Batcher
from vitrine.service.operations.settings import Settings


def test_a_reload_encodes_label_sets_between_the_batches_of_the_bundle_in_service(bundle, tmp_path, monkeypatch):
    (tmp_path / "pets.json").write_text('{"labels": ["cat", "dog"]}')
    used, run_between = [], Batcher.run_between

    def watched(batcher, *args, **options):
        used.append(batcher)
        return run_between(batcher, *args, **options)

    monkeypatch.setattr(Batcher, "run_between", watched)

    async def scene():
        async with Serving(Settings(bundle=bundle.path, label_sets=tmp_path, replacement=False)) as serving:
            first = serving.attributor
            assert set(used) == {first.batcher}
            used.clear()
            await serving.reload()
            assert set(used) == {first.batcher}
            used.clear()
            second = serving.attributor
            await second.labels.resolve(("a new one",), ("{}",), second.batcher.run_between)
            assert second is not first
            assert used == [second.batcher]

    asyncio.run(scene())
