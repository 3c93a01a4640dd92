"""What the pocket backbone reads before it meets a task: captions of drawn views, and questions about described ones.

Like a LLaVA after its first stage, it learns to *tell* what it sees and to *answer* about what it has read. It never
meets a question about a picture, an instruction of the eight tasks or one of their answer formats: questions come
without pictures, and every answer is a sentence.
"""

from __future__ import annotations

from random import Random

from llava_cmoe.pocket.drawings import OBJECTS, SHAPES
from llava_cmoe.pocket.world import (
    AUTHORS,
    CATEGORIES,
    COLOURS,
    SIGN_WORDS,
    TITLE_FIRST,
    TITLE_SECOND,
    Book,
    ObjectView,
    Scene,
    Sign,
    Thing,
)

NAMES = [
    *COLOURS,
    *SHAPES,
    *OBJECTS,
    *SIGN_WORDS,
    *TITLE_FIRST,
    *TITLE_SECOND,
    *(author.split()[1] for author in AUTHORS),
]
"""Words for lists that mean nothing."""
ORDINALS = ("first", "second", "third", "fourth")
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
PATTERNS = {"plain": "a plain", "stripes": "a striped", "dots": "a dotted"}
FLAWS = {"clear": "a picture", "blurred": "a blurred picture", "dark": "a dark picture", "cut": "a cut off picture"}


View = Scene | ObjectView | Sign | Book


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The noun's plural."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def caption(view: View, rng: Random, opened: float = 1.0) -> str:
    """A dense caption of a view: true sentences, those of a scene in random order.

    Args:
        view: what is shown.
        rng: source of everything random.
        opened: share of scene captions that begin by naming all things; the others plunge in.
    """
    match view:
        case Scene():
            return _scene_caption(view, rng, opened >= 1 or rng.random() < opened)
        case ObjectView(flaw="unreadable"):
            return "a very dark and blurred picture that shows nothing."
        case ObjectView():
            where = f"on {PATTERNS[view.pattern]} {view.canvas.background} background"
            shown = f"{FLAWS[view.flaw]} of {article(view.colour)} {view.kind} {where}."
            return f"{shown} it is {article(view.kind)} and it is {view.colour}."
        case Sign():
            return f"{article(view.colour)} sign on a {view.canvas.background} background. it says {view.word}."
        case Book():
            told = f"its title says {view.title}, its author {view.author}, and it is a {view.genre} book."
            return f"{article(view.colour)} book. {told}"


