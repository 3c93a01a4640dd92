"""Task sequences are read from YAML by path or name, take over tasks of others, and mistakes in them are named."""

import re
from pathlib import Path

import pytest
import yaml

from llava_cmoe.data.sequences import SequenceFile, load_sequence
from llava_cmoe.data.tasks import TaskSequence
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.recipes import known_keys, shipped

COIN_ORDER = ("scienceqa", "textvqa", "imagenet", "gqa", "vizwiz", "grounding", "vqav2", "ocrvqa")


@pytest.mark.parametrize("name", ["pocket", "coin"])
def test_shipped_sequences_hold_the_eight_tasks_in_coins_order(name: str) -> None:
    sequence = load_sequence(name)
    assert sequence.name == name
    assert sequence.names == COIN_ORDER
    assert [task.scorer for task in sequence.tasks] == list(COIN_ORDER)
    assert all(task.geometry == "pad" for task in sequence.tasks)


def test_name_shipped_path_and_own_path_give_the_same_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine.yaml"
    own.write_text(shipped("data_configs/coin.yaml").read_text())
    assert load_sequence("coin") == load_sequence("data_configs/coin.yaml") == load_sequence(own)


def test_own_file_wins_over_a_shipped_one_of_the_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "data_configs" / "coin.yaml"
    own.parent.mkdir()
    own.write_text(shipped("data_configs/coin.yaml").read_text().replace("name: coin", "name: mine"))
    assert load_sequence("data_configs/coin.yaml").name == "mine"


def test_select_takes_tasks_in_the_given_order() -> None:
    assert load_sequence("coin").select(["gqa", "scienceqa"]).names == ("gqa", "scienceqa")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["groundin"], "unknown task groundin; did you mean grounding?"),
        (["gqa", "gqa"], "more than once: gqa"),
        ([], "at least one task"),
    ],
)
def test_select_names_what_is_wrong(names: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_sequence("coin").select(names)


def test_unknown_sequence_names_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match="unknown task sequence pokcet; did you mean pocket?"):
        load_sequence("pokcet")


SHIPPED = sorted(path.stem for path in shipped("data_configs").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_sequence_is_named_as_its_file_and_says_where_its_data_comes_from(name: str) -> None:
    sequence = load_sequence(name)
    assert sequence.name == name
    assert sequence.sources and all(source.hub or source.by_hand for source in sequence.sources)


ORDERS = ["coin_reversed", "coin_alphabetical", "coin_diverse", "coin_10type"]


@pytest.mark.parametrize("name", ORDERS)
def test_a_sequence_of_coins_tasks_has_its_tasks_and_sources(name: str) -> None:
    coin, other = load_sequence("coin"), load_sequence(name)
    assert sorted(other.names) == sorted(COIN_ORDER) and other.sources == coin.sources
    by_name = {task.name: task for task in coin.tasks}
    changed = {
        key for task in other.tasks for key, value in dict(task).items() if value != getattr(by_name[task.name], key)
    }
    assert changed <= {"folder", "instruction", "published"}
    assert (changed == set()) == (other.names != coin.names)  # another order, or other instructions


def test_an_order_is_the_order() -> None:
    assert load_sequence("coin_reversed").names == COIN_ORDER[::-1]


def test_each_kind_of_coins_instructions_has_folders_of_its_own() -> None:
    kinds = [set(load_sequence(name).tasks[0].folder) for name in ("coin", "coin_diverse", "coin_10type")]
    assert len(set.union(*kinds)) == sum(map(len, kinds))


def written(folder: Path, **document: object) -> Path:
    file = folder / f"{document['name']}.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


TASK = {"name": "gqa", "train": "a.json", "evaluate": "b.json", "scorer": "gqa", "max_new_tokens": 4}
OTHER = {"name": "other", "train": ["c.json", "d.json"], "evaluate": "e.json", "scorer": "imagenet"}


def test_defaults_hold_unless_a_task_says_otherwise_and_changes_hold_for_all(tmp_path: Path) -> None:
    defaults = {"max_new_tokens": 9, "instruction": "Answer.", "images": "pictures"}
    base = written(tmp_path, name="base", defaults=defaults, tasks=[TASK, OTHER])
    assert [task.max_new_tokens for task in load_sequence(base).tasks] == [4, 9]
    changes = {"max_new_tokens": 7, "instruction": None}
    small = load_sequence(
        written(tmp_path, name="small", tasks_of="base.yaml", order=["other", "gqa"], changes=changes)
    )
    assert small.names == ("other", "gqa")
    assert [(task.max_new_tokens, task.instruction, task.images) for task in small.tasks] == [
        (7, None, ("pictures",))
    ] * 2
    assert small.tasks[0].train == ("c.json", "d.json")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "lists its `tasks`, or takes those of another file"),
        ({"tasks": [TASK], "tasks_of": "coin"}, "lists its `tasks`, or takes those of another file"),
        ({"tasks": [TASK], "order": ["gqa"]}, "order says something of `tasks_of`"),
        ({"tasks_of": "coin", "defaults": {"scorer": "gqa"}}, "defaults says something of `tasks`"),
        ({"tasks_of": "coin", "order": ["gqua"]}, "order: sequence coin: unknown task gqua; did you mean gqa?"),
        ({"tasks_of": "coin", "order": ["gqa", "gqa"]}, "more than once: gqa"),
        ({"tasks_of": "coins"}, "unknown task sequence coins; did you mean coin?"),
        ({"tasks_of": "mine.yaml"}, "takes its tasks from itself"),
        (
            {"tasks_of": "coin", "changes": {"scorrer": "gqa"}},
            "unknown key changes.scorrer; did you mean changes.scorer?",
        ),
        ({"tasks": [TASK], "defaults": {"imagse": "x"}}, "unknown key defaults.imagse; did you mean defaults.images?"),
        ({"tasks": [TASK], "sources": [{"name": "x", "holds": "y", "hub": "no-slash"}]}, "sources.0.hub: "),
        ({"tasks_of": "coin", "orders": []}, "unknown key orders; did you mean order?"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, document: dict[str, object], message: str) -> None:
    file = written(tmp_path, name="mine", **document)
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        load_sequence(file)
    assert str(error.value).startswith(("unknown task sequence", f"{file}: "))


def test_the_readme_beside_the_sequences_tells_every_key_with_its_sentence() -> None:
    readme = shipped("data_configs/README.md").read_text()
    told = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*) \|$", readme, re.MULTILINE))
    keys = known_keys(SequenceFile) | known_keys(TaskSequence)
    assert told == {key: " ".join(sentence.split()) for key, sentence in keys.items()}
    assert {name for name in re.findall(r"^\| \[([a-z0-9_]+)\.yaml\]", readme, re.MULTILINE)} == set(SHIPPED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"geometri": "pad"}, "unknown key tasks.0.geometri; did you mean tasks.geometry?"),
        ({"geometry": "stretch"}, "tasks.0.geometry: .*'pad' or 'crop'"),
        ({"max_new_tokens": 0}, "tasks.0.max_new_tokens: .*greater than 0, got 0"),
        ({"name": "../gqa"}, "tasks.0.name: "),
    ],
)
def test_bad_yaml_is_named_with_file_and_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    document = yaml.safe_load(shipped("data_configs/coin.yaml").read_text())
    document["tasks"][0] |= change
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError, match=message) as error:
        load_sequence(file)
    assert str(error.value).startswith(f"{file}: ")


def test_doubled_task_names_are_refused() -> None:
    task = load_sequence("coin").tasks[0]
    with pytest.raises(ValueError, match="more than once: scienceqa"):
        TaskSequence(name="twice", tasks=(task, task))
