"""The queue in front of the engine. `explain` is that of a fake engine, which tests block and release."""

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest

from vitrine.service.engine import batcher as batcher_module
from vitrine.service.engine.batcher import Batcher
from vitrine.service.errors import ServiceError


class Engine:
    """Answers each image with its first pixel. Waits for `gate`; records all batches; raises or returns `fails`."""

    def __init__(self):
        self.batches, self.threads, self.fails = [], set(), []
        self.busy, self.gate = threading.Event(), threading.Event()

    def explain(self, pixels, *_):
        self.busy.set()
        assert self.gate.wait(30)
        self.threads.add(threading.get_ident())
        self.batches.append([int(image.flat[0]) for image in pixels])
        if self.fails:
            failure = self.fails.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        return self.batches[-1]


def image(number):
    return np.full((3, 2, 2), number, np.float32)


def run_scene(scene, batch_size=4):
    """Run `scene(batcher, engine)` while the batcher is open, at most 30 s; returns the engine."""
    engine = Engine()

    async def run():
        async with asyncio.timeout(30), Batcher(engine.explain, batch_size) as batcher:
            try:
                await scene(batcher, engine)
            finally:
                engine.gate.set()

    asyncio.run(run())
    return engine


async def submit(batcher, *numbers):
    """Tasks that wait for their answers, queued in this order."""
    tasks = [asyncio.create_task(batcher.submit(image(number))) for number in numbers]
    await asyncio.sleep(0)
    return tasks


async def submit_behind_a_running_one(batcher, engine, *numbers):
    """The same, behind an image 0 whose inference is blocked."""
    (first,) = await submit(batcher, 0)
    await asyncio.to_thread(engine.busy.wait, 30)
    return first, await submit(batcher, *numbers)


async def answers(tasks):
    return [inference.parts for inference in await asyncio.gather(*tasks)]


def test_a_single_image_does_not_wait_for_a_fuller_batch():
    async def scene(batcher, engine):
        engine.gate.set()
        assert await answers(await submit(batcher, 7)) == [7]

    assert run_scene(scene).batches == [[7]]


def test_images_that_wait_for_a_busy_engine_are_batched_up_to_the_batch_size():
    async def scene(batcher, engine):
        first, others = await submit_behind_a_running_one(batcher, engine, *range(1, 11))
        assert batcher.waiting == 10
        engine.gate.set()
        assert await answers([first, *others]) == list(range(11))

    assert run_scene(scene, batch_size=4).batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_a_batch_size_of_one_batches_nothing():
    async def scene(batcher, engine):
        first, others = await submit_behind_a_running_one(batcher, engine, 1, 2)
        engine.gate.set()
        await answers([first, *others])

    assert run_scene(scene, batch_size=1).batches == [[0], [1], [2]]


def test_many_clients_get_their_own_answers():
    async def scene(batcher, engine):
        engine.gate.set()
        numbers = np.random.default_rng(0).permutation(500).tolist()

        async def ask(number):
            await asyncio.sleep(0.0001 * (number % 7))
            return (await batcher.submit(image(number))).parts

        assert await asyncio.gather(*map(ask, numbers)) == numbers

    engine = run_scene(scene, batch_size=5)
    assert max(map(len, engine.batches)) <= 5
    assert sorted(number for batch in engine.batches for number in batch) == list(range(500))
    assert len(engine.threads) == 1


def test_a_cancelled_waiter_leaves_its_batch_and_does_not_disturb_it():
    async def scene(batcher, engine):
        first, (one, two, three) = await submit_behind_a_running_one(batcher, engine, 1, 2, 3)
        two.cancel()
        engine.gate.set()
        assert await answers([first, one, three]) == [0, 1, 3]
        with pytest.raises(asyncio.CancelledError):
            await two

    assert run_scene(scene).batches == [[0], [1, 3]]


