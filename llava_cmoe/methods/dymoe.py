"""LLaVA-DyMoE (arXiv 2603.27481): incremental MoELoRA whose tokens are told which side they belong to.

    guide    while learning, a token uses new experts only if their best score clearly exceeds the old ones' best
    exclude  L_exc = mean of g_old g_new            a token's probability lies on one side
    special  L_spe = mean of BCE(g_new, 1 - max w_old)     on the new side where no old expert is sure
    L        = L_LM + lambda * balance of the new experts + alpha * (L_exc + L_spe)

g are the router's probabilities w summed over the old and the new experts. No code is released; what the description
leaves open is a choice: a token that may use new experts still may use old ones; the target of L_spe takes no gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llava_cmoe.experts.routers.widened import Scores, WidenedRouter
from llava_cmoe.methods.inc_moelora import IncMoeLora
from llava_cmoe.settings.methods.dymoe import DyMoeSettings


class DyMoe(IncMoeLora):
    """Experts and rows per task in every FFN, under one router that grows and is guided."""

    costs = IncMoeLora.costs

    settings: DyMoeSettings

    def router(self, width: int) -> WidenedRouter:
        """A guided one."""
        return WidenedRouter(width, self.settings.top_k, self.settings.margin)

    def loss_of(self, scores: Scores, weight_BT: Tensor) -> Tensor:
        """Balance, exclusion and specialisation at one site; the last two once there are old experts."""
        loss = super().loss_of(scores, weight_BT)
        if scores.num_old:
            loss = loss + self.settings.routing_weight * separation(scores, weight_BT)
        return loss


def separation(scores: Scores, weight_BT: Tensor) -> Tensor:
    """L_exc + L_spe of one site."""
    old_BTE, new_BTN = scores.logits_BTE.softmax(dim=-1).tensor_split([scores.num_old], dim=-1)
    mass_old_BT, mass_new_BT = old_BTE.sum(dim=-1), new_BTN.sum(dim=-1).clamp(0, 1)
    unsure_BT = (1 - old_BTE.amax(dim=-1)).clamp(0, 1).detach()
    special_BT = F.binary_cross_entropy(mass_new_BT, unsure_BT, reduction="none")
    return ((mass_old_BT * mass_new_BT + special_BT) * weight_BT).sum()
