"""README and docs: commands run, links lead somewhere, settings exist, numbers are those of the committed JSON.

Commands run as they stand, in a folder where what they name exists: a finished tiny run stands for `runs/pocket_cmoe`.
Training is only tried (`--dry-run`), make only asked what it would do (`-n`). Only what a sentence names is tested.
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
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from inspect import get_annotations, signature
from pathlib import Path

import pytest
import yaml
from commands import type_in
from hub import reached_hub
from official_files import write_answers
from original import write_parts
from pydantic import BaseModel
from tiny import Lesson

from llava_cmoe import api
from llava_cmoe.cli import main
from llava_cmoe.evaluation.log import read_results
from llava_cmoe.evaluation.scorers import PROTOCOLS
from llava_cmoe.methods import METHODS
from llava_cmoe.methods.base import Method, StageData
from llava_cmoe.methods.catalogue import catalogue, markdown
from llava_cmoe.planning.estimate import Budget
from llava_cmoe.pocket.backbone import POCKET_DIR
from llava_cmoe.pocket.root import make_pocket_root
from llava_cmoe.report.headline import Headline, readme_markdown
from llava_cmoe.report.results_page import HEADLINE, results_page
from llava_cmoe.serve.server import Server
from llava_cmoe.settings.backbone import BackboneSettings
from llava_cmoe.settings.recipes import known_keys, parse_recipe, parse_settings

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "eval/results"
GENERATED = REPOSITORY / "docs/results.md"
PAGES = (
    *(REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))),
    *(REPOSITORY / "data_configs/README.md", REPOSITORY / "zero_configs/README.md"),
)
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
WRITTEN = {page: text for page, text in TEXT.items() if page != GENERATED}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

README_BYTES = 10_000
BASE = "runs/backbones/vicuna-7b-v1.5-stage1"
"""What CoIN starts from; in these tests the tiny backbone."""
PROGRAMS = ("make", "source", "python", "pip", "git", "accelerate", "llava-cmoe")
"""What a command in a sentence begins with."""
SECTION = ("Paper", "Known", "Choices and departures", "Stores", "Growth")
"""Parts of every method's section, in order."""
GLOSSARY = {
    *("backbone", "base model", "site", "expert", "bank", "router", "gate", "plan", "locator", "probe", "growth"),
    *("task", "sequence", "stage", "run", "registry", "merge", "merge map", "study", "variant", "budget"),
    *("route", "located route", "oracle route", "immediate", "last", "MAA", "BWT", "forgetting", "forward transfer"),
    *("locator accuracy", "oracle gap", "false rejection", "protocol"),
}
DEFAULTS: dict[object, tuple[str, ...]] = {
    (): ("none",),
    False: ("off",),
    True: ("on",),
    None: ("calibrated", "as in training", "by the rule", "all"),
}
"""How the tables of methods.md write a default that is neither a number nor a word."""


def page_names(pages: dict[Path, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(REPOSITORY)))


def inline_commands(text: str) -> list[str]:
    return re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", " ".join(FENCE.sub("", text).split()))


def is_name(command: str) -> bool:
    """Whether it only names a command, without any argument."""
    return bool(re.fullmatch(r"llava-cmoe(?: data| answers)? [a-z-]+|accelerate launch(?: --config_file)?", command))


def commands() -> Iterator[str]:
    """Every command, whether in a block or in a sentence."""
    for text in WRITTEN.values():
        for language, block in FENCE.findall(text):
            if language == "bash":
                yield from (
                    " ".join(shlex.split(line, comments=True)) for line in block.replace("\\\n", "").splitlines()
                )
        yield from (command for command in inline_commands(text) if not is_name(command))


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pocket") / "root"
    make_pocket_root(root, lambda *_: None, train_rows=2, test_rows=1)
    return root