@pytest.mark.parametrize("failure", [None, RuntimeError("out of memory")], ids=["it works", "it fails"])
def test_a_waiter_cancelled_during_its_inference_does_not_disturb_the_others(failure):
    async def scene(batcher, engine):
        first, others = await submit_behind_a_running_one(batcher, engine, 1)
        engine.fails = [failure] if failure else []
        first.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        assert await answers(others) == [1]
        with pytest.raises(asyncio.CancelledError):
            await first

    assert run_scene(scene).batches == [[0], [1]]


def test_cancelled_waiters_give_their_places_in_the_queue_back():
    async def scene(batcher, engine):
        first, cancelled = await submit_behind_a_running_one(batcher, engine, 1, 2)
        for task in cancelled:
            task.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 0
        others = await submit(batcher, 3, 4)
        await asyncio.sleep(0)
        engine.gate.set()
        assert await answers([first, *others]) == [0, 3, 4]

    run_scene(scene)


def test_a_batch_whose_waiters_were_all_cancelled_is_not_run():
    async def scene(batcher, engine):
        first, cancelled = await submit_behind_a_running_one(batcher, engine, 1, 2)
        for task in cancelled:
            task.cancel()
        engine.gate.set()
        assert await answers([first, *await submit(batcher, 3)]) == [0, 3]

    assert run_scene(scene).batches == [[0], [3]]


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), [1]], ids=["an error", "too few answers"])
def test_a_failed_batch_fails_all_its_waiters_and_the_next_works(failure):
    async def scene(batcher, engine):
        first, others = await submit_behind_a_running_one(batcher, engine, 1, 2, 3, 4, 5)
        engine.fails = [[0], failure]
        engine.gate.set()
        assert await answers([first]) == [0]
        async with asyncio.timeout(5):
            results = await asyncio.gather(*others, return_exceptions=True)
        assert all(isinstance(result, Exception) for result in results[:4])
        assert results[4].parts == 5
        assert await answers(await submit(batcher, 6)) == [6]

    assert run_scene(scene, batch_size=4).batches == [[0], [1, 2, 3, 4], [5], [6]]


def test_images_of_different_sizes_fail_together_and_the_next_works():
    async def scene(batcher, engine):
        _, (good,) = await submit_behind_a_running_one(batcher, engine, 1)
        odd = asyncio.create_task(batcher.submit(np.zeros((3, 5, 5), np.float32)))
        await asyncio.sleep(0)
        engine.gate.set()
        results = await asyncio.gather(good, odd, return_exceptions=True)
        assert [type(result) for result in results] == [ValueError, ValueError]
        assert await answers(await submit(batcher, 2)) == [2]

    run_scene(scene)


def test_other_work_runs_on_the_engines_thread_in_turn():
    async def scene(batcher, engine):
        first, others = await submit_behind_a_running_one(batcher, engine, 1, 2)
        work = asyncio.create_task(batcher.run(lambda a, b: (a + b, threading.get_ident()), 2, 3))
        await asyncio.sleep(0)
        assert not work.done()
        engine.gate.set()
        total, thread = await work
        assert await answers([first, *others]) == [0, 1, 2]
        assert total == 5
        assert engine.threads == {thread}

    run_scene(scene)


def test_an_error_of_other_work_reaches_only_its_caller():
    async def scene(batcher, engine):
        engine.gate.set()
        with pytest.raises(ZeroDivisionError):
            await batcher.run(lambda: 1 / 0)
        assert await answers(await submit(batcher, 1)) == [1]

    run_scene(scene)


def test_queue_and_inference_are_timed_apart():
    async def scene(batcher, engine):
        first, others = await submit_behind_a_running_one(batcher, engine, 1, 2)
        engine.gate.set()
        inferences = await asyncio.gather(first, *others)
        assert all(inference.queue_ms >= 0 and inference.inference_ms > 0 for inference in inferences)
        assert inferences[1].inference_ms == inferences[2].inference_ms

    run_scene(scene)


