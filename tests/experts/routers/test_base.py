"""A gate by itself: what is counted of it where a router says nothing about choices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llava_cmoe.experts.routers.base import Gate, over_tokens


@given(rows=st.integers(1, 3), tokens=st.integers(1, 5), experts=st.integers(1, 4), seed=st.integers(0, 99))
def test_without_choices_an_expert_is_counted_where_it_has_a_weight(rows: int, tokens: int, experts: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    gate_BTE = torch.rand(rows, tokens, experts, generator=generator)
    gate_BTE[torch.rand(gate_BTE.shape, generator=generator) < 0.5] = 0
    mask_BT = torch.rand(rows, tokens, generator=generator) < 0.7
    for mask, kept in ((None, torch.ones_like(mask_BT)), (mask_BT, mask_BT)):
        gate = Gate(gate_BTE)
        assert (
            torch.equal(gate.counts(mask), gate_BTE[kept].ne(0).sum(dim=0)) and gate.counts(mask).dtype == torch.int64
        )
        torch.testing.assert_close(gate.probability(mask), gate_BTE[kept].sum(dim=0))


@pytest.mark.parametrize("mask_BT", [torch.ones(2, 9), torch.ones(3, 4), torch.ones(1, 4)])
def test_a_mask_of_another_pass_is_refused(mask_BT: Tensor):
    with pytest.raises(ValueError, match="observe whole forward passes"):
        over_tokens(torch.ones(2, 4, 3), mask_BT)


def test_a_mask_per_row_counts_all_of_a_row():
    assert over_tokens(torch.ones(2, 4, 3), torch.tensor([[True], [False]])).tolist() == [4, 4, 4]
