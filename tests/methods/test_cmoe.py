"""Old tasks compute what they computed, and a prompt's route depends on that prompt alone."""

from pathlib import Path

import pytest
import torch
from tiny import Lesson
from torch import Tensor
from torch.utils.data import Subset

from llava_cmoe.backbones.feature_store import FeatureStore
from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.encoding import PromptRows, SampleRows
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.methods.cmoe import Cmoe
from llava_cmoe.methods.pool_use import count
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.runs.stage import stage_data
from llava_cmoe.sequence import learn


@pytest.fixture
def prompts(lesson: Lesson) -> list[dict[str, Tensor]]:
    """All evaluation prompts of both tasks."""
    return [row for questions in lesson.questions.values() for row in map(questions.prompts.__getitem__, range(6))]


def collate(lesson: Lesson, rows: list[dict[str, Tensor]], side: str = "left") -> dict[str, Tensor]:
    return Collator(lesson.run.backbone.processor.tokenizer.pad_token_id, side)(rows)


def test_an_old_task_computes_the_same_bits_after_the_model_grew(lesson: Lesson):
    first, second = lesson.results.growth.values()
    assert sum(first.values()) == 4 and sum(second.values()) == 1  # two per layer, then one where the probe was used
    before, after = (logits[0] for logits in lesson.logits)
    assert torch.equal(before, after)
    assert not torch.equal(after, lesson.logits[1][1])  # and it is not that routes do not matter


def test_a_layer_that_did_not_grow_still_gets_a_router_for_the_task(method: Cmoe):
    assert all(len(bank.router) == 2 for bank in method.host.banks.values())
    assert sorted(tuple(map(len, bank.router.known)) for bank in method.host.banks.values()) == [(2, 2), (2, 3)]


def test_new_experts_start_as_copies_of_the_most_used_old_one_and_with_the_tasks_tokens(lesson: Lesson):
    method = restore_method(lesson.recipe, load_backbone(lesson.recipe.backbone), Registry(lesson.recipe.run), stages=1)
    assert isinstance(method, Cmoe)
    data = stage_data(lesson.run, 1, lesson.run.stages[1])
    growth, init = method.probe(data, lambda *args, **kwargs: None)
    method.grow(growth, init, data.seed)
    ((site, index),) = growth.init_from.items()
    bank = method.host.banks[site]
    for linear, copied in bank.expert(2).items():
        original = bank.expert(index)[linear]
        assert torch.equal(copied.a_ERI, original.a_ERI) and torch.equal(copied.b_EOR, original.b_EOR)
        assert original.b_EOR.any()  # learned: not what a fresh expert starts as
    rows = Subset(data.samples, range(len(data.samples)))
    counts = count(method.model, rows, method.processor, method.host, RoutePlan.single(1))
    used = {name: (counts_E / counts_E.sum()).tolist() for name, counts_E in counts.items()}
    assert used[site][2] > 0.45  # of two slots per token nearly one


def test_every_route_is_measured_for_every_learned_task(lesson: Lesson):
    assert set(lesson.results.routes) == {"located", "oracle", "random"}
    for route in lesson.results.routes.values():
        assert [[cell is not None for cell in row] for row in route.matrix] == [[True, False], [True, True]]


def test_a_mixed_batch_answers_each_prompt_on_its_own_route(lesson: Lesson, method: Cmoe):
    batch = lesson.prompts()
    task_B = torch.tensor([1, 0, -1, 1])
    with torch.no_grad(), method.answering(batch, task_B):
        mixed = method.model(**batch).logits
    apart = torch.stack([lesson.logits_of(method, task)[row] for row, task in enumerate(task_B.tolist())])
    torch.testing.assert_close(mixed, apart, rtol=0, atol=1e-6)


def test_a_verdict_does_not_depend_on_batch_mates(lesson: Lesson, method: Cmoe, prompts: list[dict[str, Tensor]]):
    together = method.locating.locate(collate(lesson, prompts))
    alone = [method.locating.locate(collate(lesson, [row])) for row in prompts]
    assert together.task_B.tolist() == [located.task_B.item() for located in alone]
    torch.testing.assert_close(
        together.score_BN, torch.cat([located.score_BN for located in alone]), rtol=1e-4, atol=1e-3
    )


def test_a_verdict_does_not_depend_on_the_padding(lesson: Lesson, method: Cmoe, prompts: list[dict[str, Tensor]]):
    left, right = (method.locating.locate(collate(lesson, prompts, side)) for side in ("left", "right"))
    assert torch.equal(left.score_BN, right.score_BN)


def test_a_verdict_is_about_the_prompt_and_never_about_the_answer(lesson: Lesson, method: Cmoe):
    data = stage_data(lesson.run, 0, lesson.run.stages[0])
    samples, prompts = data.samples, data.prompts
    assert isinstance(samples, SampleRows) and isinstance(prompts, PromptRows)
    with pytest.raises(ValueError, match="prompts"):
        method.locating.locate(collate(lesson, [samples[0], samples[1]]))

    def rotated(row: dict) -> dict:
        question, answer = row["turns"]
        return {"turns": [question, {"role": "assistant", "text": answer["text"] + " and so on"}]}

    other = PromptRows(prompts.rows.map(rotated), prompts.encoding)
    assert torch.equal(method.locating.features.of_rows(prompts), method.locating.features.of_rows(other))


def test_experts_never_move_what_the_locator_reads(lesson: Lesson, method: Cmoe, prompts: list[dict[str, Tensor]]):
    batch = collate(lesson, prompts)
    plain = method.locating.locate(batch).score_BN
    with method.answering(batch, torch.ones(len(prompts), dtype=torch.long)):
        assert torch.equal(method.locating.locate(batch).score_BN, plain)


def test_a_batch_learns_on_the_newest_routers_with_the_balance_term(lesson: Lesson, method: Cmoe):
    batch = lesson.prompts()
    with torch.no_grad(), method.training_context(batch) as extra_loss:
        output = method.model(**batch)
        loss = extra_loss(output)
    assert torch.equal(output.logits, lesson.logits[-1][-1])
    weight = lesson.recipe.method.experts.balance_weight
    assert (
        0.5 * weight < loss < 3 * weight
    )  # the balance loss itself is 1 at uniform use, at most the number of experts


def test_features_kept_by_another_run_teach_the_same_bits(
    lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def learned(name: str) -> list[str]:
        data = lesson.recipe.data.model_copy(update={"feature_store": tmp_path / "features"})
        learn(lesson.recipe.model_copy(update={"data": data, "run": tmp_path / name}))
        return [record.sha256 for record in Registry(tmp_path / name).records()]

    def refuse() -> Tensor:
        raise AssertionError("read from the model again")

    plain, features = [record.sha256 for record in lesson.run.registry.records()], FeatureStore.features
    assert learned("first") == plain
    monkeypatch.setattr(
        FeatureStore, "features", lambda store, prompts, read_as, _: features(store, prompts, read_as, refuse)
    )
    assert learned("second") == plain
