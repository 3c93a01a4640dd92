"""The README tells the truth: its commands run, its tree is the repository's, its table is what was measured.

Commands run as they stand, in a folder where what they name exists: a finished tiny run stands for `runs/pocket_cmoe`.
Training is only tried (`--dry-run`), make only asked what it would do (`-n`).
"""

import glob
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import pytest
from official_files import write_answers
from original import write_parts
from tiny import Lesson

from llava_cmoe.analyses.expert_similarity import Diversity
from llava_cmoe.analyses.probe_report import Calibration
from llava_cmoe.analyses.unseen import UnseenResults
from llava_cmoe.cli import main
from llava_cmoe.evaluation.log import read_results
from llava_cmoe.merging.summary import MergeSummary, merges_markdown
from llava_cmoe.planning.estimate import Budget
from llava_cmoe.pocket.root import make_pocket_root
from llava_cmoe.report.headline import Headline, headline_markdown
from llava_cmoe.report.studies import read_study, study_markdown

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
SUMMARY = "eval/results/pocket.json"
UNFINISHED = "*The headline runs are not finished: no number is stated before they are.*"
WHOLE_FOLDERS = (
    *("tests/", "eval/results/"),
    *("llava_cmoe/pocket/weights/", "llava_cmoe/backbones/known_configs/"),
)
"""One line of the tree stands for all of each."""

GLOSSARY = {
    *("backbone", "site", "expert", "bank", "router", "gate", "plan", "probe", "growth", "locator", "route"),
    *("task", "sequence", "stage", "run", "registry", "merge", "stand-in"),
    *("immediate", "last", "MAA", "BWT", "study", "variant", "budget"),
}
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
BASE = "runs/backbones/vicuna-7b-v1.5-stage1"
"""What CoIN starts from; in these tests the tiny backbone."""
PROGRAMS = ("make", "source", "python", "pip", "git", "accelerate", "llava-cmoe")
"""What a command in a sentence begins with."""


def generated(name: str) -> str:
    """The part between two comments."""
    [part] = re.findall(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", README, re.DOTALL)
    return str(part)


def commands() -> Iterator[str]:
    """Every command, whether in a block or in a sentence."""
    for language, block in FENCES:
        if language == "bash":
            yield from (" ".join(shlex.split(line, comments=True)) for line in block.replace("\\\n", "").splitlines())
    yield from re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", PROSE)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pocket") / "root"
    make_pocket_root(root, lambda *_: None, train_rows=2, test_rows=1)
    return root


