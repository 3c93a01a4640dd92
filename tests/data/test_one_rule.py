"""Whatever a file of rows holds: the check of data says it is well exactly if training and evaluation take it.

Each row here is strange in one or two places. Both judge it; where they refuse it, it is one readable line.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_model import VICUNA_TEMPLATE

from llava_cmoe.backbones.loading import load_processor
from llava_cmoe.data.check import check_sequence
from llava_cmoe.data.coin import NO_PICTURES
from llava_cmoe.data.coin_rows import row_id_of
from llava_cmoe.data.encoding import PromptRows, SampleRows
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.spelling import is_blank
from llava_cmoe.data.task_data import TaskData
from llava_cmoe.runs.run import check_rows

SCORERS = ("gqa", "grounding", "textvqa", "scienceqa", "captions", "vqa_soft", "numeric")
LONG = "word " * 20_000
PICTURES = ("a.png", "thin.png", "dot.png", "three.png")
TEXTS = st.sampled_from(
    ["", " ", "\n", "\t\r\n", "\u200b", "\ufeff", "\0", "a\0b", "\x1b[2J", "a\rb", "a\u2028b", "\u202eabc", "\ud800",
     "x" * 5000, LONG, "<image>", "<image>\n", "<image><image>", "a <image>", "</s>", "<s>", "USER:", "ASSISTANT: x",
     "{{ 1/0 }}", "{% raw %}", "é\u0301", "😀", "\x1c", " a", "a ", "0", "[0, 0, 1, 1]", "[0, 0, 1e-400, 1]",
     "[1, 1, 0, 0]", "[nan, 0, 1, 1]", "A", "B"]
) | st.text(max_size=8)  # fmt: skip
NUMBERS = st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 10**5000, 0.5, 1e308, float("inf"), float("nan")])
DEEP = st.sampled_from([1, 20, 900]).map(lambda depth: json.loads("[" * depth + "]" * depth))
SIMPLE = TEXTS | NUMBERS | st.booleans() | st.none()
ANY = SIMPLE | DEEP | st.lists(SIMPLE, max_size=2) | st.dictionaries(TEXTS, SIMPLE, max_size=2)
PATHS = st.sampled_from(
    [*PICTURES, "", ".", "..", "/", "sub", "sub/", "./a.png", "sub/../a.png", "../cl_dataset/a.png", "../x.png",
     "/etc/passwd", "link.png", "a.png/", "a.png\0", "a\nb.png", "A.PNG", "x" * 300 + ".png", "x/" * 3000, "~/a.png",
     "file:///a.png", "pipe"]
)  # fmt: skip
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": ANY}) | ANY
ANSWERS = st.lists(SIMPLE, max_size=3) | SIMPLE | st.just(["a"] * 10)
SIZES = st.lists(NUMBERS, max_size=3) | st.sampled_from([[20, 20], [2**31, 1], [2**31 - 1, 1], [10**30, 1]])
FIELDS = {
    "train": {"id": ANY, "question_id": ANY, "image": PATHS | ANY, "images": st.lists(PATHS, max_size=2),
              "conversations": st.lists(TURN, max_size=4) | ANY, "note": ANY, "video": ANY},
    "test": {"id": ANY, "question_id": ANY, "image": PATHS | ANY, "text": ANY, "answer": ANY, "answers": ANSWERS,
             "answer_bbox": ANY, "choices": ANSWERS, "size": SIZES, "meta": ANY},
}  # fmt: skip
SOUND: dict[str, dict[str, Any]] = {
    "train": {"id": "t", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                             {"from": "gpt", "value": "A"}]},
    "test": {"id": "e", "image": "a.png", "text": "What?", "answer": "A", "answers": ["A"] * 10, "choices": ["a", "b"],
             "answer_bbox": "[0, 0, 1, 1]", "size": [20, 20]},
}  # fmt: skip


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    kind = draw(st.sampled_from(sorted(FIELDS)))
    keys = draw(st.lists(st.sampled_from(sorted(FIELDS[kind])), min_size=1, max_size=2, unique=True))
    return kind, {key: draw(FIELDS[kind][key]) for key in keys}


@pytest.fixture(scope="module")
def judge(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[str], str | None]]:
    """What the check, and what training and evaluation, make of one changed row of a sound root."""
    root = tmp_path_factory.mktemp("rule")
    pictures = root / "cl_dataset"
    (pictures / "sub").mkdir(parents=True)
    (root / "x.png").write_bytes(b"no picture")
    for name, size in zip(PICTURES, ((20, 30), (900, 1), (1, 1), (3, 3)), strict=True):
        Image.new("RGB", size, (200, 30, 30)).save(pictures / name)
    (pictures / "link.png").symlink_to(root / "x.png")
    backbone = Path(shutil.copytree(tiny_backbone, root / "backbone"))

    def judged(
        kind: str, change: dict[str, Any], scorer: str, geometry: str = "pad", template: str = VICUNA_TEMPLATE
    ) -> tuple[list[str], str | None]:
        (backbone / "chat_template.jinja").write_text(template)
        processor = load_processor(str(backbone))
        for name in SOUND:
            row = {**SOUND[name], **(change if name == kind else {})}
            file = root / f"Instructions_Original/{name}.json"
            file.parent.mkdir(exist_ok=True)
            try:
                file.write_text(json.dumps([row, {**SOUND[name], "id": "other"}]))
            except ValueError:  # Python writes no such number
                return [], None
        task = {"name": "t", "train": "train.json", "evaluate": "test.json", "scorer": scorer, "max_new_tokens": 3,
                "geometry": geometry}  # fmt: skip
        (root / "sequence.yaml").write_text(json.dumps({"name": "one", "tasks": [task]}))
        report = check_sequence(root, load_sequence(str(root / "sequence.yaml")), processor=processor)
        recipe = tiny.recipe(root / "run", root, backbone, "sequential_lora", "training.max_length=100000")
        try:
            data = TaskData.of(recipe)
            data.check(reads_images=True)
            check_rows(recipe, data, 0)
        except DataError as error:
            return [str(problem) for problem in report.problems], str(error)
        (task_spec,) = data.sequence.tasks
        encoding = data.encoding(task_spec, processor)
        for rows in (SampleRows(data.train["t"], encoding, 100_000), PromptRows(data.evaluate["t"], encoding)):
            assert all(len(rows[number]["input_ids"]) for number in range(len(rows)))
        return [str(problem) for problem in report.problems], None

    return judged


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(changes(), st.sampled_from(SCORERS), st.sampled_from(["pad", "crop"]))
def test_the_check_and_training_have_one_rule(judge, changed: tuple[str, dict[str, Any]], scorer: str, geometry: str):
    problems, refusal = judge(*changed, scorer, geometry)
    assert bool(problems) == (refusal is not None), (problems, refusal)
    assert refusal is None or refusal in problems
    for line in problems:
        assert len(line.splitlines()) == 1 and len(line) < 700 and "\x1b" not in line, line


BREAKING = ["a\nb", "a\r", "\t", "\x00", "a\x1b[2J", "a\x85b", "a\u2028b", "a\u2029", "\u202ea", "a\u2066b", " ",
            "\u200b", "x" * 501]  # fmt: skip


@pytest.mark.parametrize("kind", ["train", "test"])
@pytest.mark.parametrize("row_id", BREAKING, ids=ascii)
def test_an_id_that_would_break_a_line_is_refused_by_both(judge, kind: str, row_id: str):
    problems, refusal = judge(kind, {"id": row_id}, "gqa")
    assert refusal is not None and "cannot stand in a file of answers" in refusal and refusal in problems
    assert len(refusal.splitlines()) == 1


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cf"]), min_size=1, max_size=9) | st.integers()
)
def test_any_other_id_is_its_text(row_id: str | int):
    assume(str(row_id).strip() and not is_blank(str(row_id)))
    assert row_id_of({"id": row_id}) == str(row_id)


@pytest.mark.parametrize("side", [2**31, 2**63, 10**30])
def test_a_size_that_no_row_can_hold_is_refused_by_both(judge, side: int):
    problems, refusal = judge("test", {"size": [side, 3]}, "grounding")
    assert refusal in problems and "malformed size" in str(refusal)


THINKING = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else "
    "p['text'].split('</think>')[-1] }}{% endfor %}{{ eos_token }}{% endfor %}{{ 'assistant: ' if "
    "add_generation_prompt }}"
)
REFUSING = "{% if 'tea' in messages[0]['content'][-1]['text'] %}{{ raise_exception('no tea') }}{% endif %}" + THINKING


@pytest.mark.parametrize(
    ("template", "kind", "change"),
    [
        (THINKING, "train", {"conversations": [{"from": "human", "value": "<image>\nq"},
                                               {"from": "gpt", "value": "hm</think> so"}]}),
        (REFUSING, "test", {"text": "tea?"}),
    ],
)  # fmt: skip
def test_a_row_that_only_this_template_cannot_render_is_found_by_both(
    judge, template: str, kind: str, change: dict[str, Any]
):
    problems, refusal = judge(kind, change, "gqa", template=template)
    assert refusal in problems and "chat template of" in str(refusal)
    assert judge("train", {}, "gqa", template=template) == ([], None)


def test_a_picture_for_a_backbone_of_text_alone_is_found_by_the_check(tiny_data: Path, tmp_path: Path):
    processor = families.make("llama").processor
    found = check_sequence(tiny_data, load_sequence(str(tiny_data / "sequence.yaml")), processor=processor).problems
    assert found and {problem.reason for problem in found} == {NO_PICTURES}
