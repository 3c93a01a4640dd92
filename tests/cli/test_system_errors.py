"""What the operating system refuses ends a command in one line that names the place."""

import errno
import io
import os

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.cli.console import user_errors

NUMBERS = [number for number in errno.errorcode if number not in (errno.EINTR,)]


@given(st.sampled_from(NUMBERS), st.sampled_from([None, "a/b", b"a\xff", 3, "x\x1b[2J"]), st.booleans())
def test_every_error_of_the_system_is_one_line(number: int, name: object, renamed: bool):
    error = (
        OSError(number, os.strerror(number), "from", None, name)
        if renamed
        else OSError(number, os.strerror(number), name)
    )
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        with pytest.raises(typer.Exit) as left, user_errors():
            raise error
    assert left.value.exit_code == 2
    told = stream.getvalue()
    assert told.startswith("error: ") and told.count("\n") == 1 and os.strerror(number) in told and "\x1b" not in told
