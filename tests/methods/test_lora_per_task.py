"""LoRA per task: stock LoRA for each task, on the route that a sample is given or located at."""

from collections.abc import Callable

import pytest
import torch
from formulas import experts_of, through
from peft import LoraConfig, get_peft_model
from tiny import Lesson

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.backbones.sites import linear_sites
from llava_cmoe.methods.lora_per_task import LoraPerTask

SITE = "model.language_model.layers.1.mlp.down_proj"


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("lora_per_task")


@pytest.fixture
def method(lesson: Lesson) -> LoraPerTask:
    assert isinstance(lesson.run.method, LoraPerTask)
    return lesson.run.method


@pytest.mark.parametrize("task", [0, 1])
def test_a_tasks_adapter_is_stock_peft_lora(lesson: Lesson, method: LoraPerTask, task: int):
    model = load_backbone(lesson.recipe.backbone).model
    targets = [site.name for site in linear_sites(model)]
    stock = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    for site, bank in method.host.banks.items():
        a_RI, b_OR = experts_of(bank)[task]
        adapter = stock.base_model.model.get_submodule(site)
        adapter.lora_A["default"].weight.data.copy_(a_RI)
        adapter.lora_B["default"].weight.data.copy_(b_OR)
    prompts = lesson.prompts()
    with torch.no_grad():
        logits_BTV = stock(**prompts).logits
    torch.testing.assert_close(lesson.logits_of(method, task), logits_BTV, rtol=0, atol=1e-5)
    assert not torch.allclose(logits_BTV, lesson.base, rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_linear_adds_the_adapter_of_each_samples_task(lesson: Lesson, method: LoraPerTask):
    batch, bank = lesson.prompts(), method.host.banks[SITE]
    task_B = torch.tensor([1, 0, -1, 1])
    with through(bank) as calls, method.answering(batch, task_B):
        method.model(**batch)
    ((x_BTI, y_BTO),) = calls
    pairs = experts_of(bank)
    for x_TI, y_TO, task in zip(x_BTI, y_BTO, task_B.tolist(), strict=True):
        expected_TO = x_TI @ bank.frozen.frozen.weight.double().T
        if task >= 0:
            a_RI, b_OR = pairs[task]
            expected_TO = expected_TO + 8 / 4 * x_TI @ a_RI.T @ b_OR.T
        torch.testing.assert_close(y_TO, expected_TO, rtol=0, atol=1e-5)


def test_a_batch_of_mixed_tasks_answers_as_each_task_alone_does(lesson: Lesson, method: LoraPerTask):
    batch, task_B = lesson.prompts(), torch.tensor([1, 0, -1, 1])
    with torch.no_grad(), method.answering(batch, task_B):
        mixed = method.model(**batch).logits
    apart = torch.stack([lesson.logits_of(method, task)[row] for row, task in enumerate(task_B.tolist())])
    torch.testing.assert_close(mixed, apart, rtol=0, atol=1e-5)
    assert torch.equal(lesson.logits_of(method, -1), lesson.base)


def test_an_old_task_computes_the_same_bits_after_a_new_one(lesson: Lesson):
    assert torch.equal(lesson.logits[0][0], lesson.logits[1][0])
    assert not torch.equal(lesson.logits[1][0], lesson.logits[1][1])


def test_a_prompt_that_is_located_is_answered_by_its_tasks_adapter(lesson: Lesson, method: LoraPerTask):
    batch = lesson.prompts()
    with torch.no_grad(), method.answering(batch) as location:
        logits_BTV = method.model(**batch).logits
    located = location()
    assert located is not None and len(set(located.task_B.tolist())) > 1
    apart = torch.stack([lesson.logits_of(method, task)[row] for row, task in enumerate(located.task_B.tolist())])
    torch.testing.assert_close(logits_BTV, apart, rtol=0, atol=1e-5)


def test_every_adapter_starts_afresh(lesson: Lesson):
    first, second = (lesson.run.registry.load(index)["experts"] for index in (0, 1))
    sites = linear_sites(load_backbone(lesson.recipe.backbone).model)
    assert first.keys() == second.keys() == {f"{site.name}/linear.{matrix}" for site in sites for matrix in "AB"}
    assert not any(torch.equal(first[name], second[name]) for name in first)
