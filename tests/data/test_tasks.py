"""Task sequences are read from YAML by path or name, and mistakes in them are named."""

from pathlib import Path

import pytest
import yaml

from llava_cmoe.data.tasks import TaskSequence, load_sequence
from llava_cmoe.settings import RecipeError, shipped

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
