"""What can stand in for what, and where a gate goes then."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.merging.merge_map import MergeMap


@pytest.mark.parametrize("of_E", [(1, 1), (0, 2, 2), (0, 0, 1), (-2,)])
def test_what_cannot_stand_in_is_refused(of_E: tuple[int, ...]):
    with pytest.raises(ValueError, match="cannot stand in"):
        MergeMap(of_E, (1.0,) * len(of_E))


def maps() -> st.SearchStrategy[MergeMap]:
    """Any merge of up to six experts of which one stays."""

    def of(choices: list[int]) -> MergeMap:
        of_E: list[int] = []
        for expert, choice in enumerate(choices):
            possible = [expert, -1, *(other for other in range(expert) if of_E[other] == other)]
            of_E.append(possible[choice % len(possible)])
        return MergeMap(tuple(of_E), tuple(float(stand_in >= 0) for stand_in in of_E))

    return st.lists(st.integers(0, 9), min_size=1, max_size=6).map(of)


@given(merge_map=maps(), data=st.data())
def test_a_gate_goes_to_the_stand_ins_and_that_of_dropped_experts_to_nobody(merge_map: MergeMap, data: st.DataObject):
    num_known = data.draw(st.integers(1, len(merge_map.of_E)))  # a task knows the first experts only
    gate_BTE = torch.rand(2, 3, num_known, generator=torch.Generator().manual_seed(num_known))
    found_BTS = merge_map.gate_of(gate_BTE)
    known = [expert for expert in merge_map.kept if expert < num_known]
    assert found_BTS.shape == (2, 3, len(known))
    for place, kept in enumerate(known):
        members = [expert for expert in range(num_known) if merge_map.of_E[expert] == kept]
        torch.testing.assert_close(found_BTS[..., place], gate_BTE[..., members].sum(dim=-1))
