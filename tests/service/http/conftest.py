"""A server with small limits."""

import pytest

from raw_http import KEY, MIB


@pytest.fixture(scope="session")
def door(start_server):
    """A server with small limits, a key and origins whose pages may ask, on the embedded bundle."""
    limits = {
        "MAX_HEADER_BYTES": 8_192,
        "HEADER_SECONDS": 1,
        "KEEP_ALIVE_SECONDS": 2,
        "SEND_SECONDS": 2,
        "MAX_BODY_BYTES": 8 * MIB,
        "MAX_BYTES_IN_HAND": 20 * MIB,
        "MAX_CONNECTIONS": 40,
        "API_KEYS": KEY,
        "CORS_ORIGINS": "https://app.example, http://localhost:8080",
    }
    with start_server(**{f"VITRINE_{name}": value for name, value in limits.items()}) as running:
        yield running
