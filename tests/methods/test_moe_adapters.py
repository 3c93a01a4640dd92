"""MoE-Adapters: who answers for a sample, what a task freezes, and what goes on learning."""

from collections.abc import Callable

import pytest
import torch
from formulas import experts_of, layer_norm, restored, through
from hypothesis import given
from hypothesis import strategies as st
from tiny import Lesson
from torch import Tensor

from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.experts.routers.per_sample import SampleRouters
from llava_cmoe.methods.moe_adapters import MoeAdapters
from llava_cmoe.settings.base import RecipeError
from llava_cmoe.settings.methods.moe_adapters import MoeAdaptersSettings

SITE = "model.language_model.layers.1.mlp"
POOL, KEPT = 6, 2


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("moe_adapters")


def method_of(lesson: Lesson, stages: int) -> MoeAdapters:
    method = restored(lesson, stages)
    assert isinstance(method, MoeAdapters)
    return method


def by_hand(logits_BE: Tensor, top_k: int) -> Tensor:
    """Softmax over the k largest of each row."""
    gate_BE = torch.zeros_like(logits_BE)
    for row, logits_E in enumerate(logits_BE):
        chosen = sorted(range(len(logits_E)), key=lambda expert: -float(logits_E[expert]))[:top_k]
        gate_BE[row, chosen] = logits_E[chosen].softmax(dim=0)
    return gate_BE


@torch.no_grad()
def test_an_ffn_adds_the_top_experts_of_each_samples_router(lesson: Lesson):
    method, batch, task_B = method_of(lesson, 2), lesson.prompts(), torch.tensor([1, 0, -1, 1])
    feature_BD = layer_norm(method.locating.features.of(batch).double())
    bank = method.host.banks[SITE]
    down = bank.frozen.down_proj
    with through(down) as calls, method.answering(batch, task_B):
        method.model(**batch)
    *_, (x_BTI, y_BTO) = calls
    pairs = experts_of(bank, "down_proj")
    for row, task in enumerate(task_B.tolist()):
        expected_TO = x_BTI[row] @ down.frozen.weight.double().T
        if task >= 0:
            weight_ED = lesson.run.registry.load(task)["routers"][f"{SITE}/weight"].double()
            gate_E = by_hand(feature_BD[row : row + 1] @ weight_ED.T, top_k=2)[0]
            for expert, (a_RI, b_OR) in pairs.items():
                expected_TO = expected_TO + gate_E[expert] * 8 / 4 * x_BTI[row] @ a_RI.T @ b_OR.T
        torch.testing.assert_close(y_BTO[row], expected_TO, rtol=0, atol=1e-5)


def test_a_task_freezes_the_experts_that_most_of_its_rows_use_and_the_others_go_on(lesson: Lesson):
    first, second = (lesson.run.registry.load(task) for task in (0, 1))
    for site, bank in method_of(lesson, 2).host.banks.items():
        frozen = {expert for task in (first, second) for expert in task["chosen"][site].tolist()}
        assert len(frozen) <= 2 * KEPT and set(bank.ids) == set(range(POOL))
        assert set(bank.trainable_ids) == set(range(POOL)) - frozen
        kept = first["chosen"][site].tolist()
        named = second["experts"].get(f"{site}/ids", torch.arange(KEPT, POOL)).tolist()
        assert named == [expert for expert in range(POOL) if expert not in kept]
        pair = bank.stacks["up_proj"].read(kept)
        assert torch.equal(pair.b_EOR, first["experts"][f"{site}/up_proj.B"][kept])
    changed = second["experts"][f"{SITE}/up_proj.B"] != first["experts"][f"{SITE}/up_proj.B"][named]
    assert changed.any()


def test_use_is_counted_over_the_tasks_rows_without_noise(lesson: Lesson):
    method = method_of(lesson, 1)
    weight_ED = torch.randn(POOL, 32, generator=torch.Generator().manual_seed(0))
    method._of_rows_SD = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    for site, router in method.routers.items():
        router.add_task(POOL, method.host.banks[site].anchor.device)
        router.weight.data.copy_(weight_ED)
        router.noise.data.fill_(9)
    counts_E = by_hand(layer_norm(method._of_rows_SD.double()) @ weight_ED.double().T, 2).ne(0).sum(dim=0)
    best = sorted(sorted(range(POOL), key=lambda expert: -int(counts_E[expert]))[:KEPT])
    assert {tuple(ids.tolist()) for ids in method.most_used().values()} == {tuple(best)}


@given(seed=st.integers(0, 99), top_k=st.integers(1, 4), noise=st.floats(0, 3))
def test_noise_chooses_while_a_task_learns_and_never_afterwards(seed: int, top_k: int, noise: float):
    generator = torch.Generator().manual_seed(seed)
    router, feature_BD = SampleRouters(8, top_k), torch.randn(40, 8, generator=generator)
    router.add_task(5, torch.device("cpu"))
    assert router.weight is not None and router.noise is not None
    router.weight.data.copy_(torch.randn(5, 8, generator=generator))
    router.noise.data.fill_(noise)
    plain_BE = router.gate_of_newest(feature_BD, noisy=False)
    torch.testing.assert_close(plain_BE, by_hand((feature_BD.double() @ router.weight.double().T), top_k).float())
    torch.manual_seed(seed)
    drawn_BE = torch.randn(40, 5)
    scale_BE = torch.nn.functional.softplus(feature_BD @ router.noise.T) + 0.01
    torch.manual_seed(seed)
    noisy_BE = router.gate_of_newest(feature_BD, noisy=True)
    torch.testing.assert_close(noisy_BE, by_hand(feature_BD @ router.weight.T + drawn_BE * scale_BE, top_k))
    router.freeze()
    rows = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    assert torch.equal(router.gate(feature_BD, *rows), plain_BE)


def test_a_pool_too_small_is_an_error(lesson: Lesson):
    backbone = load_backbone(lesson.recipe.backbone)
    with pytest.raises(RecipeError, match="num_experts is 1, fewer than"):
        MoeAdapters(MoeAdaptersSettings(num_experts=1), backbone.model, backbone.processor, seed=0)
