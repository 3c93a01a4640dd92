"""The only place that edits the module tree: puts expert banks around frozen linears and takes them out again.

Knows nothing of tasks or training. The frozen modules stay the objects they were, whatever their class (`nn.Linear`,
bitsandbytes' `Linear4bit`, ...), only deeper: `mlp.up_proj.weight` becomes `mlp.frozen.up_proj.frozen.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_cmoe.backbones.sites import Site, image_token_of
from llava_cmoe.experts.bank import ExpertBank, ExpertLinear
from llava_cmoe.experts.context import RouteContext
from llava_cmoe.experts.forward_hook import follow, unfollow
from llava_cmoe.experts.routers.base import Router
from llava_cmoe.experts.stack import stack_name

KindOfRouter = TypeVar("KindOfRouter", bound=Router)


@dataclass(frozen=True)
class ExpertHost:
    """A model's banks by site name, in order of depth, and the context whose plan they all follow."""

    context: RouteContext
    banks: Mapping[str, ExpertBank]

    def routers(self, kind: type[KindOfRouter]) -> dict[str, KindOfRouter]:
        """Site to its router, of banks that were installed with this kind."""
        found = {site: bank.router for site, bank in self.banks.items()}
        assert all(isinstance(router, kind) for router in found.values()), f"installed with other routers than {kind}"
        return cast(dict[str, KindOfRouter], found)

    def freeze(self) -> None:
        """End a task in every bank: its experts and routers change no more."""
        for bank in self.banks.values():
            bank.freeze()

    def discard_trainable(self) -> None:
        """Forget, in every bank, the experts and routers since the last `freeze()`."""
        for bank in self.banks.values():
            bank.discard_trainable()


def install(
    model: PreTrainedModel,
    sites: Iterable[Site],
    make_router: Callable[[int], Router],
    *,
    rank: int,
    alpha: float,
    dtype: torch.dtype = torch.float32,
) -> ExpertHost:
    """Freeze the model and put an empty bank at every site; what the model computes stays the same, bit for bit.

    Args:
        model: the backbone; all of its parameters stop requiring gradients.
        sites: places from `backbones/sites.py`.
        make_router: makes a site's router from the width of its input.
        rank: LoRA rank of one expert.
        alpha: LoRA scale; an expert's output is multiplied by alpha / rank.
        dtype: precision of the experts, whatever that of the frozen weights.

    Raises:
        ValueError: experts are installed already, or a site is not where its path says. Nothing has been edited then.
    """
    if any(isinstance(module, ExpertBank) for module in model.modules()):
        raise ValueError("experts are installed in this model already; uninstall(model) first")
    linears = {site: {path: _linear(model, site, path) for path in site.linears} for site in sites}
    model.requires_grad_(False)
    context, banks = RouteContext(image_token_of(model)), {}
    for site, paths in linears.items():
        frozen = model.get_submodule(site.name)
        bank = ExpertBank(site, frozen, context, make_router, rank=rank, alpha=alpha, dtype=dtype)
        model.set_submodule(site.name, bank)
        for path, linear in paths.items():
            bank.set_submodule(_join("frozen", path), ExpertLinear(linear, partial(bank.delta, stack_name(path))))
        banks[site.name] = bank.train(model.training)
    follow(model, context, of_images=any(site.of_images for site in linears))
    return ExpertHost(context, banks)


def uninstall(model: PreTrainedModel) -> None:
    """Put the original modules back, the very same objects; they stay frozen. Their banks go with the host.

    Raises:
        ValueError: no experts are installed.
    """
    banks = {name: module for name, module in model.named_modules() if isinstance(module, ExpertBank)}
    if not banks:
        raise ValueError("no experts are installed in this model")
    for name, bank in banks.items():
        for path in bank.site.linears:
            wrapped = bank.get_submodule(_join("frozen", path))
            assert isinstance(wrapped, ExpertLinear)
            bank.set_submodule(_join("frozen", path), wrapped.frozen)
        model.set_submodule(name, bank.frozen)
    unfollow(model, next(iter(banks.values())).context)


def _linear(model: nn.Module, site: Site, path: str) -> nn.Module:
    """The frozen linear at a site's path, of any class that says how wide it is."""
    full = _join(site.name, path)
    try:
        linear = model.get_submodule(full)
    except AttributeError as error:
        raise ValueError(f"{full}: no such module in {type(model).__name__}; were the sites made for it?") from error
    if not (hasattr(linear, "in_features") and hasattr(linear, "out_features")):
        raise ValueError(f"{full}: experts sit on linears, {type(linear).__name__} has no in_features and out_features")
    return linear


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name
