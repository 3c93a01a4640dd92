"""The page of a report: whole in one file, of bounded size, true to results and answers, deaf to strangers' markup."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import type_in
from hypothesis import given
from hypothesis import settings as examples_of_hypothesis
from hypothesis import strategies as st
from PIL import Image

from llava_cmoe.data.task_data import TaskData
from llava_cmoe.evaluation.aggregate import aggregate
from llava_cmoe.evaluation.eval_spec import eval_spec_of
from llava_cmoe.evaluation.log import (
    Answer,
    LocatorResults,
    Results,
    RouteResults,
    RunFacts,
    read_answers,
    write_answers,
)
from llava_cmoe.evaluation.metrics import DEFINITIONS, all_metrics
from llava_cmoe.evaluation.rescoring import open_examined
from llava_cmoe.registry.schema import recipe_facts
from llava_cmoe.registry.store import Registry
from llava_cmoe.report import page, page_examples
from llava_cmoe.report.page import page_of
from llava_cmoe.report.page_grids import STEPS
from llava_cmoe.report.pages import contrast, luminance
from llava_cmoe.report.paired_tests import compare, final_scores
from llava_cmoe.report.reported import Reported, open_reported
from llava_cmoe.report.tables import number

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "path", "polyline", "circle"}


@dataclass
class Shown:
    """One example of a page."""

    task: str
    outcomes: str
    picture: str = ""
    alt: str = ""
    question: str = ""
    truth: str = ""
    answers: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)


class Parsed(HTMLParser):
    """Tags, texts, tables (by run and key) and examples of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.grids: dict[str, list[list[str]]] = {}
        self.below: dict[str, list[str]] = {}
        self.examples: list[Shown] = []
        self.words: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self._grid = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in VOID:
            self._open.append((tag, found))
        if tag == "div" and "aria-labelledby" in found:
            self._grid = found["aria-labelledby"]
        if tag == "tr":
            self.grids.setdefault(self._grid, []).append([])
        if tag in ("td", "th"):
            self.grids[self._grid][-1].append("")
        if found.get("class") == "example":
            self.examples.append(Shown(found["data-task"], found["data-outcomes"]))
        if tag == "img":
            self.examples[-1].picture, self.examples[-1].alt = found["src"], found["alt"]
        if found.get("class") == "answer":
            self.examples[-1].answers.append("")
        if found.get("class") in ("right", "wrong"):
            self.examples[-1].verdicts.append(found["class"])

    def handle_endtag(self, tag):
        if tag in VOID:  # closed where it opens
            return
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        self.words.append(data)
        if not self._open:
            return
        tag, found = self._open[-1]
        if tag in ("style", "script", "title"):
            self.texts[tag] = self.texts.get(tag, "") + data
        if tag in ("td", "th"):
            self.grids[self._grid][-1][-1] += data
        if tag == "small" and self._open[-2][0] == "td":
            self.below.setdefault(self._grid, []).append(data)
        match found.get("class"):
            case "question":
                self.examples[-1].question += data
            case "answer":
                self.examples[-1].answers[-1] += data
            case "truth":
                self.examples[-1].truth += data


@pytest.fixture(scope="module")
def folder(lesson_of: Callable[..., tiny.Lesson]) -> Path:
    return lesson_of("cmoe").recipe.run


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Reported]:
    return open_reported([folder])


@pytest.fixture(scope="module")
def whole(runs: list[Reported]) -> Parsed:
    return Parsed(page_of(runs))


