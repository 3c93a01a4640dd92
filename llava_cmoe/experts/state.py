"""What one task added to the banks, as named tensors, and back: the experts' share of a task's directory.

Names say where a tensor lives; B has LoRA's own shape, not the transposed one that `bank.py` computes with. Files,
hashes and atomic writing are the registry's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llava_cmoe.experts.bank import ExpertBank, LoraPair


@dataclass(frozen=True)
class TaskState:
    """The tensors one task added, over all sites, on the CPU.

    Attributes:
        experts: `SITE/LINEAR.A` (E, R, d_in) and `SITE/LINEAR.B` (E, d_out, R) of the task's new experts; a site that
            did not grow is absent.
        routers: `SITE/router` (E_t, D) over all experts that existed then; a site without experts is absent.
    """

    experts: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]


def state_of(banks: Mapping[str, ExpertBank], task: int) -> TaskState:
    """What task `task` added; for banks that are never frozen, task 0 is all they hold."""
    experts: dict[str, Tensor] = {}
    routers: dict[str, Tensor] = {}
    for site, bank in banks.items():
        new = bank.routers.new_experts(task)
        for linear, stack in bank.stacks.items():
            if new:
                pair = stack.read(new)
                experts[f"{site}/{linear}.A"] = pair.a_ERI.cpu()
                experts[f"{site}/{linear}.B"] = pair.b_EOR.cpu()
        weight_ED = bank.routers.weight(task)
        if weight_ED is not None:
            routers[f"{site}/router"] = weight_ED.detach().to("cpu", copy=True)
    return TaskState(experts, routers)


def restore(banks: Mapping[str, ExpertBank], state: TaskState) -> None:
    """Add one task from its state, as the next one, trainable until the banks are frozen. Tasks come back in order.

    Raises:
        ValueError: a tensor is missing, has another shape than its site, or belongs to no installed site. Nothing has
            been added then.
    """
    given = {**state.experts, **state.routers}
    expected: dict[str, tuple[int, ...]] = {}
    for site, bank in banks.items():
        expected |= _shapes(site, bank, given)
    for name, shape in expected.items():
        if name not in given:
            raise ValueError(f"{name}: missing from the task's tensors; restore tasks in the order they were learned")
        if tuple(given[name].shape) != shape:
            raise ValueError(
                f"{name}: shape {tuple(given[name].shape)}, this site needs {shape}; "
                "use the run's own settings and restore tasks in the order they were learned"
            )
    strangers = sorted(given.keys() - expected.keys())
    if strangers:
        raise ValueError(f"{strangers[0]}: no such linear at an installed site; install the sites it was saved with")
    for site, bank in banks.items():
        for linear, stack in bank.stacks.items():
            if f"{site}/{linear}.A" in given:
                stack.add(LoraPair(given[f"{site}/{linear}.A"], given[f"{site}/{linear}.B"]), like=bank.anchor)
        weight_ED = given.get(f"{site}/router")
        bank.routers.add(None if weight_ED is None else weight_ED.to(bank.anchor.device, copy=True))


def _shapes(site: str, bank: ExpertBank, given: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a site must be given: experts if any of its tensors is there, and a router over all."""
    names = [f"{site}/{linear}.{matrix}" for linear in bank.stacks for matrix in "AB"]
    num_new = next((len(given[name]) for name in names if name in given), 0)
    shapes: dict[str, tuple[int, ...]] = {}
    for linear, stack in bank.stacks.items() if num_new else ():
        shapes[f"{site}/{linear}.A"] = (num_new, bank.rank, stack.d_in)
        shapes[f"{site}/{linear}.B"] = (num_new, stack.d_out, bank.rank)
    if bank.num_experts + num_new:
        shapes[f"{site}/router"] = (bank.num_experts + num_new, bank.routers.hidden_size)
    return shapes
