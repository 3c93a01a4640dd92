"""PMoE: one decision half-way, for all deep layers, read from the prompt alone and learned with the task's number."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from formulas import data_of, experts_of, layer_norm, restored, samples_of, through
from tiny import NUM_TRAIN, Lesson
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from llava_cmoe.data.batches import Batch
from llava_cmoe.data.collator import ROW, dummy_image_row
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.methods.pmoe import Pmoe
from llava_cmoe.methods.replay import kept_rows

LAYERS = "model.language_model.layers"
ENTRANCE = f"{LAYERS}.1.self_attn.q_proj"


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("pmoe")


@pytest.fixture
def method(lesson: Lesson) -> Pmoe:
    """After both tasks; what the second one's rows are is still known."""
    assert isinstance(lesson.run.method, Pmoe)
    return lesson.run.method


@pytest.fixture
def learned_rows(lesson: Lesson) -> ConcatDataset:
    """What the second task learned from: its own rows, then those kept of the first."""
    old, new = (data_of(lesson, task).samples for task in range(2))
    return ConcatDataset([new, Subset(old, kept_rows(NUM_TRAIN, 0.1, f"{lesson.recipe.seed}/0"))])


@contextmanager
def gates_seen(method: Pmoe) -> Iterator[dict[str, Tensor]]:
    """Deep site to its gate (B, N) in the pass inside."""
    seen: dict[str, Tensor] = {}
    hooks = [
        bank.router.register_forward_hook(lambda _, args, gate, site=site: seen.update({site: gate.gate_BTE[:, 0]}))
        for site, bank in method.deep.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def gate_of(method: Pmoe, x_BTD: Tensor, prompt_BT: Tensor) -> Tensor:
    """softmax(W c), c the layer-normalised mean of what the deep half reads of the prompt."""
    weights_BT1 = prompt_BT.double().unsqueeze(-1)
    c_BD = layer_norm((x_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1))
    return (c_BD @ method.router.weight.detach().double().T).softmax(dim=1)


def prompt_tokens(batch: Batch) -> Tensor:
    """Tokens before the answer (B, T): by hand, row by row."""
    prompt_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, labels_T in enumerate(batch["labels"].tolist()):
        first = next(place for place, label in enumerate(labels_T) if label != IGNORED)
        prompt_BT[row, :first] = True
    return prompt_BT & batch["attention_mask"].bool()


@torch.no_grad()
def test_the_gate_is_a_softmax_of_the_prompts_mean_and_all_deep_sites_share_it(
    lesson: Lesson, method: Pmoe, learned_rows: ConcatDataset
):
    answers, questions = samples_of(lesson, learned_rows, range(6)), lesson.prompts()
    for batch in (answers, questions):
        context = method.training_context(batch) if batch is answers else method.answering(batch)
        prompt_BT = prompt_tokens(batch) if batch is answers else batch["attention_mask"].bool()
        with through(method.deep[ENTRANCE]) as calls, gates_seen(method) as seen, context:
            method.model(**{name: value for name, value in batch.items() if name != ROW})
        expected_BN = gate_of(method, calls[0][0], prompt_BT)
        assert set(seen) == set(method.deep) and len(seen) == 7
        for gate_BN in seen.values():
            assert torch.equal(gate_BN, seen[ENTRANCE])
        torch.testing.assert_close(seen[ENTRANCE].double(), expected_BN, rtol=0, atol=1e-5)
        assert expected_BN.shape[1] == 2 and expected_BN.std(dim=0).min() > 1e-4  # it does tell prompts apart


@torch.no_grad()
def test_shallow_linears_add_the_shared_adapter_and_deep_ones_the_gated_experts(lesson: Lesson, method: Pmoe):
    batch = lesson.prompts()
    shallow, deep = method.shallow[f"{LAYERS}.0.mlp.up_proj"], method.deep[f"{LAYERS}.1.mlp.up_proj"]
    with through(shallow) as of_shallow, through(deep) as of_deep, gates_seen(method) as seen, method.answering(batch):
        method.model(**batch)
    gate_BN = seen[ENTRANCE].double()
    for bank, ((x_BTI, y_BTO),), share_BN in ((shallow, of_shallow, gate_BN.new_ones(4, 1)), (deep, of_deep, gate_BN)):
        expected_BTO = x_BTI @ bank.frozen.frozen.weight.double().T
        pairs = experts_of(bank)
        assert len(pairs) == share_BN.shape[1]
        for expert, (a_RI, b_OR) in pairs.items():
            expected_BTO = expected_BTO + 8 / 4 * share_BN[:, expert, None, None] * (x_BTI @ a_RI.T @ b_OR.T)
        torch.testing.assert_close(y_BTO, expected_BTO, rtol=0, atol=1e-5)


def test_the_loss_adds_the_cross_entropy_of_the_gate_with_each_rows_own_task(
    lesson: Lesson, method: Pmoe, learned_rows: ConcatDataset
):
    places, tasks = [3, NUM_TRAIN, 0, NUM_TRAIN + 1], [1, 0, 1, 0]  # behind the new rows lie those of the first task
    batch = samples_of(lesson, learned_rows, places)
    added, gate_BN = _added(method, batch)
    expected = -gate_BN[range(4), tasks].log().mean()
    assert added.item() == pytest.approx(0.1 * float(expected), rel=1e-5)
    wrong = -gate_BN[range(4), [1, 1, 1, 1]].log().mean()
    assert added.item() != pytest.approx(0.1 * float(wrong), rel=1e-2)


def test_a_sample_that_only_fills_up_a_batch_is_of_no_task(lesson: Lesson, method: Pmoe, learned_rows: ConcatDataset):
    places = [3, NUM_TRAIN]
    batch = samples_of(lesson, learned_rows, places)
    added, _ = _added(method, batch)
    pictured = next(learned_rows[place] for place in range(NUM_TRAIN) if "pixel_values" in learned_rows[place])
    filled = samples_of(lesson, [*(learned_rows[place] for place in places), pictured], range(3))
    hidden = dummy_image_row({name: value[-1] for name, value in filled.items()})
    for name in ("attention_mask", "labels"):
        filled[name][-1] = hidden[name]
    filled[ROW] = torch.tensor([*places, -1])
    with_it, _ = _added(method, filled)
    assert with_it.item() == pytest.approx(added.item(), rel=1e-5)


def _added(method: Pmoe, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss term of a batch, and the gate it is of."""
    with torch.no_grad(), gates_seen(method) as seen, method.training_context(batch) as extra_loss:
        added = extra_loss(method.model(**{name: value for name, value in batch.items() if name != ROW}))
    return added, seen[ENTRANCE].double()


def test_the_routers_loss_reaches_every_row_of_the_router(lesson: Lesson, learned_rows: ConcatDataset):
    method = restored(lesson, 1)
    assert isinstance(method, Pmoe)
    method.grow(1, data_of(lesson, 1).seed)
    method._task_of_row = torch.tensor([1] * NUM_TRAIN + [0, 0])
    batch = samples_of(lesson, learned_rows, [0, NUM_TRAIN])
    with method.training_context(batch) as extra_loss:
        extra_loss(method.model(**{name: value for name, value in batch.items() if name != ROW})).backward()
    assert method.router.weight.grad.any(dim=1).tolist() == [True, True]


@torch.no_grad()
def test_a_given_tasks_expert_answers_alone_and_without_a_task_none_does(lesson: Lesson, method: Pmoe):
    batch = lesson.prompts()
    with gates_seen(method) as seen, method.answering(batch, torch.tensor([1, 0, -1, 0])) as location:
        method.model(**batch)
    expected = torch.tensor([[0.0, 1], [1, 0], [0, 0], [1, 0]])
    assert all(torch.equal(gate_BN, expected) for gate_BN in seen.values())
    assert location() is None


@torch.no_grad()
def test_a_prompt_is_located_at_the_task_of_the_largest_gate(lesson: Lesson, method: Pmoe):
    batch = lesson.prompts()
    with gates_seen(method) as seen, method.answering(batch) as location:
        method.model(**batch)
    located, gate_BN = location(), seen[ENTRANCE]
    assert located.task_B.tolist() == gate_BN.argmax(dim=1).tolist()
    torch.testing.assert_close(located.score_BN, -gate_BN.log())


def test_the_shared_adapter_is_the_first_tasks_unless_a_setting_goes_on(
    lesson: Lesson, lesson_of: Callable[..., Lesson]
):
    going_on = lesson_of("pmoe", "method.freeze_shallow=false")
    for other, changes in ((lesson, False), (going_on, True)):
        first, second = (other.run.registry.load(index)["experts"] for index in (0, 1))
        shared = {name for name in first if name.startswith(f"{LAYERS}.0.")}
        assert len(shared) == 2 * 7
        assert (shared <= second.keys()) == (not shared.isdisjoint(second)) == changes
        assert not changes or not any(torch.equal(first[name], second[name]) for name in shared if name.endswith("B"))
        assert torch.equal(other.logits_of(restored(other, 2), 0), other.logits[1][0])


def test_without_replay_no_row_of_the_task_before_is_read(lesson: Lesson, lesson_of: Callable[..., Lesson]):
    without = lesson_of("pmoe", "method.replay=0")
    for other, num_replayed in ((lesson, 2), (without, 0)):
        records = other.run.registry.records()
        assert [record.facts["replayed_rows"] for record in records] == [0, num_replayed]
        assert [record.facts["training"]["samples"] for record in records] == [NUM_TRAIN, NUM_TRAIN + num_replayed]


def test_old_rows_of_the_router_go_on_learning(lesson: Lesson):
    first, second = (lesson.run.registry.load(index)["routers"][f"{ENTRANCE}/router"] for index in (0, 1))
    assert first.shape == (1, 32) and second.shape == (2, 32)
    assert not torch.equal(first[0], second[0])
