"""The account of the bytes in hand, and answers in pieces."""

import asyncio

from starlette.responses import Response

from vitrine.service.http.budget import ACCOUNT, Account, Budget
from vitrine.service.http.middleware import RequestMiddleware

MIB = 2**20


def test_uploads_share_one_limit_and_give_back_what_they_held():
    budget = Budget(100)
    first, second = Account(budget), Account(budget)
    assert first.take(60)
    assert not second.take(41)
    assert second.is_overdrawn
    assert not first.is_overdrawn
    assert second.take(40)
    first.close()
    first.close()
    assert budget.held == 40
    first.hold(200)  # an answer is never refused
    assert not second.take(1)
    first.give_back(200)
    second.close()
    assert budget.held == 0


def test_what_waits_in_connections_leaves_less_for_uploads():
    budget = Budget(100)
    budget.unsent = 90
    assert Account(budget).take(10)
    assert not Account(budget).take(1)


def test_large_answers_are_sent_in_pieces_and_held_until_then():
    answer, budget, sent = bytes(range(256)) * 4_100, Budget(MIB), []

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            assert budget.held == len(answer)
            await asyncio.sleep(0)

    async def receive():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], ACCOUNT: Account(budget)}
    asyncio.run(RequestMiddleware(Response(answer), MIB)(scope, receive, send))
    start, *pieces = sent
    assert start["status"] == 200
    assert b"".join(piece["body"] for piece in pieces) == answer
    assert max(len(piece["body"]) for piece in pieces) <= 256 * 2**10
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert budget.held == 0
