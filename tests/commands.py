"""Commands as people type them, in tests."""

from click.testing import Result
from typer.testing import CliRunner

from llava_cmoe.cli import app


def type_in(*words: object) -> Result:
    """Run a command in a wide terminal; its output holds what goes to either stream."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def refused(*words: object) -> str:
    """What a command answers to a mistake: status 2, a message, and no traceback."""
    result = type_in(*words)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    return result.output
