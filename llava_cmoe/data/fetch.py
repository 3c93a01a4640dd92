"""Where the data of a sequence comes from, and the download of what the Hugging Face Hub serves of it.

Pictures mostly lie on the pages of their datasets, behind forms and licences: these are named, never fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import DryRunFileInfo, snapshot_download
from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from llava_cmoe.data.problems import DataError, Problem
from llava_cmoe.data.tasks import Source, TaskSequence


def fetch_sources(sequence: TaskSequence, root: Path, say: Callable[[str], None]) -> list[Problem]:
    """Download whatever the hub serves of a sequence's data, and return what could not be had.

    Args:
        sequence: names the sources.
        root: the data root that they fill.
        say: called with what is being downloaded.
    """
    problems = []
    for source in sequence.sources:
        try:
            if source.hub is not None:
                _download(source.hub, source.name, root / source.to, patterns_of(source, sequence), say)
        except DataError as error:
            problems.append(error.problem)
    return problems


def _download(hub: str, name: str, folder: Path, patterns: tuple[str, ...], say: Callable[[str], None]) -> None:
    download = partial(snapshot_download, hub, repo_type="dataset", local_dir=folder, allow_patterns=list(patterns))
    try:
        # Asked first: offline, a download into a folder that holds something only warns, and brings nothing.
        wanted = [file for file in download(dry_run=True) if isinstance(file, DryRunFileInfo)]
        if not wanted:
            raise DataError(Problem(folder, f"{hub} serves no file like {', '.join(patterns)}"))
        due = [file for file in wanted if file.will_download]
        size = sum(file.file_size or 0 for file in due) / 1e9
        say(f"{name}: {len(due)} of {len(wanted)} files of {hub} are missing, {size:.1f} GB")
        download()
    except (DryRunError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        files = " ".join(f"--include '{pattern}'" for pattern in patterns)
        reason = (
            f"{hub} cannot be downloaded ({type(error).__name__}); where the hub can be reached: "
            f"hf download {hub} --repo-type dataset {files} --local-dir {folder}"
        )
        raise DataError(Problem(folder, reason)) from error


def patterns_of(source: Source, sequence: TaskSequence) -> tuple[str, ...]:
    """The source's patterns, `{folder}` replaced by every spelling of the tasks' instruction folder."""
    folders = dict.fromkeys(folder for task in sequence.tasks for folder in task.folder)
    spelled = (
        pattern.replace("{folder}", folder)
        for pattern in source.files
        for folder in (folders if "{folder}" in pattern else ("",))
    )
    return tuple(dict.fromkeys(spelled))


def render(sequence: TaskSequence, root: Path) -> Iterator[str]:
    """All sources, a line for each thing to know: addresses are copied, so they stand in no table."""
    yield f"{sequence.name}: where its data comes from"
    for source in sequence.sources:
        yield f"\n{source.name}: {source.holds}"
        if source.hub is not None:
            yield f"  from      {source.hub} on the Hugging Face Hub"
        if source.page is not None:
            yield f"  page      {source.page}"
        yield f"  licence   {source.licence}"
        yield f"  into      {root / source.to}"
        if source.by_hand is not None:
            yield f"  by hand   {source.by_hand}"
    yield ""
