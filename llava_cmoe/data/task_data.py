"""A task sequence's data, opened once: its tasks, the rows that are learned and asked, the hashes of their files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset

from llava_cmoe.data.coin import read_eval, read_train, refuse_pictures
from llava_cmoe.data.encoding import Encoding
from llava_cmoe.data.paths import files_of, train_file
from llava_cmoe.data.pocket_mark import check_pocket
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.data.tasks import TaskSequence, TaskSpec
from llava_cmoe.data.validation import as_questions, split
from llava_cmoe.provenance.fingerprints import fingerprint_all, fingerprint_each
from llava_cmoe.settings.data import DataSettings
from llava_cmoe.settings.evaluation import Split
from llava_cmoe.settings.run import Recipe

POCKET = "pocket"
"""Name of the sequence that is rendered where it is missing."""


@dataclass(frozen=True)
class TaskData:
    """The data that one seed learns and is asked; files are read when they are first wanted, each once.

    Attributes:
        settings: where it lies, and how much of it is used.
        seed: of the draws.
        sequence: the tasks, in order.
        split: which questions are asked; training rows that are, are not learned.
    """

    settings: DataSettings
    seed: int
    sequence: TaskSequence
    split: Split = "test"

    @classmethod
    def open(cls, settings: DataSettings, seed: int, split: Split = "test") -> TaskData:
        """Parse the sequence's YAML.

        Raises:
            RecipeError: unknown sequence or task, or a broken file.
        """
        return cls(settings, seed, sequence_of(settings), split)

    @classmethod
    def of(cls, recipe: Recipe) -> TaskData:
        """The data of a recipe's run; errors as of `open`."""
        return cls.open(recipe.data, recipe.seed, recipe.evaluation.split)

    @cached_property
    def train(self) -> dict[str, Dataset]:
        """Task name to the rows that are learned.

        Raises:
            DataError: the first problem found; names file, row and reason.
        """
        return {name: subsample(rows, self.settings.train_rows, self.seed) for name, rows in self._to_learn.items()}

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
        """The training rows of a task that are neither learned nor asked."""
        return held_out_rows(self._to_learn[name], self.settings.train_rows, self.seed)

    def check(self, reads_images: bool) -> None:
        """Read everything, so that a mistake is found before a model is loaded.

        Raises:
            DataError: the first problem found; also a picture where the backbone reads text alone.
        """
        if self.sequence.name == POCKET and self.settings.pocket_seed is not None:
            check_pocket(self.settings.root, self.settings.pocket_seed)
        _ = self.train, self.evaluate, self.files
        if not reads_images:
            refuse_pictures(self.settings.root, self.sequence.tasks)

    def encoding(self, task: TaskSpec, processor: Any, keep: bool = False) -> Encoding:
        """How a task's rows become tensors."""
        return Encoding(processor, task.geometry, self.settings.max_pixels, keep)

    @cached_property
    def _all_evaluate(self) -> dict[str, Dataset]:
        root, tasks = self.settings.root, self.sequence.tasks
        if self.split == "test":
            return {task.name: read_eval(root, task) for task in tasks}
        asked = {name: rows for name, (_, rows) in self._parts.items()}
        return {task.name: as_questions(asked[task.name], task.scorer, train_file(root, task)) for task in tasks}

    @cached_property
    def _to_learn(self) -> dict[str, Dataset]:
        return {name: rows for name, (rows, _) in self._parts.items()}

    @cached_property
    def _parts(self) -> dict[str, tuple[Dataset, Dataset]]:
        """Training rows that are learned, and those that are asked, of which the test split has none."""
        whole = {task.name: read_train(self.settings.root, task) for task in self.sequence.tasks}
        is_test = self.split == "test"
        return {name: (rows, rows.select([])) if is_test else split(rows) for name, rows in whole.items()}


def sequence_of(settings: DataSettings) -> TaskSequence:
    """The tasks that are named, in order."""
    sequence = load_sequence(settings.sequence)
    return sequence if settings.tasks is None else sequence.select(settings.tasks)


def lacks_pocket(settings: DataSettings) -> bool:
    """Whether a pocket sequence has to be rendered first; any other data a user brings."""
    return sequence_of(settings).name == POCKET and not settings.root.exists()


def subsample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """A seeded draw of `count` rows; all of them where fewer exist or none is wanted."""
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def held_out_rows(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """The rows that `subsample` leaves out."""
    kept = len(rows) if count is None else min(count, len(rows))
    return rows.shuffle(seed=seed).select(list(range(kept, len(rows))))
