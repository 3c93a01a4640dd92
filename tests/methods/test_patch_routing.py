"""Patch-level routing: which patches an expert chooses, at what weight, and that nothing but the prompt decides."""

from collections.abc import Callable

import pytest
import torch
from formulas import experts_of, layer_norm, through
from hypothesis import given
from hypothesis import strategies as st
from tiny import Lesson
from torch import Tensor

from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.expert_choice import ExpertChoice
from llava_cmoe.methods.patch_routing import PatchRouting
from llava_cmoe.records import Located

SITE = "model.language_model.layers.1.mlp"
WIDTH, IMAGE = 6, 3


@pytest.fixture
def lesson(lesson_of: Callable[[str], Lesson]) -> Lesson:
    return lesson_of("patch_routing")


def by_hand(h_TD: Tensor, patches: list[int], words: list[int], parts: dict[str, Tensor], capacity: float) -> Tensor:
    """Gate (T, K) of one sample, token by token, in float64."""
    keys_KD, into_RD, out_of_DR = (parts[name].double() for name in ("keys", "into", "out_of"))
    gate_TK = torch.zeros(len(h_TD), len(keys_KD), dtype=torch.float64)
    if not patches:
        return gate_TK
    q_D = layer_norm(h_TD[words].double().mean(dim=0, keepdim=True))[0]
    factor_D = 1 + out_of_DR @ (into_RD @ q_D)
    num = max(1, round(len(patches) * min(1.0, capacity / len(keys_KD))))
    for expert, key_D in enumerate(keys_KD):
        score = {place: float(key_D @ (h_TD[place].double() * factor_D)) for place in patches}
        chosen = sorted(patches, key=lambda place: -score[place])[:num]
        gate_TK[chosen, expert] = num * torch.tensor([score[place] for place in chosen]).double().softmax(dim=0)
    return gate_TK


@given(
    layout=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3),
    capacity=st.floats(0.2, 3),
    num_new=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_expert_weighs_the_patches_it_scores_best_and_no_other_token(
    layout: list[list[bool]], capacity: float, num_new: int, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    router = ExpertChoice(WIDTH, num_new, capacity, condition_rank=2)
    for _ in range(2):
        router.add_task(torch.device("cpu"), generator)
        router.get_parameter(f"out_of_{router.num_tasks - 1}").data.normal_(generator=generator)
    patch_BT = torch.tensor([[*row, False] for row in layout])  # the last token is a word
    h_BTD = torch.randn(*patch_BT.shape, WIDTH, generator=generator)
    input_ids = torch.where(patch_BT, IMAGE, 9)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    task_B = torch.randint(-1, 2, (len(layout),), generator=generator)
    plan = RoutePlan.of(Located.at(task_B))
    gate = router(h_BTD, ForwardPass(plan, batch, image_token=IMAGE))
    if plan.max_task < 0:
        assert gate is None
        return
    for row, task in enumerate(task_B.tolist()):
        patches = patch_BT[row].nonzero().flatten().tolist()
        words = (~patch_BT[row]).nonzero().flatten().tolist()
        wanted_TE = torch.zeros(len(patch_BT[row]), 2 * num_new, dtype=torch.float64)
        if task >= 0:
            own_TK = by_hand(h_BTD[row], patches, words, router.state_of(task), capacity)
            wanted_TE[:, task * num_new : (task + 1) * num_new] = own_TK
        found_TE = torch.zeros_like(wanted_TE)
        found_TE[:, list(range(gate.gate_BTE.shape[-1]) if gate.ids is None else gate.ids)] = gate.gate_BTE[
            row
        ].double()
        torch.testing.assert_close(found_TE, wanted_TE, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_ffn_adds_the_experts_of_each_samples_task_to_the_patches_they_chose(lesson: Lesson):
    method, batch, task_B = lesson.run.method, lesson.prompts(), torch.tensor([1, 0, -1, 1])
    assert isinstance(method, PatchRouting)
    bank = method.host.banks[SITE]
    with through(bank) as outer, through(bank.frozen.down_proj) as calls, method.answering(batch, task_B):
        method.model(**batch)
    ((h_BTD, _),), ((x_BTI, y_BTO),) = outer, calls
    is_image = batch["input_ids"] == method.model.config.image_token_id
    pairs = experts_of(bank, "down_proj")
    for row, task in enumerate(task_B.tolist()):
        expected_TO = x_BTI[row] @ bank.frozen.down_proj.frozen.weight.double().T
        patches = is_image[row].nonzero().flatten().tolist()
        words = (batch["attention_mask"][row].bool() & ~is_image[row]).nonzero().flatten().tolist()
        if task >= 0:
            parts = {name: bank.router.get_parameter(f"{name}_{task}") for name in ("keys", "into", "out_of")}
            gate_TK = by_hand(h_BTD[row], patches, words, parts, capacity=1.0)
            assert gate_TK.any() == bool(patches)
            for expert in range(2):
                a_RI, b_OR = pairs[2 * task + expert]
                expected_TO = expected_TO + gate_TK[:, expert : expert + 1] * 8 / 4 * x_BTI[row] @ a_RI.T @ b_OR.T
        torch.testing.assert_close(y_BTO[row], expected_TO, rtol=0, atol=1e-4)


def test_a_decoded_token_is_nobodys_patch(lesson: Lesson):
    bank = lesson.run.method.host.banks[SITE]
    step = ForwardPass(RoutePlan.single(0), {}, image_token=IMAGE, is_prefill=False)
    assert bank.router(torch.randn(1, 1, 32), step) is None
