"""Work on one answers file: processes share its batches, append what they answer, and go on after a kill.

Batches are fixed by the order of what is asked and the batch size alone (batch b belongs to process b modulo the number
of processes), and answers are appended batch by batch. So one process or two, killed or not, the same batches are
computed. A batch that a kill cut in two is computed again whole, because the last bits of its logits may depend on who
shares the batch; for the same reason work that goes on with another batch size begins anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from llava_cmoe.evaluation.log import Answer, read_answers


class Processes(Protocol):
    """The processes that share the work: an `accelerate.PartialState` or `Accelerator`."""

    @property
    def process_index(self) -> int:
        """From 0."""
        ...

    @property
    def num_processes(self) -> int:
        """All of them."""
        ...

    @property
    def is_main_process(self) -> bool:
        """Whether this one merges what all have written."""
        ...

    def wait_for_everyone(self) -> None:
        """Return when every process has called this."""
        ...


def share_out(
    path: Path,
    rows: Sequence[int],
    ask: Callable[[Sequence[int]], list[Answer]],
    *,
    ids: Sequence[str],
    batch_size: int,
    processes: Processes,
    progress: Callable[[int, int], None],
) -> None:
    """Ask about some rows, batch by batch, until all are answered; all processes call this together.

    Process p appends to `path` with the suffix `.{batch size}.{p}.part`, for `read_parts`. What such files hold already
    is not asked again.

    Args:
        path: the answers file that is worked on.
        rows: which are asked about, in order.
        ask: called with some of them.
        ids: of all rows.
        batch_size: rows in a batch.
        processes: those that share the work.
        progress: called after every batch with how many rows are done and how many there are, both of this process.

    Raises:
        RuntimeError: not one of the first questions can be answered, so that it is no question's fault.
    """
    answered = read_parts(path, batch_size).keys()
    processes.wait_for_everyone()  # everyone has read before anyone writes
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    mine = batches[processes.process_index :: processes.num_processes]
    num_done, num_mine = 0, sum(map(len, mine))
    held: list[Answer] = []  # failures, until one question is answered: they may all be one and the same
    works = bool(answered)
    with _open_to_append(path.with_name(f"{path.name}.{batch_size}.{processes.process_index}.part")) as stream:
        for batch in mine:
            if not answered >= {ids[row] for row in batch}:
                held += ask(batch)
                works = works or any(answer.failed is None for answer in held)
                if works:
                    _append(stream, held)
                    held = []
                elif len(held) > 1:
                    raise RuntimeError(f"none of the first questions can be answered: {held[-1].failed}")
            num_done += len(batch)
            progress(num_done, num_mine)
        _append(stream, held)
    processes.wait_for_everyone()


def read_parts(path: Path, batch_size: int) -> dict[str, Answer]:
    """What all processes have answered so far, by id; of a batch computed twice the later answers stand."""
    return {answer.id: answer for part in _parts(path, batch_size) for answer in read_answers(part, at_work=True)}


def remove_parts(path: Path) -> None:
    """Remove what is left of the work on a file that is complete, also of what was done beforehand for it."""
    for part in _parts(path, "*"):
        part.unlink()


def _parts(path: Path, batch_size: int | Literal["*"]) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.{batch_size}.*.part"))


def _open_to_append(part: Path) -> BinaryIO:
    """Open a part behind its last complete line; what a kill left of the next one is cut off."""
    part.parent.mkdir(parents=True, exist_ok=True)
    stream = part.open("a+b")
    stream.seek(0)
    stream.truncate(stream.read().rfind(b"\n") + 1)
    return stream


def _append(stream: BinaryIO, answers: Sequence[Answer]) -> None:
    stream.write(b"".join(answer.to_line() for answer in answers))
    stream.flush()
    os.fsync(stream.fileno())
