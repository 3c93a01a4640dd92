"""A stage gets its own rows and, only where its method may learn from them, those of the stages before."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import NUM_TRAIN, Lesson

from llava_cmoe.data import encoding
from llava_cmoe.data.encoding import PromptRows, SampleRows
from llava_cmoe.data.tasks import TaskSequence
from llava_cmoe.methods.base import Stage
from llava_cmoe.runs.stage import stage_data


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("sequential_lora")


@pytest.fixture
def uses_past(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(lesson.run.method), "uses_past", True)


def test_a_method_that_uses_no_past_gets_none(lesson: Lesson):
    assert not lesson.run.method.uses_past
    for index, stage in enumerate(lesson.run.stages):
        assert stage_data(lesson.run, index, stage).past == ()


@pytest.mark.usefixtures("uses_past")
def test_a_method_that_uses_it_gets_the_samples_of_each_stage_before(lesson: Lesson):
    first, second = (stage_data(lesson.run, index, stage) for index, stage in enumerate(lesson.run.stages))
    assert first.past == ()
    (past,) = second.past
    assert isinstance(past, SampleRows) and past.rows["id"][:] == first.samples.rows["id"][:]
    assert past.rows["id"][:] != second.samples.rows["id"][:]
    for index in (0, NUM_TRAIN - 1):
        old, again = first.samples[index], past[index]
        assert old.keys() == again.keys() and all(torch.equal(old[name], again[name]) for name in old)


@pytest.mark.usefixtures("uses_past")
def test_no_row_is_encoded_before_it_is_read(lesson: Lesson, monkeypatch: pytest.MonkeyPatch):
    encoded: list[str] = []
    plain = encoding.encode_sample
    monkeypatch.setattr(encoding, "encode_sample", lambda *given: encoded.append("sample") or plain(*given))
    monkeypatch.setattr(encoding, "encode_prompt", lambda *given: pytest.fail("a prompt is encoded"))
    data = stage_data(lesson.run, 1, lesson.run.stages[1])
    assert not encoded
    assert "labels" in data.past[0][2] and encoded == ["sample"]


def test_prompts_are_those_of_the_samples_in_their_order(lesson: Lesson):
    data = stage_data(lesson.run, 1, lesson.run.stages[1])
    assert isinstance(data.prompts, PromptRows) and data.prompts.rows["id"][:] == data.samples.rows["id"][:]
    prompt, sample = data.prompts[0]["input_ids"], data.samples[0]["input_ids"]
    assert len(prompt) < len(sample) and torch.equal(prompt, sample[: len(prompt)])


def test_a_stage_of_several_tasks_learns_the_rows_of_all(lesson: Lesson):
    data = stage_data(lesson.run, 0, Stage("both", (1, 0), 1))
    assert [row_id.split("-")[0] for row_id in data.samples.rows["id"]] == ["sides"] * NUM_TRAIN + [
        "colours"
    ] * NUM_TRAIN


def test_the_seed_of_a_stage_hangs_on_its_name_and_the_runs_seed_alone(lesson: Lesson):
    seeds = [stage_data(lesson.run, index, stage).seed for index, stage in enumerate(lesson.run.stages)]
    again = stage_data(lesson.run, 0, lesson.run.stages[1]).seed
    other = replace(lesson.run, recipe=lesson.recipe.model_copy(update={"seed": 1}))
    assert again == seeds[1] != seeds[0] and stage_data(other, 1, lesson.run.stages[1]).seed != seeds[1]


def test_tasks_of_two_geometries_are_not_learned_in_one_stage(lesson: Lesson):
    colours, sides = lesson.run.data.sequence.tasks
    mixed = TaskSequence(name="tiny", tasks=(colours, sides.model_copy(update={"geometry": "crop"})))
    run = replace(lesson.run, data=replace(lesson.run.data, sequence=mixed))
    with pytest.raises(ValueError, match=r"stage both: its tasks differ in geometry \(crop, pad\)"):
        stage_data(run, 0, Stage("both", (0, 1), 1))
