"""A task leaves its run as stock PEFT or as a plain checkpoint: exactly, or refused, or measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, type_in
from peft import PeftModel
from tiny import TASKS, Lesson
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_cmoe.evaluation.log import read_answers
from llava_cmoe.export.exporting import export
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.settings.base import RecipeError

EXACT = ("sequential_lora", "merging", "lora_per_task", "hide", "pmoe")
"""Methods whose gates the task alone decides."""
MOVED = ("cmoe", "moelora")
"""Methods whose gates depend on what is read."""


def logits(model: Any, lesson: Lesson) -> torch.Tensor:
    with torch.no_grad():
        return model(**lesson.prompts()).logits


@pytest.mark.parametrize("name", EXACT)
def test_stock_peft_computes_what_the_run_computes(
    name: str, lesson_of: Callable[[str], Lesson], tiny_backbone: Path, tmp_path: Path
):
    lesson = lesson_of(name)
    for index, task in enumerate(TASKS):
        written = export(lesson.recipe.run, tmp_path / task, task)
        base = AutoModelForImageTextToText.from_pretrained(tiny_backbone)
        loaded = PeftModel.from_pretrained(base, tmp_path / task).eval()
        wanted = lesson.logits_of(lesson.run.method, index)
        assert written.agreement is None
        torch.testing.assert_close(logits(loaded, lesson), wanted, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(wanted, lesson.base, atol=1e-3)


@pytest.mark.parametrize("name", ["sequential_lora", "lora_per_task"])
def test_a_merged_checkpoint_answers_as_the_run(name: str, lesson_of: Callable[[str], Lesson], tmp_path: Path):
    lesson, folder = lesson_of(name), tmp_path / "merged"
    written = export(lesson.recipe.run, folder, "colours", merged=True)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert {"config.json", "model.safetensors", "README.md"} <= set(written.files)
    torch.testing.assert_close(logits(model, lesson), lesson.logits_of(lesson.run.method, 0), atol=2e-5, rtol=1e-4)
    asked = lesson.questions["colours"]
    route = "oracle" if lesson.run.method.locates else "located"
    said = read_answers(lesson.run.eval_spec.answers_path(1, 0, route))
    for prompt, answer in zip(asked.prompts, said, strict=True):  # type: ignore[arg-type]
        batch = {key: value if key == "pixel_values" else value.unsqueeze(0) for key, value in prompt.items()}
        tokens = model.generate(**batch, max_new_tokens=asked.max_new_tokens)[0, batch["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == answer.text


@pytest.mark.parametrize("name", MOVED)
def test_gates_that_tokens_move_are_refused_and_nothing_is_written(
    name: str, lesson_of: Callable[[str], Lesson], tmp_path: Path
):
    with pytest.raises(RegistryError, match="depend on what is read.*--approximate") as refusal:
        export(lesson_of(name).recipe.run, tmp_path / "adapter", "colours")
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_an_approximation_is_measured_on_what_it_writes(
    lesson_of: Callable[[str], Lesson], tiny_backbone: Path, tmp_path: Path
):
    """The shares stand in the card, and whoever loads the adapter finds them again."""
    lesson = lesson_of("cmoe")
    written = export(lesson.recipe.run, tmp_path / "adapter", "sides", approximate=True)
    found = written.agreement
    assert found is not None and found.questions == len(lesson.questions["sides"].ids)
    said = read_answers(lesson.run.eval_spec.answers_path(1, 1, "oracle"))
    loaded: Any = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tiny_backbone), tmp_path / "adapter"
    ).eval()
    asked, same = lesson.questions["sides"], 0
    for prompt, answer in zip(asked.prompts, said, strict=True):  # type: ignore[arg-type]
        batch = {key: value if key == "pixel_values" else value.unsqueeze(0) for key, value in prompt.items()}
        tokens = loaded.generate(**batch, max_new_tokens=asked.max_new_tokens, do_sample=False)
        text = lesson.run.backbone.processor.tokenizer.decode(
            tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        same += text.strip() == answer.text
    assert found.answers == same / found.questions
    assert f"{100 * found.answers:.1f} %" in (tmp_path / "adapter/README.md").read_text()
    torch.testing.assert_close(  # closer to the run than the backbone is
        logits(loaded, lesson), lesson.logits_of(lesson.run.method, 1), atol=1.0, rtol=0.5
    )


def test_a_task_that_is_answered_alike_need_not_be_named(lesson_of: Callable[[str], Lesson], tmp_path: Path):
    export(lesson_of("sequential_lora").recipe.run, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ""  # a path of this machine says nothing elsewhere


def test_equal_exports_have_equal_bytes(lesson_of: Callable[[str], Lesson], tmp_path: Path):
    for folder in ("one/adapter", "two/adapter"):
        export(lesson_of("lora_per_task").recipe.run, tmp_path / folder, "sides")
    for file in (tmp_path / "one/adapter").iterdir():
        assert file.read_bytes() == (tmp_path / "two/adapter" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lora_per_task", {"task": None}, "--task"),
        ("lora_per_task", {"task": "colors"}, "no 'colors'.*colours, sides"),
        ("zero_shot", {"task": "colours"}, "nothing is learned"),
        ("moelora", {"task": None, "approximate": True}, "--task"),
    ],
)
def test_what_cannot_leave_is_said_before_a_model_is_loaded(
    name: str, given: dict[str, Any], message: str, lesson_of: Callable[[str], Lesson], tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("llava_cmoe.chat.opening.load_backbone", lambda _: pytest.fail("loaded"))
    with pytest.raises((RegistryError, RecipeError), match=message):
        export(lesson_of(name).recipe.run, tmp_path / "adapter", **given)


def test_a_folder_that_holds_something_is_left_alone(lesson_of: Callable[[str], Lesson], tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(RecipeError, match="is there already"):
        export(lesson_of("lora_per_task").recipe.run, tmp_path, "sides")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_says_whether_it_is_exact(lesson_of: Callable[[str], Lesson], tmp_path: Path):
    run = lesson_of("lora_per_task").recipe.run
    result = type_in("export", run, "--task", "sides", "--as", "peft", "--to", tmp_path / "adapter")
    assert result.exit_code == 0 and "exact" in result.output and "adapter_model.safetensors" in result.output
    assert "is there already" in refused("export", run, "--task", "sides", "--to", tmp_path / "adapter")
