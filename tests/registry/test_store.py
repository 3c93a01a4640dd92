"""A task is learned as a whole or not at all, never changed afterwards, and every damage is named."""

import json
import shutil
import stat
import sys

import pytest
import torch

from llava_cmoe.provenance.fingerprints import fingerprint_all
from llava_cmoe.records import Learned
from llava_cmoe.registry import store, tensor_files
from llava_cmoe.registry.schema import RegistryError, Sources
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.recipes import parse_recipe

NAMES = ("scienceqa", "textvqa", "imagenet")
WRITING = ("open_run", "commit", "write_tensors", "_write")


class Killed(BaseException):
    """Stands in for SIGKILL: no code of the registry may catch it."""


def recipe_for(run, **changes):
    return parse_recipe({"run": str(run), "method": {"name": "cmoe"}} | changes, source="test")


def learned(index):
    """Tensors of one task, some of them views of one storage as slices of a stacked bank are."""
    bank_ERD = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(index))
    return Learned(
        tensors={
            "experts": {"layers.0.up.0": bank_ERD[0], "layers.0.up.1": bank_ERD[1].T},
            "routers": {"layers.0": bank_ERD[:, 0].to(torch.bfloat16)},
            "locator": {},
        },
        facts={"growth": {"layers.0": 2}, "trainable": 24, "loss": [2.5, 0.1]},
    )


def commit(registry, index, seconds=1.0):
    return registry.commit(
        index,
        NAMES[index],
        learned(index),
        data_fingerprint=f"data{index}",
        backbone_fingerprint="base",
        seconds={"train": seconds},
    )


def begun(run, num_tasks=0, seconds=1.0):
    registry = Registry(run, writer=True)
    registry.open_run(recipe_for(run))
    for index in range(num_tasks):
        commit(registry, index, seconds)
    return registry