@pytest.fixture
def workplace(
    lesson_of: Callable[[str], Lesson], pocket: Path, tiny_data: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch
) -> Path:
    """A checkout without the library, and in it whatever the README's commands name."""
    for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("train", "eval", "data_configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for run in ("runs/pocket_cmoe", "runs/headline/cmoe_0"):
        shutil.copytree(lesson_of("cmoe").recipe.run, tmp_path / run)
    shutil.copytree(lesson_of("cmoe", "data.train_rows=18").recipe.run, tmp_path / "runs/spare")
    make_pocket_root(
        tmp_path / "runs/data/pocket_unseen", lambda *_: None, train_rows=1, test_rows=2, tasks=["Pretraining"]
    )
    (tmp_path / "ROOT").symlink_to(pocket)
    (tmp_path / "MODEL").symlink_to(tiny_backbone)
    (tmp_path / "runs/backbones").mkdir()
    (tmp_path / BASE).symlink_to(tiny_backbone)
    [(_, mine)] = [block for block in FENCES if block[1].startswith("name: mine\n")]
    (tmp_path / "mine.yaml").write_text(mine)
    (tmp_path / "MINE").symlink_to(tiny_data)
    asked = json.loads((pocket / "Instructions_Original/VizWiz/val.json").read_text())
    write_answers(tmp_path / "merge.jsonl", *((row["question_id"], "a pear") for row in asked))
    shutil.copy(next((tiny_data / "cl_dataset").rglob("*.png")), tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(entry: Callable[[], object], words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of a command of this repository, started in this process."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        entry()
    return int(left.value.code or 0)


def planned(budget: Budget) -> str:
    """What the README says of the plan of a 7B."""
    likely = budget.courses[0]
    expert, stored = max(budget.expert_parameters.values()), max(size.stored.bytes for size in likely.tasks)
    most = {"none": 0.0, "nf4": 0.0}
    for need in budget.needs:
        if need.strategy == "none or DDP":
            most = {
                name: max(size, (need.memory.states(name) or 0) + need.activations.kept) for name, size in most.items()
            }
    return (
        f"{expert:,} parameters an expert, {likely.mean / 1e6:.1f} million trained per task if {likely.num_grown} of "
        f"{len(budget.expert_parameters)} layers grow, {stored / 1e6:.0f} MB a task on disk, and "
        f"{most['none'] / 1e9:.1f} GB on each of eight GPUs at two samples a batch "
        f"({most['nf4'] / 1e9:.1f} with the LLM in 4 bits), temporary buffers not counted."
    )


NEED_NOTHING_MORE = {"eval", "merge", "unseen", "report", "plan", "compare", "rescore", "answers", "reproduce"}
"""Commands that a tiny run can be given as they stand."""


def attempt(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of a command, or of its dry run; one that is not known here fails."""
    words = [name for word in shlex.split(command) for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    match words:
        case ["make", target]:
            return subprocess.run(["make", "-n", target], cwd=workplace, capture_output=True).returncode
        case ["source", ".venv/bin/activate"]:
            return 0 if "BIN := .venv/bin\n" in (workplace / "Makefile").read_text() else 1
        case ["accelerate", "launch", "--config_file", config, "train/continual.py" as script, *_]:
            assert (REPOSITORY / config).is_file(), config
            words = [*words[4:], "--dry-run"]
        case ["accelerate", "launch", "train/continual.py" as script, *_]:
            words = [*words[2:], "--dry-run"]
        case ["accelerate", "launch", "eval/evaluate.py" as script, *_]:
            words = words[2:]
        case [
            "python",
            "eval/headline.py" | "eval/study.py" | "eval/merges.py" | "eval/diversity.py" | "eval/score.py" as script,
            *_,
        ]:
            words = words[1:]
        case ["python", "eval/speed.py" as script, *_]:
            elsewhere = {"cuda": "cpu", "llava-1.5-7b": "MODEL"}
            words = [*(elsewhere.get(word, word) for word in words[1:]), "--batch-size", "1", "--repetitions", "1"]
        case ["llava-cmoe", "train" | "study", *_]:
            return start(main, [*words, "--dry-run"], monkeypatch)
        case ["llava-cmoe", "data", "make-pocket", "ROOT", *_]:
            (workplace / "ROOT").unlink()
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "convert", *_]:
            (workplace / BASE).unlink()
            write_parts(workplace)
            for name, given in (("llm", "vicuna-7b-v1.5"), ("vision", "clip-vit-large-patch14-336")):
                (workplace / name).rename(workplace / given)
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "plan", "train/recipes/coin_cmoe_llava_7b.yaml", *_]:
            left = start(main, [*words, "--json", "plan.json"], monkeypatch)
            said = planned(Budget.model_validate_json((workplace / "plan.json").read_bytes()))
            assert said in " ".join(README.split()), said
            return left
        case ["llava-cmoe", "chat", "runs/spare", *_]:
            start(main, ["llava-cmoe", "merge", "runs/spare"], monkeypatch)
            monkeypatch.setattr(sys, "stdin", io.StringIO("exit\n"))
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "chat", *_]:
            monkeypatch.setattr(sys, "stdin", io.StringIO("Which colour is it?\nexit\n"))
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "probe", run, *_]:
            return start(main, ["llava-cmoe", "probe", run], monkeypatch)  # the tiny run has learned fewer tasks
        case ["llava-cmoe", "data", "fetch", *_]:
            return start(main, [*words, "--dry-run"], monkeypatch)
        case ["llava-cmoe", "answers", "import", folder, *_]:
            start(main, ["llava-cmoe", "answers", "export", "runs/pocket_cmoe", "--to", folder], monkeypatch)
            data = read_results(workplace / "runs/pocket_cmoe/results.json").recipe["data"]  # not the pocket sequence
            return start(main, [*words, *(f"data.{key}={data[key]}" for key in ("sequence", "root"))], monkeypatch)
        case ["llava-cmoe", command, *_] if command in NEED_NOTHING_MORE:
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "data", "check", *_]:
            return start(main, words, monkeypatch)
        case _:
            pytest.fail(f"no test knows how to run: {command}")
    return start(lambda: runpy.run_path(script, run_name="__main__"), words, monkeypatch)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_runs_as_it_stands(command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    reads_summary = "eval/headline.py" in command and "runs/" not in command
    expected = 2 if reads_summary and not (workplace / SUMMARY).exists() else 0
    assert attempt(command, workplace, monkeypatch) == expected
    assert (workplace / "README.md").read_text() == README  # its table is what `eval/headline.py --readme` writes


def test_a_command_that_no_test_knows_fails(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(pytest.fail.Exception, match="no test knows how to run"):
        attempt("llava-cmoe forget everything", workplace, monkeypatch)


def test_blocks_are_commands_or_listings():
    listings = [block for language, block in FENCES if language != "bash"]
    assert {language for language, _ in FENCES} == {"", "bash"}
    assert not [
        line for block in listings for line in block.splitlines() if set(PROGRAMS).intersection(line.split()[:1])
    ]


def listed(tree: str) -> Iterator[tuple[str, str]]:
    """Path and words of every line of the tree; two blanks more are one folder deeper."""
    above: list[str] = []
    for line in tree.splitlines():
        indent, name, words = re.fullmatch(r"((?:  )*)(\S+) {2,}(\S.*)", line).groups()  # type: ignore[union-attr]
        above = [*above[: len(indent) // 2], name]
        yield "".join(above), words


def tracked() -> Iterator[str]:
    """What the tree has to list: every file but `__init__.py`, and some folders as a whole."""
    output = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for path in filter(lambda path: (REPOSITORY / path).exists(), output.splitlines()):
        whole = [folder for folder in WHOLE_FOLDERS if path.startswith(folder)]
        if not path.endswith("__init__.py"):
            yield whole[0] if whole else path


def test_the_tree_lists_every_file_once_in_at_most_eight_words():
    lines = list(listed(generated("tree").strip("`\n")))
    paths = [path for path, _ in lines]
    branches = {path for path in paths for other in paths if other != path and other.startswith(path)}
    assert sorted(set(paths) - branches) == sorted(set(tracked()))
    assert len(paths) == len(set(paths)) and all(path.endswith("/") for path in branches)
    assert [words for _, words in lines if len(words.split()) > 8] == []


def test_the_table_is_the_committed_summary_or_is_not_there():
    """And neither is the picture, before there is something to show."""
    summary = REPOSITORY / SUMMARY
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    if summary.exists():
        table = headline_markdown(Headline.model_validate_json(summary.read_bytes()))
        assert generated("headline").strip() == table and pictures
    else:
        assert generated("headline").strip() == UNFINISHED and not pictures


def test_the_table_of_each_committed_study_is_there_and_no_other():
    summaries = [read_study(path) for path in sorted((REPOSITORY / SUMMARY).parent.glob("study_*.json"))]
    assert {summary.study["name"] for summary in summaries} == set(re.findall(r"<!-- study (\S+): begin -->", README))
    for summary in summaries:
        assert generated(f"study {summary.study['name']}").strip() == study_markdown(summary)


def test_the_table_of_merges_is_the_committed_one_or_is_not_there():
    committed = REPOSITORY / "eval/results/merges.json"
    assert committed.exists() == ("<!-- merges: begin -->" in README)
    if committed.exists():
        assert generated("merges").strip() == merges_markdown(MergeSummary.model_validate_json(committed.read_bytes()))


def test_what_is_said_of_the_calibration_is_what_was_measured():
    said = " ".join(README.split("What probes say of tasks")[1].split("\n\n")[0].split())
    for name in ("calibration_layer", "calibration"):
        found = Calibration.model_validate_json((REPOSITORY / f"eval/results/{name}.json").read_bytes())
        by_learned = {state: [one for one in found.tasks if one.learned is state] for state in (True, False)}
        for tasks in by_learned.values():
            assert f" {', '.join(str(len(one.growth.new_experts)) for one in tasks)}" in said
        assert f"`scope: {found.probe.scope}`, alpha {found.probe.alpha:g}" in said and len(found.sites) == 6
        slots = {state: 100 * fmean(fmean(one.use.values()) for one in tasks) for state, tasks in by_learned.items()}
        assert f"{slots[True]:.1f} % of the slots of a learned task, {slots[False]:.1f} % of a new one's" in said


def test_what_is_said_of_the_ninth_task_is_what_was_measured():
    said = " ".join(README.split("A ninth task")[1].split("\n\n")[0].split())
    calibrated, by_hand = (
        UnseenResults.model_validate_json((REPOSITORY / f"eval/results/{name}.json").read_bytes())
        for name in ("unseen_calibrated", "unseen")
    )
    assert calibrated.recipe["method"]["locator"]["unseen_threshold"] is None
    [found], [set_by_hand] = calibrated.unseen.values(), by_hand.unseen.values()
    assert f"{found.rows} questions" in said and f"leave {found.to_base:.1f} % of them" in said
    assert found.located == found.base_alone and f"answers {found.located:.1f} % right with or without" in said
    assert f"{calibrated.false_alarm_rate:.1f} % of the learned tasks' own" in said
    threshold = by_hand.recipe["method"]["locator"]["unseen_threshold"]
    told = f"threshold, {threshold}, was set by hand after a look at such scores: {set_by_hand.to_base:.1f} % and"
    assert f"{told} {by_hand.false_alarm_rate:.1f} % " in said


def test_what_is_said_of_free_locating_is_what_was_measured():
    said = " ".join(README.split("Free locating (")[1].split("\n\n")[0].split())
    speed = json.loads((REPOSITORY / "eval/results/speed.json").read_text())
    assert speed["llm_layers"] == 6 and speed["first_layer"] == speed["locator"]["layer"] == 3
    for route in ("free", "twice"):
        assert f" {speed['ratio_to_oracle'][route]:.3f} times" in said
    [free] = Headline.model_validate_json((REPOSITORY / "eval/results/pocket_free.json").read_bytes()).methods
    assert speed["run"] == free.results[0]["run"] and free.recipe["method"]["experts"]["first_layer"] == 3
    numbers = free.numbers
    assert f"*last* is {numbers['last'].mean:.1f}, oracle − located {numbers['oracle_minus_located'].mean:.1f} " in said


def test_what_is_said_of_clones_is_what_was_measured():
    found = Diversity.model_validate_json((REPOSITORY / "eval/results/diversity.json").read_bytes())
    _, *later = found.tasks.values()
    said = " ".join(README.split("Clones stay alike:")[1].split("\n\n")[0].split())
    for what, cosines in {
        "a cosine of": [alike.among_new for alike in later],
        "and of": [alike.to_origin for alike in later],
    }.items():
        assert f"{what} {min(cosines):.2f} to {max(cosines):.2f} " in said


def test_the_words_are_the_glossary_and_the_code_uses_them():
    section = PROSE.split("\n## Words\n")[1].split("\n## ")[0]
    words = [word for row in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[2:] for word in row.split(", ")]
    assert len(words) == len(set(words)) and set(words) == GLOSSARY
    code = "".join(path.read_text() for path in (REPOSITORY / "llava_cmoe").rglob("*.py"))
    assert [word for word in words if not re.search(rf"\b{word}s?\b", code)] == []


def test_every_link_leads_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert [target for target in targets if "://" not in target and not (REPOSITORY / target).exists()] == []
