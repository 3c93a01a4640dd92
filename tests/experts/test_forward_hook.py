"""A context knows when a pass begins, and whose the pictures are that it reads.

Experts before the LLM serve each image by its own sample's plan, however many images the samples of a batch have.
"""

from collections.abc import Callable

import pytest
import torch
from banks import GivenGate, add_task
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlavaForConditionalGeneration

from llava_cmoe.backbones.sites import Site, ffn_sites, projector_sites, vision_sites
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.forward_hook import samples_of_images
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import ExpertHost, install, uninstall
from llava_cmoe.records import Located

Learn = Callable[[ExpertBank, int], None]
Batch = dict[str, Tensor]
TOP_K, PATCHES = 2, 4
NUM_IMAGES = (0, 1, 2, 1)
"""Of the samples of `batch`."""


def sites_before_the_llm(model: LlavaForConditionalGeneration) -> tuple[Site, ...]:
    return (*vision_sites(model), *projector_sites(model))


def top_k_routers(width: int) -> TaskRouters:
    return TaskRouters(width, TOP_K)


@pytest.fixture
def host(tiny_llava: LlavaForConditionalGeneration) -> ExpertHost:
    """Empty banks on the vision encoder's FFNs, the projector and the LLM's FFNs."""
    tiny_llava.config.vision_feature_layer = -1  # both vision layers
    sites = (*sites_before_the_llm(tiny_llava), *ffn_sites(tiny_llava))
    return install(tiny_llava, sites, top_k_routers, rank=3, alpha=3.0)


@pytest.fixture
def sample(tiny_llava: LlavaForConditionalGeneration, generator: torch.Generator) -> Callable[[int, int], Batch]:
    """Makes one prompt with so many text tokens and images, one text token between any two images."""
    image = tiny_llava.config.image_token_id

    def make(num_text: int, num_images: int) -> Batch:
        text_T = torch.randint(4, 300, (num_text,), generator=generator)
        parts = [
            part for index in range(num_images) for part in (text_T[index : index + 1], text_T.new_full((4,), image))
        ]
        input_ids = torch.cat([*parts, text_T[num_images:]])[None]
        made = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if num_images:
            made["pixel_values"] = torch.randn(num_images, 3, 24, 24, generator=generator)
        return made

    return make


@pytest.fixture
def samples(sample: Callable[[int, int], Batch]) -> list[Batch]:
    return [sample(num_text, num_images) for num_text, num_images in zip((9, 6, 5, 12), NUM_IMAGES, strict=True)]


def together(samples: list[Batch]) -> Batch:
    """One left-padded batch, with the images of all samples in their order."""
    tokens = {
        name: pad_sequence([one[name][0] for one in samples], batch_first=True, padding_side="left")
        for name in ("input_ids", "attention_mask")
    }
    pixels = [one["pixel_values"] for one in samples if "pixel_values" in one]
    return tokens | ({"pixel_values": torch.cat(pixels)} if pixels else {})


@torch.no_grad()
def routed(model: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, plan: RoutePlan | None) -> Tensor:
    with host.context.use(plan, batch):
        return model(**batch).logits


def of_sample(logits_BTV: Tensor, batch: Batch, row: int) -> Tensor:
    return logits_BTV[row, batch["attention_mask"][row].bool()]


def hard(*tasks: int) -> RoutePlan:
    return RoutePlan.of(Located.at(torch.tensor(tasks)))


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [((1, 1, 1), [0, 1, 2]), ((0, 1, 2, 1), [1, 2, 2, 3]), ((2, 0, 0), [0, 0]), ((0, 0, 3), [2, 2, 2])],
)
def test_an_image_belongs_to_the_sample_that_holds_its_tokens(num_images: tuple[int, ...], expected: list[int]):
    placeholder_BT = torch.zeros(len(num_images), 3 * PATCHES + 3, dtype=torch.bool)
    for row, number in enumerate(num_images):
        placeholder_BT[row, row : row + PATCHES * number] = True
    assert samples_of_images(placeholder_BT, sum(num_images)).tolist() == expected


