"""Every number of every setting is one, finite and possible; whatever else is written there is refused by its key."""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from commands import refused
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.settings.base import RecipeError, Settings
from llava_cmoe.settings.methods import MethodSettings
from llava_cmoe.settings.recipes import load_recipe, override
from llava_cmoe.settings.run import Recipe
from llava_cmoe.settings.values import LARGEST, MOST_PROCESSES, SIZES

METHODS = {model.model_fields["name"].default: model for model in get_args(get_args(MethodSettings)[0])}


def kinds_of(annotation: Any) -> set[Any]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return {kind for one in get_args(annotation) for kind in kinds_of(one)} if is_union else {annotation}


def settings_in(model: type[Settings], prefix: str = "") -> Iterator[tuple[str, set[Any]]]:
    """Dotted key and kinds of every setting that holds a value of its own."""
    for name, field in model.model_fields.items():
        kinds = kinds_of(field.annotation)
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
        if groups and name != "method":
            yield from settings_in(groups[0], f"{prefix}{name}.")
        yield f"{prefix}{name}", kinds


SHARED = dict(settings_in(Recipe))
KEYS = {("sequential_lora", key): kinds for key, kinds in SHARED.items()} | {
    (name, key): kinds for name, model in METHODS.items() for key, kinds in settings_in(model, "method.")
}
NUMBERS = {place: kinds for place, kinds in KEYS.items() if kinds & {int, float}}
WHOLE = [place for place, kinds in NUMBERS.items() if float not in kinds]
DECIMAL = [place for place, kinds in NUMBERS.items() if float in kinds]
FLAGS = [place for place, kinds in KEYS.items() if bool in kinds]
PATHS = [place for place, kinds in KEYS.items() if Path in kinds]


def refusal(method: str, key: str, written: str) -> str:
    judge = {"model": "m"} if key.startswith("evaluation.judge.") else None
    sites = {"layers": "l", "ffn": "f", "ffn_linears": ["u"]} if key.startswith("backbone.sites.") else None
    document = {"run": "r", "method": {"name": method}, "evaluation": {"judge": judge}, "backbone": {"sites": sites}}
    with pytest.raises(RecipeError) as raised:
        override(document, [f"{key}={written}"], "recipe.yaml")
    return str(raised.value)


NO_NUMBER = st.sampled_from([".inf", "-.inf", ".nan", "true", "false", "yes", "1:30", "12:30:45", "2024-01-02", "0b1"])


@given(
    st.sampled_from(sorted(NUMBERS)), NO_NUMBER | st.sampled_from(["[1]", "{a: 1}", "0x", "1,5", "'1e999'", "1e999"])
)
def test_what_is_no_finite_number_is_refused_by_its_key(place: tuple[str, str], written: str):
    told = refusal(*place, written)
    assert place[1] in told and len(told.splitlines()) == 1 and len(told) < 300


@given(st.sampled_from(sorted(WHOLE)), st.integers(LARGEST + 1, 10**40), st.sampled_from([1, -1]))
def test_whole_numbers_are_those_that_libraries_count_with(place: tuple[str, str], number: int, sign: int):
    assert place[1] in refusal(*place, str(sign * number))


@given(st.sampled_from(DECIMAL), st.floats(2.0**31 * 1.001, 1e308), st.sampled_from(["", "-"]))
def test_no_rate_share_or_factor_is_astronomic(place: tuple[str, str], number: float, sign: str):
    assert place[1] in refusal(*place, f"{sign}{number!r}")


@given(st.sampled_from(FLAGS), st.sampled_from(["1", "0", "1.0", "'true'", "'yes'", "on_", "[true]", "2", "{a: true}"]))
def test_what_is_neither_true_nor_false_is_refused(place: tuple[str, str], written: str):
    assert "true or false is expected" in refusal(*place, written)


@pytest.mark.parametrize("name", SIZES)
def test_what_sizes_tensors_has_an_end(name: str):
    for method, key in NUMBERS:
        if key.rpartition(".")[2] == name:
            assert "at most" in refusal(method, key, str(SIZES[name] + 1))


@given(st.sampled_from(sorted(PATHS)), st.sampled_from(["''", "' '", r'"\t"', r'"a\0"', r'"a/\e[2J/b"', r'"\uD800"']))
def test_a_path_names_a_place(place: tuple[str, str], written: str):
    assert place[1] in refusal(*place, written) or "not valid YAML" in refusal(*place, written)


@pytest.mark.parametrize("written", ["run=", "run=''", "run=null"])
def test_an_empty_run_is_refused_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: runs/x\nmethod: {name: zero_shot}\n")
    monkeypatch.chdir(tmp_path)
    assert "run: a path is expected, and this one is empty" in refused("train", recipe, written)
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize("workers", [MOST_PROCESSES + 1, 1700, 10**20])
def test_no_more_processes_are_started_than_the_machine_can_hold(workers: int):
    assert "data.workers" in refusal("cmoe", "data.workers", str(workers))
    for words in (("data", "check", "--processes"), ("study", "x.yaml", "--jobs")):
        assert f"expected a whole number from 1 to {MOST_PROCESSES}, got" in refused(*words, workers)


KEY = st.sampled_from(["run", "seed", "a", "method"])


@given(st.lists(st.tuples(KEY, st.integers(0, 9)), min_size=2, max_size=6), st.booleans(), st.integers(0, 2))
def test_a_key_that_stands_twice_is_refused_by_its_name(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, int]], flow: bool, depth: int
):
    keys = [key for key, _ in pairs]
    doubled = {key for key in keys if keys.count(key) > 1}
    entries = [f"{key}: {value}" for key, value in pairs]
    pad = "  " * depth
    text = "{" + ", ".join(entries) + "}" if flow else "\n" + "\n".join(pad + " " + entry for entry in entries)
    nested = "".join(f"{'  ' * level}outer{level}:\n" for level in range(depth)) + f"{pad}k: {text}\n"
    path = tmp_path_factory.mktemp("doubled") / "recipe.yaml"
    path.write_text(nested)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert ("occurs twice" in str(raised.value)) == bool(doubled)
    assert not doubled or any(f"key '{key}' occurs twice" in str(raised.value) for key in doubled)