def test_nobody_waits_forever_when_the_batcher_closes():
    async def run():
        engine = Engine()
        async with Batcher(engine.explain, 1, 10) as batcher:
            running, waiting = await submit_behind_a_running_one(batcher, engine, 1, 2)
            threading.Timer(0.2, engine.gate.set).start()
        done, pending = await asyncio.wait([running, *waiting], timeout=5)
        for task in pending:
            task.cancel()
        return done, pending

    done, pending = asyncio.run(run())
    assert not pending
    assert len(done) == 3


def test_a_closed_batcher_accepts_nothing_new():
    async def run():
        engine = Engine()
        engine.gate.set()
        async with Batcher(engine.explain, 1, 10) as batcher:
            pass
        with pytest.raises(ServiceError) as caught:
            await asyncio.wait_for(batcher.submit(image(1)), 5)
        return caught.value.code

    assert asyncio.run(run()) == "not_ready"


# batch_wait_ms


def run_with_batch_wait(scene, wait_ms, batch_size=3):
    engine = Engine()
    engine.gate.set()

    async def run():
        async with asyncio.timeout(30), Batcher(engine.explain, batch_size, wait_ms) as batcher:
            await scene(batcher)

    asyncio.run(run())
    return engine.batches


def test_the_first_image_waits_for_a_full_batch():
    async def scene(batcher):
        tasks = await submit(batcher, 1)
        await asyncio.sleep(0.02)
        tasks += await submit(batcher, 2)
        await asyncio.sleep(0.02)
        tasks += await submit(batcher, 3, 4)
        assert await answers(tasks) == [1, 2, 3, 4]

    assert run_with_batch_wait(scene, wait_ms=500)[0] == [1, 2, 3]


def test_a_full_batch_does_not_wait():
    async def scene(batcher):
        async with asyncio.timeout(10):
            assert await answers(await submit(batcher, 1, 2, 3)) == [1, 2, 3]

    assert run_with_batch_wait(scene, wait_ms=60_000) == [[1, 2, 3]]


def test_nobody_waits_longer_than_that_nor_while_the_service_ends():
    async def scene(batcher):
        assert await answers(await submit(batcher, 7)) == [7]

    assert run_with_batch_wait(scene, wait_ms=30) == [[7]]

    async def closing(batcher):
        await submit(batcher, 8)

    assert run_with_batch_wait(closing, wait_ms=60_000) == [[8]]


# pieces of other work


