from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.state import TaskState, restore, state_of
from llava_cmoe.experts.surgery import ExpertHost, install, uninstall

Learn = Callable[[ExpertBank, int], None]
UP = "model.language_model.layers.1.mlp/up_proj"
ROUTER = "model.language_model.layers.1.mlp/router"


@pytest.fixture
def learned(host: ExpertHost, learn: Learn) -> ExpertHost:
    """Three tasks; the first layer gets its first expert with the second task, the second layer grows unevenly."""
    shallow, deep = host.banks.values()
    for in_shallow, in_deep in ((0, 2), (1, 0), (2, 1)):
        learn(shallow, in_shallow), learn(deep, in_deep)
    return host


def test_a_model_restored_from_files_has_the_same_bits_for_every_task(
    tiny_llava: LlavaForConditionalGeneration, learned: ExpertHost, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    for task in range(3):
        state = state_of(learned.banks, task)
        save_file(dict(state.experts), tmp_path / f"experts{task}")
        save_file(dict(state.routers), tmp_path / f"routers{task}")

    def answers(host: ExpertHost, num_tasks: int) -> list[Tensor]:
        results = []
        for task in range(num_tasks):
            with torch.no_grad(), host.context.use(RoutePlan.single(task)):
                results.append(model(**batch).logits)
        return results

    model = tiny_llava
    expected = answers(learned, 3)
    for num_tasks in (2, 3):  # as it was after that task
        uninstall(model)
        host = install(model, ffn_sites(model), rank=3, alpha=6.0, top_k=2)
        for task in range(num_tasks):
            state = TaskState(load_file(tmp_path / f"experts{task}"), load_file(tmp_path / f"routers{task}"))
            restore(host.banks, state)
            host.freeze()
        for restored, original in zip(answers(host, num_tasks), expected[:num_tasks], strict=True):
            assert torch.equal(restored, original)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_state_holds_what_its_task_added_under_readable_names(learned: ExpertHost) -> None:
    first, second, third = (state_of(learned.banks, task) for task in range(3))
    assert {name: tuple(tensor.shape) for name, tensor in first.experts.items() if name.startswith(UP)} == {
        f"{UP}.A": (2, 3, 32),
        f"{UP}.B": (2, 64, 3),
    }
    assert first.routers.keys() == {ROUTER} and first.routers[ROUTER].shape == (2, 32)
    assert not any(name.startswith(UP) for name in second.experts) and second.routers[ROUTER].shape == (2, 32)
    assert third.experts[f"{UP}.A"].shape == (1, 3, 32) and third.routers[ROUTER].shape == (3, 32)


def test_a_state_is_a_copy(learned: ExpertHost) -> None:
    state = state_of(learned.banks, 0)
    before = deepcopy(state)
    for bank in learned.banks.values():
        for parameter in bank.parameters():
            parameter.data.zero_()
    assert all(torch.equal(state.experts[name], before.experts[name]) for name in state.experts)
    assert torch.equal(state.routers[ROUTER], before.routers[ROUTER]) and state.routers[ROUTER].any()


def test_a_restored_task_goes_on_learning_until_it_is_frozen(host: ExpertHost, learn: Learn) -> None:
    for bank in host.banks.values():
        learn(bank, 2)
    state = state_of(host.banks, 0)
    restore(host.banks, TaskState({}, dict(state.routers)))  # a task that only has a new router
    assert all(bank.routers.task_1.requires_grad for bank in host.banks.values())
    host.drop_fresh()
    assert all(len(bank.routers) == 1 for bank in host.banks.values())


def test_tensors_that_do_not_fit_are_named_and_nothing_is_added(
    learned: ExpertHost, generator: torch.Generator
) -> None:
    for bank in learned.banks.values():
        bank.grow(1, generator=generator)
        bank.add_router(generator=generator)
    good = state_of(learned.banks, 3)
    learned.drop_fresh()
    without = {name: tensor for name, tensor in good.experts.items() if name != f"{UP}.B"}
    narrow = dict(good.experts) | {f"{UP}.A": torch.zeros(1, 2, 32)}
    mistakes = {
        rf"{UP}\.B: missing": replace(good, experts=without),
        rf"{UP}\.A: shape \(1, 2, 32\), this site needs \(1, 3, 32\)": replace(good, experts=narrow),
        r"/router: missing": replace(good, routers={}),
        r"/router: shape \(1, 32\), this site needs \(4, 32\)": state_of(learned.banks, 1),
        r"elsewhere/router: no such linear": replace(
            good, routers={**good.routers, "elsewhere/router": torch.zeros(1)}
        ),
    }
    for message, wrong in mistakes.items():
        with pytest.raises(ValueError, match=message):
            restore(learned.banks, wrong)
        assert all(len(bank.routers) == 3 for bank in learned.banks.values())
        assert [bank.num_experts for bank in learned.banks.values()] == [3, 3]
    restore(learned.banks, good)
    assert [bank.num_experts for bank in learned.banks.values()] == [4, 4]
