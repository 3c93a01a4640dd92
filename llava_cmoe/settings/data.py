"""Which rows are learned and asked."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from llava_cmoe.settings.base import Settings
from llava_cmoe.settings.values import MOST_PROCESSES


class DataSettings(Settings):
    """Which task sequence is learned, and from where."""

    former: ClassVar = {"eval_seed": None, "pocket_seed": None}

    sequence: str = "data_configs/pocket.yaml"
    """Task sequence as YAML: a path, or the name of one in `data_configs/` (`pocket`, `coin`)."""
    root: Path = Path("runs/data/pocket")
    """Folder in CoIN's layout that holds the instruction files and `cl_dataset/`."""
    pocket_seed: int | None = 0
    """Seed with which the pocket sequence is rendered where `root` is missing; one that is there must be of this seed.
    Any with null, as in runs that are older than this setting. Says nothing of other sequences."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks to learn, in this order; all tasks of the sequence when absent."""
    train_rows: int | None = Field(None, gt=0)
    """Use only this many training rows per task (seeded draw); all when absent."""
    eval_rows: int | None = Field(None, gt=0)
    """Use only this many evaluation rows per task, drawn by `eval_seed`, and mark every result as a subset; all when
    absent."""
    eval_seed: int | None = 0
    """Seed of that draw; not the run's, so that runs of several seeds answer the same questions. The run's with null,
    as in runs that are older than this setting."""
    keep_encoded: bool = False
    """Keep encoded rows in memory after their first use: for small data (85 kB a row at 84 pixels, 1.3 MB at 336)."""
    workers: int = Field(0, ge=0, le=MOST_PROCESSES)
    """Processes that open and encode the rows of the next batches while one is trained on; with 0, training waits for
    each. They change no result, and a run may go on with others. At most four a core, or 16."""
    feature_store: Path | None = None
    """Folder that keeps the features which locators read, so that no run reads them from the same model twice: 16 kB a
    row at width 4096; none when absent. Changes no result, and a run may go on with another."""
    max_pixels: int | None = Field(None, gt=0)
    """A square picture of more pixels is made smaller before the backbone's processor gets it: for processors that
    make more tokens of a larger picture, and to resize large photographs only once. As they are when absent."""