def test_telling_whose_an_image_is_never_waits_for_the_device():
    plan, placeholder_BT = hard(0, 1), torch.ones(2, PATCHES, dtype=torch.bool)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # reading a value raises
        sample_I = samples_of_images(fake.from_tensor(placeholder_BT), 3)
        tasks_IK, weights_IK = ForwardPass(plan, sample_I=sample_I).rows()
        assert tasks_IK.shape == weights_IK.shape == (3, 1)


def test_installing_experts_before_the_llm_leaves_the_logits_bit_identical(
    tiny_llava: LlavaForConditionalGeneration, samples: list[Batch], generator: torch.Generator
):
    batch = together(samples)
    with torch.no_grad():
        base = tiny_llava(**batch).logits
    sites = (*sites_before_the_llm(tiny_llava), *ffn_sites(tiny_llava))
    host = install(tiny_llava, sites, top_k_routers, rank=3, alpha=6.0)
    assert torch.equal(routed(tiny_llava, host, batch, None), base)
    for bank in host.banks.values():
        add_task(bank, 3, generator)
    for plan in (None, RoutePlan.single(0), hard(0, -1, 0, 0)):
        assert torch.equal(routed(tiny_llava, host, batch, plan), base)


def test_a_mixed_batch_equals_separate_batches_with_none_one_or_two_images(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for num_new in (2, 1, 2):
        for bank in host.banks.values():
            learn(bank, num_new)
    tasks, mates = (2, 0, 1, 2), (1, 2, 0, 0)
    for order in ((0, 1, 2, 3), (3, 0, 2, 1)):
        batch = together([samples[row] for row in order])
        mixed = routed(tiny_llava, host, batch, hard(*(tasks[row] for row in order)))
        other = routed(tiny_llava, host, batch, hard(*(mates[row] for row in order)))
        for place, row in enumerate(order):
            alone = routed(tiny_llava, host, samples[row], RoutePlan.single(tasks[row]))[0]
            torch.testing.assert_close(of_sample(mixed, batch, place), alone, rtol=0, atol=1e-6)
            assert (of_sample(other, batch, place) - alone).abs().max() > 1e-2  # routes matter


def test_routes_before_the_llm_matter_to_the_images_own_sample_alone(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for site, bank in host.banks.items():
        num_new = 0 if "language_model" in site else 2
        learn(bank, num_new), learn(bank, num_new)
    batch = together(samples)
    first, second = (routed(tiny_llava, host, batch, hard(*tasks)) for tasks in ((1, 1, 0, 1), (0, 1, 1, 1)))
    moved = [(of_sample(first, batch, row) - of_sample(second, batch, row)).abs().max().item() for row in range(4)]
    assert moved[2] > 1e-2 and moved[0] == moved[1] == moved[3] == 0


def test_the_only_image_of_a_batch_goes_by_its_own_sample(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for bank in host.banks.values():
        learn(bank, 2), learn(bank, 1)
    batch = together(samples[:2])
    mixed = routed(tiny_llava, host, batch, hard(1, 0))
    alone = routed(tiny_llava, host, samples[1], hard(0))[0]
    torch.testing.assert_close(of_sample(mixed, batch, 1), alone, rtol=0, atol=1e-6)


def test_a_sample_without_a_task_gets_the_base_models_logits(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    batch = together(samples)
    base = routed(tiny_llava, host, batch, None)
    for bank in host.banks.values():
        learn(bank, 2)
    assert torch.equal(routed(tiny_llava, host, batch, RoutePlan.single(-1)), base)
    mixed = routed(tiny_llava, host, batch, hard(0, 0, -1, -1))
    assert torch.equal(mixed[2:], base[2:])
    assert (mixed[1] - base[1]).abs().max() > 1e-2


def test_an_old_tasks_logits_keep_their_bits_after_growth(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    batch, plans = together(samples), [RoutePlan.single(0), hard(0, 0, -1, 0)]
    for bank in host.banks.values():
        learn(bank, 2)
    before = [routed(tiny_llava, host, batch, plan) for plan in plans]
    for number, bank in enumerate(host.banks.values()):
        learn(bank, number % 3)
    for plan, old in zip(plans, before, strict=True):
        assert torch.equal(routed(tiny_llava, host, batch, plan), old)
    assert (routed(tiny_llava, host, batch, RoutePlan.single(1)) - before[0]).abs().max() > 1e-2


def test_a_mixture_of_tasks_serves_the_images_of_its_sample(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for bank in host.banks.values():
        learn(bank, 2), learn(bank, 1)
    batch = together(samples)
    tasks_BK, weights_BK = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]]), torch.tensor([[0.7, 0.3]]).repeat(4, 1)
    mixed = routed(tiny_llava, host, batch, RoutePlan.of(Located(tasks_BK, weights_BK)))
    for row, one in enumerate(samples):
        alone = routed(tiny_llava, host, one, RoutePlan.of(Located(tasks_BK[row : row + 1], weights_BK[:1])))[0]
        torch.testing.assert_close(of_sample(mixed, batch, row), alone, rtol=0, atol=1e-6)


def test_cached_generation_follows_the_plan_as_a_teacher_forced_forward_does(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for bank in host.banks.values():
        learn(bank, 2), learn(bank, 1)
    batch, plan, new = together(samples), hard(1, 0, 1, -1), 5

    def generate(plan: RoutePlan) -> tuple[Tensor, Tensor]:
        with host.context.use(plan):
            out = tiny_llava.generate(
                **batch, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        return out.sequences, torch.stack(out.logits, dim=1)

    answered, logits_BTV = generate(plan)
    added = torch.ones(len(samples), new, dtype=torch.long)
    forced = batch | {"input_ids": answered, "attention_mask": torch.cat([batch["attention_mask"], added], dim=1)}
    expected = routed(tiny_llava, host, forced, plan)[:, -new - 1 : -1]
    torch.testing.assert_close(logits_BTV, expected, rtol=0, atol=1e-5)
    assert (generate(hard(1, 1, 0, 0))[1] - logits_BTV)[1:, 0].abs().amax(dim=1).min() > 1e-2


def test_all_patches_of_all_images_are_counted_whatever_the_padding(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for bank in host.banks.values():
        learn(bank, 3)
    batch, num_images = together(samples), sum(NUM_IMAGES)
    with host.context.observe() as seen:
        routed(tiny_llava, host, batch, RoutePlan.single(0))
    for site, counts_E in seen.counts.items():
        tokens = {
            "model.multi_modal_projector": num_images * PATCHES,
            **{site.name: num_images * (PATCHES + 1) for site in vision_sites(tiny_llava)},  # and the class token
        }.get(site, int(batch["attention_mask"].sum()))
        assert counts_E.sum() == TOP_K * tokens
    assert seen.counts.keys() == host.banks.keys()


def test_a_batch_without_images_learns_where_there_is_something_to_learn(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], generator: torch.Generator
):
    for bank in host.banks.values():
        add_task(bank, 2, generator)
    batch = samples[0]
    with host.context.use(RoutePlan.single(0)), host.context.observe() as seen:
        loss = tiny_llava(**batch, labels=batch["input_ids"]).loss + seen.balance_loss()
    loss.backward()
    reached = {name for name, bank in host.banks.items() if bank.router.task_0.grad is not None}
    assert reached == seen.counts.keys() == {name for name, bank in host.banks.items() if not bank.site.of_images}


def test_experts_before_the_llm_learn_the_same_with_gradient_checkpointing(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for bank in host.banks.values():
        learn(bank, 2)
        bank.requires_grad_(False)
        bank.router.requires_grad_(True)
    batch = together(samples)
    learned = [parameter for parameter in tiny_llava.parameters() if parameter.requires_grad]

    def gradients() -> tuple[Tensor, ...]:
        with host.context.use(hard(0, 0, -1, 0)):
            return torch.autograd.grad(tiny_llava(**batch, labels=batch["input_ids"]).loss, learned)

    plain = gradients()
    tiny_llava.train()
    tiny_llava.activation_checkpointing_enable({"use_reentrant": False})
    for checkpointed, expected in zip(gradients(), plain, strict=True):
        assert expected.any() and torch.equal(checkpointed, expected)


def test_a_vision_encoder_that_is_called_alone_is_not_routed_by_guesswork(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, samples: list[Batch], learn: Learn
):
    for bank in host.banks.values():
        learn(bank, 2)
    routed(tiny_llava, host, samples[1], hard(0))
    with host.context.use(hard(0)), pytest.raises(ValueError, match="which sample each image belongs to"):
        tiny_llava.get_image_features(samples[1]["pixel_values"])
    with host.context.use(None):
        tiny_llava.get_image_features(samples[1]["pixel_values"])


@pytest.mark.parametrize("sites_of", [sites_before_the_llm, ffn_sites])
def test_uninstalling_leaves_nothing_behind(
    tiny_llava: LlavaForConditionalGeneration,
    samples: list[Batch],
    learn: Learn,
    sites_of: Callable[[LlavaForConditionalGeneration], tuple[Site, ...]],
):
    def attached() -> tuple[dict[str, nn.Module], object, list[str], int]:
        modules = dict(tiny_llava.named_modules())
        hooks = sum(len(module._forward_pre_hooks) for module in modules.values())
        return modules, tiny_llava.input_modalities, sorted(vars(tiny_llava)), hooks

    before = attached()
    host = install(tiny_llava, sites_of(tiny_llava), top_k_routers, rank=3, alpha=6.0)
    for bank in host.banks.values():
        learn(bank, 2)
    assert attached() != before
    uninstall(tiny_llava)
    assert attached() == before


# When a pass begins.


@pytest.fixture
def recording(tiny_llava: LlavaForConditionalGeneration, generator: torch.Generator) -> ExpertHost:
    """Banks on the LLM's FFNs whose routers remember the passes they decided in, and leave the model as it is."""
    host = install(tiny_llava, ffn_sites(tiny_llava), GivenGate, rank=2, alpha=2.0)
    for bank in host.banks.values():
        bank.grow(1, generator=generator)
    return host


def passes_of(host: ExpertHost) -> list[ForwardPass]:
    """The passes of the model since the last look; each site saw the same ones, each of them once."""
    seen = [bank.router.passes for bank in host.banks.values()]
    for passes in seen[1:]:
        assert len(passes) == len(seen[0]) and all(one is other for one, other in zip(passes, seen[0], strict=True))
    passes = list(seen[0])
    for one in seen:
        one.clear()
    return passes


def test_every_forward_of_prompts_or_samples_is_a_prefill(
    tiny_llava: LlavaForConditionalGeneration, recording: ExpertHost, samples: list[Batch]
):
    batch, plan = together(samples), hard(0, 1, -1, 0)
    with torch.no_grad(), recording.context.use(plan, batch):
        for use_cache in (True, False):
            tiny_llava(**batch, use_cache=use_cache)
            tiny_llava(**batch, labels=batch["input_ids"], use_cache=use_cache)
    passes = passes_of(recording)
    assert len(passes) == 4 and all(one.is_prefill for one in passes)
    assert all(one.plan is plan and one.batch is batch and one.sample_I is None for one in passes)


@pytest.mark.parametrize("new", [1, 4])
def test_in_generating_the_first_pass_is_a_prefill_and_the_steps_behind_it_are_not(
    tiny_llava: LlavaForConditionalGeneration, recording: ExpertHost, samples: list[Batch], new: int
):
    for batch, plan in ((together(samples), hard(0, 1, -1, 0)), (samples[2], hard(1))):  # twice, on one context
        with recording.context.use(plan, batch):
            for _ in range(2):
                tiny_llava.generate(**batch, do_sample=False, max_new_tokens=new, min_new_tokens=new)
                passes = passes_of(recording)
                assert [one.is_prefill for one in passes] == [True] + [False] * (new - 1)
                assert all(one.plan is plan and one.batch is batch for one in passes)


def test_what_a_router_decides_at_prefill_it_finds_again_while_decoding_and_not_in_another_plan(
    tiny_llava: LlavaForConditionalGeneration, recording: ExpertHost, samples: list[Batch]
):
    batch = together(samples)
    for number in range(2):
        plan = hard(0, 1, -1, 0)
        with recording.context.use(plan, batch):
            tiny_llava(**batch)
            [prefill] = passes_of(recording)
            assert prefill.plan.decided == {}
            prefill.plan.decided["gate"] = torch.tensor(number)
            tiny_llava.generate(**batch, do_sample=False, max_new_tokens=3, min_new_tokens=3)
        assert all(one.plan.decided["gate"] == number for one in passes_of(recording))


def test_a_continued_cache_is_no_prefill_and_an_empty_one_is(
    tiny_llava: LlavaForConditionalGeneration, recording: ExpertHost, samples: list[Batch]
):
    batch = samples[2]
    with torch.no_grad(), recording.context.use(hard(0), batch):
        cache = DynamicCache(config=tiny_llava.config.text_config)
        tiny_llava(**batch, past_key_values=cache)
        tiny_llava(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
        tiny_llava(input_ids=batch["input_ids"][:, -1:], past_key_values=None, use_cache=True)
    assert [one.is_prefill for one in passes_of(recording)] == [True, False, True]


def test_without_a_plan_no_router_is_asked(
    tiny_llava: LlavaForConditionalGeneration, recording: ExpertHost, samples: list[Batch]
):
    with torch.no_grad(), recording.context.use(None, samples[0]):
        tiny_llava(**samples[0])
    with torch.no_grad():
        tiny_llava(**samples[0])
    assert passes_of(recording) == []


def test_a_router_can_tell_the_tokens_of_pictures_and_of_the_prompt(
    tiny_llava: LlavaForConditionalGeneration, recording: ExpertHost, samples: list[Batch]
):
    batch = together(samples)
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100  # the last two tokens are the answer
    with torch.no_grad(), recording.context.use(RoutePlan.single(0), batch | {"labels": labels}):
        tiny_llava(**batch)
    [seen] = passes_of(recording)
    assert seen.image_mask_BT.sum(dim=1).tolist() == [PATCHES * number for number in NUM_IMAGES]
    assert torch.equal(seen.mask_BT, batch["attention_mask"].bool())
    prompt_BT = batch["attention_mask"].bool()
    prompt_BT[:, -2:] = False
    assert torch.equal(seen.prompt_mask_BT, prompt_BT)


def test_a_router_before_the_llm_knows_the_sample_of_each_picture(
    tiny_llava: LlavaForConditionalGeneration, samples: list[Batch], generator: torch.Generator
):
    sites = sites_before_the_llm(tiny_llava)
    host = install(tiny_llava, sites, GivenGate, rank=2, alpha=2.0)
    for bank in host.banks.values():
        bank.grow(1, generator=generator)
    batch = together(samples)
    with host.context.use(hard(0, 1, 2, 3), batch):
        tiny_llava.generate(**batch, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    for bank in host.banks.values():
        [seen] = bank.router.passes  # steps of decoding read no picture
        assert seen.is_prefill and seen.sample_I.tolist() == [1, 2, 2, 3]
        assert seen.rows()[0].flatten().tolist() == [1, 2, 2, 3] and seen.mask_BT.tolist() == [[True]] * 4
