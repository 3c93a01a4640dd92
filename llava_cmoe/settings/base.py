"""What all settings share: frozen values, an error that names the key and the fix, and old names that still load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from llava_cmoe.settings.values import check_given, check_made

logger = logging.getLogger(__name__)

RECORDED = {"recorded": True}
"""Context in which the record of a run is validated: it may be older than a setting."""


class RecipeError(ValueError):
    """A recipe or task sequence that cannot be used; the message names the key and the fix."""


LONGEST_SHOWN = 80
"""Characters of a value that an error repeats."""


def shown(value: object) -> str:
    """A value as errors repeat it: on one line, without what a terminal would obey, and not all of a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        text = "a number too long to show"
    except RecursionError:
        text = "a value nested too deep to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


LONGEST_REASON = 200
"""Characters of another library's message that an error repeats."""


def in_one_line(error: BaseException) -> str:
    """Another library's message as ours repeat it: on one line, and not all of a long one."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def first_problem(error: ValueError) -> str:
    """What is wrong with a document, in one line: the reason, or the key and the reason of the first of several."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    return f"{key}: {first['msg'].removeprefix('Value error, ')}"


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error.

    Attributes:
        renamed: old name of a setting to its name now; recipes and runs that have the old one still load.
        former: what held before a setting existed, where that is not its default; for the records of older runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    former: ClassVar[Mapping[str, Any]] = {}

    def why_too_few(self, num_rows: int, first: bool) -> str | None:
        """What cannot be done with so few rows of a stage, and the fix; None if all can. By default what a part says.

        Args:
            num_rows: rows that the stage learns from.
            first: whether nothing was learned before it.
        """
        parts = (part for _, part in self if isinstance(part, Settings))
        return next((reason for part in parts if (reason := part.why_too_few(num_rows, first))), None)

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, document: Any, info: ValidationInfo) -> Any:
        if info.context is RECORDED and isinstance(document, Mapping):
            document = {**cls.former, **document}
        for old, new in cls.renamed.items() if isinstance(document, Mapping) else ():
            if old in document:
                if new in document:
                    raise ValueError(f"{old} is the old name of {new}; give one of them")
                _say_once(old, new)
                document = {(new if key == old else key): value for key, value in document.items()}
        if isinstance(document, Mapping):
            given = {name: document[name] for name in cls.model_fields if name in document}
            cls._check(given, lambda name, value: check_given(cls.model_fields[name].annotation, value))
        return document

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        self._check({name: getattr(self, name) for name in self.model_fields_set}, check_made)
        return self

    @classmethod
    def _check(cls, values: Mapping[str, Any], check: Callable[[str, Any], None]) -> None:
        """Raise what `check` finds wrong with values, each at its key: a validator of all fields allows no `name`."""
        problems: list[InitErrorDetails] = []
        for name, value in values.items():
            try:
                check(name, value)
            except ValueError as error:
                reason = PydanticCustomError("value_error", "{reason}", {"reason": str(error)})
                problems.append({"type": reason, "loc": (name,), "input": value})
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)


@cache
def _say_once(old: str, new: str) -> None:
    logger.warning("the setting %s is called %s now", old, new)
