"""Merges of a run: which experts stand in for which, found when so many tasks were learned, each an entry of its own.

    runs/NAME/merges/01/            merge.json  answers/

No task's directory changes, and no tensor is written: what stays is made from the tasks' own files. Deleting an entry
takes a merge back. How one is found is `search.py`'s.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from llava_cmoe.merging.merge_map import MergeMap
from llava_cmoe.merging.merged_bank import merge
from llava_cmoe.methods.base import Method
from llava_cmoe.provenance.files import sync, write_atomically
from llava_cmoe.provenance.fingerprints import fingerprint_each, fingerprint_file
from llava_cmoe.registry.schema import Manifest, RegistryError, Sealed
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.names import InnerPath

FILE = "merge.json"


class BeforeAfter(Manifest):
    """A number without and with the merge."""

    before: float
    after: float


class MergeRecord(Sealed):
    """`merge.json`: what stands in for what, and what that costs and saves."""

    parent: str
    """`sha256` of the record of the last task that was learned."""
    bound: float
    """The most by which a task's held-out loss was allowed to rise, in nats per answer token."""
    stand_ins: dict[str, tuple[int, ...]]
    """Site to each expert's stand-in: itself, an older one, or -1 for none."""
    shares: dict[str, tuple[float, ...]]
    """Site to each expert's share in the mean that its stand-in is."""
    held_out: dict[str, int]
    """Task to the number of its rows, never learned, that the loss was measured on."""
    loss: dict[str, BeforeAfter]
    """Task to its held-out loss on its own route."""
    accuracy: dict[str, BeforeAfter]
    """Task to its accuracy on the evaluation rows, located, in percent."""
    expert_bytes: BeforeAfter
    """Bytes of all experts in memory; routers and locators are as before."""
    versions: dict[str, str]
    """Python and the packages that had a hand in the numbers."""
    answers: dict[InnerPath, str] = Field(default_factory=dict)
    """sha256 of each answers file that `accuracy` was made from, by its path in the entry; empty in older entries."""

    @model_validator(mode="after")
    def _is_a_merge(self) -> Self:
        if self.stand_ins.keys() != self.shares.keys():
            raise ValueError("stand_ins and shares are of different sites")
        for site, of_E in self.stand_ins.items():
            if len(of_E) != len(self.shares[site]):
                raise ValueError(f"{site} has {len(of_E)} stand-ins and {len(self.shares[site])} shares")
            MergeMap(of_E, self.shares[site])  # raises for what cannot stand in
        return self


def restore_merge(method: Method, registry: Registry, number: int) -> None:
    """Leave out of a restored method the experts that merge `number` leaves out, for good.

    Raises:
        RegistryError: no such merge, or it was found for other learned tasks.
    """
    record = Merges(registry).load(number)
    assert method.host is not None, "only a run with a pool of experts has merges"
    for site, of_E in record.stand_ins.items():
        if site not in method.host.banks or len(of_E) != method.host.banks[site].num_experts:
            raise RegistryError(
                f"{registry.run}: merge {number} has other experts in {site} than the run; merge it again"
            )
        merge(method.host.banks[site], MergeMap(of_E, record.shares[site]))


class Merges:
    """The entries of one run."""

    def __init__(self, registry: Registry) -> None:
        """Look into a run's folder; nothing is written yet."""
        self._registry, self._folder = registry, registry.run / "merges"

    def prepare(self) -> Path:
        """An empty folder for the next merge; what a killed one left there was another merge's."""
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        return self._partial

    def commit(self, record: MergeRecord) -> tuple[MergeRecord, Path]:
        """Make the prepared folder an entry; returns the record, sealed, and where the entry is now."""
        answers = fingerprint_each(sorted(self._partial.glob("answers/*/*.jsonl")), self._partial)
        record = record.model_copy(update={"answers": answers}).sealed()
        write_atomically(self._partial / FILE, record.to_json().encode())
        sync(self._partial)
        final = self._folder / f"{self._next:02d}"
        os.rename(self._partial, final)
        sync(self._folder)
        return record, final

    def load(self, number: int) -> MergeRecord:
        """An entry that fits the run as it is.

        Raises:
            RegistryError: no such entry, it or its answers were changed, or the run has learned or lost tasks since.
        """
        path = self._folder / f"{number:02d}" / FILE
        if path.parent.is_dir() and not path.is_file():
            raise RegistryError(
                f"{path}: is missing; bring it back from a copy, or delete {path.parent} and merge again"
            )
        if not path.is_file():
            known = ", ".join(map(str, self._numbers)) or "none yet; `llava-cmoe merge` makes one"
            raise RegistryError(f"{self._registry.run}: there is no merge {number}; there is {known}")
        record, learned = MergeRecord.read(path), self._registry.records()
        if not learned or record.parent != learned[-1].sha256:
            raise RegistryError(f"{path}: was found for other learned tasks than the run holds now; merge it again")
        for name, written in record.answers.items():
            answers = path.parent / name
            if not answers.is_file() or fingerprint_file(answers) != written:
                raise RegistryError(
                    f"{answers}: is not what was answered; bring it back from a copy, or delete {path.parent} and "
                    "merge again"
                )
        return record

    def last(self) -> MergeRecord:
        """The newest entry.

        Raises:
            RegistryError: there is none, or the run has learned or lost tasks since.
        """
        if self._next == 1:
            raise RegistryError(f"{self._registry.run}: nothing is merged yet; `llava-cmoe merge` does it")
        return self.load(self._next - 1)

    @property
    def _partial(self) -> Path:
        return self._folder / ".next.partial"

    @property
    def _numbers(self) -> list[int]:
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))

    @property
    def _next(self) -> int:
        return max(self._numbers, default=0) + 1
