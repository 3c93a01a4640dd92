"""R2MoE: who takes part in a gate, what keeps old routes, and where experts are removed."""

from collections.abc import Callable

import pytest
import torch
from formulas import data_of, experts_of, layer_norm, restored, samples_of, through
from tiny import Lesson
from torch import Tensor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.data.batches import Batch, batches
from llava_cmoe.data.collator import ROW
from llava_cmoe.experts.routers.additive import AdditiveRouter
from llava_cmoe.methods.r2moe import R2moe

SITES = tuple(f"model.language_model.layers.{layer}.mlp" for layer in range(2))
KEEP = "method.remove_below=0"


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    """A run that removes nothing."""
    return lesson_of("r2moe", KEEP)


def method_of(lesson: Lesson, stages: int) -> R2moe:
    method = restored(lesson, stages)
    assert isinstance(method, R2moe)
    return method


def features_of(lesson: Lesson, batch: Batch) -> Tensor:
    """The frozen model's mean state of each prompt behind its first layer, layer-normalised: (B, D)."""
    model = load_backbone(lesson.recipe.backbone).model.double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        hidden_BTD = model(**inputs, output_hidden_states=True).hidden_states[1]
    mask_BT1 = batch["attention_mask"].unsqueeze(-1)
    return layer_norm((hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1))


def features_of_task(lesson: Lesson, task: int) -> Tensor:
    """The same of all of a task's prompts (S, D)."""
    prompts, processor = data_of(lesson, task).prompts, lesson.run.backbone.processor
    return torch.cat([features_of(lesson, batch) for batch in batches(prompts, processor, 1, torch.device("cpu"))])


def gate_of(logits_BE: Tensor, num: int, learning: bool) -> Tensor:
    """Softmax over the null expert, the `num` largest (while learning: of the old ones) and, then, the newest."""
    gate_BE = torch.zeros_like(logits_BE)
    for row, logits_E in enumerate(logits_BE):
        candidates = range(1, len(logits_E) - learning)
        chosen = sorted(candidates, key=lambda expert: -float(logits_E[expert]))[:num]
        chosen = [0, *chosen, *([len(logits_E) - 1] if learning else [])]
        gate_BE[row, chosen] = logits_E[chosen].softmax(dim=0)
    return gate_BE


@pytest.fixture
def rows() -> list[Tensor]:
    """What four tasks added to a router of width 6."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(task + 1, 6, generator=generator) for task in range(4)]


@pytest.fixture
def router(rows: list[Tensor]) -> AdditiveRouter:
    """The fourth task is being learned."""
    router = AdditiveRouter(width=6, num_old=2, num_chosen=3)
    for rows_ED in rows:
        router.freeze()
        router.add_task(rows_ED)
    return router


@pytest.fixture
def feature_BD() -> Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


def logits_of(rows: list[Tensor], feature_BD: Tensor) -> Tensor:
    """Null's logit 0, then the sum of what every task added."""
    logits_BE = torch.zeros(len(feature_BD), 1 + len(rows), dtype=torch.float64)
    for rows_ED in rows:
        logits_BE[:, 1 : 1 + len(rows_ED)] += feature_BD.double() @ rows_ED.double().T
    return logits_BE


@pytest.mark.parametrize("learning", [True, False])
def test_the_gate_is_a_softmax_over_null_the_best_old_experts_and_the_newest(
    router: AdditiveRouter, rows: list[Tensor], feature_BD: Tensor, learning: bool
):
    found = router.gate(feature_BD, learning)
    expected = gate_of(logits_of(rows, feature_BD), 2 if learning else 3, learning)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found != 0, expected != 0)
    assert (found[:, 0] > 0).all() and ((found != 0).sum(dim=1) == 4).all()
    assert not learning or (found[:, 4] > 0).all()
    assert learning or not (found[:, 4] > 0).all()


@pytest.mark.parametrize("learning", [True, False])
def test_a_removed_expert_gets_no_share_and_takes_nobodys_place(
    router: AdditiveRouter, rows: list[Tensor], feature_BD: Tensor, learning: bool
):
    router.removed_E[1] = True  # expert 2
    others = logits_of(rows, feature_BD)[:, [0, 1, 3, 4]]
    found = router.gate(feature_BD, learning)
    assert not found[:, 2].any()
    expected = gate_of(others, 2 if learning else 3, learning)
    torch.testing.assert_close(found[:, [0, 1, 3, 4]].double(), expected, rtol=0, atol=1e-6)
    router.remove_newest()
    assert not router.gate(feature_BD, learning)[:, [2, 4]].any()
    router.removed_E[:] = True
    assert torch.equal(router.gate(feature_BD, learning)[:, 0], torch.ones(50))


