"""Requests that come together are started in turns, in order, and none is forgotten."""

import asyncio

from vitrine.service.http.pace import AT_ONCE, Pace


def test_a_crowd_is_started_over_several_turns():
    async def turns():
        loop, pace, started, seen = asyncio.get_running_loop(), Pace(), [], []
        for number in range(3 * AT_ONCE + 1):
            pace.start(loop, lambda number=number: started.append(number))
        while not seen or len(started) > seen[-1]:
            seen.append(len(started))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        pace.start(loop, lambda: started.append("late"))
        return started, seen

    started, seen = asyncio.run(turns())
    assert started == [*range(3 * AT_ONCE + 1), "late"]
    assert seen == [AT_ONCE, 2 * AT_ONCE, 3 * AT_ONCE, 3 * AT_ONCE + 1]
