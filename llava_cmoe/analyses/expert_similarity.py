"""How alike the experts of a finished run compute: do clones become experts of their own?

New experts start as copies of one expert, so METHOD asks whether they stay so. The cosine between two experts of a site
is that between what they add to its linears, the matrices B_e A_e, all linears of the site together as one vector.
Shape letters: E experts, R rank, I and O input and output width of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from llava_cmoe.evaluation.log import RunFacts
from llava_cmoe.evaluation.rescoring import results_of
from llava_cmoe.registry.schema import RegistryError
from llava_cmoe.registry.store import Registry


class Likeness(BaseModel):
    """Cosines between experts, the mean over a task's sites; None where there is no such pair."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    among_new: float | None
    """Of two experts that the task added to one site."""
    to_origin: float | None
    """Of an added expert and the one in the pool that it started as a copy of."""
    to_pool: float | None
    """Of an added expert and any of the pool."""


class ExpertSimilarity(RunFacts):
    """How alike experts are, in which run."""

    tasks: dict[str, Likeness]
    """Task to the likeness of the experts that it added."""


def measure_similarity(folder: Path) -> ExpertSimilarity:
    """Compare all experts of a finished run, from its stored tensors; no model is loaded.

    Raises:
        RegistryError: no results here, a damaged file, or a method without a pool of experts.
    """
    results, registry = results_of(folder), Registry(folder)
    if results.method != "cmoe":
        raise RegistryError(f"{folder}: method {results.method} has no pool of experts; cmoe has")
    pool: dict[str, dict[str, Tensor]] = {}  # site to stored name to the matrices of all its experts so far
    tasks = {}
    for index, record in enumerate(registry.records()):
        for name, tensor in registry.load(index)["experts"].items():
            known = pool.setdefault(name.partition("/")[0], {})
            known[name] = torch.cat([known[name], tensor]) if name in known else tensor
        grown: dict[str, int] = record.facts["growth"]["new_experts"]
        origins: dict[str, int] = record.facts["growth"]["init_from"]
        tasks[record.name] = _likeness({site: (cosines(pool[site]), num) for site, num in grown.items()}, origins)
    return ExpertSimilarity(**results.model_dump(include=set(RunFacts.model_fields)), tasks=tasks)


def cosines(matrices: Mapping[str, Tensor]) -> Tensor:
    """Cosine between any two experts of a site (E, E).

    Args:
        matrices: `LINEAR.A` (E, R, I) and `LINEAR.B` (E, O, R) of every linear of the site. The products B A are never
            formed: <B_e A_e, B_f A_f> is the sum of B_e^T B_f times A_e A_f^T, both (R, R).
    """
    inner_EE = torch.zeros(())
    for name, a_ERI in matrices.items():
        if name.endswith(".A"):
            b_EOR = matrices[f"{name[:-1]}B"].float()
            a_EERR = torch.einsum("epi,fqi->efpq", a_ERI.float(), a_ERI.float())
            inner_EE = inner_EE + (a_EERR * torch.einsum("eop,foq->efpq", b_EOR, b_EOR)).sum(dim=(2, 3))
    norm_E = inner_EE.diagonal().sqrt()
    return inner_EE / (norm_E.unsqueeze(0) * norm_E.unsqueeze(1))


def _likeness(sites: Mapping[str, tuple[Tensor, int]], origins: Mapping[str, int]) -> Likeness:
    """Means over sites, each with the cosines of its experts, the last `num` of which are new."""
    among, origin, pool = list[float](), list[float](), list[float]()
    for site, (cosine_EE, num) in sites.items():
        old = len(cosine_EE) - num
        new_NN, new_NP = cosine_EE[old:, old:], cosine_EE[old:, :old]
        if num > 1:
            among.append(float(new_NN[~torch.eye(num, dtype=torch.bool)].mean()))
        if old:
            pool.append(float(new_NP.mean()))
        if origins.get(site, old) < old:  # none for a fresh init; a probe is no expert of the pool
            origin.append(float(new_NP[:, origins[site]].mean()))
    return Likeness(
        among_new=fmean(among) if among else None,
        to_origin=fmean(origin) if origin else None,
        to_pool=fmean(pool) if pool else None,
    )
