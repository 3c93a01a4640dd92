import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_cmoe.experts.routers.exact import exact_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.integers(1, 6))


@given(sizes=SIZES, dtype=st.sampled_from(DTYPES), each=st.booleans(), seed=st.integers(0, 99))
def test_logits_and_gradients_are_those_of_float64_and_nothing_of_it_is_kept(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, each: bool, seed: int
) -> None:
    batch, tokens, width, rows = sizes
    generator = torch.Generator().manual_seed(seed)
    h_BTD = torch.randn(batch, tokens, width, generator=generator).to(dtype).requires_grad_()
    weight_FD = torch.randn(*[batch] * each, rows, width, generator=generator).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits_BTF = exact_logits(h_BTD, weight_FD)
    assert {tensor.data_ptr() for tensor in kept} == {h_BTD.data_ptr(), weight_FD.data_ptr()}
    reference_BTF = (h_BTD.double() @ weight_FD.double().mT).float()
    assert logits_BTF.dtype == torch.float32 and torch.equal(logits_BTF, reference_BTF)
    grad_BTF = torch.randn(logits_BTF.shape, generator=generator)
    found, wanted = (torch.autograd.grad(one, (h_BTD, weight_FD), grad_BTF) for one in (logits_BTF, reference_BTF))
    assert all(
        left.dtype == right.dtype and torch.equal(left, right) for left, right in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_a_gradient_that_nobody_needs_is_not_computed(needed: tuple[bool, bool]) -> None:
    h_BTD, weight_FD = (torch.randn(2, 3, 4).requires_grad_(one) for one in needed)
    exact_logits(h_BTD, weight_FD[0]).sum().backward()
    assert (h_BTD.grad is not None, weight_FD.grad is not None) == needed
