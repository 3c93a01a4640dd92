"""CaRE: whose routers decide, what the perceptrons are taught, and how the shared expert drifts."""

from collections.abc import Callable

import pytest
import torch
from formulas import data_of, experts_of, layer_norm, restored, samples_of, through
from hypothesis import given
from hypothesis import strategies as st
from tiny import Lesson
from torch import Tensor

from llava_cmoe.data.collator import ROW
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.bi_level import BiLevelRouter
from llava_cmoe.methods.care import Care, clusters, perceptron_loss

SITE = "model.language_model.layers.1.mlp"
WIDTH = 6


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("care")


def by_hand(c_D: Tensor, states: list[dict[str, Tensor]], num_routers: int, num_experts: int, learning: bool) -> Tensor:
    """Gate (1 + E,) of one sample."""
    entropies = []
    for state in states:
        p_C = (state["perceptron"].double() @ c_D).softmax(dim=0)
        entropies.append(float(-(p_C * p_C.log()).sum()))
    if learning:
        entropies[-1] = -1.0
    gate_E = torch.zeros(1 + len(states), dtype=torch.float64)
    gate_E[0] = 1
    for task in sorted(range(len(states)), key=lambda task: entropies[task])[:num_routers]:
        logits_E = states[task]["router"].double() @ c_D
        best = sorted(range(len(logits_E)), key=lambda expert: -float(logits_E[expert]))[:num_experts]
        gate_E[[1 + expert for expert in best]] += logits_E[best].softmax(dim=0)
    return gate_E


@given(
    num_tasks=st.integers(1, 5),
    num_routers=st.integers(1, 3),
    num_experts=st.integers(1, 3),
    learning=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_surest_routers_give_their_best_experts_beside_the_shared_one(
    num_tasks: int, num_routers: int, num_experts: int, learning: bool, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    router = BiLevelRouter(WIDTH, 4, num_routers, num_experts).train(learning)
    for _ in range(num_tasks):
        router.add_task(torch.device("cpu"), generator)
    h_BTD = torch.randn(3, 5, WIDTH, generator=generator)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    plan = RoutePlan.single(0)
    gate = router(h_BTD, ForwardPass(plan, {"attention_mask": mask_BT}))
    states = [router.state_of(task) for task in range(num_tasks)]
    for row in range(3):
        c_D = layer_norm(h_BTD[row][mask_BT[row].bool()].double().mean(dim=0, keepdim=True))[0]
        wanted_E = by_hand(c_D, states, num_routers, num_experts, learning)
        torch.testing.assert_close(gate.gate_BTE[row, 0].double(), wanted_E, rtol=1e-4, atol=1e-5)
    step = router(h_BTD[:, :1], ForwardPass(plan, {"attention_mask": mask_BT}, is_prefill=False))
    assert torch.equal(step.gate_BTE, gate.gate_BTE)  # once per prompt


@torch.no_grad()
def test_an_ffn_adds_the_experts_of_the_gate(lesson: Lesson):
    method, batch = lesson.run.method, lesson.prompts()
    bank = method.host.banks[SITE]
    with through(bank) as outer, through(bank.frozen.down_proj) as calls, method.answering(batch):
        method.model(**batch)
    ((h_BTD, _),), ((x_BTI, y_BTO),) = outer, calls
    states, pairs = [bank.router.state_of(task) for task in (0, 1)], experts_of(bank, "down_proj")
    assert list(pairs) == [0, 1, 2]
    for row, mask_T in enumerate(batch["attention_mask"].bool()):
        c_D = layer_norm(h_BTD[row][mask_T].mean(dim=0, keepdim=True))[0]
        gate_E = by_hand(c_D, states, num_routers=2, num_experts=3, learning=False)
        expected_TO = x_BTI[row] @ bank.frozen.down_proj.frozen.weight.double().T
        for (a_RI, b_OR), weight in zip(pairs.values(), gate_E, strict=True):
            expected_TO = expected_TO + weight * 8 / 4 * x_BTI[row] @ a_RI.T @ b_OR.T
        torch.testing.assert_close(y_BTO[row], expected_TO, rtol=0, atol=1e-4)


def test_the_loss_teaches_every_layers_newest_perceptron_the_rows_clusters(lesson: Lesson):
    method, data = restored(lesson, 1), data_of(lesson, 1)
    assert isinstance(method, Care)
    method.before_task(data, fit=lambda *args, **kwargs: None)
    classes = method._class_of_row_S
    assert len(classes) == len(data.samples) and 1 < len(set(classes.tolist())) <= 3
    batch = samples_of(lesson, data.samples, range(4))
    batch[ROW][3] = -1  # fills the batch up
    with method.training_context(batch) as extra:
        added = extra(method.model(**{name: value for name, value in batch.items() if name != ROW}))
    added.backward()
    for bank in method.host.banks.values():
        assert bank.router.perceptron_1.grad.any() and bank.router.perceptron_0.grad is None


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 99))
def test_the_perceptrons_loss_is_its_formula(num_layers: int, batch: int, num_classes: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, num_classes, generator=generator).requires_grad_() for _ in range(num_layers)]
    class_B = torch.randint(num_classes, (batch,), generator=generator)
    wanted = 0.0
    deep_BC = logits[-1].detach().double().softmax(dim=1)
    for logits_BC in logits:
        p_BC = logits_BC.detach().double().softmax(dim=1)
        for row in range(batch):
            wanted -= float(p_BC[row, class_B[row]].log()) / batch / num_layers
            wanted += float((deep_BC[row] * (deep_BC[row] / p_BC[row]).log()).sum()) / batch / num_layers
    assert float(perceptron_loss(logits, class_B)) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_the_shared_expert_moves_by_what_its_momentum_leaves(lesson: Lesson, lesson_of: Callable[..., Lesson]):
    free = lesson_of("care", "method.momentum=0")
    name = f"{SITE}/up_proj.B"
    before, after, alone = (
        one.run.registry.load(task)["experts"][name][0] for one, task in ((lesson, 0), (lesson, 1), (free, 1))
    )
    assert not torch.equal(before, alone)
    torch.testing.assert_close(after, 0.999 * before + 0.001 * alone, rtol=0, atol=1e-6)


@given(
    rows=st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=12),
    num=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_no_row_is_nearer_to_the_middle_of_another_cluster(rows: list[tuple[float, float]], num: int, seed: int):
    x_SD = torch.tensor(rows, dtype=torch.float64)
    found_S = clusters(x_SD, num, torch.Generator().manual_seed(seed), rounds=100)
    assert len(found_S) == len(rows) and found_S.min() >= 0 and found_S.max() < min(num, len(rows))
    assert torch.equal(found_S, clusters(x_SD, num, torch.Generator().manual_seed(seed), rounds=100))
    middles = {int(one): x_SD[found_S == one].mean(dim=0) for one in set(found_S.tolist())}
    for row, one in enumerate(found_S.tolist()):
        nearest = min(float((x_SD[row] - middle).norm()) for middle in middles.values())
        assert float((x_SD[row] - middles[one]).norm()) <= nearest + 1e-6
