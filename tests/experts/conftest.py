"""Banks with experts that do something, for the tests of this room."""

from collections.abc import Callable

import pytest
import torch
from banks import train_task
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import ExpertHost, install

Learn = Callable[[ExpertBank, int], None]
"""Teach a bank one more task with so many new experts."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def learn(generator: torch.Generator) -> Learn:
    """A task that was learned and frozen: new experts with a random B, as training would leave them, and a router."""

    def learn_task(bank: ExpertBank, num_new: int) -> None:
        train_task(bank, num_new, generator)
        bank.freeze()

    return learn_task


@pytest.fixture
def host(tiny_llava: LlavaForConditionalGeneration) -> ExpertHost:
    """Empty banks on every FFN of `tiny_llava`."""
    return install(tiny_llava, ffn_sites(tiny_llava), lambda width: TaskRouters(width, top_k=2), rank=3, alpha=6.0)


@pytest.fixture
def batch(tiny_llava: LlavaForConditionalGeneration, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Three left-padded prompts with a picture each: 4 image tokens, then text; 0, 2 and 5 pads."""
    image, pad = tiny_llava.config.image_token_id, tiny_llava.config.text_config.pad_token_id
    input_ids = torch.randint(4, 300, (3, 14), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, num_pads in enumerate((0, 2, 5)):
        input_ids[row, :num_pads] = pad
        attention_mask[row, :num_pads] = 0
        input_ids[row, num_pads + 1 : num_pads + 5] = image
    pixel_values = torch.randn(3, 3, 24, 24, generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
