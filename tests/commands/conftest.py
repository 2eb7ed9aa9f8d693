"""The command, run in this process."""

import pytest
from typer.testing import CliRunner

from vitrine.commands import app


@pytest.fixture(scope="session")
def run():
    """run(*arguments) -> typer's result. Any exception but an exit is the test's failure."""

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke
