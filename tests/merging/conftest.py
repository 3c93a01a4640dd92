"""A model with two tasks' experts, for the tests of this room."""

import pytest
import torch
from banks import train_task
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import ffn_sites
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import ExpertHost, install


@pytest.fixture
def host(tiny_llava: LlavaForConditionalGeneration) -> ExpertHost:
    """Per layer two experts of a first task and two of a second, all of which do something."""
    generator = torch.Generator().manual_seed(0)
    host = install(tiny_llava, ffn_sites(tiny_llava), lambda width: TaskRouters(width, top_k=2), rank=3, alpha=6.0)
    for _ in range(2):
        for bank in host.banks.values():
            train_task(bank, 2, generator)
        host.freeze()
    return host
