"""The schema of what the registry writes beside tensors: `record.json` of a task and `run.json` of a run.

Where these files lie, and in which order they come to be, is for `store.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llava_cmoe.settings.base import first_problem, shown
from llava_cmoe.settings.names import PlainName
from llava_cmoe.settings.plain_json import parse_json
from llava_cmoe.settings.run import Recipe

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
"""Ends the name of every file of tensors."""


class RegistryError(RuntimeError):
    """A run folder that cannot be used as it is; the message names the file and the fix."""


class Manifest(BaseModel):
    """A JSON file of the registry: frozen, unknown keys are errors.

    A key that comes to be has a default, for files that are older; `format` grows with any other change of the schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse and validate.

        Raises:
            RegistryError: missing, not JSON, or not of this schema; names the file.
        """
        try:
            content = path.read_bytes()
            parse_json(content)
            return cls.model_validate_json(content)
        except OSError as error:
            raise RegistryError(
                f"{path}: cannot be read ({error.strerror}); give the folder of a run, or restore the file from a copy"
            ) from error
        except ValueError as error:
            raise RegistryError(f"{path}: {first_problem(error)}; restore the file from a copy") from error

    def to_json(self) -> str:
        """The file's text; equal values give equal bytes."""
        return _canonical(self.model_dump(mode="json"))


class Sealed(Manifest):
    """A file of the registry that names its own hash, so that no value in it is believed that was not written so."""

    sha256: str = ""
    """Of the file without this key; absent in files of older versions."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse, validate and verify; of a file without a hash it is said that nothing verifies it.

        Raises:
            RegistryError: as above, or the file was changed after it was written.
        """
        found = super().read(path)
        if not found.sha256:
            warn_once(f"{path}: has no hash, as files of older versions; what it says is not verified")
        elif found.sha256 != found._digest():
            raise RegistryError(f"{path}: was changed after it was written; restore it from a copy")
        return found

    def sealed(self) -> Self:
        """The same with its hash."""
        whole = type(self).model_validate(self.model_dump())
        return whole.model_copy(update={"sha256": whole._digest()})

    def _digest(self) -> str:
        # Of the keys that the file has: one that comes to be later breaks no hash of an older file.
        content = self.model_dump(mode="json", exclude={"sha256"}, exclude_unset=True)
        return hashlib.sha256(_canonical(content).encode()).hexdigest()


class FileRecord(BaseModel):
    """Content of one safetensors file of a task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int


class TaskRecord(Manifest):
    """`record.json`: everything about a learned task but its tensors.

    Two runs of one recipe with one seed write the same record, `seconds` apart; `sha256` covers all the rest, so whole
    chains of records can be compared by their last link.
    """

    index: int = Field(ge=0, lt=10_000)
    """Position in the sequence, from 0; the folder's name counts from 1."""
    name: str
    """Name of the task."""
    method: str
    """Name of the method that learned it."""
    settings: dict[str, Any]
    """The recipe, as `recipe_facts` gives it."""
    parent: str | None
    """`sha256` of the record of the task before; null for the first."""
    files: dict[PlainName, FileRecord]
    """File name to content."""
    versions: dict[str, str]
    """Python and the packages that had a hand in the numbers."""
    data_fingerprint: str
    """sha256 over the task's data."""
    backbone_fingerprint: str
    """sha256 over the frozen backbone's files."""
    facts: dict[str, Any]
    """What the method tells about the stage: growth, parameter counts, losses. No times."""
    seconds: dict[str, float]
    """Wall-clock seconds per part of the stage; the only thing here that differs between equal runs."""
    sha256: str = ""
    """Of this record without `seconds` and without itself."""

    @field_validator("files")
    @classmethod
    def _are_tensors(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        if others := [name for name in files if not name.endswith(SUFFIX)]:
            raise ValueError(f"{shown(others[0])} is no {SUFFIX} file")
        return files

    def digest(self) -> str:
        """What `sha256` has to be."""
        content = self.model_dump(mode="json", exclude={"seconds", "sha256"})
        return hashlib.sha256(_canonical(content).encode()).hexdigest()


class Sources(BaseModel):
    """What a run learns from, and on, by content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_files: dict[str, str]
    """sha256 of every data file, by its name in the data root."""
    backbone_fingerprint: str
    """sha256 over the frozen backbone's files."""


class RunRecord(Sealed):
    """`run.json`: what began the run, written before anything is learned; only `--anyway` changes what it says."""

    recipe: dict[str, Any]
    """The recipe, as `recipe_facts` gives it."""
    processes: int = 1
    """Processes that learn it: with their number the batch of a step changes."""
    sources: Sources | None = None
    """The data and the backbone; null where nothing was trained yet, or by a program that did not write them down."""


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, without what says nothing about what is learned: where it lies, who helps, who is told."""
    aside: Any = {"run": True, "data": {"workers", "feature_store"}, "training": {"report_to", "checkpoint_steps"}}
    return recipe.model_dump(mode="json", exclude=aside)


def differing_keys(began: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ, each with both values."""
    for key in sorted(began.keys() | now.keys()):
        before, after = began.get(key, "absent"), now.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} (was {shown(before)}, now {shown(after)})"


def differ(message: str, force: bool) -> None:
    """Stop at a difference to how a run was begun, or with `force` only warn."""
    if not force:
        raise RegistryError(message)
    logger.warning(message)


@cache
def warn_once(message: str) -> None:
    """Say something of a file that is read again and again, once."""
    logger.warning(message)


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON gives them back, so that what is hashed now is what will be read.

    Raises:
        ValueError: a value that JSON cannot hold (nan included), or a time, which would make equal runs differ.
    """
    plain: dict[str, Any] = json.loads(json.dumps(facts, allow_nan=False))
    timed = [key for key in _keys(plain) if "seconds" in key]
    if timed:
        raise ValueError(f"facts.{timed[0]}: a time would make equal runs differ; pass it in `seconds` instead")
    return plain


def _keys(document: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in document.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"