def content(run):
    """Every file below a run with its bytes, mode and time of change."""
    return {
        str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def equal(left, right):
    return left.keys() == right.keys() and all(
        left[group].keys() == right[group].keys()
        and all(
            torch.equal(left[group][name], right[group][name]) and left[group][name].dtype == right[group][name].dtype
            for name in left[group]
        )
        for group in left
    )


def killing_at(step, action):
    """Run an action and kill it before the step-th line of its writing functions in store.py; True if it was killed."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if (
            frame.f_code.co_filename not in (store.__file__, tensor_files.__file__)
            or frame.f_code.co_name not in WRITING
        ):
            return None
        if event == "line":
            lines += 1
            if lines == step:
                raise Killed
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Killed:
        return True
    finally:
        sys.settrace(previous)
    return False


def test_what_is_committed_is_what_is_loaded(tmp_path):
    begun(tmp_path, 3)
    registry = Registry(tmp_path)
    assert [(record.index, record.name, record.method) for record in registry.records()] == [
        (index, name, "cmoe") for index, name in enumerate(NAMES)
    ]
    for index in range(3):
        assert equal(registry.load(index), learned(index).tensors)
    assert sorted(path.name for path in (tmp_path / "tasks" / "03_imagenet").iterdir()) == [
        "experts.safetensors",
        "locator.safetensors",
        "record.json",
        "routers.safetensors",
    ]


def test_record_states_what_learned_it_and_from_what(tmp_path):
    first, second = begun(tmp_path, 2).records()
    document = json.loads((tmp_path / "tasks" / "02_textvqa" / "record.json").read_text())
    assert document["parent"] == second.parent == first.sha256 and first.parent is None
    assert document["settings"]["method"]["experts"]["rank"] == 64 and "run" not in document["settings"]
    assert {"python", "torch", "transformers", "peft", "accelerate", "deepspeed"} <= document["versions"].keys()
    assert (document["data_fingerprint"], document["backbone_fingerprint"]) == ("data1", "base")
    assert document["facts"] == learned(1).facts and document["seconds"] == {"train": 1.0}
    for name, file in document["files"].items():
        assert file["bytes"] == (tmp_path / "tasks" / "02_textvqa" / name).stat().st_size


def test_equal_runs_write_equal_directories_up_to_seconds(tmp_path):
    begun(tmp_path / "one", 3, seconds=1.0)
    begun(tmp_path / "two", 3, seconds=2.0)
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one.keys() == two.keys()
    for path in one:
        texts = [one[path][0], two[path][0]]
        if path.endswith("record.json"):
            assert texts[0] != texts[1]
            texts = [{**json.loads(text), "seconds": None} for text in texts]
        assert texts[0] == texts[1]


def test_a_commit_killed_at_any_step_leaves_the_old_state_or_the_whole_new_task(tmp_path):
    begun(tmp_path / "run", 1)
    outcomes = []
    for step in range(1, 1000):
        run = shutil.copytree(tmp_path / "run", tmp_path / f"killed_{step}")
        writer = Registry(run, writer=True)
        killed = killing_at(step, lambda writer=writer: commit(writer, 1))
        reader = Registry(run)
        outcomes.append(len(reader.records()))
        assert outcomes[-1] in (1, 2)
        assert all(equal(reader.load(index), learned(index).tensors) for index in range(outcomes[-1]))

        again = Registry(run, writer=True)
        assert not list((run / "tasks").glob(".*"))
        commit(again, outcomes[-1])
        assert [record.name for record in again.records()] == list(NAMES[: outcomes[-1] + 1])
        if not killed:
            break
    assert not killed and step > 40
    assert outcomes == sorted(outcomes) and outcomes[0] == 1 and outcomes.count(2) > 1


def test_a_run_killed_while_it_begins_can_be_begun_again(tmp_path):
    for step in range(1, 1000):
        run = tmp_path / str(step)
        killed = killing_at(step, lambda run=run: Registry(run, writer=True).open_run(recipe_for(run)))
        begun(run, 1)
        assert len(Registry(run).records()) == 1
        if not killed:
            break
    assert not killed and step > 10


def test_bytes_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """A commit syncs every file and their directory, renames it, and syncs the directory that holds the new name."""
    registry, events = begun(tmp_path), []
    sync, rename = store.sync, store.os.rename
    for module in (store, tensor_files):
        monkeypatch.setattr(module, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(store.os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    commit(registry, 0)
    files = ["experts.safetensors", "routers.safetensors", "locator.safetensors", "record.json"]
    assert events == [*files, ".01_scienceqa.partial", "rename", "tasks"]


def test_leftovers_of_a_killed_commit_are_removed_by_the_writer_only(tmp_path):
    begun(tmp_path, 1)
    leftover = tmp_path / "tasks" / ".02_textvqa.partial"
    leftover.mkdir()
    (leftover / "experts.safetensors").write_bytes(b"half")
    (leftover / "experts.safetensors").chmod(0o444)
    assert len(Registry(tmp_path).records()) == 1 and leftover.exists()
    assert len(Registry(tmp_path, writer=True).records()) == 1 and not leftover.exists()


def test_committed_directories_are_read_only_and_never_rewritten(tmp_path):
    registry = begun(tmp_path, 2)
    before = content(tmp_path)
    assert all(not stat.S_IMODE(mode) & 0o222 for path, (_, mode, _) in before.items() if path.startswith("tasks/"))
    with pytest.raises(RegistryError, match="task 1 cannot be committed, the next one is 2"):
        commit(registry, 1)
    begun(tmp_path)
    commit(registry, 2)
    after = content(tmp_path)
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 4


def test_readers_never_write(tmp_path):
    begun(tmp_path, 1)
    before, reader = content(tmp_path), Registry(tmp_path)
    reader.open_run(recipe_for(tmp_path))
    reader.load(0)
    with pytest.raises(AssertionError, match="writer=True"):
        commit(reader, 1)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["experts.safetensors", "routers.safetensors", "locator.safetensors"])
def test_one_wrong_byte_or_a_lost_file_is_found_and_named(tmp_path, name):
    registry = begun(tmp_path, 2)
    path = tmp_path / "tasks" / "01_scienceqa" / name
    path.chmod(0o644)
    whole = path.read_bytes()
    for damaged in (
        bytes([whole[0] ^ 1]) + whole[1:],
        whole[:-1] + bytes([whole[-1] ^ 128]),
        whole[:-1],
        whole + b"\0",
    ):
        path.write_bytes(damaged)
        with pytest.raises(RegistryError, match=f"01_scienceqa/{name}: is damaged.*restore it"):
            registry.load(0)
    path.unlink()
    with pytest.raises(RegistryError, match=f"01_scienceqa/{name}: is missing; restore it"):
        registry.load(0)
    path.write_bytes(whole)
    assert equal(registry.load(0), learned(0).tensors) and equal(registry.load(1), learned(1).tensors)


@pytest.mark.parametrize(
    "key, value", [("name", "other"), ("facts", {}), ("parent", "0"), ("surplus", 1), ("index", "x")]
)
def test_a_changed_record_is_found_and_named(tmp_path, key, value):
    registry = begun(tmp_path, 2)
    path = tmp_path / "tasks" / "02_textvqa" / "record.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RegistryError, match="02_textvqa/record.json: "):
        registry.records()


def test_broken_record_is_found_and_named(tmp_path):
    registry = begun(tmp_path, 1)
    path = tmp_path / "tasks" / "01_scienceqa" / "record.json"
    path.chmod(0o644)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(RegistryError, match="01_scienceqa/record.json: .*restore"):
        registry.records()


def test_a_gap_in_the_chain_is_found(tmp_path):
    registry = begun(tmp_path, 3)
    shutil.rmtree(tmp_path / "tasks" / "02_textvqa")
    with pytest.raises(RegistryError, match="03_imagenet: comes where task 1 should be"):
        registry.records()


def test_a_doubled_or_renamed_task_is_found(tmp_path):
    registry = begun(tmp_path, 2)
    tasks = tmp_path / "tasks"
    shutil.copytree(tasks / "02_textvqa", tasks / "02_copy")
    with pytest.raises(RegistryError, match="02_copy: holds task 1 textvqa"):
        registry.records()
    (tasks / "02_copy").rename(tasks / "notes")
    with pytest.raises(RegistryError, match="notes: is not a task's directory"):
        registry.records()


def test_a_task_learned_after_another_past_is_found(tmp_path):
    run, other = begun(tmp_path / "run", 2), begun(tmp_path / "other")
    other.commit(0, NAMES[0], learned(5), data_fingerprint="data0", backbone_fingerprint="base", seconds={"train": 1.0})
    shutil.rmtree(run.run / "tasks" / "01_scienceqa")
    shutil.copytree(other.run / "tasks" / "01_scienceqa", run.run / "tasks" / "01_scienceqa")
    with pytest.raises(
        RegistryError, match="02_textvqa/record.json: was learned after another task 0.*delete 02_textvqa"
    ):
        run.records()


def test_deleting_the_last_directory_gives_back_the_run_before_that_task(tmp_path):
    registry = begun(tmp_path, 1)
    before = content(tmp_path)
    commit(registry, 1)
    shutil.rmtree(tmp_path / "tasks" / "02_textvqa")
    assert content(tmp_path) == before
    again = begun(tmp_path)
    assert len(again.records()) == 1 and equal(again.load(0), learned(0).tensors)
    commit(again, 1)
    assert equal(again.load(1), learned(1).tensors)


def test_another_recipe_in_the_same_folder_names_the_differing_keys(tmp_path):
    registry = begun(tmp_path, 1)
    other = recipe_for(tmp_path, seed=3, method={"name": "cmoe", "probe": {"alpha": 1.0}})
    with pytest.raises(
        RegistryError, match=r"run.json: .*method.probe.alpha \(was 0.25, now 1.0\), seed \(was 0, now 3\)"
    ):
        registry.open_run(other)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RegistryError, match=r"01_scienceqa: .*seed \(was 0, now 3\)"):
        registry.open_run(other)
    begun(tmp_path)


def test_a_run_goes_on_after_a_setting_with_a_default_has_come_to_be(tmp_path):
    Registry(tmp_path, writer=True).open_run(recipe_for(tmp_path))
    path = tmp_path / "run.json"
    document = json.loads(path.read_text())
    del document["recipe"]["method"]["probe"]["alpha"], document["sha256"]
    path.write_text(json.dumps(document))
    Registry(tmp_path, writer=True).open_run(recipe_for(tmp_path))
    other = recipe_for(tmp_path, method={"name": "cmoe", "probe": {"alpha": 1.0}})
    with pytest.raises(RegistryError, match=r"method.probe.alpha \(was 0.25, now 1.0\)"):
        Registry(tmp_path, writer=True).open_run(other)


def test_a_run_that_was_begun_with_the_old_name_of_a_setting_goes_on_with_the_new_one(tmp_path):
    registry = begun(tmp_path)
    path = tmp_path / "run.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    experts = document["recipe"]["method"]["experts"]
    experts["head_start"] = experts.pop("router_init_logit")
    path.write_text(json.dumps(document))
    record = commit(registry, 0)
    assert "head_start" in record.settings["method"]["experts"]
    assert registry.recipe().model_dump() == recipe_for(tmp_path).model_dump()
    registry.open_run(recipe_for(tmp_path))
    other = recipe_for(tmp_path, method={"name": "cmoe", "experts": {"router_init_logit": 1.0}})
    with pytest.raises(RegistryError, match=r"method.experts.router_init_logit \(was 6.0, now 1.0\)"):
        registry.open_run(other)


def test_a_run_goes_on_only_with_the_data_and_the_backbone_it_began_with(tmp_path, caplog):
    registry, recipe = Registry(tmp_path, writer=True), recipe_for(tmp_path)
    began = Sources(data_files={"a/train.json": "1" * 64, "a/test.json": "2" * 64}, backbone_fingerprint="3" * 64)
    registry.open_run(recipe, sources=began)
    registry.open_run(recipe, sources=began)
    registry.open_run(recipe)  # whoever knows none takes none away
    before = content(tmp_path)
    other_data = {"data_files": {"a/train.json": "4" * 64, "b/test.json": "2" * 64}}
    other_backbone = {"backbone_fingerprint": "5" * 64}
    for change, told in (
        (other_data, "run.json: .* other data than .*: a/test.json, a/train.json, b/test.json; .*--anyway"),
        (other_backbone, "run.json: .* another backbone .* 333333333333, now 555555555555.*--anyway"),
    ):
        now = began.model_copy(update=change)
        with pytest.raises(RegistryError, match=told):
            registry.open_run(recipe, sources=now)
        assert content(tmp_path) == before
    registry.open_run(recipe, force=True, sources=now)
    assert "another backbone" in caplog.text
    registry.open_run(recipe, sources=now)
    with pytest.raises(RegistryError, match="another backbone"):
        registry.open_run(recipe, sources=began)


def test_what_is_learned_stays_on_its_backbone_whatever_is_said(tmp_path):
    registry, recipe = Registry(tmp_path, writer=True), recipe_for(tmp_path)
    began = Sources(data_files={"a/train.json": "1" * 64}, backbone_fingerprint="base")
    registry.open_run(recipe, sources=began)
    fingerprint = fingerprint_all(began.data_files)
    registry.commit(
        0, NAMES[0], learned(0), data_fingerprint=fingerprint, backbone_fingerprint="base", seconds={"train": 1.0}
    )
    before = content(tmp_path)
    for force in (False, True):
        with pytest.raises(RegistryError, match="scienceqa was learned on another backbone .* set backbone.path to it"):
            registry.open_run(recipe, force=force, sources=began.model_copy(update={"backbone_fingerprint": "other"}))
    assert content(tmp_path) == before


def test_a_run_that_is_older_than_sources_goes_on_and_takes_them_down(tmp_path):
    registry, recipe = begun(tmp_path, 1), recipe_for(tmp_path)
    path = tmp_path / "run.json"
    document = json.loads(path.read_text())
    del document["sources"], document["sha256"]
    path.write_text(json.dumps(document))
    record = content(tmp_path / "tasks")
    with pytest.raises(RegistryError, match=r"scienceqa was learned from other data .*fingerprint data0, now"):
        registry.open_run(recipe, sources=Sources(data_files={}, backbone_fingerprint="base"))
    registry.open_run(recipe, force=True, sources=Sources(data_files={}, backbone_fingerprint="base"))
    assert json.loads(path.read_text())["sources"] == {"backbone_fingerprint": "base", "data_files": {}}
    assert content(tmp_path / "tasks") == record


def test_a_moved_run_goes_on_with_the_recipe_that_began_it(tmp_path):
    begun(tmp_path / "here", 1)
    moved = (tmp_path / "here").rename(tmp_path / "there")
    registry = begun(moved)
    assert registry.recipe().model_dump() == recipe_for(moved).model_dump()
    commit(registry, 1)
    assert len(registry.records()) == 2


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(RegistryError, match="run.json: cannot be read .* give the folder of a run"):
        Registry(tmp_path).recipe()
    assert Registry(tmp_path).records() == ()
    with pytest.raises(RegistryError, match="task 0 is not learned yet, there are 0"):
        Registry(tmp_path).load(0)


def test_nothing_is_written_for_a_task_that_cannot_be_recorded(tmp_path):
    registry = begun(tmp_path)
    before = content(tmp_path)
    fingerprints = {"data_fingerprint": "d", "backbone_fingerprint": "b", "seconds": {}}
    with pytest.raises(RegistryError, match="task name '../x' cannot name a folder"):
        registry.commit(0, "../x", learned(0), **fingerprints)
    with pytest.raises(ValueError, match="facts.growth.probe_seconds: a time"):
        registry.commit(0, "x", Learned({}, {"growth": {"probe_seconds": 1.0}}), **fingerprints)
    with pytest.raises(ValueError, match="JSON compliant"):
        registry.commit(0, "x", Learned({}, {"loss": float("nan")}), **fingerprints)
    assert content(tmp_path) == before and not list((tmp_path / "tasks").iterdir())


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", ["experts", "routers", "locator"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_neither_committed_nor_read(tmp_path, monkeypatch, odd, group, kind):
    registry = begun(tmp_path / "run", 1)
    good = learned(1)
    weight = torch.ones(2, 3, dtype=kind)
    weight[1, 2] = odd
    bad = Learned({**good.tensors, group: {**good.tensors[group], "weight": weight, "count": torch.tensor(3)}}, {})
    sources = {"data_fingerprint": "data1", "backbone_fingerprint": "base", "seconds": {}}
    with pytest.raises(RegistryError, match=f"02_textvqa: weight of {group} is not finite"):
        registry.commit(1, NAMES[1], bad, **sources)
    assert [path.name for path in (tmp_path / "run/tasks").iterdir()] == ["01_scienceqa"]
    monkeypatch.setattr(store, "check_finite", lambda *_: None)  # as an older version committed it
    registry.commit(1, NAMES[1], bad, **sources)
    monkeypatch.undo()
    with pytest.raises(RegistryError, match=f"02_textvqa: weight of {group} is not finite; delete 02_textvqa"):
        Registry(tmp_path / "run").load(1)
    assert Registry(tmp_path / "run").load(0)
