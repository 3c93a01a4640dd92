"""What the calls that made a result ran on: code, machine, processes, batch, and how long evaluation took.

    runs/NAME/manifest.json     beside results.json, which it names by its hash

Base, data (a hash per file), recipe, seed, versions, protocol and subset stand in `results.json`, whose bytes two equal
evaluations share. What differs between them stands here.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.provenance.fingerprints import fingerprint_file
from llava_cmoe.settings.base import first_problem
from llava_cmoe.settings.plain_json import parse_json
from llava_cmoe.settings.training import TrainingSettings

MANIFEST = "manifest.json"


class ManifestError(ValueError):
    """A `manifest.json` that cannot be read, or results that are not those it names; the message names the fix."""


class _Recorded(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True)


class Hardware(_Recorded):
    """The machine of the main process."""

    processor: str
    cores: int
    memory_gb: float
    gpus: tuple[str, ...]


class Call(_Recorded):
    """One call that learned or evaluated something.

    Attributes:
        learned: stages that it learned.
        evaluated: stage to the seconds that its evaluation took; stages that were evaluated before are absent.
        processes: that took part.
        effective_batch: samples of an optimizer step, over all processes and accumulated batches.
        revision: git revision of this program, with `+` behind it where files differ; null if it is no checkout.
        hardware: of the main process.
    """

    learned: tuple[str, ...]
    evaluated: dict[str, float] = Field(validation_alias=AliasChoices("evaluated", "asked"))
    processes: int
    effective_batch: int
    revision: str | None
    hardware: Hardware


class Manifest(_Recorded):
    """`manifest.json`: the result, and the calls that made it, the first one first."""

    results_sha256: str | None
    """Null where a stage is learned and nothing is measured yet."""
    calls: tuple[Call, ...]


def effective_batch(training: TrainingSettings, processes: int) -> int:
    """Samples of an optimizer step."""
    return training.batch_size * training.accumulation * processes


def read_invocations(folder: Path) -> tuple[Call, ...]:
    """The calls that a folder's manifest holds; none where there is no manifest.

    Raises:
        ManifestError: it is not one.
    """
    return _read(folder).calls


def bind_results(folder: Path) -> None:
    """Let the manifest name the results that a folder has now; its calls stay. Errors of `read_invocations`."""
    _write(folder, read_invocations(folder))


def is_bound(results: Path) -> bool | None:
    """Whether a results file is the one that the manifest beside it names; None where none is named, as in older runs.

    Raises:
        ManifestError: the manifest is not one.
    """
    named = _read(results.parent).results_sha256
    return None if named is None else named == fingerprint_file(results)


def append_invocation(folder: Path, before: tuple[Call, ...], call: Call) -> None:
    """Write a folder's manifest: the calls before, and what this one did so far; nothing new adds nothing."""
    _write(folder, (*before, call) if call.learned or call.evaluated else before)


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.exists():
        return Manifest(results_sha256=None, calls=())
    try:
        content = path.read_bytes()
        parse_json(content)
        return Manifest.model_validate_json(content)
    except ValueError as error:
        raise ManifestError(
            f"{path}: {first_problem(error)}; restore it from a copy, or delete it: it says what the run was made on"
        ) from error


def _write(folder: Path, calls: tuple[Call, ...]) -> None:
    path, results = folder / MANIFEST, folder / "results.json"
    manifest = Manifest(results_sha256=fingerprint_file(results) if results.exists() else None, calls=calls)
    content = (manifest.model_dump_json(indent=1) + "\n").encode()
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)


def revision() -> str | None:
    """Git revision of this program's checkout; None where it was installed without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        printed = [
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):  # no git here, or not its owner's checkout
        return None
    return printed[0] + ("+" if printed[1] else "")


def hardware() -> Hardware:
    """This machine."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Hardware(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_gb=round(pages / 1e9, 1),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
    )


def _processor() -> str:
    """The processor's name where Linux states it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
