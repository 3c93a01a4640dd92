"""Answers that go out come back to the same numbers; what comes in is checked by file and line before it counts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Lesson

from llava_cmoe.evaluation.log import read_results
from llava_cmoe.evaluation.official.coin_format import Stated, export_answers, import_answers
from llava_cmoe.evaluation.rescoring import open_examined, rescore
from llava_cmoe.provenance.invocations import bind_results
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.report.paired_tests import compare
from llava_cmoe.settings.run import Recipe


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("cmoe")


@pytest.fixture
def theirs(lesson: Lesson, tmp_path: Path) -> Path:
    """Answers as another toolkit leaves them."""
    export_answers(open_examined(lesson.recipe.run), tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def asked(lesson: Lesson, tmp_path: Path) -> Recipe:
    return lesson.recipe.model_copy(update={"run": tmp_path / "imported"})


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_every_cell_is_a_folder_of_coins_two_files(theirs: Path, lesson: Lesson) -> None:
    files = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*.*"))
    cells = ("colours/colours", "colours/sides", "sides/sides")
    assert files == [f"{cell}/{name}" for cell in cells for name in ("Result.text", "merge.jsonl")]
    line, *others = lines_of(theirs / "colours/sides/merge.jsonl")
    assert list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert line["question_id"] == "colours-test-0" and "<image>" not in str(line["prompt"])
    assert len({str(one["answer_id"]) for one in (line, *others)}) == len(others) + 1 == 6
    accuracy = lesson.results.headline.other_protocols["coin"][1][0]
    assert (
        theirs / "colours/sides/Result.text"
    ).read_text() == f"Samples: 6\nAccuracy: {accuracy:.2f}%\nProtocol: coin\n"


def test_the_same_run_is_exported_to_the_same_bytes(theirs: Path, lesson: Lesson, tmp_path: Path) -> None:
    export_answers(open_examined(lesson.recipe.run), tmp_path / "again")
    for path in theirs.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(theirs)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kept", [lambda lines: lines[:-1], lambda lines: lines[:1], lambda lines: [*lines, lines[0]]])
def test_answers_that_are_not_whole_do_not_go_out(
    lesson: Lesson, tmp_path: Path, kept: Callable[[list[bytes]], list[bytes]]
) -> None:
    run = Path(shutil.copytree(lesson.recipe.run, tmp_path / "run"))
    path = run / "answers/after_02/colours.located.jsonl"
    path.write_bytes(b"".join(kept(path.read_bytes().splitlines(keepends=True))))
    bind_results(run)
    with pytest.raises(RegistryError, match=r"colours.located.jsonl: holds \d answers to \d questions, 6 were asked"):
        export_answers(open_examined(run), tmp_path / "out")


def test_numbers_in_the_data_are_numbers_in_the_answers(
    lesson: Lesson, tiny_data: Path, tmp_path: Path, asked: Recipe
) -> None:
    """CoIN's scripts join on the id as it stands in the file."""
    root = Path(shutil.copytree(tiny_data, tmp_path / "root"))
    for path in root.glob("Instructions_Original/*/test.json"):
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([row | {"question_id": number} for number, row in enumerate(rows)]))
    recipe = asked.model_copy(update={"data": lesson.recipe.data.model_copy(update={"root": root})})
    folder = tmp_path / "numbers" / "sides" / "sides"
    folder.mkdir(parents=True)
    write_lines(folder / "merge.jsonl", [{"question_id": number, "text": "A"} for number in range(6)])
    import_answers(tmp_path / "numbers", recipe, "theirs")
    export_answers(open_examined(recipe.run), tmp_path / "out")
    assert [line["question_id"] for line in lines_of(tmp_path / "out/sides/sides/merge.jsonl")] == list(range(6))


def test_what_goes_out_comes_back_the_same(theirs: Path, lesson: Lesson, asked: Recipe) -> None:
    results, stated = import_answers(theirs, asked, "theirs", base="somebody's")
    assert results.headline == lesson.results.headline and results.locator == lesson.results.locator
    assert (results.method, results.base, results.run) == ("theirs", "somebody's", "imported")
    for path in (asked.run / "answers").rglob("*.jsonl"):
        assert path.read_bytes() == (lesson.recipe.run / path.relative_to(asked.run)).read_bytes()
    assert all(abs(one.stated - one.scored) < 0.01 for one in stated) and len(stated) == 3


def test_what_came_in_is_scored_and_compared_like_a_run(theirs: Path, lesson: Lesson, asked: Recipe) -> None:
    import_answers(theirs, asked, "theirs")
    before = (asked.run / "results.json").read_bytes()
    assert rescore(open_examined(asked.run))[1] == [] and (asked.run / "results.json").read_bytes() == before
    comparison = compare([lesson.recipe.run, asked.run])
    assert {one.value for one in comparison.differences} == {0.0}
    assert any("base" in warning for warning in comparison.warnings)


def test_cells_that_were_not_measured_may_lack_and_the_order_of_lines_does_not_count(
    theirs: Path, lesson: Lesson, asked: Recipe
) -> None:
    shutil.rmtree(theirs / "colours/colours")
    path = theirs / "colours/sides/merge.jsonl"
    write_lines(path, lines_of(path)[::-1])
    (theirs / "colours").rename(theirs / "Colours")
    results, _ = import_answers(theirs, asked, "theirs")
    assert results.headline.matrix == ((None, None), lesson.results.headline.matrix[1])
    assert read_results(asked.run / "results.json") == results


