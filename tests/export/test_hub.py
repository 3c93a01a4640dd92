"""A run goes to the hub and comes back: the same bytes, nothing else, and nothing that was not written so."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from commands import refused, type_in
from hub import Hub, reached_hub
from huggingface_hub import ModelCard
from tiny import Lesson

import llava_cmoe
from llava_cmoe.evaluation.log import LogError, comparable, read_results
from llava_cmoe.export.hub import HubError, pull, push
from llava_cmoe.registry.contents import parts_of
from llava_cmoe.registry.schema import RegistryError, RunRecord
from llava_cmoe.report.tables import number
from llava_cmoe.settings.base import RecipeError

REPO, TOKEN = "somebody/run", "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with reached_hub(monkeypatch, TOKEN) as hub:
        yield hub


@pytest.fixture
def run(lesson_of: Callable[[str], Lesson], tmp_path: Path) -> Path:
    """A finished run to do anything with, and what lies in a run folder without being a part of it."""
    run = Path(shutil.copytree(lesson_of("cmoe").recipe.run, tmp_path / "run"))
    for name in ("report.html", "notes.txt", "tasks/01_colours/optimizer.pt", "logs/x.tfevents", ".env"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    return run


def bytes_of(run: Path) -> dict[str, bytes]:
    return {part: (run / part).read_bytes() for part in parts_of(run)}


def test_what_is_pulled_is_what_was_pushed_and_answers_alike(
    hub: Hub, run: Path, lesson_of: Callable[[str], Lesson], tmp_path: Path
):
    lesson, backbone = lesson_of("cmoe"), lesson_of("cmoe").recipe.backbone.path
    url = push(run, REPO)
    assert url == f"{hub.address}/{REPO}" and hub.private == {REPO}
    assert hub.files(REPO).keys() - {"README.md"} == bytes_of(run).keys()
    assert any(asked.startswith("PUT /lfs/") for asked in hub.asked)
    pull(REPO, tmp_path / "theirs", backbone=backbone)
    assert bytes_of(tmp_path / "theirs") == bytes_of(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]
    assert comparable(read_results(tmp_path / "theirs/results.json")) == comparable(lesson.results)
    here, there = (llava_cmoe.load(folder) for folder in (run, tmp_path / "theirs"))
    prompts = here.prompts(["Which colour is it?", "And which side?"])
    assert here.generate(**prompts).tolist() == there.generate(**prompts).tolist()


def test_the_card_shows_the_matrix_and_names_base_seed_and_protocol(
    hub: Hub, run: Path, lesson_of: Callable[[str], Lesson]
):
    push(run, REPO)
    card, results = ModelCard(hub.files(REPO)["README.md"].decode()), lesson_of("cmoe").results
    assert card.data.library_name == "llava_cmoe" and {"llava_cmoe", "cmoe"} <= set(card.data.tags or ())
    assert card.data.base_model is None  # a folder of this machine
    assert lesson_of("cmoe").recipe.backbone.path not in card.text
    for row in results.headline.matrix:
        assert all(number(accuracy) in card.text for accuracy in row if accuracy is not None)
    for fact in (f"| protocol | {results.protocol}", f"| seed | {results.seed}", f"llava-cmoe pull {REPO}"):
        assert fact in card.text


def test_a_push_leaves_nothing_of_the_one_before(hub: Hub, run: Path):
    push(run, REPO)
    hub.files(REPO)["somebodys.txt"] = b"theirs"
    shutil.rmtree(run / "answers")
    (run / "results.json").unlink()
    (run / "manifest.json").unlink()
    push(run, REPO)
    assert hub.files(REPO).keys() == {*bytes_of(run), "README.md", "somebodys.txt"}
    assert "Nothing is measured yet" in hub.files(REPO)["README.md"].decode()


def test_no_token_is_written(hub: Hub, run: Path, lesson_of: Callable[[str], Lesson], tmp_path: Path):
    push(run, REPO)
    pull(REPO, tmp_path / "theirs", backbone=lesson_of("cmoe").recipe.backbone.path)
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in data for data in (*written, *hub.files(REPO).values(), *hub.blobs.values()))


@pytest.mark.parametrize("name", ["record.json", "experts.safetensors", "results.json", "gqa", "run.json"])
def test_a_changed_file_is_named_and_nothing_is_made(
    name: str, hub: Hub, run: Path, lesson_of: Callable[[str], Lesson], tmp_path: Path
):
    push(run, REPO)
    files, wanted = hub.files(REPO), {"gqa": "sides.located.jsonl"}.get(name, name)
    path = next(path for path in sorted(files) if path.endswith(wanted))
    if wanted == "run.json":
        files[path] = files[path].replace(b'"seed":0', b'"seed":1').replace(b'"seed": 0', b'"seed": 1')
    else:
        files[path] = files[path][:-9] + bytes([files[path][-9] ^ 1]) + files[path][-8:]
    with pytest.raises((RegistryError, LogError), match=wanted.partition(".")[0]) as refusal:
        pull(REPO, tmp_path / "theirs", backbone=lesson_of("cmoe").recipe.backbone.path)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_run_is_not_pushed(hub: Hub, run: Path):
    path = run / "tasks/02_sides/experts.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RegistryError, match="experts.safetensors"):
        push(run, REPO)
    assert hub.asked == []


def test_a_backbone_that_nobody_named_is_not_accepted(hub: Hub, run: Path, tmp_path: Path):
    push(run, REPO)
    asked = len(hub.asked)
    with pytest.raises(RegistryError, match="--backbone"):
        pull(REPO, tmp_path / "theirs")
    assert not any("safetensors" in path for path in hub.asked[asked:])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_copy_of_the_backbone_takes_its_place_on_record(hub: Hub, run: Path, tmp_path: Path):
    push(run, REPO)
    pull(REPO, tmp_path / "theirs", backbone="/elsewhere/copy")
    begun = RunRecord.read(tmp_path / "theirs/run.json")
    assert begun.recipe["backbone"]["path"] == "/elsewhere/copy" and begun.sha256


def test_what_else_lies_in_a_repository_is_not_fetched(
    hub: Hub, run: Path, lesson_of: Callable[[str], Lesson], tmp_path: Path
):
    push(run, REPO)
    hub.files(REPO).update({"tasks/01_colours/optimizer.pt": b"x", "evil.py": b"x", "tasks/x/record.json": b"x"})
    pull(REPO, tmp_path / "theirs", backbone=lesson_of("cmoe").recipe.backbone.path)
    assert {path.name for path in (tmp_path / "theirs").rglob("*") if path.is_file()}.isdisjoint(
        {"optimizer.pt", "evil.py"}
    )
    assert not any("evil" in asked or "optimizer" in asked for asked in hub.asked)


@pytest.mark.parametrize(
    ("repo", "message"), [("somebody/nothing", "404"), ("not a name", "not a name"), ("somebody/empty", "no run")]
)
def test_what_is_not_there_is_one_line(repo: str, message: str, hub: Hub, tmp_path: Path):
    hub.repos["somebody/empty"] = {}
    hub.commit("somebody/empty", {"README.md": b"nothing"})
    with pytest.raises(HubError, match=message) as refusal:
        pull(repo, tmp_path / "theirs")
    assert "\n" not in str(refusal.value) and TOKEN not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_refuses_or_is_away_is_one_line(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch):
    hub.token = "another"
    assert "401" in refused("push", run, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len(refused("push", run, REPO).splitlines()) == 1


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path):
    with pytest.raises(RecipeError, match="is there already"):
        pull(REPO, tmp_path)


def test_the_commands_push_and_pull(hub: Hub, run: Path, lesson_of: Callable[[str], Lesson], tmp_path: Path):
    pushed = type_in("push", run, REPO, "--public")
    assert pushed.exit_code == 0 and f"{hub.address}/{REPO}" in pushed.output and not hub.private
    words = ("pull", REPO, "--to", tmp_path / "theirs")
    assert "--backbone" in refused(*words)
    pulled = type_in(*words, "--backbone", lesson_of("cmoe").recipe.backbone.path)
    assert pulled.exit_code == 0 and "verified" in pulled.output
    assert json.loads((tmp_path / "theirs/run.json").read_text()) == json.loads((run / "run.json").read_text())
