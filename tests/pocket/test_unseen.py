"""The ninth task is the same bytes from a seed, is read like any other, and is no part of the eight."""

import json
from pathlib import Path
from random import Random

from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.coin import read_eval
from llava_cmoe.data.conversation import split
from llava_cmoe.data.paths import eval_file
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.pocket.backbone import build_processor
from llava_cmoe.pocket.tasks import TASKS, UNSEEN, make_pocket


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def render(root: Path, seed: int = 3) -> Path:
    make_pocket(root, seed=seed, train_rows=2, test_rows=12, tasks=[UNSEEN.name])
    return root


def test_a_seed_makes_the_same_rows_and_pictures_and_another_seed_others(tmp_path: Path):
    one, again, other = (content(render(tmp_path / name, seed)) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert one == again and any(name.endswith(".png") for name in one)
    assert all(one[name] != other[name] for name in one.keys() & other.keys())


def test_it_shares_no_file_with_the_eight_and_is_not_written_among_them(tmp_path: Path):
    make_pocket(tmp_path / "eight", train_rows=1, test_rows=1)
    eight, ninth = content(tmp_path / "eight"), content(render(tmp_path / "ninth"))
    assert ninth and not eight.keys() & ninth.keys()
    assert UNSEEN not in TASKS and not any(UNSEEN.name in name for name in eight)


def test_it_is_read_without_a_problem_and_a_quarter_has_no_picture(tmp_path: Path):
    sequence = load_sequence("pocket_unseen")
    assert check_sequence(render(tmp_path), sequence).ok
    assert len(read_eval(tmp_path, sequence.tasks[0])) == 12
    share = sum(UNSEEN.draw(Random(str(number))).view is None for number in range(1000)) / 1000
    assert 0.2 < share < 0.3


def test_it_is_asked_word_for_word_as_the_backbone_was_pretrained_and_its_answers_fit(tmp_path: Path):
    processor, (task,) = build_processor(), load_sequence("pocket_unseen").tasks
    rows = read_eval(render(tmp_path), task)
    raw = json.loads(eval_file(tmp_path, task).read_text())
    for row, written in zip(rows, raw, strict=True):
        content = [{"type": "image"}] if row["image"] else written["text"]
        asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert split(processor, row["turns"])[0].text == asked
        assert len(processor.tokenizer.tokenize(row["answer"])) < task.max_new_tokens  # the end token comes after it
    assert {bool(row["image"]) for row in rows} == {True, False}
