"""A run to the hub and back, by the hub's own client: the parts of a run and nothing else, verified at both ends.

Tokens are the client's (HF_TOKEN, or its own login); none is read or written here. What a pulled run may do is what any
stranger's run may (docs/trust.md), but its backbone: that has to be named by whoever pulls.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from llava_cmoe.evaluation.log import Results, check_answers, read_results
from llava_cmoe.export.run_card import run_card
from llava_cmoe.merging.store import MergeRecord
from llava_cmoe.provenance.files import write_atomically
from llava_cmoe.registry.contents import parts_among, parts_of, verify
from llava_cmoe.registry.schema import RegistryError, RunRecord
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError, in_one_line, shown

CARD, RESULTS = "README.md", "results.json"
FAILURES = (
    *(HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, EntryNotFoundError),
    hub_errors.HTTPError,  # type: ignore[attr-defined]  # no connection; of whichever HTTP library the client uses
    *(RuntimeError, ValueError),  # an upload that broke off, a card or an answer that is malformed
)
"""What the hub's client raises."""


class HubError(RegistryError):
    """What the hub refuses, or cannot be asked."""


def push(run: Path, repo_id: str, *, public: bool = False, endpoint: str | None = None) -> str:
    """Put a run into a repository of the hub, in one commit, and return its address; what lies there is replaced.

    Args:
        run: its folder, verified first.
        repo_id: `USER/NAME`; made where it is missing.
        public: whether everybody can see a repository that is made; nobody but its owner can otherwise.
        endpoint: address of the hub; HF_ENDPOINT's if absent.

    Raises:
        RegistryError: nothing is learned, or a file is not what was written.
        LogError: the results or answers are not what was written.
        HubError: the hub refuses.
    """
    records, results, recipe = verify(run), _verified_results(run), Registry(run).recipe()
    parts, api = parts_of(run), _api(endpoint)
    card = run_card(repo_id, recipe, records[-1], results)
    additions = [CommitOperationAdd(part, str(run / part)) for part in parts]
    with _one_line(repo_id):
        repo_id = api.create_repo(repo_id, private=not public, exist_ok=True).repo_id
        stale = set(parts_among(api.list_repo_files(repo_id))) - set(parts)
        commit = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(CARD, card.encode()),
                *additions,
                *(CommitOperationDelete(part, is_folder=False) for part in sorted(stale)),
            ],
            commit_message=f"{recipe.run.name}: {len(records)} stages of {recipe.method.name}",
        )
    return str(commit.repo_url)


def pull(
    repo_id: str, to: Path, *, backbone: str | None = None, revision: str | None = None, endpoint: str | None = None
) -> list[str]:
    """Make a run folder of a repository, whole or not at all, and return the parts that it consists of.

    Args:
        repo_id: `USER/NAME`.
        to: folder to make.
        backbone: model folder or name to load when the run is opened; needed unless the run's is `pocket`.
        revision: branch, tag or commit; the newest if absent.
        endpoint: address of the hub; HF_ENDPOINT's if absent.

    Raises:
        RecipeError: the folder is there already.
        RegistryError: no run lies there, a file is not what was written, or its backbone was not named.
        LogError: the answers are not what was written.
        HubError: the hub refuses.
    """
    if to.exists():
        raise RecipeError(f"{to}: is there already; name a folder that is not")
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _one_line(repo_id):
            api = _api(endpoint)
            commit = api.repo_info(repo_id, revision=revision).sha
            parts = parts_among(api.list_repo_files(repo_id, revision=commit))
            if "run.json" not in parts:
                raise HubError(f"{repo_id}: holds no run, as it has no run.json")
            api.hf_hub_download(repo_id, "run.json", revision=commit, local_dir=partial)
            _check_backbone(repo_id, Registry(partial).recipe().backbone.path, backbone)
            api.snapshot_download(repo_id, revision=commit, local_dir=partial, allow_patterns=parts)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's
        verify(partial)
        _verified_results(partial)
        _name_backbone(partial / "run.json", backbone)
        os.rename(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return parts


def _verified_results(run: Path) -> Results | None:
    """What was measured, None if nothing was; verified with its answers, as are subsets and merges."""
    for path in run.glob("merges/*/merge.json"):
        MergeRecord.read(path)
    found = {
        folder: read_results(folder / RESULTS)
        for folder in (run, *run.glob("subsets/*"))
        if (folder / RESULTS).exists()
    }
    if run not in found:
        check_answers(run)  # of a stage that is not measured to its end
    return found.get(run)


def _check_backbone(repo_id: str, recorded: str, named: str | None) -> None:
    """Stop where opening the run would load a model that nobody but its maker chose."""
    if named is None and recorded != "pocket":
        raise RegistryError(
            f"{repo_id}: opening it loads the backbone {shown(recorded)}; give that, or the folder of a copy, as "
            "--backbone if it is meant"
        )


def _name_backbone(run_file: Path, named: str | None) -> None:
    """Put the backbone's place here on record; whether it is the right one its hash says when it is loaded."""
    begun = RunRecord.read(run_file)
    if named is not None and begun.recipe["backbone"]["path"] != named:
        recipe = begun.recipe | {"backbone": begun.recipe["backbone"] | {"path": named}}
        write_atomically(run_file, begun.model_copy(update={"recipe": recipe}).sealed().to_json().encode())


def _api(endpoint: str | None) -> HfApi:
    return HfApi(endpoint=endpoint, library_name="llava_cmoe")


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Errors of the client as ours."""
    try:
        yield
    except RegistryError:
        raise
    except FAILURES as error:
        raise HubError(f"{repo_id}: {in_one_line(error)}") from error