class Clock:
    """Time that passes only where somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def run_timed(monkeypatch):
    """run_timed(scene) -> what ran, in order: an image's number, or a piece's name. A batch takes 2 s, a piece 1.

    `scene(batcher, piece, hold)`: `piece(name, spent)` is a task; what is queued within `async with hold()` waits for
    one another.
    """
    clock = Clock()
    monkeypatch.setattr(batcher_module, "perf_counter", clock)

    def run(scene):
        order, gate, held = [], threading.Event(), threading.Event()
        gate.set()

        def explain(pixels, *_):
            order.append(int(pixels.flat[0]))
            clock.now += 2
            return list(pixels)

        def work(name):
            order.append(name)
            clock.now += 1
            return name

        def wait():
            held.set()
            assert gate.wait(30)

        async def main():
            async with asyncio.timeout(30), Batcher(explain, 1) as batcher:

                def piece(name, spent=0):
                    return asyncio.create_task(batcher.run_between(work, name, spent=spent))

                @asynccontextmanager
                async def hold():
                    gate.clear()
                    held.clear()
                    holding = asyncio.create_task(batcher.run(wait))
                    await asyncio.to_thread(held.wait, 30)
                    try:
                        yield
                        await asyncio.sleep(0)
                    finally:
                        gate.set()
                    await holding

                await scene(batcher, piece, hold)

        asyncio.run(main())
        return order

    return run


def test_images_go_first_but_do_not_starve_pieces(run_timed):
    """A piece of 1 s is followed by 8 s of images, if so many wait."""

    async def scene(batcher, piece, hold):
        async with hold():
            tasks = [piece(name) for name in "abcd"] + await submit(batcher, *range(10))
        await asyncio.gather(*tasks)

    assert run_timed(scene) == ["a", 0, 1, 2, 3, "b", 4, 5, 6, 7, "c", 8, 9, "d"]


def test_pieces_run_freely_while_no_image_waits(run_timed):
    async def scene(batcher, piece, hold):
        async with hold():
            tasks = [piece(name) for name in "abc"]
        await asyncio.gather(*tasks)
        async with hold():
            tasks = [piece("d"), *await submit(batcher, 1, 2)]
        await asyncio.gather(*tasks)

    assert run_timed(scene) == ["a", "b", "c", 1, 2, "d"]


def test_the_piece_of_who_has_spent_least_goes_first_and_sometimes_the_oldest(run_timed):
    async def scene(batcher, piece, hold):
        async with hold():
            tasks = [piece(spent, spent) for spent in (60, 50, 40, 30, 20, 10, 5, 0, 0.5)]
        await asyncio.gather(*tasks)

    assert run_timed(scene) == [0, 0.5, 5, 60, 10, 20, 30, 50, 40]


def test_pieces_of_equals_take_turns(run_timed):
    """Three requests, each with one piece in hand."""

    async def scene(batcher, piece, hold):
        async def ask(name):
            for spent in range(3):
                await piece(name, spent)

        async with hold():
            tasks = [asyncio.create_task(ask(name)) for name in "abc"]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    order = run_timed(scene)
    assert sorted(order[:3]) == sorted(order[3:6]) == sorted(order[6:]) == ["a", "b", "c"]


def test_a_cancelled_piece_leaves_the_queue(run_timed):
    async def scene(batcher, piece, hold):
        async with hold():
            first, second, third = (piece(name) for name in "abc")
            await asyncio.sleep(0)
            second.cancel()
        assert await asyncio.gather(first, third) == ["a", "c"]
        with pytest.raises(asyncio.CancelledError):
            await second

    assert run_timed(scene) == ["a", "c"]


def test_a_piece_that_is_cancelled_while_it_runs_disturbs_nobody():
    async def scene(batcher, engine):
        running, gate = threading.Event(), threading.Event()
        piece = asyncio.create_task(batcher.run_between(lambda: running.set() or gate.wait(30), spent=0))
        await asyncio.to_thread(running.wait, 30)
        piece.cancel()
        tasks = await submit(batcher, 1)
        gate.set()
        engine.gate.set()
        assert await answers(tasks) == [1]

    assert run_scene(scene).batches == [[1]]


def test_an_error_of_a_piece_reaches_only_its_caller():
    async def scene(batcher, engine):
        engine.gate.set()
        with pytest.raises(ZeroDivisionError):
            await batcher.run_between(lambda: 1 / 0, spent=0)
        thread = await batcher.run_between(threading.get_ident, spent=0)
        assert await answers(await submit(batcher, 1)) == [1]
        assert engine.threads == {thread}

    run_scene(scene)


def test_pieces_are_finished_when_the_batcher_closes_and_then_refused():
    async def scene():
        gate = threading.Event()
        async with Batcher(lambda *_: [], 1) as batcher:
            tasks = [asyncio.create_task(batcher.run_between(gate.wait, 30, spent=0)) for _ in range(3)]
            await asyncio.sleep(0)
            threading.Timer(0.1, gate.set).start()
        assert await asyncio.gather(*tasks) == [True] * 3
        with pytest.raises(ServiceError, match="shutting down") as caught:
            await asyncio.wait_for(batcher.run_between(gate.wait, spent=0), 5)
        return caught.value.code

    assert asyncio.run(scene()) == "not_ready"
