"""Only the generated part of a Markdown file is ever replaced."""

from pathlib import Path

import pytest

from llava_cmoe.report.readme import markers, write_between

BEGIN, END = markers("table")


def test_only_the_generated_part_is_replaced(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter ±\n")
    for _ in range(2):  # writing twice changes nothing
        write_between(readme, "table", "new")
        assert readme.read_text() == f"# before\n\n{BEGIN}\nnew\n{END}\n\nafter ±\n"


@pytest.mark.parametrize("text", ["no part", f"{BEGIN} only", f"{END} only", f"{END} {BEGIN}"])
def test_a_file_without_that_part_is_refused_and_left_alone(tmp_path: Path, text: str):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: no <!-- table: begin"):
        write_between(readme, "table", "new")
    assert readme.read_text() == text
