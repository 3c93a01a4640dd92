"""Every family of backbones learns two tasks through its own processor and chat template, end to end.

Left out: the processors of SmolVLM 2 (needs torchvision and num2words) and whatever reads videos (needs torchvision).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from PIL import Image
from tiny import Lesson
from torch import Tensor
from transformers import AutoModelForImageTextToText

from llava_cmoe import sequence
from llava_cmoe.backbones.features import prompt_feature
from llava_cmoe.backbones.loading import load_backbone
from llava_cmoe.backbones.sites import Site, ffn_sites, image_token_of, linear_sites, projector_sites, vision_sites
from llava_cmoe.chat.session import open_session
from llava_cmoe.data.coin import read_train
from llava_cmoe.data.collator import Collator
from llava_cmoe.data.conversation import IGNORED, encode_prompt, encode_sample, tokenizer_of
from llava_cmoe.data.encoding import Encoding, SampleRows
from llava_cmoe.data.problems import DataError
from llava_cmoe.data.rows import Turn
from llava_cmoe.data.sequences import load_sequence
from llava_cmoe.experts.bank import ExpertBank
from llava_cmoe.experts.plan import RoutePlan
from llava_cmoe.experts.routers.per_task import TaskRouters
from llava_cmoe.experts.surgery import install, uninstall
from llava_cmoe.records import Located
from llava_cmoe.registry.restore import restore_method
from llava_cmoe.registry.store import Registry
from llava_cmoe.settings.base import RecipeError

FAMILIES = [*families.WITH_IMAGES]
SITES = {"layers": "transformer.h", "ffn": "mlp", "ffn_linears": ["fc_in", "fc_out"]}
EAGER = ("paligemma", "codegen")
"""Of these transformers has no other attention."""

SIDES = (24, 40, 72)
"""Of the pictures in a batch, in pixels: of several numbers of crops or patches, where a family has such."""


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny sequence without pictures."""
    root = tmp_path_factory.mktemp("text")
    tiny.write_data(root, pictures=False)
    return root


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a family's model and processor are saved."""

    @cache
    def save(kind: str) -> Path:
        return families.make(kind).save(tmp_path_factory.mktemp("family") / kind)

    return save


@pytest.fixture(scope="session")
def learned(
    tiny_data: Path, text_data: Path, folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Lesson]:
    """What is seen while a family learns."""

    @cache
    def learn(kind: str, *more: str) -> Lesson:
        # A dozen rows teach a probe too little to win a token from routers that start as trained ones.
        overrides = ["evaluation.routes=[located]", "data.train_rows=12", "method.probe.router=random"]
        overrides += ["backbone.attention=eager"] if kind in EAGER else []
        overrides += [f"backbone.sites={SITES}"] if kind == "codegen" else []
        data = tiny_data if kind in FAMILIES else text_data
        run = tmp_path_factory.mktemp(kind) / "run"
        return tiny.attend(tiny.recipe(run, data, folder_of(kind), "cmoe", *overrides, *more))

    return learn


