"""The pocket sequence is CoIN in miniature: files, order and answer formats, and the same bytes from a seed."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.coin import read_eval, read_train
from llava_cmoe.data.images import pad_to_square
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.pocket import world as world
from llava_cmoe.pocket.backbone import build_tokenizer
from llava_cmoe.pocket.captions import caption, spoken
from llava_cmoe.pocket.drawings import OBJECTS
from llava_cmoe.pocket.tasks import LETTER, LOCATE, SHORT, TASKS, Draw, PocketTask, make_pocket

COIN_ORDER = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA")
NUM_TRAIN, NUM_TEST = 24, 8
TASK = {task.name: task for task in TASKS}
PAD = (122, 116, 104)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pocket")
    make_pocket(root, seed=3, train_rows=NUM_TRAIN, test_rows=NUM_TEST)
    return root


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def draws(task: PocketTask, count: int) -> Iterator[Draw]:
    return (task.draw(Random(f"{task.name}/{number}")) for number in range(count))


def rows_of(root: Path, task: str, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((root / "Instructions_Original" / task / f"{split}.json").read_text())
    return rows


def questions_of(row: dict[str, Any]) -> list[str]:
    turns = row.get("conversations", [{"from": "human", "value": row.get("text")}])
    return [turn["value"].removeprefix("<image>\n") for turn in turns if turn["from"] == "human"]


def test_a_seed_makes_the_same_bytes_and_another_seed_others(root: Path, tmp_path: Path):
    size = {"train_rows": NUM_TRAIN, "test_rows": NUM_TEST, "tasks": ["ScienceQA", "GQA"]}
    make_pocket(tmp_path / "again", seed=3, **size)
    again, first = content(tmp_path / "again"), content(root)
    assert again.items() <= first.items() and any(name.endswith(".png") for name in again)
    make_pocket(tmp_path / "other", seed=4, **size)
    other = content(tmp_path / "other")
    assert all(other[name] != again[name] for name in again if name.endswith("train.json"))


def test_a_smaller_sequence_is_the_beginning_of_a_larger_one(root: Path, tmp_path: Path):
    make_pocket(tmp_path, seed=3, train_rows=5, test_rows=2, tasks=["TextVQA", "Grounding", "VQAv2"])
    for task in ("TextVQA", "Grounding", "VQAv2"):
        for split, count in (("train", 5), (TASK[task].evaluate, 2)):
            assert rows_of(tmp_path, task, split) == rows_of(root, task, split)[:count]
    small, large = content(tmp_path / "cl_dataset"), content(root / "cl_dataset")
    pictures = {name: data for name, data in small.items() if name.endswith(".png")}
    assert len(pictures) == 2 * (5 + 2) and pictures.items() <= large.items()


def test_no_question_about_a_picture_is_both_learned_and_evaluated(root: Path):
    for task in TASKS:
        keys: dict[str, set[tuple[str, str]]] = {"train": set(), "evaluate": set()}
        for split in keys:
            for row in rows_of(root, task.name, "train" if split == "train" else task.evaluate):
                picture = (root / "cl_dataset" / row["image"]).read_bytes() if "image" in row else b""
                keys[split] |= {(hashlib.sha256(picture).hexdigest(), question) for question in questions_of(row)}
        assert keys["train"] and not keys["train"] & keys["evaluate"]


def test_text_only_rows_are_drawn_again_until_they_are_new():
    seen = [(repr(draw.view), draw.turns[0][0]) for draw in draws(TASK["ScienceQA"], 3000) if draw.view is None]
    assert len(set(seen)) < len(seen)  # alone, a draw does repeat


def test_the_eight_tasks_of_coin_are_read_in_order_without_a_problem(root: Path):
    sequence = load_sequence("pocket")
    assert tuple(task.name for task in TASKS) == COIN_ORDER
    assert sequence.names == tuple(name.lower() for name in COIN_ORDER)
    report = check_sequence(root, sequence)
    assert report.ok and not report.overlaps
    for task in sequence.tasks:
        train, evaluate = read_train(root, task), read_eval(root, task)
        assert (len(train), len(evaluate)) == (NUM_TRAIN, NUM_TEST)
        for row in evaluate:
            assert all(len(row["answers"]) == (10 if task.name == "textvqa" else 0) for row in evaluate)
            assert bool(row["choices"]) == (task.name == "scienceqa") and bool(row["box"]) == (task.name == "grounding")


def test_rows_keep_coins_instructions_and_answer_formats():
    for task in TASKS:
        for draw in draws(task, 200):
            for question, answer in draw.turns:
                if task.name == "ScienceQA":
                    assert question.endswith(LETTER) and answer in "ABCD"[: len(draw.choices)]
                    assert (
                        question.split("\n")[1 + "ABCD".index(answer)]
                        == f"{answer}. {draw.choices['ABCD'.index(answer)]}"
                    )
                elif task.name == "Grounding":
                    assert question.startswith(LOCATE) and re.fullmatch(r"\[(\d\.\d\d, ){3}\d\.\d\d\]", answer)
                else:
                    assert question.endswith(SHORT) and len(answer.split()) <= 2


def test_a_quarter_of_scienceqa_is_text_only_and_nothing_else_is():
    for task in TASKS:
        share = sum(draw.view is None for draw in draws(task, 1000)) / 1000
        assert 0.2 < share < 0.3 if task.name == "ScienceQA" else share == 0


def test_whole_questions_are_asked_in_several_tasks():
    asked = {task.name: {turns[0] for draw in draws(task, 1500) for turns in draw.turns[:1]} for task in TASKS}
    for family in ({"TextVQA", "VizWiz", "OCRVQA"}, {"ImageNet", "VizWiz"}, {"GQA", "VQAv2"}):
        assert set.intersection(*(asked[name] for name in family))
    for alone in ("ScienceQA", "Grounding"):
        assert not asked[alone] & set().union(*(asked[name] for name in asked if name != alone))


def test_words_alone_do_not_tell_the_task():
    learned = {task.name: Counter(draw.turns[0][0] for draw in draws(task, 2000)) for task in TASKS}
    right = 0
    for task in TASKS:
        fresh = [task.draw(Random(f"fresh/{task.name}/{number}")).turns[0][0] for number in range(300)]
        right += sum(max(learned, key=lambda name: learned[name][question]) == task.name for question in fresh)
    assert right / (300 * len(TASKS)) < 0.76


def test_some_tasks_have_several_turns():
    turns = {task.name: {len(draw.turns) for draw in draws(task, 50)} for task in TASKS}
    assert turns["GQA"] == turns["VQAv2"] == {2} and turns["Grounding"] == {1, 2}


def test_pictures_differ_in_size_and_aspect_ratio(root: Path):
    for task in TASKS:
        rows = [row for row in rows_of(root, task.name, "train") if "image" in row]
        sizes = {Image.open(root / "cl_dataset" / row["image"]).size for row in rows}
        ratios = [width / height for width, height in sizes]
        assert len(sizes) > len(rows) / 2 and max(ratios) / min(ratios) > 1.1
    assert min(ratios) < 1 and max(max(size) for size in sizes) <= 180


def test_there_are_twenty_classes_of_objects_and_more():
    assert len(OBJECTS) >= 20
    assert {draw.turns[0][1] for draw in draws(TASK["ImageNet"], 1000)} == set(OBJECTS)


def test_vizwiz_says_unanswerable_where_nothing_can_be_seen():
    answers: dict[tuple[type, bool], set[str]] = defaultdict(set)
    for draw in draws(TASK["VizWiz"], 800):
        assert isinstance(draw.view, (world.ObjectView, world.Sign))
        answers[type(draw.view), draw.view.flaw == "unreadable"].add(draw.turns[0][1])
    assert answers[world.ObjectView, True] == answers[world.Sign, True] == {"unanswerable"}
    assert answers[world.Sign, False] <= set(world.SIGN_WORDS)
    assert answers[world.ObjectView, False] <= {*OBJECTS, *world.COLOURS}


def test_an_unreadable_picture_shows_less_than_any_other():
    for draw in draws(TASK["VizWiz"], 100):
        assert isinstance(draw.view, (world.ObjectView, world.Sign))
        if draw.view.flaw in ("clear", "unreadable"):
            continue
        worse = np.asarray(world.render(replace(draw.view, flaw="unreadable")), dtype=float)
        assert worse.std() < np.asarray(world.render(draw.view), dtype=float).std()


def test_ten_annotators_mostly_read_the_sign():
    for draw in draws(TASK["TextVQA"], 200):
        assert len(draw.annotators) == 10 and draw.annotators.count(draw.turns[0][1]) >= 6


def test_grounding_and_vqav2_ask_about_the_same_pictures(root: Path):
    for split, other in (("train", "train"), ("test", "val")):
        left, right = (rows_of(root, *place) for place in (("Grounding", split), ("VQAv2", other)))
        assert [row["image"] for row in left] == [row["image"] for row in right]


def test_a_box_lies_around_the_thing_it_names():
    checked = 0
    for draw in draws(TASK["Grounding"], 60):
        assert isinstance(draw.view, world.Scene)
        square = np.asarray(pad_to_square(world.render(draw.view), PAD))
        for question, answer in draw.turns:
            colour, kind = question.removeprefix(f"{LOCATE}the ").rstrip(".").split()
            others = [thing for thing in draw.view.things if thing.colour == colour and thing.kind != kind]
            checked += 1
            _assert_around(square, world.COLOURS[colour], box_of(answer), [t.box(draw.view.canvas) for t in others])
    assert checked > 60


def test_the_files_hold_these_boxes_and_pictures(root: Path):
    (task,) = [task for task in load_sequence("pocket").tasks if task.name == "grounding"]
    for row in read_eval(root, task):
        colour = row["turns"][0]["text"].removeprefix(f"<image>\n{LOCATE}the ").split()[0]
        square = np.asarray(pad_to_square(Image.open(row["image"]), PAD))
        x0, y0, x1, y1 = (int(value * len(square)) for value in row["box"])
        assert (square[y0:y1, x0:x1] == world.COLOURS[colour]).all(axis=-1).any()


def box_of(answer: str) -> tuple[float, ...]:
    return tuple(float(value) for value in answer.strip("[]").split(", "))


def _assert_around(
    square: np.ndarray, colour: tuple[int, int, int], box: tuple[float, ...], others: list[tuple[float, ...]]
) -> None:
    """The colour fills much of the box and occurs nowhere outside of it, other things of that colour aside."""
    side, margin = len(square), 2  # a box has two decimals: up to one pixel, and half a pixel of rounding in drawing
    painted = (square == colour).all(axis=-1)
    for other in others:
        x0, y0, x1, y1 = (int(value * side) for value in other)
        painted[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin] = False
    rows, columns = np.nonzero(painted)
    x0, y0, x1, y1 = (value * side for value in box)
    assert x0 - margin <= columns.min() and columns.max() <= x1 + margin
    assert y0 - margin <= rows.min() and rows.max() <= y1 + margin
    assert (columns.max() - columns.min()) * (rows.max() - rows.min()) > 0.5 * (x1 - x0) * (y1 - y0)


def test_the_backbones_tokenizer_knows_every_word_of_tasks_and_captions(tokenizer: PreTrainedTokenizerFast):
    texts: set[str] = set()
    for task in TASKS:
        for draw in draws(task, 400):
            texts |= {text for turn in draw.turns for text in turn} | set(draw.annotators) | set(draw.choices)
    for number in range(1500):
        rng = Random(f"words/{number}")
        views = (world.random_scene(rng), world.random_object(rng), world.random_sign(rng), world.random_book(rng))
        texts |= {*spoken(rng), *(caption(view, rng) for view in views)}
    spelled = {
        token for text in texts for token in tokenizer.tokenize(text) if token.startswith("##") or token == "<unk>"
    }
    assert not spelled
    assert "##" in "".join(tokenizer.tokenize("zyzzyva"))  # what it does with a word that it does not know


def test_a_sequence_that_runs_out_of_new_rows_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "llava_cmoe.pocket.tasks.TASKS", (PocketTask("Same", lambda rng: Draw(None, [("?", "a")]), ("a", "b")),)
    )
    with pytest.raises(ValueError, match="Same: no new row after 1000 draws; ask for fewer rows than 2"):
        make_pocket(tmp_path, train_rows=2, test_rows=1)
