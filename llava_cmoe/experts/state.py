"""What one task trained in the banks, as named tensors, and back: the experts' share of a task's directory.

Names say where a tensor lives; B has LoRA's own shape, not the transposed one that `stack.py` computes with. Files,
hashes and atomic writing are the registry's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.stack import LoraPair


@dataclass(frozen=True)
class TaskState:
    """The tensors one task trained, over all sites, on the CPU.

    Attributes:
        experts: `SITE/LINEAR.A` (E, R, d_in) and `SITE/LINEAR.B` (E, d_out, R) of the experts that the task trained; a
            site without any is absent. `SITE/ids` (E,) where they do not simply follow the experts before.
        routers: `SITE/NAME` of what the site's router learned; `SITE/router` (E_t, D) of a router per task, and
            `SITE/router_ids` (E_t,) of the experts that it knows where they are not all that there were.
    """

    experts: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]


def state_of(banks: Mapping[str, ExpertBank], task: int) -> TaskState:
    """What task `task` trained: the experts that are not frozen yet, and what the routers hold of that task."""
    experts: dict[str, Tensor] = {}
    routers: dict[str, Tensor] = {}
    for site, bank in banks.items():
        ids = bank.trainable_ids
        for linear, stack in bank.stacks.items() if ids else ():
            pair = stack.read(ids)
            experts[f"{site}/{linear}.A"] = pair.a_ERI.cpu()
            experts[f"{site}/{linear}.B"] = pair.b_EOR.cpu()
        frozen = [expert for expert in bank.ids if expert not in ids]
        if ids and ids != _following(frozen, len(ids)):
            experts[f"{site}/ids"] = torch.tensor(ids)
        routers |= {f"{site}/{name}": tensor for name, tensor in bank.router.state_of(task).items()}
    return TaskState(experts, routers)


def restore(banks: Mapping[str, ExpertBank], state: TaskState) -> None:
    """Add one task from its state, as the next one, trainable until the banks are frozen. Tasks come back in order.

    Raises:
        ValueError: a tensor is missing, has another shape than its site, or belongs to no installed site. Nothing has
            been added then.
    """
    given, of_router = {**state.experts, **state.routers}, _by_site(state.routers)
    expected: dict[str, tuple[int, ...]] = {}
    for site, bank in banks.items():
        expected |= _shapes(site, bank, given, of_router.get(site, {}))
    for name, shape in expected.items():
        if name not in given:
            raise ValueError(f"{name}: missing from the task's tensors; restore tasks in the order they were learned")
        if tuple(given[name].shape) != shape:
            raise ValueError(
                f"{name}: shape {tuple(given[name].shape)}, this site needs {shape}; "
                "use the run's own settings and restore tasks in the order they were learned"
            )
    for site, bank in banks.items():
        named = given.get(f"{site}/ids")
        if taken := sorted(set(bank.ids) & set([] if named is None else named.tolist())):
            raise ValueError(f"{site}/ids: experts {taken} are there already; restore each task once, in order")
    strangers = sorted(given.keys() - expected.keys())
    if strangers:
        raise ValueError(f"{strangers[0]}: no such linear at an installed site; install the sites it was saved with")
    for site, bank in banks.items():
        if num_new := _num_new(site, bank, given):
            named = given.get(f"{site}/ids")
            ids = _following(bank.ids, num_new) if named is None else tuple(named.tolist())
            for linear, stack in bank.stacks.items():
                pair = LoraPair(given[f"{site}/{linear}.A"], given[f"{site}/{linear}.B"])
                stack.add(ids, pair, like=bank.anchor)
        bank.router.restore_next(of_router.get(site, {}), bank.anchor.device)


def _following(ids: tuple[int, ...] | list[int], num: int) -> tuple[int, ...]:
    """The ids of `num` experts that simply come next."""
    start = max(ids, default=-1) + 1
    return tuple(range(start, start + num))


def _num_new(site: str, bank: ExpertBank, given: Mapping[str, Tensor]) -> int:
    names = [f"{site}/{linear}.{matrix}" for linear in bank.stacks for matrix in "AB"]
    return next((len(given[name]) for name in names if name in given), 0)


def _by_site(routers: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What each site's router is given, by name."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in routers.items():
        site, _, name = full.rpartition("/")
        found.setdefault(site, {})[name] = tensor
    return found


def _shapes(
    site: str, bank: ExpertBank, given: Mapping[str, Tensor], of_router: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a site must be given: experts if any of its tensors is there, and its router's."""
    num_new = _num_new(site, bank, given)
    shapes: dict[str, tuple[int, ...]] = {}
    for linear, stack in bank.stacks.items() if num_new else ():
        shapes[f"{site}/{linear}.A"] = (num_new, bank.rank, stack.d_in)
        shapes[f"{site}/{linear}.B"] = (num_new, stack.d_out, bank.rank)
    if f"{site}/ids" in given:
        shapes[f"{site}/ids"] = (num_new,)
    wanted = bank.router.shapes_of_next(bank.num_experts + num_new, of_router)
    return shapes | {f"{site}/{name}": shape for name, shape in wanted.items()}
