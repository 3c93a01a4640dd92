from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from banks import add_task
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from llava_cmoe.backbones.quantization import keep_bytes
from llava_cmoe.backbones.sites import Site, ffn_sites, linear_sites
from llava_cmoe.experts.bank import ExpertBank, ExpertLinear
from llava_cmoe.experts.context import ForwardPass
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import ExpertHost, install, uninstall
from llava_cmoe.records import Located

Learn = Callable[[ExpertBank, int], None]
Batch = dict[str, Tensor]


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    return model(**batch).logits


@torch.no_grad()
def routed(model: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, plan: RoutePlan) -> Tensor:
    with host.context.use(plan, batch):
        return model(**batch).logits


def hard(*tasks: int) -> RoutePlan:
    return RoutePlan.of(Located.at(torch.tensor(tasks)))


def routers_of(top_k: int) -> Callable[[int], TaskRouters]:
    return lambda width: TaskRouters(width, top_k)


def rows(batch: Batch, *which: int) -> Batch:
    return {name: tensor[list(which)] for name, tensor in batch.items()}


@pytest.mark.parametrize("sites_of", [ffn_sites, linear_sites])
def test_installing_experts_leaves_the_logits_bit_identical(
    tiny_llava: LlavaForConditionalGeneration,
    batch: Batch,
    generator: torch.Generator,
    sites_of: Callable[[LlavaForConditionalGeneration], tuple[Site, ...]],
) -> None:
    base = logits(tiny_llava, batch)
    host = install(tiny_llava, sites_of(tiny_llava), routers_of(2), rank=4, alpha=8.0)
    assert torch.equal(logits(tiny_llava, batch), base)
    for bank in host.banks.values():
        add_task(bank, 3, generator)
    assert torch.equal(logits(tiny_llava, batch), base)
    for plan in (RoutePlan.single(0), hard(0, -1, 0)):
        assert torch.equal(routed(tiny_llava, host, batch, plan), base)


def test_trained_experts_serve_only_the_rows_whose_plan_wants_them(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, learn: Learn
) -> None:
    base = logits(tiny_llava, batch)
    for bank in host.banks.values():
        learn(bank, 2)
    assert torch.equal(logits(tiny_llava, batch), base)
    assert torch.equal(routed(tiny_llava, host, batch, RoutePlan.single(-1)), base)
    mixed = routed(tiny_llava, host, batch, hard(-1, 0, -1))
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert (mixed[1] - base[1]).abs().max() > 0.1


def test_an_old_tasks_logits_keep_their_bits_after_two_more_tasks(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, learn: Learn
) -> None:
    shallow, deep = host.banks.values()
    learn(shallow, 2), learn(deep, 1)
    plans = [RoutePlan.single(0), hard(0, -1, 0)]
    before = [routed(tiny_llava, host, batch, plan) for plan in plans]
    learn(shallow, 0), learn(deep, 3)
    second = routed(tiny_llava, host, batch, RoutePlan.single(1))
    learn(shallow, 1), learn(deep, 2)
    for plan, old in zip(plans, before, strict=True):
        assert torch.equal(routed(tiny_llava, host, batch, plan), old)
    assert torch.equal(routed(tiny_llava, host, batch, RoutePlan.single(1)), second)
    assert not torch.allclose(routed(tiny_llava, host, batch, RoutePlan.single(2)), before[0], atol=0.1)


def test_a_mixed_batch_equals_separate_batches_whatever_the_mates_and_the_padding(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, learn: Learn
) -> None:
    for num_new in (2, 1, 2):
        for bank in host.banks.values():
            learn(bank, num_new)
    tasks = [2, 0, 1]
    mixed = routed(tiny_llava, host, batch, hard(*tasks))
    for row, task in enumerate(tasks):
        alone = rows(batch, row)
        kept = alone["attention_mask"][0].bool()
        for name in ("input_ids", "attention_mask"):
            alone[name] = alone[name][:, kept]
        separate = routed(tiny_llava, host, alone, RoutePlan.single(task))
        torch.testing.assert_close(mixed[row, kept], separate[0], rtol=1e-4, atol=1e-5)


