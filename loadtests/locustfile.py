"""The service's users for locust: every request sends one of a fixed set of pictures, in a fixed order.

    locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:3000 --mix attribute --load steady --rate 20

A user sends one request per second on average, 0.75 to 1.25 s after its previous one, whether that was answered quickly
or slowly. So N independent users are an open load of N requests per second, unless they have to wait.
(With locust's own `constant_throughput`, users that start together keep sending together: one burst per second.) A 429
counts neither as a success nor as a failure. Every answer is recorded (`--rows`), with the stage times that the service
reports.
`loadtests/latency.py` starts the service, runs this, and writes the report.
"""

from __future__ import annotations

import csv
import json
import random
import time
from itertools import count
from typing import Any

import gevent
from locust import FastHttpUser, LoadTestShape, events, task

from corpus import drawn_images, multipart
from profiles import PROFILES, users_at

STAGES = ("decode", "labels", "queue", "inference", "ledger", "predict")
COLUMNS = ("seconds", "offered", "name", "status", "milliseconds", *STAGES)
BATCH = 8  # images in a batch request
# What requests are drawn from: (path, weight); `paired` alternates instead.
MIXES: dict[str, list[tuple[str, int]]] = {
    "classify": [("/v1/classify", 1)],
    "attribute": [("/v1/attribute", 1)],
    "batch": [("/v1/attribute:batch", 1)],
    "mixed": [("/v1/attribute", 6), ("/v1/classify", 3), ("/v1/attribute:batch", 1)],
    "paired": [("/v1/classify", 1), ("/v1/attribute", 1)],
}
SEED = 0
PICTURES = drawn_images(40)
_numbers, _users = count(), count()
_rows: list[list[Any]] = []


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    parser.add_argument("--mix", choices=sorted(MIXES), default="attribute")
    parser.add_argument("--load", choices=sorted(PROFILES), default="steady")
    parser.add_argument("--rate", type=float, default=10.0, help="requests per second that the profile is based on")
    parser.add_argument("--seconds", type=float, default=0.0, help="seconds of one step; 0: as in the profile")
    parser.add_argument("--rows", default="", help="CSV file for every answer")


class Client(FastHttpUser):
    """One user, with one request a second on average."""

    connection_timeout = network_timeout = 60.0

    def on_start(self) -> None:
        self.chance = random.Random(SEED + next(_users))  # noqa: S311
        self.due = time.time() + self.chance.random()
        gevent.sleep(self.due - time.time())

    def wait_time(self) -> float:
        """Seconds until this user's next request. A late user sends at once, but does not catch up on missed ones."""
        now = time.time()
        self.due = max(now, self.due + self.chance.uniform(0.75, 1.25))
        return self.due - now

    @task
    def ask(self) -> None:
        options = self.environment.parsed_options
        number = next(_numbers)
        path = _path(options.mix, number, self.chance)
        # A pair sends the same picture twice.
        picture = PICTURES[(number // 2 if options.mix == "paired" else number) % len(PICTURES)]
        body: Any  # locust's types allow only text
        body, headers = multipart(picture, "{}") if path != "/v1/attribute:batch" else _batch(number)
        runner = self.environment.runner
        offered = runner.target_user_count if runner else 0
        start = time.time()
        with self.client.post(path, data=body, headers=headers, name=path, catch_response=True) as response:
            took = (time.time() - start) * 1e3
            stages = {}
            if response.status_code == 200:
                response.success()
                answer = json.loads(response.text)
                stages = answer.get("timings_ms", {})
            elif response.status_code == 429:
                response.success()  # identified by its row, not among locust's failures
            else:
                response.failure(f"{response.status_code} {(response.text or '')[:200]}")
            _rows.append([start, offered, path, response.status_code, took, *(stages.get(name) for name in STAGES)])


class Shape(LoadTestShape):
    """The profile as a number of users over time; one user is one request a second."""

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        options: Any = self.runner.environment.parsed_options
        users = users_at(PROFILES[options.load], options.rate, options.seconds, self.get_run_time())
        return None if users is None else (users, max(100.0, float(users)))


@events.quitting.add_listener
def _write(environment: Any, **_: Any) -> None:
    """Writes all rows at the end: writing during the run would slow the requests."""
    if environment.parsed_options.rows:
        with open(environment.parsed_options.rows, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(_rows)


def _path(mix: str, number: int, chance: random.Random) -> str:
    if mix == "paired":
        return MIXES[mix][number % 2][0]
    paths, weights = zip(*MIXES[mix], strict=True)
    return chance.choices(paths, weights)[0]


def _batch(number: int) -> tuple[bytes, dict[str, str]]:
    """A request with `BATCH` pictures."""
    parts = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n'
        + PICTURES[(number + place) % len(PICTURES)]
        + b"\r\n"
        for place in range(BATCH)
    )
    return parts + b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}
