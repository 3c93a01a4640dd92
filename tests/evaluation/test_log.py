"""Answers files survive a cut and odd text; results.json keeps everything, and a comparison leaves out only times."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_cmoe.evaluation.log import (
    Answer,
    LogError,
    Results,
    RouteResults,
    comparable,
    read_answers,
    read_results,
    write_answers,
    write_results,
)
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.provenance.versions import versions

# A busy machine is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

MATRIX = ((80.0, None), (10.0, 60.0))


def make_results(**changes: object) -> Results:
    fields = {
        "run": "demo",
        "method": "cmoe",
        "seed": 3,
        "recipe": {"training": {"epochs": 1.0}},
        "base": "b4se",
        "data": "d4ta",
        "tasks": ("GQA", "OCRVQA"),
        "num_samples": {"GQA": 4, "OCRVQA": 5},
        "protocol": "strict",
        "protocol_version": 1,
        "definitions": DEFINITIONS,
        "routes": {"located": RouteResults(matrix=MATRIX, detail={}, metrics=all_metrics(MATRIX))},
        "locator": None,
        "seconds": {"GQA": {"training": 12.5}},
        "versions": versions(),
    }
    return Results.model_validate(fields | changes)


@UNHURRIED
@given(text=st.text(), prompt=st.text(), score=st.none() | st.floats(allow_nan=False, allow_infinity=False))
def test_any_answer_is_one_line_and_comes_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, text: str, prompt: str, score: float | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    answers = [Answer("1", text, 0, score, prompt), Answer("2", text, None, None, prompt)]
    write_answers(path, answers)
    assert path.read_bytes().count(b"\n") == 2
    assert read_answers(path) == answers


@pytest.mark.parametrize("num_bytes_lost", [1, 5, 40])
def test_a_cut_last_line_is_left_out(tmp_path: Path, num_bytes_lost: int) -> None:
    path = tmp_path / "cut.jsonl"
    answers = [Answer(str(number), "yes", 1, 0.5, "Is it?") for number in range(3)]
    write_answers(path, answers)
    os.truncate(path, path.stat().st_size - num_bytes_lost)
    assert read_answers(path, at_work=True) == answers[:2]
    with pytest.raises(LogError, match="cut.jsonl:3: "):
        read_answers(path)


@pytest.mark.parametrize("line", ["{", '{"id": "1"}', "[]", '{"id": "1", "text": "", "answer": ""}'])
def test_a_damaged_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(Answer("0", "yes", None, None, "Is it?").to_line() + line.encode() + b"\n")
    with pytest.raises(ValueError, match=r"damaged\.jsonl:2: not an answer"):
        read_answers(path)


def test_results_come_back_unchanged_and_nothing_is_left_beside_them(tmp_path: Path) -> None:
    results = make_results()
    write_results(tmp_path / "run" / "results.json", results)
    assert read_results(tmp_path / "run" / "results.json") == results
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.json"]


def test_equal_results_give_equal_bytes_with_null_for_what_was_not_measured(tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        write_results(tmp_path / name, make_results())
    content = (tmp_path / "one.json").read_bytes()
    assert content == (tmp_path / "two.json").read_bytes()
    assert json.loads(content)["routes"]["located"]["matrix"] == [[80.0, None], [10.0, 60.0]]


def test_definitions_stand_beside_every_metric() -> None:
    document = json.loads(make_results().model_dump_json())
    assert list(document["definitions"]) == list(document["routes"]["located"]["metrics"])


def test_a_file_of_the_first_format_is_read_as_it_was(tmp_path: Path) -> None:
    document = json.loads(make_results().model_dump_json()) | {"format": 1}
    del (
        document["bootstrap"],
        document["routes"]["located"]["intervals"],
        document["routes"]["located"]["metric_intervals"],
    )
    (tmp_path / "old.json").write_text(json.dumps(document))
    old = read_results(tmp_path / "old.json")
    assert old.format == 1 and old.headline.intervals == () and old.headline.matrix == MATRIX


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"results\.json: not a results file"):
        read_results(path)


def test_only_times_are_left_out_of_a_comparison() -> None:
    faster = make_results(seconds={"GQA": {"training": 1.0}})
    assert comparable(faster) == comparable(make_results())
    assert comparable(make_results(seed=4)) != comparable(make_results())
    assert set(make_results().model_dump()) - set(comparable(make_results())) == {"seconds"}


def test_times_inside_other_facts_are_left_out_too() -> None:
    slow, fast = ({"probe_seconds": value, "probe_parameters": 7} for value in (9.0, 1.0))
    assert comparable(make_results(recipe={"a": [slow]})) == comparable(make_results(recipe={"a": [fast]}))
    assert comparable(make_results(recipe={"a": [slow]}))["recipe"] == {"a": [{"probe_parameters": 7}]}


@given(data=st.data())
def test_whatever_is_damaged_in_an_answers_file_is_named_or_leaves_the_answers_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    answers = [Answer(str(number), "ja, ü", 1, 0.5, "Is it?", None if number else "why") for number in range(3)]
    write_answers(path, answers)
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    put = data.draw(st.binary(max_size=3) | st.sampled_from([b"\n", b'"', b"NaN", b"true", b"9" * 4400, b"[" * 9999]))
    path.write_bytes(content[:place] + put + content[place + data.draw(st.integers(0, 40)) :])
    try:
        read = read_answers(path)
    except LogError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)
    else:
        assert all(type(one.text) is type(one.prompt) is str and type(one.located) in (int, type(None)) for one in read)