def check_alone(text: str) -> None:
    """Nothing in a page leads outside of it, and nothing in it runs but its own style and script."""
    found = Parsed(text)
    tags = [tag for tag, _ in found.tags]
    assert not {"link", "iframe", "object", "embed", "base", "frame", "video", "audio", "use", "image"} & set(tags)
    assert tags.count("script") == tags.count("style") == 1
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "action")]
        assert not attributes.get("src", "data:image/").removeprefix("data:image/").startswith(("http", "/", "."))
        assert attributes.get("href", "#").startswith("#")
        assert tag != "img" or attributes["alt"]
    assert "url(" not in found.texts["style"] and "@import" not in found.texts["style"]
    policy = next(one["content"] for _, one in found.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy and "*" not in policy
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.texts[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_page_is_whole_in_one_file_and_runs_nothing_of_others(runs: list[Reported]):
    text = page_of(runs)
    check_alone(text)
    assert "http://" not in text and "https://" not in text
    assert page_of(runs) == text


def test_numbers_are_those_of_the_results(runs: list[Reported], whole: Parsed):
    results = runs[0].results
    matrix = results.headline.matrix
    assert [row[1:] for row in whole.grids["run-1-matrix"][1:]] == [
        ["" if value is None and i > j else number(value) for i, value in enumerate(row)]
        for j, row in enumerate(matrix)
    ]
    assert whole.grids["run-1-matrix"][0][1:] == list(results.tasks)
    routes = whole.grids["run-1-routes"]
    assert routes[0][1:] == list(results.routes) == ["located", "oracle", "random"]
    for i, task in enumerate(results.tasks):
        assert routes[1 + i] == [task, *(number(one.matrix[-1][i]) for one in results.routes.values())]
    assert routes[-1] == ["BWT", *(number(one.metrics["bwt"]) for one in results.routes.values())]
    assert results.locator is not None
    assert [row[1:-1] for row in whole.grids["run-1-locator"][1:]] == [
        list(map(str, counts)) for counts in results.locator.confusion
    ]
    for task, trained, stored in whole.grids["run-1-costs"][1:-1]:
        assert trained == f"{results.trainable_parameters[task]:,}" and stored == f"{results.stored_bytes[task]:,}"
    phases = whole.grids["run-1-seconds"][0][1:]
    for task, *taken in whole.grids["run-1-seconds"][1:]:
        assert taken == [number(results.seconds[task][phase]) for phase in phases]
    facts = dict(whole.grids["facts"])
    assert (facts["method"], facts["seed"], facts["protocol"]) == ("cmoe", "0", f"strict {results.protocol_version}")
    assert results.base[:12] in facts["base"] and results.data[:12] in facts["data"]
    assert all(f"{name} {version}" in facts["versions"] for name, version in results.versions.items())


def test_growth_stands_with_the_use_of_the_probes(folder: Path, runs: list[Reported], whole: Parsed):
    results, [record] = runs[0].results, list(folder.glob("tasks/02_*/record.json"))
    used = json.loads(record.read_text())["facts"]["growth"]["frequencies"]
    lines = whole.grids["run-1-growth"][1:]
    added = [[results.growth[task].get(site, 0) for task in results.tasks] for site in reversed(results.sites)]
    assert [row[1:] for row in lines] == [[f"+{num}" if num else "0" for num in row] for row in added]
    assert whole.below["run-1-growth"] == [f"{100 * used[site][-1]:.1f} %" for site in reversed(results.sites)]


def test_curves_are_spoken_too(runs: list[Reported], whole: Parsed):
    matrix, spoken = runs[0].results.headline.matrix, [one["aria-label"] for tag, one in whole.tags if tag == "svg"]
    assert spoken == [
        f"colours: {number(matrix[0][0])} after colours, {number(matrix[1][0])} after sides",
        f"sides: {number(matrix[1][1])} after sides",
    ]


def test_examples_are_those_of_the_answers_files(folder: Path, runs: list[Reported], whole: Parsed):
    assert runs[0].examined is not None
    rows = {task: {row["id"]: row for row in found} for task, found in runs[0].examined.eval_spec.rows.items()}
    files = {"colours": ("after_01", "after_02"), "sides": ("after_02", "after_02")}
    assert len(whole.examples) == 2 * tiny.NUM_EVAL and {one.task for one in whole.examples} == set(tiny.TASKS)
    for task, stages in files.items():
        answered = [
            {one.prompt: one for one in read_answers(folder / f"answers/{stage}/{task}.located.jsonl")}
            for stage in stages
        ]
        asked = {prompt.replace("<image>\n", ""): prompt for prompt in answered[0]}
        for shown in (one for one in whole.examples if one.task == task):
            prompt = asked.pop(shown.question)
            texts = [one[prompt].text for one in answered]
            row = rows[task][answered[0][prompt].id]
            assert shown.answers == [text or "(empty)" for text in texts] and shown.truth == row["answer"]
            assert [verdict == "right" for verdict in shown.verdicts] == [text == row["answer"] for text in texts]
            assert bool(shown.picture) == (row["image"] is not None)
        assert not asked


def test_verdicts_mean_what_the_accuracy_means(whole: Parsed, runs: list[Reported]):
    # Of so few questions all are shown.
    for index, task in enumerate(tiny.TASKS):
        right = [one.verdicts[-1] == "right" for one in whole.examples if one.task == task]
        assert 100 * np.mean(right) == pytest.approx(runs[0].results.headline.matrix[-1][index])


def test_a_scorer_that_asks_others_is_not_run(runs: list[Reported], folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_examples, "NOT_RUN", ("gqa",))
    drawn = page_examples.examples_of(runs)
    assert drawn and not any(given.last.verdict or given.outcome for one in drawn for given in one.given)
    assert final_scores(folder, without=("gqa",)) == {} != final_scores(folder)


@pytest.mark.parametrize("growth", ["x", {"frequencies": ["x"]}, {"frequencies": {"x": []}}, {"frequencies": {"x": 1}}])
def test_facts_of_another_shape_are_a_note(folder: Path, growth: object, monkeypatch: pytest.MonkeyPatch):
    records = [one.model_copy(update={"facts": {"growth": growth}}) for one in Registry(folder).records()]
    monkeypatch.setattr(Registry, "records", lambda _: records)
    [run] = open_reported([folder])
    assert run.probe_use == {} and "no use of probes" in run.notes[0]


def test_without_its_data_a_run_has_no_pictures_and_says_so_in_one_line(folder: Path, tmp_path: Path):
    result = type_in("report", folder, "--out", tmp_path / "out", "--root", tmp_path / "nowhere")
    assert result.exit_code == 0, result.output
    found = Parsed((tmp_path / "out" / "report.html").read_text())
    assert len([word for word in found.words if "no pictures" in word]) == 1
    assert len(found.examples) == 2 * tiny.NUM_EVAL and any(any(one.answers) for one in found.examples)
    assert not any(one.picture or one.truth or one.verdicts for one in found.examples)


def test_runs_stand_side_by_side_with_the_intervals_of_compare(
    folder: Path, lesson_of: Callable[..., tiny.Lesson], tmp_path: Path
):
    folders = [folder, lesson_of("sequential_lora").recipe.run]
    result = type_in("report", *folders, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report.html").read_text()
    check_alone(text)
    found, expected = Parsed(text), compare(folders)
    cells = [row[1] for row in found.grids["compared-3"][1:]]
    assert len(cells) == len(expected.differences) == 3
    for cell, one in zip(cells, expected.differences, strict=True):
        assert cell.startswith(number(one.value)) and cell.endswith(f"p {one.p:.3f}")
    assert found.grids["facts"][2][1:] == ["cmoe", "sequential_lora"]
    assert len(found.examples) == 2 * tiny.NUM_EVAL and all(len(one.answers) == 4 for one in found.examples)
    assert {"run-1-matrix", "run-2-matrix", "run-1-growth"} <= found.grids.keys()
    for name in ("matrix", "forgetting", "comparison"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<text" not in (tmp_path / f"{name}.svg").read_text()
    tables = (tmp_path / "tables.md").read_text(), (tmp_path / "tables.tex").read_text()
    last = [number(one.results.headline.metrics["last"]) for one in open_reported(folders)]
    assert all(value in table for value in last for table in tables)


def written(folder: Path, word: str) -> Reported:
    """A run in which everything that a stranger may choose is `word`; its questions are not at hand."""
    tasks, matrix = (f"a{word}", f"b{word}"), ((50.0, None), (25.0, 75.0))
    answers = [Answer(str(place), word, place, None, f"<image>\n{word}") for place in range(2)]
    for stage in (1, 2):
        for task in tasks[:stage]:
            write_answers(folder / f"answers/after_{stage:02d}/{task}.located.jsonl", answers)
    results = Results.model_construct(
        run=word, method=word, seed=0, recipe={"data": {"sequence": word}, word: word}, base=word, data=word,
        tasks=tasks, num_samples=dict.fromkeys(tasks, 2), protocol=word, protocol_version=1, definitions=DEFINITIONS,
        versions={word: word}, failed={f"after_01/{word}.located": 1}, sites=(word, f"{word}.2"),
        growth={tasks[0]: {word: 1}}, trainable_parameters=dict.fromkeys(tasks, 1), seconds={tasks[0]: {word: 1.0}},
        routes={"located": RouteResults(matrix=matrix, detail={}, metrics=all_metrics(matrix))},
        locator=LocatorResults(
            columns=(*tasks, "base"), confusion=((1, 1, 0), (0, 2, 0)), accuracy=dict.fromkeys(tasks, 50.0),
            mean_accuracy=50.0,
        ),
    )  # fmt: skip
    return Reported(word, folder, results, None, (word,), {tasks[0]: {word: 0.5}})


HOSTILE = (
    "<script>alert(1)<\\script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onfocus=alert(1) autofocus x='",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;<!-- ",
)


@pytest.mark.parametrize("word", HOSTILE)
def test_what_a_stranger_wrote_is_text(tmp_path: Path, word: str):
    text = page_of([written(tmp_path / "hostile", word)])
    check_alone(text)
    plain, found = Parsed(page_of([written(tmp_path / "plain", "word")])), Parsed(text)
    assert [(tag, list(one)) for tag, one in found.tags] == [(tag, list(one)) for tag, one in plain.tags]
    assert [row[1] for row in found.grids["facts"]][1:3] == [word, word]
    assert found.examples[0].answers == [word, word] and found.examples[0].question == word.strip()


@given(st.text(st.sampled_from("<>/'\"&!-=` ascriptyle{}%;\n\x00\u2028"), max_size=30))
@examples_of_hypothesis(max_examples=20)
def test_whatever_an_answer_holds_the_page_has_the_same_tags(tmp_path_factory: pytest.TempPathFactory, text: str):
    def tags(answer: str) -> Iterator[str]:
        run = written(tmp_path_factory.mktemp("run"), "word")
        answers = [Answer("0", answer, None, None, f"</style>{answer}")]
        write_answers(run.folder / "answers/after_02/aword.located.jsonl", answers)
        return (tag for tag, _ in Parsed(page_of([run])).tags)

    assert list(tags(text)) == list(tags("x"))


def many_pictures(folder: Path, num_tasks: int, words: str) -> Reported:
    """A run of many tasks whose pictures are large and noise, which no format makes small."""
    names = tuple(f"task{place}" for place in range(num_tasks))
    tiny.write_data(folder, names=("sides",))
    noise = np.random.default_rng(0)
    for picture in folder.rglob("*.png"):
        Image.fromarray(noise.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(picture)
    for name in names:
        shutil.copytree(folder / "Instructions_Original/sides", folder / f"Instructions_Original/{name}")
        shutil.copytree(folder / "cl_dataset/sides", folder / f"cl_dataset/{name}")
    tasks = json.loads((folder / "sequence.yaml").read_text())["tasks"][0]
    document = [
        tasks | {"name": name, "train": f"{name}/train.json", "evaluate": f"{name}/test.json"} for name in names
    ]
    (folder / "sequence.yaml").write_text(json.dumps({"name": "many", "tasks": document}))
    recipe = tiny.recipe(folder / "run", folder, folder, "sequential_lora", "evaluation.routes=[oracle]")
    spec = eval_spec_of(TaskData.of(recipe), recipe.evaluation, recipe.run)
    for after in range(num_tasks):
        for task in range(after + 1):
            answers = [Answer(one, words, None, None, words) for one in spec.rows[names[task]]["id"]]
            write_answers(spec.answers_path(after, task, "oracle"), answers)
    facts = RunFacts(
        run="run", method="sequential_lora", seed=0, recipe=recipe_facts(recipe), base="b",
        data=TaskData.of(recipe).fingerprint,
    )  # fmt: skip
    results = aggregate(spec, facts, range(num_tasks))
    (recipe.run / "results.json").write_text(results.model_dump_json())
    return Reported("run", recipe.run, results, open_examined(recipe.run))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    return many_pictures(tmp_path_factory.mktemp("large"), num_tasks=16, words="very long " * 2000)


def test_many_large_pictures_and_long_answers_keep_a_page_small(large: Reported, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_examples, "PICTURE_BYTES", 300_000)
    text = page_of([large])
    found = Parsed(text)
    pictures = [one.picture for one in found.examples if one.picture]
    assert len(text.encode()) < page.LARGEST and sum(map(len, pictures)) <= 300_000
    assert 0 < len(pictures) < len(found.examples) == 16 * tiny.NUM_EVAL
    assert all(one.picture for one in found.examples[:: tiny.NUM_EVAL])  # every task has its first
    assert max(len(one.answers[0]) for one in found.examples) <= page_examples.LONGEST
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].split(",")[1])))
    assert max(picture.size) <= page_examples.SIDE


def test_no_more_examples_are_drawn_than_there_is_room_for(large: Reported, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_examples, "IN_ALL", 32)
    drawn = page_examples.examples_of([large])
    assert len(drawn) == 32 and {one.task for one in drawn} == set(large.results.tasks)
    assert page_examples.examples_of([large]) == drawn


def test_what_does_not_fit_is_left_out_and_the_page_says_so(large: Reported, monkeypatch: pytest.MonkeyPatch):
    sizes = {}
    for largest in (page.LARGEST, 350_000, 130_000):
        monkeypatch.setattr(page, "LARGEST", largest)
        text = page_of([large])
        sizes[len(text.encode())] = next(iter(re.findall(r"(Pictures|Examples)(?:, and.*?)? are left out", text)), "")
        assert len(text.encode()) <= largest
    assert list(sizes.values()) == ["", "Pictures", "Examples"]


def test_every_shade_is_read_with_enough_contrast(whole: Parsed):
    shades = re.findall(r"\.s\d+ \{ background: #(\w{6}); color: #(\w{6}); \}", whole.texts["style"])
    assert len(shades) == STEPS + 1

    def light(colour: str) -> float:
        return luminance(*(int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)))

    assert all(contrast(light(ground), light(ink)) >= 4.5 for ground, ink in shades)
    grounds = [light(ground) for ground, _ in shades]
    assert grounds == sorted(grounds, reverse=True)  # the order is one of lightness: read with any colour vision


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser_the_script_runs_and_no_policy_is_broken(whole: Parsed, runs: list[Reported], tmp_path: Path):
    (tmp_path / "report.html").write_text(page_of(runs))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr")
    seen = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert f"{len(whole.examples)} of {len(whole.examples)} shown" in seen.stdout
    assert "Content Security Policy" not in seen.stderr
