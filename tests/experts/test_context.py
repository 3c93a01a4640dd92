"""Which plan and batch are in force, and what a router may know of the pass it decides in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_cmoe.data.conversation import IGNORED
from llava_cmoe.experts.context import ForwardPass, RouteContext
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.records import Located

CPU, META = torch.device("cpu"), torch.device("meta")
IMAGE = 3


def plan_in(context: RouteContext) -> RoutePlan | None:
    running = context.forward_pass(CPU)
    return None if running is None else running.plan


def test_a_nested_plan_gives_way_to_the_one_before_even_after_an_error() -> None:
    context, outer, inner = RouteContext(), RoutePlan.single(0), RoutePlan.single(1)
    with context.use(outer):
        with context.use(inner):
            assert plan_in(context) is inner
        assert plan_in(context) is outer
        with context.use(None):
            assert plan_in(context) is None and not context.routes
        with pytest.raises(KeyError), context.use(inner):
            raise KeyError
        assert plan_in(context) is outer
    assert plan_in(context) is None and not context.routes


def test_a_nested_batch_gives_way_to_the_one_before() -> None:
    context, plan = RouteContext(), RoutePlan.single(0)
    outer, inner = ({"attention_mask": torch.ones(1, width)} for width in (2, 5))
    with context.use(plan, outer):
        with context.use(plan, inner):
            context.begin_pass(is_prefill=False)
            assert context.forward_pass(CPU).batch is inner and not context.forward_pass(CPU).is_prefill
        assert context.forward_pass(CPU).batch is outer and context.forward_pass(CPU).is_prefill
        with context.use(plan):
            assert context.forward_pass(CPU).mask_BT is None


def test_a_plan_found_inside_a_pass_holds_to_the_end_of_the_block_with_the_batch_of_the_block() -> None:
    context, batch = RouteContext(), {"attention_mask": torch.ones(2, 3)}
    with context.use(RoutePlan.single(5)):
        with context.use(None, batch):
            assert plan_in(context) is None
            found = RoutePlan.of(Located.at(torch.tensor([1, -1])))
            context.set_plan(found)
            assert plan_in(context) is found and context.forward_pass(CPU).batch is batch
        assert plan_in(context).max_task == 5


def test_a_pass_is_made_once_and_moves_with_its_plan_and_masks_once() -> None:
    context, batch = RouteContext(IMAGE), {"attention_mask": torch.ones(1, 2), "input_ids": torch.ones(1, 2)}
    with context.use(RoutePlan.single(0), batch):
        moved = context.forward_pass(META)
        assert moved is not None and moved.mask_BT is not None
        of_plan, of_masks = (moved.plan.tasks_BK, moved.plan.weights_BK), (moved.prompt_mask_BT, moved.image_mask_BT)
        assert {tensor.device for tensor in (*of_plan, moved.mask_BT, *of_masks)} == {META}
        assert context.forward_pass(META) is moved and context.forward_pass(META).plan is moved.plan


def test_images_are_told_apart_only_once_somebody_has_said_whose_they_are() -> None:
    context, batch = RouteContext(), {"attention_mask": torch.tensor([[0, 0, 0], [0, 1, 1]])}
    with context.use(RoutePlan(torch.tensor([[4], [7]]), torch.tensor([[0.5], [1.0]]), (4, 7)), batch):
        with pytest.raises(ValueError, match="which sample each image belongs to"):
            context.image_pass(CPU, 3)
        context.begin_pass(True, lambda num_rows: torch.arange(num_rows) % 2)
        seen = context.image_pass(CPU, 3)
        assert [value.tolist() for value in seen.rows()] == [[[4], [7], [4]], [[0.5], [1.0], [0.5]]]
        assert seen.mask_BT.tolist() == [[False], [True], [False]]  # the first sample is padding throughout
        assert context.image_pass(CPU, 3) is seen and context.image_pass(CPU, 2) is not seen
        whole = context.forward_pass(CPU)
        assert whole.sample_I is None and whole.mask_BT.tolist() == batch["attention_mask"].bool().tolist()
        context.begin_pass(True, lambda num_rows: torch.zeros(num_rows, dtype=torch.long))
        assert context.image_pass(CPU, 3).rows()[0].tolist() == [[4]] * 3  # the pictures of the pass that began last
    with context.use(None):
        assert context.image_pass(CPU, 3) is None


# What a router reads of the batch.

kinds = st.lists(st.sampled_from(["text", "image", "answer", "hidden"]), min_size=1, max_size=9)
"""Tokens of a conversation: `answer` is learned, `hidden` is what follows an answer without being learned."""


def batch_of(samples: list[list[str]], side: str) -> dict[str, Tensor]:
    """Conversations as a collator pads them; a token's id says its place, but for pictures."""
    ids = [
        torch.tensor([IMAGE if kind == "image" else 100 + place for place, kind in enumerate(one)]) for one in samples
    ]
    labels = [torch.tensor([7 if kind == "answer" else IGNORED for kind in one]) for one in samples]
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    rows = {"input_ids": ids, "labels": labels, "attention_mask": [torch.ones_like(one) for one in ids]}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=fill[name], padding_side=side)
        for name, values in rows.items()
    }


def without_pads(mask_BT: Tensor, batch: dict[str, Tensor], row: int) -> list[bool]:
    assert not mask_BT[row, ~batch["attention_mask"][row].bool()].any()  # a pad is never anything
    return mask_BT[row, batch["attention_mask"][row].bool()].tolist()


@given(samples=st.lists(kinds, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_masks_tell_pads_prompts_and_pictures_whichever_side_is_padded(samples: list[list[str]], side: str) -> None:
    batch = batch_of(samples, side)
    seen = ForwardPass(RoutePlan.single(0), batch, image_token=IMAGE)
    assert seen.mask_BT is not None and seen.mask_BT.dtype == seen.prompt_mask_BT.dtype == torch.bool
    for row, kinds_T in enumerate(samples):
        before_the_answer = kinds_T.index("answer") if "answer" in kinds_T else len(kinds_T)
        assert without_pads(seen.mask_BT, batch, row) == [True] * len(kinds_T)
        expected = [place < before_the_answer for place in range(len(kinds_T))]
        assert without_pads(seen.prompt_mask_BT, batch, row) == expected
        assert without_pads(seen.image_mask_BT, batch, row) == [kind == "image" for kind in kinds_T]


@given(samples=st.lists(kinds, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_a_prompt_alone_is_a_prompt_throughout(samples: list[list[str]], side: str) -> None:
    batch = batch_of(samples, side)
    del batch["labels"]
    seen = ForwardPass(RoutePlan.single(0), batch)
    assert torch.equal(seen.prompt_mask_BT, batch["attention_mask"].bool())


def test_the_answer_and_what_follows_it_are_no_prompt_even_where_they_are_not_learned() -> None:
    samples = [["text", "image", "answer", "answer", "hidden", "text", "answer"], ["text"]]
    for side in ("left", "right"):
        batch = batch_of(samples, side)
        seen = ForwardPass(RoutePlan.single(0), batch)
        assert batch["input_ids"][seen.prompt_mask_BT].tolist() == [100, IMAGE, 100]


def test_a_pass_without_a_batch_knows_no_mask() -> None:
    assert ForwardPass(RoutePlan.single(0)).mask_BT is None