def test_a_row_s_gate_has_the_same_bits_whoever_shares_the_batch(router: AdditiveRouter, feature_BD: Tensor):
    together = router.gate(feature_BD, learning=False)
    alone = torch.cat([router.gate(row_D[None], learning=False) for row_D in feature_BD])
    assert torch.equal(together, alone)


@torch.no_grad()
def test_an_ffn_adds_its_experts_by_the_prompts_gate(lesson: Lesson):
    method, batch = lesson.run.method, lesson.prompts()
    feature_BD, records = features_of(lesson, batch), lesson.run.registry
    for site in SITES:
        bank = method.host.banks[site]
        rows = [records.load(task)["routers"][f"{site}/router"] for task in range(2)]
        gate_BE = gate_of(logits_of(rows, feature_BD), 3, learning=False)
        with through(bank.frozen.gate_proj) as calls, method.answering(batch):
            method.model(**batch)
        *of_feature, (x_BTI, y_BTO) = calls
        weight_OI = bank.frozen.gate_proj.frozen.weight.double()
        for x, y in of_feature:  # the pass that reads the feature, through the first layer alone, is the frozen model's
            torch.testing.assert_close(y, x @ weight_OI.T, rtol=0, atol=1e-5)
        assert len(of_feature) == (site == SITES[0])
        expected_BTO = x_BTI @ weight_OI.T
        pairs = experts_of(bank, "gate_proj")
        assert set(pairs) == {1, 2}  # 0 is null
        for expert, (a_RI, b_OR) in pairs.items():
            expected_BTO = expected_BTO + 8 / 4 * gate_BE[:, expert, None, None] * (x_BTI @ a_RI.T @ b_OR.T)
        torch.testing.assert_close(y_BTO, expected_BTO, rtol=0, atol=1e-5)


def test_while_learning_a_row_is_routed_by_its_own_prompt(lesson: Lesson):
    method, data, places = lesson.run.method, data_of(lesson, 1), [5, 0, 17, 2]
    batch, gates = samples_of(lesson, data.samples, places), []
    router = method.routers[SITES[0]]
    hook = router.register_forward_hook(lambda _, args, gate: gates.append(gate.gate_BTE[:, 0].double()))
    method.model.train()
    with torch.no_grad(), method.training_context(batch):
        method.model(**{name: value for name, value in batch.items() if name != ROW})
    method.model.eval()
    hook.remove()
    rows = [lesson.run.registry.load(task)["routers"][f"{SITES[0]}/router"] for task in range(2)]
    expected = gate_of(logits_of(rows, features_of_task(lesson, 1)[places]), 2, learning=True)
    torch.testing.assert_close(gates[0], expected, rtol=0, atol=1e-5)
    assert len(torch.unique(expected[:, 2])) == 4  # every prompt has a gate of its own


def test_the_loss_adds_how_far_old_prompts_logits_would_move(lesson: Lesson):
    method, data = method_of(lesson, 1), data_of(lesson, 1)
    method.grow(data.seed)
    assert method.distillation(None).item() == pytest.approx(0, abs=1e-9)
    generator, old_SD, total = torch.Generator().manual_seed(0), features_of_task(lesson, 0), 0.0
    for router in method.routers.values():
        router.delta.data.normal_(generator=generator)
        total += (old_SD @ router.delta.detach().double().T).norm().item()
    found = method.distillation(None)
    assert found.item() == pytest.approx(1e-5 * total, rel=1e-4)
    found.backward()
    assert all(router.delta.grad.any() for router in method.routers.values())


def test_the_first_task_has_no_routes_to_keep(lesson: Lesson):
    method = method_of(lesson, 0)
    method.grow(data_of(lesson, 0).seed)
    for router in method.routers.values():
        router.delta.data.fill_(1.0)
    assert method.distillation(None) == 0
    assert lesson.run.registry.records()[0].facts["routing_drift"] == 0


