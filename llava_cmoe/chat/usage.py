"""Which experts took part in an answer: a forward pass over question and answer tells. Shape letters: T tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava_cmoe.backbones.sites import image_token_of
from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.methods.base import Method


@torch.no_grad()
def experts_used(
    method: Method, prompt: Mapping[str, Tensor], said_T: Tensor, task: int | None
) -> Mapping[str, Mapping[int, float]]:
    """Share of each expert's slots over the tokens of a prompt and its answer, by site; empty without experts.

    Args:
        method: as it answered.
        prompt: a batch of one.
        said_T: the answer's tokens.
        task: index of the task whose routers answered, -1 for the base model; found out anew where absent.
    """
    host, num_asked = method.host, prompt["input_ids"].shape[1]
    if host is None:
        return {}
    image_token = image_token_of(method.model)
    if image_token is not None:  # as an answer it stands for no picture that is there
        said_T = said_T[said_T != image_token]
    tokens_1T = torch.cat([prompt["input_ids"], said_T.unsqueeze(0)], dim=1)
    whole = {**prompt, "input_ids": tokens_1T, "attention_mask": torch.ones_like(tokens_1T)}
    labels_1T = tokens_1T.clone()
    labels_1T[:, :num_asked] = IGNORED  # a router that pools the prompt ends where the answer begins
    answering = method.answering({**whole, "labels": labels_1T}, None if task is None else torch.tensor([task]))
    with answering, host.context.observe() as seen:
        method.model.base_model(**whole, use_cache=False)
    shares = {site: (counts_E / counts_E.sum().clamp(min=1)).tolist() for site, counts_E in seen.counts.items()}
    return {site: dict(zip(seen.ids[site], share_E, strict=True)) for site, share_E in shares.items()}
