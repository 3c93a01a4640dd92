"""A file of questions is answered line by line, or refused by line before a model is loaded."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import refused, type_in
from hypothesis import given
from hypothesis import strategies as st
from tiny import Lesson

from llava_cmoe.chat.questions import read_questions
from llava_cmoe.data.problems import DataError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda one: st.lists(one) | st.dictionaries(st.sampled_from(["question", "image", "x"]), one),
    max_leaves=4,
)


@given(st.lists(JSON | st.fixed_dictionaries({"question": st.text(max_size=9)}), min_size=1, max_size=4))
def test_every_line_is_a_question_or_the_file_is_refused_by_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
):
    file = tmp_path_factory.mktemp("asked") / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    def good(row: Any) -> bool:
        if not isinstance(row, dict) or row.keys() - {"question", "image"}:
            return False
        text, image = row.get("question"), row.get("image")
        return (
            isinstance(text, str) and bool(text.strip()) and (image is None or (isinstance(image, str) and bool(image)))
        )

    if all(map(good, rows)):
        found = read_questions(file)
        assert [one.question for one in found] == [row["question"] for row in rows]
        named = [row.get("image") for row in rows]
        assert [one.image for one in found] == [None if name is None else file.parent / name for name in named]
    else:
        first = next(number for number, row in enumerate(rows, 1) if not good(row))
        with pytest.raises(DataError, match=f"questions.jsonl: line {first}: "):
            read_questions(file)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", b"{", b"[" * 100_000, b"9" * 5000])
def test_a_file_that_holds_no_question_is_refused_in_a_line(content: bytes, tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match="questions.jsonl"):
        read_questions(file)


def test_questions_are_answered_as_each_is_alone(lesson_of: Callable[[str], Lesson], tmp_path: Path):
    lesson = lesson_of("cmoe")
    rows = [lesson.run.eval_spec.rows[task][index] for task in ("colours", "sides") for index in (0, 3)]
    lines = [{"question": row["turns"][0]["text"].removeprefix("<image>\n"), "image": row["image"]} for row in rows]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    result = type_in("chat", lesson.recipe.run, "--questions", file)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [one["question"] for one in told] == [line["question"] for line in lines]
    assert all(one["located"] in ("colours", "sides", None) for one in told)
    assert all(one["scores"].keys() == {"colours", "sides"} for one in told)
    words = ["--prompt", lines[1]["question"], *(["--image", lines[1]["image"]] if lines[1]["image"] else []), "--json"]
    alone = type_in("chat", lesson.recipe.run, *words)
    assert json.loads(alone.stdout.splitlines()[-1]) == told[1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--questions", "q.jsonl", "--prompt", "What?"), "give one of them"),
        (("--json",), "it is of the answer to --prompt"),
        (("--questions", "q.jsonl", "--image", "x.png"), "each line of --questions names its own picture"),
        (("--questions", "no.jsonl"), "no.jsonl"),
        (
            ("--prompt", "What?", "--route", "oracle:nobody"),
            "--route: no route 'oracle:nobody'; there is located, base",
        ),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    lesson_of: Callable[[str], Lesson], words: tuple[str, ...], reason: str
):
    assert reason in refused("chat", lesson_of("cmoe").recipe.run, *words)


@given(st.text(min_size=1).filter(lambda text: text.strip() and not re.search("[\ud800-\udfff]", text)))
def test_any_text_that_is_one_line_of_json_is_one_question(tmp_path_factory: pytest.TempPathFactory, text: str):
    file = tmp_path_factory.mktemp("asked") / "questions.jsonl"
    file.write_text(json.dumps({"question": text}, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    assert [one.question for one in read_questions(file)] == [text]


@pytest.mark.parametrize("line", ["[" * 50_000, '{"question": "a", "question": "b"}', '{"question": "\\ud800"}'])
def test_a_line_that_would_be_read_otherwise_is_refused(tmp_path: Path, line: str):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1") as raised:
        read_questions(tmp_path / "q.jsonl")
    assert len(str(raised.value).splitlines()) == 1