def test_the_drift_of_a_task_is_what_its_rows_change_for_old_prompts(lesson: Lesson, lesson_of: Callable[..., Lesson]):
    old_SD, pruned = features_of_task(lesson, 0), lesson_of("r2moe", "method.remove_below=0.4")
    assert not pruned.run.registry.records()[1].facts["growth"]["new_experts"]
    for run, experts in ((lesson.run, slice(2)), (pruned.run, slice(1))):  # of an expert that is gone no logit counts
        rows = run.registry.load(1)["routers"]
        moved = [(old_SD @ rows[f"{site}/router"][experts].double().T).norm() / len(old_SD) ** 0.5 for site in SITES]
        assert run.registry.records()[1].facts["routing_drift"] == pytest.approx(float(max(moved)), rel=1e-4)


def test_rows_add_up_and_what_a_task_added_stays(lesson: Lesson):
    for stages in (1, 2):
        for site, router in method_of(lesson, stages).routers.items():
            expected_ED = torch.zeros(stages, router.width)
            for task in range(stages):
                rows_ED = lesson.run.registry.load(task)["routers"][f"{site}/router"]
                assert rows_ED.shape == (task + 1, router.width) and rows_ED.any()
                expected_ED[: task + 1] += rows_ED
            assert torch.equal(router.frozen_ED, expected_ED)


def mean_gates(lesson: Lesson) -> dict[str, float]:
    """Of the second task's expert, over its own prompts."""
    feature_SD, found = features_of_task(lesson, 1), {}
    for site in SITES:
        rows = [lesson.run.registry.load(task)["routers"][f"{site}/router"] for task in range(2)]
        found[site] = float(gate_of(logits_of(rows, feature_SD), 3, learning=False)[:, 2].mean())
    return found


def test_an_expert_is_removed_exactly_where_its_mean_gate_is_below_the_threshold(
    lesson: Lesson, lesson_of: Callable[..., Lesson]
):
    gates = mean_gates(lesson)
    assert lesson.run.registry.records()[1].facts["mean_gates"] == pytest.approx(gates, rel=1e-4)
    low, high = sorted(gates, key=gates.__getitem__)
    pruned = lesson_of("r2moe", f"method.remove_below={sum(gates.values()) / 2}")
    records = pruned.run.registry.records()
    assert [set(record.facts["growth"]["new_experts"]) for record in records] == [set(SITES), {high}]
    tensors = pruned.run.registry.load(1)
    assert {name.split("/")[0] for name in tensors["experts"]} == {high}
    assert [int(tensors["routing"]["count"]), int(tensors["routers"][f"{low}/kept"])] == [24, 0]
    for method in (pruned.run.method, method_of(pruned, 2)):
        assert method.host.banks[high].ids == (1, 2) and method.host.banks[low].ids == (1,)
        share = {site: router.gate(method._of_rows_SD, False) for site, router in method.routers.items()}
        assert not share[low][:, 2].any()
    assert torch.equal(tensors["routers"][f"{high}/router"], lesson.run.registry.load(1)["routers"][f"{high}/router"])


def test_what_is_left_recovers_after_a_removal(lesson: Lesson, lesson_of: Callable[..., Lesson]):
    gates = mean_gates(lesson)
    low, high = sorted(gates, key=gates.__getitem__)
    threshold = f"method.remove_below={sum(gates.values()) / 2}"
    pruned, recovered = (lesson_of("r2moe", threshold, *more) for more in ((), ("method.recovery_epochs=1",)))
    before, after = (other.run.registry.load(1) for other in (pruned, recovered))
    assert before["experts"].keys() == after["experts"].keys()
    assert not torch.equal(before["experts"][f"{high}/up_proj.B"], after["experts"][f"{high}/up_proj.B"])
    assert not torch.equal(before["routers"][f"{low}/router"][0], after["routers"][f"{low}/router"][0])
    assert torch.equal(before["routers"][f"{low}/router"][1], after["routers"][f"{low}/router"][1])  # it is gone


def test_a_task_whose_experts_are_all_redundant_leaves_the_base_model(lesson_of: Callable[..., Lesson]):
    lesson = lesson_of("r2moe", "method.remove_below=0.99", "method.recovery_epochs=1")  # with nothing to recover
    assert [record.facts["growth"]["new_experts"] for record in lesson.run.registry.records()] == [{}, {}]
    assert torch.equal(lesson.logits[1][1], lesson.base)
    assert all(not bank.ids for bank in lesson.run.method.host.banks.values())