@pytest.mark.parametrize("kind", [*FAMILIES, "llama", "codegen"])
def test_a_step_of_the_same_rows_is_the_same_step_however_it_is_split(
    kind: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Answers differ in length: a mean over batches is not the mean over their tokens."""
    tiny.write_data(tmp_path, ("counts",), pictures=kind in FAMILIES)
    more = ["backbone.attention=eager"] if kind in EAGER else []
    more += [f"backbone.sites={SITES}"] if kind == "codegen" else []
    learned, losses = [], []
    for size, accumulation in ((4, 1), (1, 4)):
        split = [f"training.batch_size={size}", f"training.accumulation={accumulation}", "training.learning_rate=1e-3"]
        rows = ["data.train_rows=8", "data.eval_rows=1", "evaluation.routes=[located]"]
        recipe = tiny.recipe(
            tmp_path / f"{size}" / "run", tmp_path, folder_of(kind), "sequential_lora", *split, *rows, *more
        )
        sequence.learn(recipe)
        registry = Registry(recipe.run)
        learned.append(registry.load(0))
        losses.append(registry.records()[0].facts["training"]["first_loss"])
    for other in learned[1:]:
        for group, tensors in learned[0].items():
            torch.testing.assert_close(other[group], tensors, rtol=0, atol=2e-5)
    assert losses == pytest.approx([losses[0]] * 2, abs=1e-5)


EVERYWHERE = "method.experts.also_in=[vision, projector]"
ATTENTION = "method.experts.blocks=[attention, ffn]"


@pytest.mark.parametrize(
    "kind",
    [*([kind] for kind in (*FAMILIES, "llama")), ["codegen"], ["qwen2_5_vl", EVERYWHERE], ["gemma3", ATTENTION]],
    ids=" ".join,
)
def test_two_tasks_are_learned_and_come_back(kind: list[str], learned: Callable[..., Lesson]) -> None:
    lesson = learned(*kind)
    recipe, results = lesson.recipe, lesson.results
    assert lesson.untrained is not None and torch.equal(lesson.untrained, lesson.base)
    assert results.growth["colours"].keys() == set(results.sites)
    assert 0 < sum(results.growth["sides"].values()) < len(results.sites)  # by probes
    first, (still, second) = lesson.logits[0][0], lesson.logits[1]
    assert torch.equal(first, still) and not torch.equal(first, lesson.base) and not torch.equal(second, first)
    assert all(".experts." in name or ".router." in name for names in lesson.optimized for name in names)
    assert len(list((recipe.run / "answers").rglob("*.jsonl"))) == 3
    restored = restore_method(recipe, load_backbone(recipe.backbone), Registry(recipe.run))
    for task, logits in enumerate(lesson.logits[1]):
        assert torch.equal(lesson.logits_of(restored, task), logits)
    prompts = lesson.prompts()
    located, again = (method.locating.locate(prompts) for method in (lesson.run.method, restored))
    assert torch.equal(again.score_BN, located.score_BN)


def asked(processor: Any, side: int | None, question: str, answer: str | None = None) -> dict[str, Tensor]:
    """A question, about a noisy picture of so many pixels or none, as a prompt or a sample."""
    noise = torch.rand(3, side or 1, side or 1, generator=torch.Generator().manual_seed(side or 0))
    picture = Image.fromarray((noise.permute(1, 2, 0) * 255).byte().numpy())
    turns: list[Turn] = [{"role": "user", "text": question if side is None else f"<image>\n{question}"}]
    if answer is None:
        return encode_prompt(processor, turns, None if side is None else picture)
    turns.append({"role": "assistant", "text": answer})
    return encode_sample(processor, turns, None if side is None else picture, max_length=512)


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Tensor]]]:
    """Four rows: pictures of three sizes and, not first, none."""

    def make(processor: Any, **answer: str) -> list[dict[str, Tensor]]:
        questions = ("What is it?", "Is it?", "How many are there in it?", "Which?")
        sides = (SIDES[0], None, *SIDES[1:])
        return [asked(processor, side, text, **answer) for side, text in zip(sides, questions, strict=True)]

    return make


def together(processor: Any, rows: list[dict[str, Tensor]], side: Any = "left") -> dict[str, Tensor]:
    return Collator(tokenizer_of(processor).pad_token_id, side)(rows)


def make_router(width: int) -> TaskRouters:
    return TaskRouters(width, top_k=2)


def sites_of(model: Any) -> tuple[Site, ...]:
    projector = () if model.config.model_type == "gemma3" else projector_sites(model)
    return (*vision_sites(model), *projector, *ffn_sites(model))


@pytest.mark.parametrize("kind", FAMILIES)
def test_sites_hold_all_linears_of_the_llm_and_every_ffn_of_the_vision_encoder(kind: str) -> None:
    model = families.make(kind).model
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {name for name in linears if name.startswith((".".join(ffn_sites(model)[0].name.split(".")[:3]),))}
    assert {site.name for site in linear_sites(model)} == inside
    visual = [site for site in sites_of(model) if site.of_images]
    assert {f"{site.name}.{path}".removesuffix(".") for site in visual for path in site.linears} <= linears
    assert len(vision_sites(model)) == (1 if kind == "llava_next" else 2)  # LLaVA's last layer but one


@pytest.mark.parametrize("kind", FAMILIES)
def test_installed_everywhere_a_batch_of_several_tasks_equals_its_rows_alone(
    kind: str, rows: Callable[..., list[dict[str, Tensor]]]
) -> None:
    """Routes reach each picture's crops and patches, and nobody else's; installing alone changes no bit."""
    made = families.make(kind)
    model, samples = made.model, rows(made.processor)
    batch = together(made.processor, samples, "right")
    with torch.no_grad():
        base = model(**batch).logits
        host = install(model, sites_of(model), make_router, rank=2, alpha=8.0)
        assert torch.equal(model(**batch).logits, base)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for bank in host.banks.values():
                _learn(bank, generator)
        before_the_llm = [bank for bank in host.banks.values() if bank.site.of_images]
        for tasks in ((1, 0, 0, 1), (0, 1, 1, -1)):
            with host.context.use(RoutePlan.of(Located.at(torch.tensor(tasks)))):
                mixed = model(**batch).logits
            for row, task in enumerate(tasks):
                with host.context.use(RoutePlan.single(task)):
                    alone = model(**together(made.processor, [samples[row]])).logits[0]
                torch.testing.assert_close(mixed[row, : len(alone)], alone, rtol=0, atol=1e-5)
        with host.context.use(RoutePlan.single(0)), host.context.observe() as seen:
            model(**batch)
        assert seen.counts.keys() >= {bank.site.name for bank in before_the_llm}
    uninstall(model)


def _learn(bank: ExpertBank, generator: torch.Generator) -> None:
    _grow(bank, generator)
    for stack in bank.stacks.values():
        torch.nn.init.normal_(stack.trainable.B, std=0.5, generator=generator)
    bank.freeze()


def _grow(bank: ExpertBank, generator: torch.Generator) -> None:
    bank.grow(2, generator=generator)
    bank.router.add_task(bank.ids, bank.anchor.device, generator)


@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_learn_everywhere(kind: str, rows: Callable[..., list[dict[str, Tensor]]]) -> None:
    made = families.make(kind)
    host = install(made.model, sites_of(made.model), make_router, rank=2, alpha=2.0)
    generator = torch.Generator().manual_seed(0)
    for bank in host.banks.values():
        _grow(bank, generator)
    batch = together(made.processor, rows(made.processor, answer="yes"), "right")
    with host.context.use(RoutePlan.single(0)):
        made.model(**batch).loss.backward()
    for bank in host.banks.values():
        assert all(stack.trainable.B.grad.any() for stack in bank.stacks.values()), bank.site.name


@pytest.mark.parametrize("kind", FAMILIES)
def test_left_padded_prompts_of_several_tasks_are_answered_as_alone(
    kind: str, rows: Callable[..., list[dict[str, Tensor]]]
) -> None:
    made = families.make(kind)
    host = install(made.model, sites_of(made.model), make_router, rank=2, alpha=8.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for bank in host.banks.values():
            _learn(bank, generator)
    prompts, tasks = rows(made.processor), (1, 0, 0, 1)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": tokenizer_of(made.processor).pad_token_id}

    def answers(*chosen: int) -> Tensor:
        batch = together(made.processor, [prompts[row] for row in chosen])
        plan = RoutePlan.of(Located.at(torch.tensor([tasks[row] for row in chosen])))
        with host.context.use(plan, batch):
            return torch.stack(made.model.generate(**batch, **settings).logits, dim=1)

    mixed = answers(*range(4))
    for row in range(4):
        torch.testing.assert_close(mixed[row], answers(row)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_the_answer_and_its_end_are_learned_from_the_very_prompt(kind: str) -> None:
    processor = families.make(kind).processor
    for side in (None, SIDES[1]):
        prompt, sample = (asked(processor, side, "What is it?", *answer) for answer in ((), ("a cat",)))
        length = len(prompt["input_ids"])
        assert torch.equal(sample["input_ids"][:length], prompt["input_ids"])
        assert (sample["labels"][:length] == IGNORED).all() and (sample["labels"][length:] != IGNORED).all()
        text = tokenizer_of(processor).decode(sample["input_ids"][length:])
        end = tokenizer_of(processor).convert_ids_to_tokens(int(sample["input_ids"][-1]))
        assert text.strip() == f"a cat{end}"
        assert tokenizer_of(processor).decode(sample["input_ids"][-1:], skip_special_tokens=True) == ""
        assert all(key in sample and len(sample[key]) > length for key in prompt if len(prompt[key]) == length)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_answer_is_read_from_left_to_right(kind: str) -> None:
    """What comes later in an answer changes no state before it."""
    made = families.make(kind)
    sample = asked(made.processor, SIDES[0], "What is it?", "a cat")
    other = sample | {"input_ids": torch.cat([sample["input_ids"][:-2], sample["input_ids"][-2:].flip(0)])}
    with torch.no_grad():
        logits, changed = (made.model(**together(made.processor, [row])).logits[0, :-2] for row in (sample, other))
    assert torch.equal(logits, changed)


@pytest.mark.parametrize("kind", FAMILIES)
def test_features_tell_words_from_pictures(kind: str, rows: Callable[..., list[dict[str, Tensor]]]) -> None:
    made = families.make(kind)
    batch = together(made.processor, rows(made.processor))
    words, pictures, all_tokens, last = (
        prompt_feature(made.model, batch, 0, feature) for feature in ("text", "vision", "mean", "last")
    )
    assert pictures[[0, 2, 3]].any(dim=1).all() and not pictures[1].any()
    repainted = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
    assert torch.equal(prompt_feature(made.model, repainted, 0, "text"), words)
    assert not torch.equal(prompt_feature(made.model, repainted, 0, "vision"), pictures)
    image_B1 = (batch["input_ids"] == image_token_of(made.model)).sum(dim=1, keepdim=True)
    real_B1 = batch["attention_mask"].sum(dim=1, keepdim=True)
    torch.testing.assert_close((image_B1 * pictures + (real_B1 - image_B1) * words) / real_B1, all_tokens)
    assert last.shape == words.shape


@pytest.mark.parametrize("kind", FAMILIES)
def test_both_kernels_of_attention_say_the_same_where_both_are_there(
    kind: str, folder_of: Callable[[str], Path], rows: Callable[..., list[dict[str, Tensor]]]
) -> None:
    def logits(attention: str) -> Tensor:
        model = AutoModelForImageTextToText.from_pretrained(folder_of(kind), attn_implementation=attention).eval()
        return model(**together(made.processor, rows(made.processor), "right")).logits

    made = families.make(kind)
    if kind in EAGER:
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            logits("sdpa")
    else:
        mask = together(made.processor, rows(made.processor), "right")["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(logits("sdpa")[mask], logits("eager")[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_vl", "llava_next", "idefics3"])
def test_long_samples_are_found_by_the_sizes_of_their_pictures(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    processor = families.make(kind).processor
    rows = read_train(tiny_data, load_sequence(tiny_data / "sequence.yaml").tasks[1])
    encoding = Encoding(processor)
    lengths = [len(sample["input_ids"]) for sample in map(SampleRows(rows, encoding, 4096).__getitem__, range(24))]
    SampleRows(rows, encoding, max(lengths)).check_lengths(Path("train.json"))
    with pytest.raises(DataError, match=f"{max(lengths)} tokens; at most {max(lengths) - 1} fit"):
        SampleRows(rows, encoding, max(lengths) - 1).check_lengths(Path("train.json"))


def test_a_picture_is_refused_by_a_backbone_of_text_before_it_is_loaded(
    tiny_data: Path, folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_cmoe.runs.run.load_backbone", lambda *_: pytest.fail("loaded"))
    recipe = tiny.recipe(tmp_path / "run", tiny_data, folder_of("llama"))
    with pytest.raises(DataError, match=r"colours/train\.json, row 0 \(id colours-train-0\): it shows a picture and"):
        sequence.learn(recipe)


def test_a_run_of_text_is_talked_to_without_a_picture(learned: Callable[[str], Lesson], tmp_path: Path) -> None:
    lesson = learned("llama")
    session = open_session(lesson.recipe.run)
    reply = session.ask(None, lesson.questions["sides"].texts[0])
    assert reply.verdict is not None and isinstance("".join(reply.pieces), str)
    with pytest.raises(DataError, match="a picture, and the backbone reads text alone"):
        session.ask(tmp_path / "picture.png", "Which?")


def test_vision_is_not_located_by_where_there_is_none(
    text_data: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path / "run", text_data, folder_of("llama"), "cmoe", "method.locator.feature=vision")
    with pytest.raises(RecipeError, match="method.locator.feature is vision, but a llama reads text alone"):
        sequence.learn(recipe)


def test_an_architecture_with_other_names_learns_only_when_they_are_in_the_recipe(
    text_data: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    eager = "backbone.attention=eager"
    with pytest.raises(RecipeError, match="type 'codegen'.* is not known.*backbone.sites: {layers:"):
        sequence.learn(tiny.recipe(tmp_path / "run", text_data, folder_of("codegen"), "cmoe", eager))
    with pytest.raises(RecipeError, match="unknown key backbone.sites.fnn; did you mean backbone.sites.ffn"):
        tiny.recipe(tmp_path / "run", text_data, folder_of("codegen"), "cmoe", eager, "backbone.sites={fnn: mlp}")
    with pytest.raises(RecipeError, match="transformer.layers is no list of layers"):
        named = f"backbone.sites={SITES | {'layers': 'transformer.layers'}}"
        sequence.learn(tiny.recipe(tmp_path / "run", text_data, folder_of("codegen"), "cmoe", eager, named))
