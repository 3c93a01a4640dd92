"""Locators that judge a prompt by how well a small network reconstructs its feature: what VAE and auto-encoder share.

    x  -> encode ->  hidden  -> bottleneck ->  latent  -> decode ->  hidden  -> output ->  x'        GELU in between

Fitted by Adam until a held-out error falls no more. What the latent is and which loss is minimised, `vae.py` and
`autoencoder.py` say.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from llava_cmoe.locators.base import Locator

FIT_BATCH = 64
"""Features per Adam step. On 2,000 synthetic features of width 224 (1.3 s a task on one core) 64 had the lowest
held-out error of 16, 64 and 256: 256 leaves too few steps before `epochs` run out, 16 takes twice as long."""


class ReconstructionLocator(Locator):
    """A network per task: four linears, each with a `weight` (in, out) and a `bias` (out)."""

    linears: ClassVar[tuple[str, str, str, str]]
    """Names of encode, bottleneck, decode and output."""
    outputs_per_latent: ClassVar[int]
    """How many numbers the bottleneck gives for each entry of the latent."""

    @abstractmethod
    def loss(self, networks: Mapping[str, Tensor], x_BD: Tensor, generator: torch.Generator) -> Tensor:
        """What a batch is fitted by, a differentiable scalar."""

    @torch.enable_grad()
    def model(self, train_SD: Tensor, held_SD: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Weights (N = 1) of the epoch with the lowest held-out error."""
        network = self._initial(train_SD.shape[1], generator)
        optimizer = torch.optim.Adam(network.values(), lr=self._settings.learning_rate)
        best: dict[str, Tensor] = {}
        best_error, stale = math.inf, 0
        for _ in range(self._settings.epochs):
            order_S = torch.randperm(len(train_SD), generator=generator).to(train_SD.device)
            for start in range(0, len(order_S), FIT_BATCH):
                loss = self.loss(network, train_SD[order_S[start : start + FIT_BATCH]], generator)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                error = float(self.error(network, held_SD).mean())
            if error < best_error:
                best = {name: tensor.detach().clone() for name, tensor in network.items()}
                best_error, stale = error, 0
            else:
                stale += 1
                if stale == self._settings.patience:
                    break
        if not best:
            rate = self._settings.learning_rate
            raise ValueError(f"fitting the locator diverged; lower locator.learning_rate (now {rate})")
        return best

    def bottleneck(self, networks: Mapping[str, Tensor], x_BD: Tensor) -> Tensor:
        """What the bottleneck gives for every x under every network: (N, B, outputs)."""
        encode, bottleneck, _, _ = self.linears
        x_NBD = x_BD.expand(len(networks[f"{encode}.bias"]), *x_BD.shape)
        return _linear(networks, bottleneck, functional.gelu(_linear(networks, encode, x_NBD)))

    def squared_error(self, networks: Mapping[str, Tensor], latent_NBZ: Tensor, x_BD: Tensor) -> Tensor:
        """(x' - x)^2 entry by entry, (N, B, D)."""
        _, _, decode, output = self.linears
        x_again_NBD = _linear(networks, output, functional.gelu(_linear(networks, decode, latent_NBZ)))
        return (x_again_NBD - x_BD).square()

    def _initial(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Leaves for one network (N = 1), uniform in +-1/sqrt(in) as `nn.Linear` starts."""
        hidden, latent = self._settings.hidden, self._settings.latent
        sizes = (width, hidden, self.outputs_per_latent * latent), (latent, hidden, width)
        shapes = [pair for size in sizes for pair in pairwise(size)]
        network = {}
        for linear, (num_in, num_out) in zip(self.linears, shapes, strict=True):
            for name, shape in ((f"{linear}.weight", (1, num_in, num_out)), (f"{linear}.bias", (1, num_out))):
                start = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(num_in)
                network[name] = start.to(self._device).requires_grad_()
        return network


def tensor_names(linears: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the tensors of some linears."""
    return tuple(f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias"))


def _linear(networks: Mapping[str, Tensor], name: str, x_NBD: Tensor) -> Tensor:
    return torch.baddbmm(networks[f"{name}.bias"].unsqueeze(1), x_NBD, networks[f"{name}.weight"])
