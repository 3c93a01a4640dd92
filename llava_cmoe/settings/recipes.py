"""Recipes and other YAML files read as settings, overridden by dotted keys; every mistake becomes a RecipeError.

What can be set, and what it means, stands beside each setting in the files of this room.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from llava_cmoe.settings.base import RECORDED, RecipeError, Settings, shown
from llava_cmoe.settings.methods import MethodSettings
from llava_cmoe.settings.plain_yaml import PlainYamlError, parse_yaml
from llava_cmoe.settings.recorded import as_recorded
from llava_cmoe.settings.run import Recipe

AnySettings = TypeVar("AnySettings", bound=Settings)


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides such as `method.probe.alpha=0.5` (values are YAML).

    Raises:
        RecipeError: unreadable file, malformed override, unknown key (with the nearest known one) or bad value.
    """
    return override(read_yaml(path), overrides, source=str(path))


def override(document: dict[str, Any], overrides: Iterable[str], source: str) -> Recipe:
    """A recipe's mapping with dotted overrides applied, validated; `source` names it in error messages."""
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise RecipeError(f"override {shown(text)}: write it as dotted.key=value")
        try:
            plain = parse_yaml(value)
        except PlainYamlError as error:
            raise RecipeError(
                f"override {shown(text)}: the value is not valid YAML ({error}); close or quote it"
            ) from error
        _set_dotted(document, key.split("."), plain)
    return parse_recipe(document, source)


def parse_recipe(document: Mapping[str, Any], source: str, recorded: bool = False) -> Recipe:
    """Validate a mapping as a recipe; `source` names it in errors; `recorded`: it is a run's record."""
    return parse_settings(Recipe, document, source, recorded)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of settings in a YAML file.

    Raises:
        RecipeError: unreadable file, broken YAML, or something else than a mapping.
    """
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not valid YAML: not UTF-8 text at byte {error.start}") from error
    except PlainYamlError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: expected a mapping of settings, found {type(document).__name__}")
    return document


def parse_settings(
    model: type[AnySettings], document: Mapping[str, Any], source: str, recorded: bool = False
) -> AnySettings:
    """Validate a mapping as `model`; every problem becomes one line of a RecipeError that starts with `source`."""
    try:
        settings = model.model_validate(document, context=RECORDED if recorded else None)
        return as_recorded(settings) if recorded else settings
    except ValidationError as error:
        known = list(known_keys(model))
        raise RecipeError("\n".join(f"{source}: {_explain(item, known)}" for item in error.errors())) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like a misspelt one."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def shipped(relative: str) -> Path:
    """Where the project's own file or folder `relative` lies: in the checkout, or inside the installed wheel."""
    package = Path(__file__).parents[1]
    packed = package / "_shipped"
    return (packed if packed.is_dir() else package.parent) / relative


def _set_dotted(document: dict[str, Any], keys: list[str], value: object) -> None:
    for key in keys[:-1]:
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise RecipeError(f"override {'.'.join(keys)}: {key} is not a group of settings")
    document[keys[-1]] = value


def _explain(item: Mapping[str, Any], known: list[str]) -> str:
    """One line per problem: the dotted key, what is wrong, and the nearest known key for a misspelt one."""
    # A discriminated union puts the chosen method's name into the location; users write `method.rank`, not
    # `method.cmoe.rank`.
    methods = {model.model_fields["name"].default for model in get_args(get_args(MethodSettings)[0])}
    location = [str(part) for index, part in enumerate(item["loc"]) if not (index == 1 and part in methods)]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}; did you mean {nearest(key, known)}?"
    given = f", got {shown(item['input'])}" if isinstance(item["input"], (str, int, float)) else ""
    reason = item["msg"].removeprefix("Value error, ")
    return f"{key}: {reason[0].lower()}{reason[1:]}{given}" if key else f"{reason}{given}"


def known_keys(root: type[BaseModel] = Recipe) -> dict[str, str]:
    """Every dotted key that `root` (a recipe by default) may hold, with the sentence that describes it."""
    keys: dict[str, str] = {}

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            kinds = (info.annotation, *get_args(info.annotation))
            inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
            keys.setdefault(prefix + name, info.description or "")
            for kind in inner:
                walk(kind, f"{prefix}{name}.")

    walk(root, "")
    return keys
