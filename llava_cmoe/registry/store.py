"""The registry of a run: one directory per learned task, written beside, renamed into place, never changed again.

    runs/NAME/run.json                      recipe, data and backbone that began the run, by content
    runs/NAME/tasks/03_imagenet/            experts.safetensors  routers.safetensors  locator.safetensors  record.json

The rename is the commit: before it the task is not learned, after it all of it is. Nothing outside a task's directory
says what that task taught, so deleting the last one gives back the model of the task before. Putting tensors back into
a model is for `restore.py`; what they mean is for the method.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_cmoe.provenance.files import sync, write_atomically
from llava_cmoe.provenance.fingerprints import fingerprint_all
from llava_cmoe.provenance.versions import versions
from llava_cmoe.records import Learned
from llava_cmoe.registry.finite import check_finite
from llava_cmoe.registry.inside import check_inside
from llava_cmoe.registry.run_lock import RunLock, hold, make_and_hold
from llava_cmoe.registry.schema import (
    RegistryError,
    RunRecord,
    Sources,
    TaskRecord,
    differ,
    differing_keys,
    plain_facts,
    recipe_facts,
    warn_once,
)
from llava_cmoe.registry.tensor_files import read_tensors, write_tensors
from llava_cmoe.settings.recipes import parse_recipe
from llava_cmoe.settings.run import Recipe

logger = logging.getLogger(__name__)

RECORD = "record.json"
PARTIAL = ".partial"
REMEDY = "bring those files back, learn the new ones in a run folder of their own, or go on with --anyway"


class Registry:
    """The learned tasks of one run folder."""

    def __init__(self, run: Path, writer: bool = False) -> None:
        """Open a run folder, which need not exist yet; a RegistryError where links leave it, or another process writes.

        Args:
            run: the run's output directory.
            writer: True in the one process that commits: it removes what a killed commit left. All others only read.
        """
        check_inside(run)
        self.run = run
        self._run_file, self._tasks = run / "run.json", run / "tasks"
        self._writer = writer
        self._lock: RunLock | None = hold(run) if writer and run.is_dir() else None
        if writer and self._tasks.is_dir():
            for leftover in self._tasks.glob(f".*{PARTIAL}"):
                logger.warning("removing %s, left by a commit that was killed", leftover)
                shutil.rmtree(leftover)

    def claim(self) -> None:
        """As a writer, be the only one from here on, also where the folder is not there yet; same error."""
        self._lock = make_and_hold(self.run) if self._writer else None

    def open_run(self, recipe: Recipe, processes: int = 1, force: bool = False, sources: Sources | None = None) -> None:
        """Begin a run with a recipe, or go on with the one that began it.

        Args:
            recipe: what is learned, and how.
            processes: that learn it.
            force: go on with others than began the run, which `run.json` holds from then on.
            sources: data and backbone; those that `run.json` holds, if any, stay where absent.

        Raises:
            RegistryError: the run was begun, or a task learned, with others; names what differs and both values.
        """
        self.check_recipe(recipe, processes, force)
        begun = self._begun()
        if sources is not None:
            self.check_sources(recipe, sources, force)
        elif begun is not None:
            sources = begun.sources
        record = RunRecord(recipe=recipe_facts(recipe), processes=processes, sources=sources).sealed()
        if begun != record:
            self._check_writer()
            self.claim()
            self._tasks.mkdir(parents=True, exist_ok=True)
            write_atomically(self._run_file, record.to_json().encode())
            sync(self.run)

    def check_recipe(self, recipe: Recipe, processes: int = 1, force: bool = False) -> None:
        """Stop, or with `force` only warn, unless a recipe may begin the run or go on with it.

        Raises:
            RegistryError: the run was begun, or a task learned, with another recipe, or the run on another number of
                processes; names what differs and both values.
        """
        facts, path = recipe_facts(recipe), self._run_file
        begun = self._begun() or RunRecord(recipe=facts, processes=processes)
        learned = {str(self._folder(record.index, record.name)): record.settings for record in self.records()}
        for source, earlier in ({str(path): begun.recipe} | learned).items():
            resolved = recipe_facts(self._resolve(earlier, source))  # a key that is younger than the run: its default
            differences = list(differing_keys(resolved, facts))
            if differences:
                differ(
                    f"{source}: this run was begun with another recipe: {', '.join(differences)}; "
                    "restore these values, give the new recipe a run folder of its own, or go on with --anyway",
                    force,
                )
        if begun.processes != processes:
            differ(
                f"{path}: this run was begun on another number of processes, {begun.processes}, now it is {processes}: "
                "a step would learn from another number of samples; launch as many, or go on with --anyway",
                force,
            )

    def check_sources(self, recipe: Recipe, sources: Sources, force: bool = False) -> None:
        """Stop, or with `force` only warn, unless data and backbone are those that a run was begun with.

        What is learned already never comes back on another backbone: that is an error with `force`, too.

        Args:
            recipe: says where they lie.
            sources: what is there now.
            force: only warn.

        Raises:
            RegistryError: the run was begun, or a task learned, with others; names the files, or both fingerprints.
        """
        self.check_data(recipe, sources.data_files, force)
        begun, backbone = self._begun(), sources.backbone_fingerprint
        for record in self.records():
            self.check_backbone(record, backbone)
        began = sources if begun is None or begun.sources is None else begun.sources
        if began.backbone_fingerprint != backbone:
            differ(
                f"{self._run_file}: this run was begun on another backbone than {recipe.backbone.path} is now "
                f"(fingerprint {began.backbone_fingerprint[:12]}, now {backbone[:12]}); {REMEDY}",
                force,
            )

    def check_data(self, recipe: Recipe, files: Mapping[str, str], force: bool = False) -> None:
        """Stop, or with `force` only warn, unless the data is what a run was begun with; needs no model.

        Raises:
            RegistryError: the run was begun, or a task learned, from other data; names the files, or both fingerprints.
        """
        begun, root, now = self._begun(), recipe.data.root, fingerprint_all(files)
        began = files if begun is None or begun.sources is None else begun.sources.data_files
        if changed := ", ".join(sorted({name for name, _ in began.items() ^ files.items()})):
            differ(
                f"{self._run_file}: this run was begun with other data than {root} holds now: {changed}; {REMEDY}",
                force,
            )
        for record in self.records():
            if record.data_fingerprint != now:
                differ(
                    f"{self.run}: {record.name} was learned from other data than {root} holds now "
                    f"(fingerprint {record.data_fingerprint[:12]}, now {now[:12]}); {REMEDY}",
                    force,
                )

    def check_backbone(self, record: TaskRecord, fingerprint: str) -> None:
        """Stop unless a task was learned on the backbone of this fingerprint."""
        if record.backbone_fingerprint != fingerprint:
            raise RegistryError(
                f"{self.run}: {record.name} was learned on another backbone "
                f"({record.backbone_fingerprint[:12]}, this one is {fingerprint[:12]}); set backbone.path to it"
            )

    def recipe(self) -> Recipe:
        """The recipe that began the run, with the folder where the run lies now as its output directory.

        Raises:
            RegistryError: no run was begun here, or `run.json` was changed since. Without a hash of its own, as older
                ones, it has to say what the last task was learned with.
        """
        begun, source = RunRecord.read(self._run_file), str(self._run_file)
        recipe = self._resolve(begun.recipe, source)
        for record in self.records()[-1:]:
            learned = recipe_facts(self._resolve(record.settings, source))
            if differences := ", ".join(differing_keys(learned, recipe_facts(recipe))):
                message = f"{source}: says another recipe than {record.name} was learned with: {differences}"
                if not begun.sha256:
                    raise RegistryError(f"{message}; restore these values, or go on with train --anyway")
                warn_once(message)
        return recipe

    def _begun(self) -> RunRecord | None:
        return RunRecord.read(self._run_file) if self._run_file.exists() else None

    def _resolve(self, settings: dict[str, Any], source: str) -> Recipe:
        return parse_recipe(settings | {"run": str(self.run)}, source, recorded=True)

    def commit(
        self,
        index: int,
        name: str,
        learned: Learned,
        *,
        data_fingerprint: str,
        backbone_fingerprint: str,
        seconds: Mapping[str, float],
    ) -> TaskRecord:
        """Make a task learned, all of it or (if killed on the way) nothing of it.

        Args:
            index: position of the task in the sequence, from 0; the next one after those committed.
            name: name of the task.
            learned: tensors, one safetensors file per group, and facts free of times.
            data_fingerprint: sha256 over the task's data.
            backbone_fingerprint: sha256 over the backbone's files.
            seconds: wall-clock seconds per part of the stage.

        Raises:
            RegistryError: not the next task, no name for a folder, a tensor that is not finite, a run never opened.
        """
        self._check_writer()
        done = self.records()
        if index != len(done):
            raise RegistryError(f"{self._tasks}: task {index} cannot be committed, the next one is {len(done)}")
        final = self._folder(index, name)
        check_finite(learned.tensors, final)
        partial = self._tasks / f".{final.name}{PARTIAL}"
        settings = RunRecord.read(self._run_file).recipe
        facts = plain_facts(learned.facts)

        partial.mkdir(parents=True)
        record = TaskRecord(
            index=index,
            name=name,
            method=settings["method"]["name"],
            settings=settings,
            parent=done[-1].sha256 if done else None,
            files=write_tensors(partial, learned.tensors),
            versions=versions(),
            data_fingerprint=data_fingerprint,
            backbone_fingerprint=backbone_fingerprint,
            facts=facts,
            seconds=dict(seconds),
        )
        record = record.model_copy(update={"sha256": record.digest()})
        _write(partial / RECORD, record.to_json())
        # Files only: in a read-only directory `rm -r` fails for all but root, and deleting the last task is a feature.
        for path in partial.iterdir():
            path.chmod(0o444)
        sync(partial)
        os.rename(partial, final)
        sync(self._tasks)
        return record

    def records(self) -> tuple[TaskRecord, ...]:
        """Records of all learned tasks in order, verified as one unbroken chain; tensors are verified by `load`.

        Raises:
            RegistryError: a gap, a stranger among the directories, a record that was changed or follows another past.
        """
        records: list[TaskRecord] = []
        for folder in self._folders():
            record = TaskRecord.read(folder / RECORD)
            position, parent = len(records), records[-1].sha256 if records else None
            if record.sha256 != record.digest():
                raise RegistryError(f"{folder / RECORD}: was changed after it was committed; restore it from a copy")
            if folder != self._folder(record.index, record.name):
                raise RegistryError(f"{folder}: holds task {record.index} {record.name}; give it back its own name")
            if record.index != position:
                raise RegistryError(
                    f"{folder}: comes where task {position} should be, one before it is missing or doubled; "
                    "restore that one, or delete this and what follows to learn them again"
                )
            if record.parent != parent:
                raise RegistryError(
                    f"{folder / RECORD}: was learned after another task {position - 1} than the one here; "
                    f"delete {folder.name} and what follows, the run will learn them again"
                )
            records.append(record)
        return tuple(records)

    def load(self, index: int) -> dict[str, dict[str, Tensor]]:
        """Tensors of a task by group (`experts`, `routers`, `locator`, ...), each file verified against its record.

        Raises:
            RegistryError: no such task, a file that is missing or not what was written, tensors that are not finite.
        """
        records = self.records()
        if not 0 <= index < len(records):
            raise RegistryError(f"{self._tasks}: task {index} is not learned yet, there are {len(records)}")
        return self.tensors_of(records[index])

    def tensors_of(self, record: TaskRecord) -> dict[str, dict[str, Tensor]]:
        """The same of a record that `records` returned: the chain is verified there, once for all tasks."""
        return read_tensors(self._folder(record.index, record.name), record.files)

    def _folder(self, index: int, name: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise RegistryError(f"task name {name!r} cannot name a folder; use letters, digits, _ and -")
        return self._tasks / f"{index + 1:02d}_{name}"

    def _folders(self) -> list[Path]:
        """The tasks' directories by number; whatever else lies there, but for hidden files, is an error."""
        numbered: list[tuple[int, Path]] = []
        for path in self._tasks.iterdir() if self._tasks.is_dir() else ():
            if path.name.startswith("."):
                continue
            number = re.match(r"(\d{2,})_", path.name)
            if number is None or not path.is_dir():
                raise RegistryError(f"{path}: is not a task's directory; move it out of {self._tasks}")
            numbered.append((int(number[1]), path))
        return [path for _, path in sorted(numbered)]

    def _check_writer(self) -> None:
        assert self._writer, "only the process that opened the registry with writer=True may write to it"


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)
