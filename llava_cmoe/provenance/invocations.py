"""What the calls that made a result ran on: code, machine, processes, batch, and how long evaluation took.

    runs/NAME/manifest.json     beside results.json and answers/, which it names by their hashes

Base, data (a hash per file), recipe, seed, versions, protocol and subset stand in `results.json`, whose bytes two equal
evaluations share. What differs between them stands here.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.provenance.fingerprints import fingerprint_file
from llava_cmoe.settings.base import first_problem
from llava_cmoe.settings.names import InnerPath
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
    """`manifest.json`: the result, the answers it was made from, and the calls that made it, the first one first.

    Attributes:
        results_sha256: null where a stage is learned and nothing is measured yet.
        calls: that made it.
        answers: sha256 of each answers file, by its path in the folder; null in an older file.
        sha256: of all of this; null in an older file.
    """

    results_sha256: str | None
    calls: tuple[Call, ...]
    answers: dict[InnerPath, str] | None = None
    sha256: str | None = None

    def sealed(self) -> Manifest:
        """The same with its hash."""
        return self.model_copy(update={"sha256": self.digest()})

    def digest(self) -> str:
        """Of everything but the hash."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


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
    """Let the manifest name results and answers that a folder has now; its calls stay. Errors of `read_invocations`."""
    _write(folder, read_invocations(folder))


def is_bound(results: Path) -> bool | None:
    """Whether a results file is the one that the manifest beside it names; None where none is named, as in older runs.

    Raises:
        ManifestError: the manifest is not one.
    """
    named = _read(results.parent).results_sha256
    return None if named is None else named == fingerprint_file(results)


def changed_answers(folder: Path) -> tuple[Path, ...]:
    """Answers files that are not those that the folder's manifest names; one that is gone is another matter.

    Raises:
        ManifestError: the manifest is not one.
    """
    named = _read(folder).answers or {}
    there = ((folder / name, digest) for name, digest in named.items() if (folder / name).is_file())
    return tuple(path for path, digest in there if fingerprint_file(path) != digest)


def forget_missing_answers(folder: Path) -> None:
    """Let the manifest name no answers file that is gone: its questions will be asked anew. Errors as above."""
    manifest = _read(folder)
    there = {name: digest for name, digest in (manifest.answers or {}).items() if (folder / name).is_file()}
    if manifest.answers not in (None, there):
        _write_manifest(folder, manifest.model_copy(update={"answers": there}))


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
        manifest = Manifest.model_validate_json(content)
        if manifest.sha256 not in (None, manifest.digest()):
            raise ValueError("was changed after it was written")
        return manifest
    except ValueError as error:
        raise ManifestError(
            f"{path}: {first_problem(error)}; restore it from a copy, or delete it: it says what the run was made on"
        ) from error


def _write(folder: Path, calls: tuple[Call, ...]) -> None:
    results = folder / "results.json"
    answers = {
        path.relative_to(folder).as_posix(): fingerprint_file(path) for path in sorted(folder.glob("answers/*/*.jsonl"))
    }
    named = fingerprint_file(results) if results.exists() else None
    _write_manifest(folder, Manifest(results_sha256=named, answers=answers, calls=calls))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    path, content = folder / MANIFEST, (manifest.sealed().model_dump_json(indent=1) + "\n").encode()
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