def test_blanks_around_an_answer_stay_as_they_decide_under_coin(theirs: Path, asked: Recipe) -> None:
    path = theirs / "sides/sides/merge.jsonl"
    lines = [line | {"text": f" {line['text']}\n"} for line in lines_of(path)]
    write_lines(path, lines)
    import_answers(theirs, asked, "theirs")
    export_answers(open_examined(asked.run), asked.run / "again")
    assert [line["text"] for line in lines_of(asked.run / "again/sides/sides/merge.jsonl")] == [
        line["text"] for line in lines
    ]


@pytest.mark.parametrize("said", [b"Samples: 6\n", b"Accuracy: 1.2.3%", b"\xff\xfe"])
def test_a_result_file_without_an_accuracy_is_an_error_and_nothing_is_written(
    theirs: Path, asked: Recipe, said: bytes
) -> None:
    (theirs / "sides/sides/Result.text").write_bytes(said)
    with pytest.raises(RegistryError, match=r"sides/sides/Result.text: no line `Accuracy: xx.xx%`"):
        import_answers(theirs, asked, "theirs")
    assert not asked.run.exists()


def test_another_accuracy_in_their_result_file_is_told(theirs: Path, asked: Recipe, lesson: Lesson) -> None:
    (theirs / "sides/sides/Result.text").write_text("Samples: 6\nAccuracy: 12.34%\n")
    _, stated = import_answers(theirs, asked, "theirs")
    scored = lesson.results.headline.other_protocols["coin"][1][1]
    assert Stated("sides", "sides", 12.34, scored, "coin") in stated


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines[:-1], "merge.jsonl: missing id 'sides-test-5' (1 of 6"),
        (lambda lines: [*lines, lines[2]], "merge.jsonl:7: doubled id 'sides-test-2', answered before in line 3"),
        (lambda lines: [lines[0] | {"question_id": "x"}, *lines[1:]], "merge.jsonl:1: unknown id 'x'"),
        (lambda lines: [lines[0], {"text": "A"}], "merge.jsonl:2: not an answer"),
        (lambda lines: [lines[0], lines[1] | {"text": None}], "merge.jsonl:2: question_id must be"),
        (lambda lines: [lines[0] | {"metadata": {"failed": False}}, *lines[1:]], "merge.jsonl:1: metadata: located is"),
        (
            lambda lines: [lines[0] | {"metadata": {"located": "gqa"}}, *lines[1:]],
            "merge.jsonl:1: metadata: located is",
        ),
        (lambda lines: [lines[0] | {"metadata": {"located": 9}}, *lines[1:]], "merge.jsonl:1: located at 9"),
        (
            lambda lines: [lines[0] | {"text": "\ud800"}, *lines[1:]],
            "merge.jsonl:1: not an answer (PlainJsonError('half of a surrogate pair",
        ),
    ],
)
def test_a_wrong_line_is_an_error_with_its_place_and_nothing_is_written(
    theirs: Path, asked: Recipe, change: Callable[[list[dict[str, object]]], list[dict[str, object]]], complaint: str
) -> None:
    path = theirs / "sides/sides/merge.jsonl"
    write_lines(path, change(lines_of(path)))
    with pytest.raises(RegistryError) as error:
        import_answers(theirs, asked, "theirs")
    assert complaint in str(error.value) and str(path) in str(error.value)
    assert not asked.run.exists()


@pytest.mark.parametrize("line", [b"[" * 50_000, b'{"question_id": "1", "text": "a", "text": "b"}', b"9" * 5000])
def test_a_line_that_would_be_read_otherwise_is_refused(theirs: Path, asked: Recipe, line: bytes) -> None:
    (theirs / "sides/sides/merge.jsonl").write_bytes(line)
    with pytest.raises(RegistryError, match="merge.jsonl:1: not an answer") as raised:
        import_answers(theirs, asked, "theirs")
    assert len(str(raised.value)) < 700


def test_an_export_that_was_killed_leaves_no_half_and_can_be_repeated(
    theirs: Path, lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", killed)
        export_answers(open_examined(lesson.recipe.run), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    written = export_answers(open_examined(lesson.recipe.run), tmp_path / "again")
    assert all(path.is_file() for path in written) and {path.name for path in tmp_path.iterdir()} >= {"again"}
    assert not list(tmp_path.glob(".*"))


def test_folders_that_say_nothing_are_refused(theirs: Path, asked: Recipe, tmp_path: Path, lesson: Lesson) -> None:
    with pytest.raises(RegistryError, match="no answers; expected"):
        import_answers(tmp_path / "nothing", asked, "theirs")
    (theirs / "sides/sides").rename(theirs / "sides/Finetune")
    with pytest.raises(RegistryError, match="Finetune: no task of tiny is called so.*colours, sides"):
        import_answers(theirs, asked, "theirs")
    with pytest.raises(RegistryError, match="holds files already"):
        export_answers(open_examined(lesson.recipe.run), theirs)
    with pytest.raises(RegistryError, match="no route rndom"):
        export_answers(open_examined(lesson.recipe.run), tmp_path / "out", "rndom")