@pytest.fixture
def checkout(
    lesson_of: Callable[..., Lesson], pocket: Path, tiny_data: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch
) -> Path:
    """A checkout without the library, and in it whatever the commands name."""
    for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("train", "eval", "docs", "data_configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for run in ("runs/pocket_cmoe", "runs/studies/headline/cmoe_3"):
        shutil.copytree(lesson_of("cmoe").recipe.run, tmp_path / run)
    shutil.copytree(lesson_of("cmoe", "data.train_rows=18").recipe.run, tmp_path / "runs/spare")
    (tmp_path / "runs/studies/growth").mkdir(parents=True)
    shutil.copy(RESULTS / "study_growth.json", tmp_path / "runs/studies/growth/study.json")
    make_pocket_root(
        tmp_path / "runs/data/pocket_unseen", lambda *_: None, train_rows=1, test_rows=2, tasks=["Pretraining"]
    )
    (tmp_path / "ROOT").symlink_to(pocket)
    (tmp_path / "MODEL").symlink_to(POCKET_DIR)  # which has the layers that the recipe names
    (tmp_path / "runs/backbones").mkdir()
    (tmp_path / BASE).symlink_to(tiny_backbone)
    [mine] = [
        block for _, block in FENCE.findall(TEXT[REPOSITORY / "docs/data.md"]) if block.startswith("name: mine\n")
    ]
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


def planned(budget: Budget) -> list[str]:
    """The numbers that training.md states of the plan of a 7B."""
    likely = budget.growth_schedules[0]
    most = {"none": 0.0, "nf4": 0.0}
    for need in budget.needs:
        if need.strategy == "none or DDP":
            most = {
                name: max(size, (need.memory.states(name) or 0) + need.activations.kept) for name, size in most.items()
            }
    return [
        f"{max(budget.expert_parameters.values()):,} parameters an expert",
        f"{likely.mean / 1e6:.1f} million trained per task",
        f"if {likely.num_grown} of {len(budget.expert_parameters)} layers",
        f"{max(size.stored.bytes for size in likely.tasks) / 1e6:.0f} MB a task",
        f"{most['none'] / 1e9:.1f} GB on each",
        f"({most['nf4'] / 1e9:.1f} with",
    ]


NEED_NOTHING_MORE = {"eval", "merge", "unseen", "report", "plan", "compare", "rescore", "answers", "reproduce"}
"""Commands that a tiny run can be given as they stand."""
SCRIPTS = ("eval/collect.py", "eval/results_page.py", "eval/score.py")
"""Scripts of which the same holds."""


def attempt(command: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of a command, or of its dry run; one that is not known here fails."""
    words = [name for word in shlex.split(command) for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    if words[:2] == ["accelerate", "launch"]:
        del words[:2]
        while words[0].startswith("--"):
            option, value, *words = words
            assert option != "--config_file" or (REPOSITORY / value).is_file(), value
        words = ["accelerate", "launch", *words]
    match words:
        case ["make", target]:
            return subprocess.run(["make", "-n", target], cwd=checkout, capture_output=True).returncode
        case ["source", ".venv/bin/activate"]:
            return 0 if "BIN := .venv/bin\n" in (checkout / "Makefile").read_text() else 1
        case ["accelerate", "launch", "train/continual.py" as script, *_]:
            words = [*words[2:], "--dry-run"]
        case ["accelerate", "launch", "eval/evaluate.py" as script, *_]:
            words = words[2:]
        case ["python", "eval/collect.py" as script, "headline", *_]:
            (checkout / "eval/results/pocket.json").unlink()  # a tiny run cannot join it
            words = words[1:]
        case ["python", "eval/collect.py" as script, "merges", run]:
            start(main, ["llava-cmoe", "merge", run], monkeypatch)
            words = words[1:]
        case ["python", "tests/campaign/run.py" as script, *_]:
            short = [*words[2:], "--minutes", "0", "--figures", str(checkout / "figures.json")]
            return subprocess.run([sys.executable, REPOSITORY / script, *short], capture_output=True).returncode
        case ["python", script, *_] if script in SCRIPTS:
            words = words[1:]
        case ["python", "eval/speed.py" as script, *_]:
            here = {"cuda": "cpu", "llava-1.5-7b": "MODEL", "small": "MODEL"}
            words = [*(here.get(word, word) for word in words[1:]), "--batch-size", "1", "--turns", "2"]
        case ["llava-cmoe", "train" | "study", *_]:
            return start(main, [*words, *(["--dry-run"] if "--dry-run" not in words else [])], monkeypatch)
        case ["llava-cmoe", "data", "make-pocket", "ROOT", *_]:
            (checkout / "ROOT").unlink()
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "convert", *_]:
            (checkout / BASE).unlink()
            write_parts(checkout)
            for name, given in (("llm", "vicuna-7b-v1.5"), ("vision", "clip-vit-large-patch14-336")):
                (checkout / name).rename(checkout / given)
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "plan", "train/recipes/coin_cmoe_llava_7b.yaml", *_]:
            left = start(main, [*words, "--json", "plan.json"], monkeypatch)
            stated = " ".join(TEXT[REPOSITORY / "docs/training.md"].split())
            numbers = planned(Budget.model_validate_json((checkout / "plan.json").read_bytes()))
            assert [number for number in numbers if number not in stated] == []
            return left
        case ["llava-cmoe", "chat", "runs/spare", *_]:
            start(main, ["llava-cmoe", "merge", "runs/spare"], monkeypatch)
            monkeypatch.setattr(sys, "stdin", io.StringIO("exit\n"))
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "chat", *_]:
            monkeypatch.setattr(sys, "stdin", io.StringIO("Which colour is it?\nexit\n"))
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "serve" | "web", *_]:
            words = ["runs/spare" if word == "runs/pocket_sequential_lora" else word for word in words]
            serve = Server.run
            monkeypatch.setattr(Server, "run", lambda server, ready: serve(server, server.stop))
            return start(main, [*words, "--port", "0"], monkeypatch)
        case ["pip", "install", "-e", extra]:
            extras = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            return 0 if extra.removeprefix(".[").removesuffix("]") in extras else 1
        case ["llava-cmoe", "push" | "pull" as verb, *others]:
            with reached_hub(monkeypatch, token="hf_of_tests"):
                if verb == "pull":
                    start(main, ["llava-cmoe", "push", "runs/pocket_cmoe", others[0]], monkeypatch)
                return start(main, words, monkeypatch)
        case ["llava-cmoe", "export", *_]:
            return start(main, [word if word != "VizWiz" else "colours" for word in words], monkeypatch)
        case ["llava-cmoe", "probe", run, *_]:
            return start(main, ["llava-cmoe", "probe", run], monkeypatch)  # the tiny run has learned fewer tasks
        case ["llava-cmoe", "data", "fetch", *_]:
            return start(main, [*words, "--dry-run"], monkeypatch)
        case ["llava-cmoe", "answers", "import", folder, *_]:
            start(main, ["llava-cmoe", "answers", "export", "runs/pocket_cmoe", "--to", folder], monkeypatch)
            data = read_results(checkout / "runs/pocket_cmoe/results.json").recipe["data"]  # not the pocket sequence
            return start(main, [*words, *(f"data.{key}={data[key]}" for key in ("sequence", "root"))], monkeypatch)
        case ["llava-cmoe", command, *_] if command in NEED_NOTHING_MORE:
            return start(main, words, monkeypatch)
        case ["llava-cmoe", "data", "check", *_]:
            return start(main, words, monkeypatch)
        case _:
            pytest.fail(f"no test knows how to run: {command}")
    return start(lambda: runpy.run_path(script, run_name="__main__"), words, monkeypatch)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_runs_as_it_stands(command: str, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    assert attempt(command, checkout, monkeypatch) == 0
    for page in (REPOSITORY / "README.md", GENERATED):  # one of the commands writes both from the committed JSON
        assert (checkout / page.relative_to(REPOSITORY)).read_text(encoding="utf-8") == TEXT[page]


@pytest.mark.parametrize(
    "block", [block for text in WRITTEN.values() for kind, block in FENCE.findall(text) if kind == "python"]
)
def test_python_runs_as_it_stands(
    block: str, checkout: Path, lesson_of: Callable[..., Lesson], monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(api, "make_pocket_root", lambda *args, **named: None)
    monkeypatch.setattr(api, "learn_recipe", lambda *args: lesson_of("cmoe").results)
    exec(compile(block, "block", "exec"), {})
    assert capsys.readouterr().out


def test_a_command_that_no_test_knows_fails(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(pytest.fail.Exception, match="no test knows how to run"):
        attempt("llava-cmoe forget everything", checkout, monkeypatch)


@pytest.mark.parametrize(
    "name",
    sorted({one for text in TEXT.values() for one in inline_commands(text) if is_name(one) and "llava-cmoe" in one}),
)
def test_a_command_that_is_only_named_exists(name: str, monkeypatch: pytest.MonkeyPatch):
    assert start(main, [*name.split(), "--help"], monkeypatch) == 0


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_bytes()) <= README_BYTES


@page_names(WRITTEN)
def test_blocks_are_commands_yaml_or_listings(page: Path):
    found = FENCE.findall(WRITTEN[page])
    assert {language for language, _ in found} <= {"", "bash", "yaml", "python"}
    assert all(yaml.safe_load(block) for language, block in found if language == "yaml")
    lines = [line for language, block in found if language in ("", "yaml") for line in block.splitlines()]
    assert [line for line in lines if set(PROGRAMS).intersection(line.split()[:1])] == []


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page_names(TEXT)
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", TEXT[page])):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_every_page_is_reached_from_readme_and_index():
    for start_page in ("README.md", "docs/index.md"):
        page = REPOSITORY / start_page
        links = {
            (page.parent / path).resolve() for path in re.findall(r"\]\(([^)#]+)", TEXT[page]) if "://" not in path
        }
        assert {other for other in PAGES if other.parent.name == "docs"} - links - {page} == set()


def generated(page: Path, name: str) -> str:
    """The part of a page between two comments."""
    [part] = re.findall(rf"<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", TEXT[page], re.DOTALL)
    return str(part)


def test_generated_parts_are_what_the_committed_json_gives():
    assert TEXT[GENERATED] == results_page(RESULTS)
    headline = Headline.model_validate_json((RESULTS / HEADLINE).read_bytes())
    assert generated(REPOSITORY / "README.md", "headline") == readme_markdown(headline) + "\n"


def test_the_list_of_methods_is_that_of_the_code():
    cards = catalogue()
    assert generated(REPOSITORY / "docs/methods.md", "catalogue") == markdown(cards) + "\n"
    assert [card.name for card in cards] == list(METHODS)
    assert all("costs" in vars(method) for method in METHODS.values())  # of its own, not of the one that it extends
    whole = {"ewc", "lwf", "o_lora", "reg_lora", "r2moe"}
    assert {card.name for card in cards if "ZeRO-3" not in card.engines} == whole
    shown = type_in("methods").output
    assert all(card.name in shown for card in cards)


def test_the_tree_lists_every_room_once_in_the_order_of_imports():
    listing = generated(REPOSITORY / "README.md", "rooms").strip("`\n").splitlines()
    lines = [re.fullmatch(r"  (\w+)(/|\.py) {2,}(\S.*)", line).groups() for line in listing[1:]]  # type: ignore[union-attr]
    rooms = [name for name, _, _ in lines]
    package = REPOSITORY / "llava_cmoe"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    files = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert sorted(rooms) == sorted(folders | files)
    assert all((name in folders) == (kind == "/") for name, kind, _ in lines)
    assert rooms == list(runpy.run_path(str(REPOSITORY / "tests/test_architecture.py"))["ORDER"])
    assert [words for *_, words in lines if len(words.split()) > 8] == []


@page_names(TEXT)
def test_every_setting_that_is_named_exists(page: Path):
    named = re.findall(
        r"(?<![\w/.])((?:data|backbone|method|training|evaluation)\.[a-z_]+(?:\.[a-z_]+)*)\b", TEXT[page]
    )
    files = {f"{name}.{ending}" for name in ("data", "backbone", "training", "evaluation") for ending in ("md", "py")}
    of_a_stage = {f"data.{field.name}" for field in fields(StageData)}
    assert set(named) - files - of_a_stage - known_keys().keys() == set()


def test_every_option_that_is_named_exists():
    """Options of `llava-cmoe` and of the scripts: given by name, or made by typer from a parameter's."""
    sources = [*(REPOSITORY / "llava_cmoe/cli").glob("*.py"), *(REPOSITORY / "eval").glob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    pages = (text for page, text in WRITTEN.items() if page.parent.name != "zero_configs")  # accelerate's
    named = {option for text in pages for option in re.findall(r"`--([a-z][a-z-]+)", FENCE.sub("", text))}
    unknown = [name for name in named if f'"--{name}"' not in code and f" {name.replace('-', '_')}: " not in code]
    assert named and unknown == []


def part_of_methods(heading: str) -> str:
    text = TEXT[REPOSITORY / "docs/methods.md"]
    [part] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return str(part)


def leaves(settings: BaseModel, prefix: str = "method") -> dict[str, object]:
    """Dotted key of every setting to its value."""
    found: dict[str, object] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        key = f"{prefix}.{name}"
        found |= leaves(value, key) if isinstance(value, BaseModel) else {key: value}
    found.pop(f"{prefix}.name", None)
    return found


def states(word: str, default: object) -> bool:
    """Whether a table's word is that default."""
    if isinstance(default, int | float) and not isinstance(default, bool):
        return float(word) == default
    return word in DEFAULTS.get(default, default if isinstance(default, tuple) else (default,))


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_section_has_every_part_and_names_every_setting(name: str):
    section = part_of_methods(f"`{name}`")
    parts = re.findall(r"^\*\*([^.:*]+)[.:]", section, re.MULTILINE)
    assert list(dict.fromkeys(parts)) == list(SECTION)
    if "(#the-locator)" in section:
        section += part_of_methods("The locator")
    defaults = leaves(parse_recipe({"run": "x", "method": {"name": name}}, source=name).method)
    assert [key for key in defaults if f"`{key}`" not in section] == []
    checked: set[str] = set()  # a method's own default stands before the locator's
    for row, stated in re.findall(r"^\| (`method\.[^|]+) \| ([^|]+) \|", section, re.MULTILINE):
        keys = re.findall(r"`([^`]+)`", row)
        words = stated.split(", ") * (len(keys) if len(stated.split(", ")) == 1 else 1)
        found = [states(word, defaults[key]) for word, key in zip(words, keys, strict=True) if key not in checked]
        assert all(found), row
        checked |= set(keys)


def test_the_page_on_training_names_every_recipe():
    named = set(re.findall(r"`(\w+\.yaml)`", TEXT[REPOSITORY / "docs/training.md"]))
    assert {path.name for path in (REPOSITORY / "train/recipes").glob("*.yaml")} - named == set()


def test_the_page_on_data_names_every_scorer():
    text = TEXT[REPOSITORY / "docs/data.md"].split("\n## Scorers\n")[1]
    assert [name for name in PROTOCOLS["strict"].scorers if f"`{name}`" not in text] == []


def test_the_contract_on_the_page_is_that_of_the_code():
    stated = re.findall(r"^\| `(\w+)(?:\(([^)]*)\))?[^|]*` \|", part_of_methods("A method of your own"), re.MULTILINE)
    members = {name for name in {**vars(Method), **get_annotations(Method)} if not name.startswith("_")} | {"__init__"}
    assert sorted(name for name, _ in stated) == sorted(members - {"model", "processor"})
    for name, given in stated:
        member = getattr(Method, name, None)
        if callable(member):
            parameters = [one.partition("=")[0] for one in given.split(", ")]
            assert parameters == [one for one in signature(member).parameters if one != "self"], name


def test_layers_under_other_names_are_settings():
    [block] = [block for language, block in FENCE.findall(TEXT[REPOSITORY / "docs/backbones.md"]) if language == "yaml"]
    parse_settings(BackboneSettings, yaml.safe_load(block)["backbone"], source="docs/backbones.md")


def test_the_glossary_defines_each_word_once_and_the_repository_uses_it():
    glossary = REPOSITORY / "docs/glossary.md"
    words = [
        word for word in re.findall(r"^\| ([^|]+) \|", TEXT[glossary], re.MULTILINE) if word not in ("word", "---")
    ]
    assert len(words) == len(set(words)) and set(words) == GLOSSARY
    used = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "llava_cmoe").rglob("*.py"))
    used += "".join(text for page, text in WRITTEN.items() if page != glossary)
    assert [word for word in words if not re.search(rf"\b{word}s?\b", used, re.IGNORECASE)] == []