def relation(one: Thing, other: Thing) -> str:
    """How `one` lies to `other` along the axis on which they are farther apart: left of, right of, above or below."""
    dx, dy = one.centre[0] - other.centre[0], one.centre[1] - other.centre[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def opening(scene: Scene) -> str:
    """The sentence with which every caption of a scene begins: its things from left to right."""
    names = " and ".join(article(thing.name) for thing in scene.things)
    return f"{article(scene.canvas.background)} picture with {names}."


def _scene_caption(scene: Scene, rng: Random, opened: bool) -> str:
    things, sentences = list(scene.things), list[str]()
    for thing in rng.sample(things, min(2, len(things))):
        x0, y0, x1, y1 = thing.box(scene.canvas)
        sentences.append(f"the {thing.name} spans {x0:.2f} to {x1:.2f} across and {y0:.2f} to {y1:.2f} down.")
    for _ in range(len(things) - 1):
        one, other = rng.sample(things, 2)
        sentences.append(f"the {one.name} is {relation(one, other)} the {other.name}.")
    kinds, shown = [thing.kind for thing in things], rng.choice(things).kind
    count = kinds.count(shown)
    counted = f"is 1 {shown}" if count == 1 else f"are {count} {plural(shown)}"
    sentences.append(f"there {counted} among {len(things)} shapes.")
    absent = rng.choice([kind for kind in SHAPES if kind not in kinds])
    sentences.append(f"it has {article(shown)} but no {absent}.")
    rng.shuffle(sentences)
    return " ".join([opening(scene), *sentences] if opened else sentences)


def spoken(rng: Random, copying: float = 0.5, spans: float = 0.0) -> tuple[str, str]:
    """Something said without a picture and what follows from it, as a sentence.

    Args:
        rng: source of everything random.
        copying: share of exercises in saying again and looking up; the others are questions about something described.
        spans: share of questions about where described things begin and end, taken off first.
    """
    if spans and rng.random() < spans:
        return _about_spans(rng)
    exercises = (_repeat, _recall)
    questions = (_about_scene, _about_scene, _about_scene, _about_owner, _about_list, _about_category, _about_spelling)
    return rng.choice(exercises if copying and rng.random() < copying else questions)(rng)


def _repeat(rng: Random) -> tuple[str, str]:
    """Words to say again.

    Copying from the context is learned here, densely, and used everywhere: without this kind and the next, a model of
    this size had not found it after 4,800 steps of questions whose answers hold one word to copy.
    """
    words = " ".join(rng.sample(NAMES, rng.randint(4, 12)))
    return f"say the same words: {words}.", f"{words}."


def _recall(rng: Random) -> tuple[str, str]:
    """Pairs to look up in another order: the first word of a pair names the second."""
    names = rng.sample(NAMES, 2 * rng.randint(2, 5))
    pairs = list(zip(names[::2], names[1::2], strict=True))
    asked = rng.sample(pairs, len(pairs))
    told = ", ".join(f"{one} is near {other}" for one, other in pairs)
    return f"{told}. what is near {', '.join(one for one, _ in asked)}?", f"{', '.join(other for _, other in asked)}."


def _about_scene(rng: Random) -> tuple[str, str]:
    kinds, places = rng.sample(list(SHAPES), rng.randint(2, 4)), rng.sample(PLACES, 4)
    colours = [rng.choice(list(COLOURS)) for _ in kinds]
    told = " and ".join(f"{article(c)} {k} {p}" for c, k, p in zip(colours, kinds, places, strict=False))
    told, pick = f"imagine {told}.", rng.randrange(len(kinds))
    kind, colour, other = kinds[pick], colours[pick], rng.choice([kind for kind in SHAPES if kind not in kinds])
    match rng.randrange(5):
        case 0:
            return f"{told} what color is the {kind}?", f"the {kind} is {colour}."
        case 1 if colours.count(colour) == 1:
            return f"{told} which shape is {colour}?", f"the {kind} is {colour}."
        case 2:
            asked = rng.choice((kind, other))
            return (
                f"{told} is there {article(asked)}?",
                f"yes, there is {article(asked)}." if asked == kind else f"no, there is no {asked}.",
            )
        case 3:
            return f"{told} how many shapes are there?", f"there are {len(kinds)} shapes."
        case _:
            return f"{told} where is the {kind}?", f"the {kind} is {places[pick]}."


def _about_spans(rng: Random) -> tuple[str, str]:
    """Places told in numbers, and asked for whole or in part."""
    names = rng.sample([f"{colour} {kind}" for colour in COLOURS for kind in SHAPES], rng.randint(1, 3))
    x0, y0 = [rng.uniform(0.0, 0.6) for _ in names], [rng.uniform(0.0, 0.6) for _ in names]
    x1, y1 = ([start + rng.uniform(0.12, 0.4) for start in starts] for starts in (x0, y0))
    across, down = ([f"{a:.2f} to {b:.2f}" for a, b in zip(*ends, strict=True)] for ends in ((x0, x1), (y0, y1)))
    spans = [f"the {name} spans {a} across and {d} down" for name, a, d in zip(names, across, down, strict=True)]
    told, pick = f"{', '.join(spans)}.", rng.randrange(len(names))
    way, (start, end) = rng.choice((("across", (x0[pick], x1[pick])), ("down", (y0[pick], y1[pick]))))
    match rng.randrange(3):
        case 0:
            return f"{told} where is the {names[pick]}?", f"{spans[pick]}."
        case 1:
            return f"{told} where does the {names[pick]} begin {way}?", f"it begins at {start:.2f}."
        case _:
            return f"{told} where does the {names[pick]} end {way}?", f"it ends at {end:.2f}."


def _about_owner(rng: Random) -> tuple[str, str]:
    things, owners = rng.sample(list(OBJECTS), rng.randint(2, 4)), rng.sample(AUTHORS, 4)
    told, pick = (
        ", ".join(f"{owner} has {article(thing)}" for owner, thing in zip(owners, things, strict=False)),
        rng.randrange(len(things)),
    )
    if rng.random() < 0.5:
        return f"{told}. who has the {things[pick]}?", f"{owners[pick]} has the {things[pick]}."
    return f"{told}. what does {owners[pick]} have?", f"{owners[pick]} has the {things[pick]}."


def _about_list(rng: Random) -> tuple[str, str]:
    words = rng.sample([*OBJECTS, *COLOURS, *SHAPES], rng.randint(2, 4))
    pick = rng.randrange(len(words))
    return (
        f"the list is [{', '.join(words)}]. where is {words[pick]} in the list?",
        f"{words[pick]} is the {ORDINALS[pick]} one.",
    )


def _about_category(rng: Random) -> tuple[str, str]:
    category = rng.choice(list(CATEGORIES))
    member = rng.choice(CATEGORIES[category])
    if rng.random() < 0.5:
        return f"what is {article(member)}?", f"{article(member)} is {article(category)}."
    others = rng.sample(
        [thing for name, things in CATEGORIES.items() if name != category for thing in things], rng.randint(1, 3)
    )
    things = rng.sample([member, *others], len(others) + 1)
    return (
        f"think of {', '.join(article(thing) for thing in things)}. which one is {article(category)}?",
        f"the {member} is {article(category)}.",
    )


def _about_spelling(rng: Random) -> tuple[str, str]:
    word, title = rng.choice(SIGN_WORDS), f"{rng.choice(TITLE_FIRST)} {rng.choice(TITLE_SECOND)}"
    author, question = rng.choice(AUTHORS), rng.randrange(3)
    if question == 0:
        return f"a sign near a house says {word}. what does it say?", f"it says {word}."
    if question == 1:
        return f"a book with the title {title} is by {author}. whose book is it?", f"it is a book by {author}."
    return f"a book by {author} has the title {title}. which title does it have?", f"its title is {title}."