def test_expert_counts_do_not_depend_on_padding(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, learn: Learn
) -> None:
    for bank in host.banks.values():
        learn(bank, 4)
    more = dict(rows(batch, 2))
    pads = torch.full((1, 9), int(batch["input_ids"][2, 0]))
    more["input_ids"] = torch.cat([pads, more["input_ids"]], dim=1)
    more["attention_mask"] = torch.cat([torch.zeros_like(pads), more["attention_mask"]], dim=1)
    counts = []
    for padded in (rows(batch, 2), more):
        with host.context.observe() as seen:
            routed(tiny_llava, host, padded, RoutePlan.single(0))
        counts.append({site: count.tolist() for site, count in seen.counts.items()})
    assert counts[0] == counts[1] and all(sum(count) == 2 * 9 for count in counts[0].values())


def test_cached_generation_follows_the_plan_as_a_teacher_forced_forward_does(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, learn: Learn
) -> None:
    for bank in host.banks.values():
        learn(bank, 2), learn(bank, 1)
    new, plan = 6, hard(1, -1, 0)

    def generate() -> Tensor:
        return tiny_llava.generate(**batch, do_sample=False, max_new_tokens=new, min_new_tokens=new)

    with host.context.use(plan):
        answered = generate()
    forced = {
        "input_ids": answered,
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(3, new, dtype=torch.long)], dim=1),
        "pixel_values": batch["pixel_values"],
    }
    scores = routed(tiny_llava, host, forced, plan)
    scores[..., tiny_llava.config.text_config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
    assert torch.equal(scores[:, -new - 1 : -1].argmax(-1), answered[:, -new:])
    assert torch.equal(generate()[1], answered[1]) and not torch.equal(generate(), answered)


def test_training_with_gradient_checkpointing_gives_the_same_gradients(
    tiny_llava: LlavaForConditionalGeneration, host: ExpertHost, batch: Batch, learn: Learn, generator: torch.Generator
) -> None:
    for bank in host.banks.values():
        learn(bank, 2)
        bank.grow(1, generator=generator, init_from=bank.expert(0))
        bank.router.add_task(bank.ids, bank.anchor.device, generator)
    learned = [parameter for parameter in tiny_llava.parameters() if parameter.requires_grad]

    def gradients() -> list[Tensor]:
        with host.context.use(RoutePlan.single(1), batch), host.context.observe() as seen:
            loss = tiny_llava(**batch, labels=batch["input_ids"]).loss + 0.01 * seen.balance_loss()
            return list(torch.autograd.grad(loss, learned))

    plain, calls = gradients(), []
    for bank in host.banks.values():
        bank.router.register_forward_hook(lambda *_: calls.append(1))
    tiny_llava.train()
    tiny_llava.activation_checkpointing_enable({"use_reentrant": False})
    for checkpointed, expected in zip(gradients(), plain, strict=True):
        assert expected.any() and torch.equal(checkpointed, expected)
    assert len(calls) == 2 * len(host.banks)  # each layer ran again in backward


def test_moelora_is_the_same_bank_on_every_linear_with_a_dense_gate_and_nothing_frozen(
    tiny_llava: LlavaForConditionalGeneration, batch: Batch, generator: torch.Generator
) -> None:
    host = install(tiny_llava, linear_sites(tiny_llava), routers_of(4), rank=2, alpha=4.0)
    for bank in host.banks.values():
        add_task(bank, 4, generator)
    learned = {name: parameter for name, parameter in tiny_llava.named_parameters() if parameter.requires_grad}
    assert len(host.banks) == 2 * 7 and len(learned) == 14 * 3  # A, B and a router for each linear
    optimizer = torch.optim.SGD(learned.values(), lr=1.0)
    for _ in range(2):
        with host.context.use(RoutePlan.single(0)):
            tiny_llava(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    for bank in host.banks.values():
        gate_BTE = bank.router(torch.randn(1, 3, bank.hidden_size), ForwardPass(RoutePlan.single(0))).gate_BTE
        assert gate_BTE.gt(0).all()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned.values())


def test_uninstalling_puts_the_very_same_modules_back(
    tiny_llava: LlavaForConditionalGeneration, batch: Batch, learn: Learn
) -> None:
    base, modules = logits(tiny_llava, batch), dict(tiny_llava.named_modules())
    for sites in (ffn_sites(tiny_llava), linear_sites(tiny_llava)):
        host = install(tiny_llava, sites, routers_of(1), rank=2, alpha=2.0)
        for bank in host.banks.values():
            learn(bank, 1)
        uninstall(tiny_llava)
        restored = dict(tiny_llava.named_modules())
        assert restored.keys() == modules.keys()
        assert all(restored[name] is module for name, module in modules.items())
    assert torch.equal(logits(tiny_llava, batch), base)


def test_the_backbone_is_frozen_and_its_keys_stay_recognisable(tiny_llava: LlavaForConditionalGeneration) -> None:
    before = tiny_llava.state_dict()
    install(tiny_llava, ffn_sites(tiny_llava), routers_of(1), rank=2, alpha=2.0)
    after = tiny_llava.state_dict()
    assert not any(parameter.requires_grad for parameter in tiny_llava.parameters())
    assert {key.replace("frozen.", "") for key in after} == before.keys()
    assert "model.language_model.layers.1.mlp.frozen.up_proj.frozen.weight" in after
    assert all(after[key].data_ptr() == before[key.replace("frozen.", "")].data_ptr() for key in after)


@pytest.mark.parametrize("training", [False, True])
def test_banks_are_put_in_the_mode_of_the_model_they_are_put_into(
    tiny_llava: LlavaForConditionalGeneration, training: bool
) -> None:
    host = install(tiny_llava.train(training), ffn_sites(tiny_llava), routers_of(1), rank=2, alpha=2.0)
    assert {module.training for bank in host.banks.values() for module in bank.modules()} == {training}


def test_a_host_hands_out_its_routers_as_what_they_are(host: ExpertHost) -> None:
    routers = host.routers(TaskRouters)
    assert routers.keys() == host.banks.keys()
    assert all(routers[site] is bank.router for site, bank in host.banks.items())
    next(iter(host.banks.values())).router = nn.Identity()
    with pytest.raises(AssertionError, match="installed with other routers"):
        host.routers(TaskRouters)


def test_a_mistaken_install_is_named_and_edits_nothing(tiny_llava: LlavaForConditionalGeneration) -> None:
    good = ffn_sites(tiny_llava)
    wrong = {
        "no such module": Site("model.language_model.layers.9.mlp", 9, ("up_proj",)),
        "LlamaMLP has no in_features": Site("model.language_model.layers.0.mlp", 0, ("",)),
    }
    for reason, site in wrong.items():
        with pytest.raises(ValueError, match=reason):
            install(tiny_llava, [*good, site], routers_of(1), rank=2, alpha=2.0)
        assert not any(isinstance(module, ExpertBank | ExpertLinear) for module in tiny_llava.modules())
        assert all(parameter.requires_grad for parameter in tiny_llava.parameters())
    with pytest.raises(ValueError, match="no experts are installed"):
        uninstall(tiny_llava)
    install(tiny_llava, good, routers_of(1), rank=2, alpha=2.0)
    with pytest.raises(ValueError, match="uninstall"):
        install(tiny_llava, good, routers_of(1), rank=2, alpha=2.0)


def test_experts_learn_on_a_four_bit_backbone(
    tiny_llava: LlavaForConditionalGeneration, batch: Batch, generator: torch.Generator
) -> None:
    for site in linear_sites(tiny_llava):
        linear = tiny_llava.get_submodule(site.name)
        assert isinstance(linear, nn.Linear)
        four_bit = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        four_bit.load_state_dict(linear.state_dict())
        tiny_llava.set_submodule(site.name, four_bit.to("cpu"))  # moving it is what quantizes it
    keep_bytes(tiny_llava)  # as loading does
    base = logits(tiny_llava, batch)
    host = install(tiny_llava, ffn_sites(tiny_llava), routers_of(2), rank=4, alpha=8.0)
    for bank in host.banks.values():
        add_task(bank, 2, generator)
    plan = RoutePlan.single(0)
    assert torch.equal(routed(tiny_llava, host, batch, plan), base)
    frozen = {name: tensor.clone() for name, tensor in tiny_llava.state_dict().items() if name.endswith("weight")}
    assert any(tensor.dtype == torch.uint8 for tensor in frozen.values())
    optimizer = torch.optim.AdamW((p for p in tiny_llava.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(4):
        with host.context.use(plan):
            loss = tiny_llava(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tiny_llava.state_dict().items() if name in frozen)
    assert torch.equal(logits(tiny_llava, batch), base)
