"""A task sequence's data, opened once: its tasks, the rows that are learned and asked, the hashes of their files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset

from llava_cmoe.data.coin import read_eval, read_train, refuse_pictures
from llava_cmoe.data.encoding import Encoding
from llava_cmoe.data.paths import files_of
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.tasks import TaskSequence, TaskSpec
from llava_cmoe.provenance.fingerprints import fingerprint_all, fingerprint_each
from llava_cmoe.settings.data import DataSettings


@dataclass(frozen=True)
class TaskData:
    """The data that one seed learns and is asked; files are read when they are first wanted, each once.

    Attributes:
        settings: where it lies, and how much of it is used.
        seed: of the draws.
        sequence: the tasks, in order.
    """

    settings: DataSettings
    seed: int
    sequence: TaskSequence

    @classmethod
    def open(cls, settings: DataSettings, seed: int) -> TaskData:
        """Parse the sequence's YAML.

        Raises:
            RecipeError: unknown sequence or task, or a broken file.
        """
        return cls(settings, seed, sequence_of(settings))

    @cached_property
    def train(self) -> dict[str, Dataset]:
        """Task name to the rows that are learned.

        Raises:
            DataError: the first problem found; names file, row and reason.
        """
        return {name: subsample(rows, self.settings.train_rows, self.seed) for name, rows in self._all_train.items()}

    @cached_property
    def evaluate(self) -> dict[str, Dataset]:
        """Task name to the rows that are asked; errors as of `train`."""
        count, own = self.settings.eval_rows, self.settings.eval_seed
        seed = self.seed if own is None else own
        return {name: subsample(rows, count, seed) for name, rows in self._all_evaluate.items()}

    @property
    def num_evaluate(self) -> dict[str, int]:
        """Task name to the number of evaluation rows there are, used or not."""
        return {name: len(rows) for name, rows in self._all_evaluate.items()}

    @cached_property
    def files(self) -> dict[str, str]:
        """Sha256 of every file that says what is learned and asked, by its name in the data root."""
        root = self.settings.root
        return fingerprint_each([file for task in self.sequence.tasks for file in files_of(root, task)], root)

    @property
    def fingerprint(self) -> str:
        """One sha256 over all of them."""
        return fingerprint_all(self.files)

    def held_out(self, name: str) -> Dataset:
        """The training rows of a task that are not learned."""
        return held_out_rows(self._all_train[name], self.settings.train_rows, self.seed)

    def check(self, reads_images: bool) -> None:
        """Read everything, so that a mistake is found before a model is loaded.

        Raises:
            DataError: the first problem found; also a picture where the backbone reads text alone.
        """
        _ = self.train, self.evaluate, self.files
        if not reads_images:
            refuse_pictures(self.settings.root, self.sequence.tasks)

    def encoding(self, task: TaskSpec, processor: Any, keep: bool = False) -> Encoding:
        """How a task's rows become tensors."""
        return Encoding(processor, task.geometry, self.settings.max_pixels, keep)

    @cached_property
    def _all_evaluate(self) -> dict[str, Dataset]:
        return {task.name: read_eval(self.settings.root, task) for task in self.sequence.tasks}

    @cached_property
    def _all_train(self) -> dict[str, Dataset]:
        return {task.name: read_train(self.settings.root, task) for task in self.sequence.tasks}


def sequence_of(settings: DataSettings) -> TaskSequence:
    """The tasks that are named, in order."""
    sequence = load_sequence(settings.sequence)
    return sequence if settings.tasks is None else sequence.select(settings.tasks)


def lacks_pocket(settings: DataSettings) -> bool:
    """Whether a pocket sequence has to be rendered first; any other data a user brings."""
    return sequence_of(settings).name == "pocket" and not settings.root.exists()


def subsample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """A seeded draw of `count` rows; all of them where fewer exist or none is wanted."""
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def held_out_rows(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """The rows that `subsample` leaves out."""
    kept = len(rows) if count is None else min(count, len(rows))
    return rows.shuffle(seed=seed).select(list(range(kept, len(rows))))
