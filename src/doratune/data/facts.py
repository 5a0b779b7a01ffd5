"""The demonstration's data: a hand-written table of everyday facts, and commonsense items made from it in four published formats.

    true/false      "is a trout a kind of fish?"                                   (BoolQ's format)
    answer1…4       "Which of these is a kind of fruit?" with four things          (ARC's and OpenBookQA's)
    solution1/2     "To cut a board in two" with two tools                         (PIQA's)
    option1/2       "A _ is a kind of bird."                                       (WinoGrande's)

Every thing belongs to the training half or to the test half, options and distractors included, so a test item can be answered
from the pretrained model's knowledge and the learned format, never from a training item. Answers are balanced: nothing is
gained by always giving the same one.
"""

from __future__ import annotations

import random

KINDS: dict[str, str] = {
    "fish": "trout salmon tuna cod herring sardine shark pike carp eel catfish haddock mackerel halibut goldfish piranha perch",
    "bird": "robin eagle sparrow owl penguin parrot crow pigeon duck swan hawk ostrich flamingo pelican falcon raven goose",
    "mammal": "dog horse cow whale bear lion tiger elephant rabbit mouse wolf deer goat sheep monkey giraffe camel otter",
    "insect": "ant bee wasp beetle butterfly moth mosquito cricket grasshopper ladybug termite dragonfly fly cockroach flea",
    "reptile": "snake lizard crocodile turtle alligator tortoise gecko iguana python cobra chameleon viper rattlesnake",
    "fruit": "apple banana orange pear peach plum cherry grape mango lemon strawberry pineapple apricot kiwi melon fig",
    "vegetable": "carrot potato onion cabbage spinach broccoli cauliflower celery lettuce turnip radish leek beet cucumber",
    "tree": "oak pine maple birch willow cedar elm spruce poplar beech redwood fir palm ash sycamore",
    "flower": "rose tulip daisy lily orchid sunflower daffodil violet carnation marigold poppy iris petunia dandelion",
    "metal": "iron copper gold silver aluminum tin lead zinc nickel steel bronze brass titanium platinum",
    "tool": "hammer saw screwdriver wrench drill pliers chisel shovel rake axe crowbar sander trowel mallet",
    "piece of furniture": "chair table sofa bed desk wardrobe bookcase bench stool dresser armchair cupboard cabinet couch",
    "piece of clothing": "shirt hat sock coat jacket dress skirt scarf glove sweater jeans blouse vest belt trousers",
    "musical instrument": "piano guitar violin drum flute trumpet cello harp clarinet saxophone banjo trombone tuba oboe",
    "vehicle": "car truck bus bicycle train airplane boat motorcycle tractor helicopter van ship scooter taxi tram",
    "country": "France Germany Japan Brazil Canada India China Mexico Egypt Italy Spain Russia Kenya Peru Norway Greece",
    "city": "Paris London Tokyo Berlin Rome Madrid Chicago Moscow Boston Cairo Toronto Vienna Seattle Dublin Athens Sydney",
    "color": "red blue green yellow purple pink brown black white gray crimson turquoise beige maroon scarlet",
    "sport": "football tennis basketball baseball hockey golf swimming boxing rugby volleyball cricket skiing cycling wrestling",
    "drink": "water milk coffee tea juice wine beer lemonade soda cocoa whiskey cider champagne vodka",
    "part of the body": "arm leg nose ear eye hand foot knee elbow shoulder finger toe neck chin wrist ankle",
    "profession": "doctor teacher lawyer nurse farmer carpenter plumber baker pilot soldier chef dentist tailor engineer judge",
    "planet": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "month": "January February March April May June July August September October November December",
}
"""Kind → things that are of that kind."""

NEAR = [
    {"fruit", "vegetable"}, {"fruit", "tree"}, {"tree", "flower"}, {"fish", "mammal"}, {"country", "city"},
    {"fruit", "color"}, {"flower", "color"}, {"metal", "color"}, {"flower", "part of the body"}, {"tree", "part of the body"},
]  # fmt: skip
"""Kinds that share words or borders (orange, iris, palm): never set against each other in one item."""

USES: list[tuple[str, str, str]] = [
    ("cut a board in two", "a saw", "a sponge"), ("drive a nail into a wall", "a hammer", "a pillow"),
    ("dry wet hair", "a towel", "a fork"), ("see in a dark room", "a lamp", "a blanket"),
    ("eat hot soup", "a spoon", "a comb"), ("write a letter", "a pen", "a plate"),
    ("tell what time it is", "a clock", "a carpet"), ("keep milk cold", "a refrigerator", "an oven"),
    ("bake a cake", "an oven", "a freezer"), ("sweep the kitchen floor", "a broom", "a candle"),
    ("open a locked door", "a key", "a napkin"), ("stay dry in the rain", "an umbrella", "a ladder"),
    ("reach a high shelf", "a ladder", "a bowl"), ("dig a hole in the garden", "a shovel", "a mirror"),
    ("brush your teeth", "a toothbrush", "a hammer"), ("cut paper", "scissors", "a bucket"),
    ("carry water", "a bucket", "a net"), ("catch fish", "a net", "a book"),
    ("tighten a bolt", "a wrench", "a feather"), ("boil water", "a kettle", "a basket"),
    ("measure the length of a table", "a ruler", "a cup"), ("take a photograph", "a camera", "a broom"),
    ("call a friend who is far away", "a telephone", "a spoon"), ("sew a button on a shirt", "a needle and thread", "a rake"),
    ("look at distant stars", "a telescope", "a pan"), ("light a candle", "a match", "an ice cube"),
    ("sleep comfortably", "a bed", "a desk"), ("fry an egg", "a pan", "a hat"),
    ("wash your hands", "soap and water", "sand and glue"), ("clean a dirty window", "a wet cloth", "a muddy stick"),
    ("keep your hands warm in winter", "gloves", "ice cubes"), ("mend a broken cup", "glue", "butter"),
    ("weigh a bag of flour", "a scale", "a clock"), ("slice bread", "a knife", "a spoon"),
    ("find the way in a strange city", "a map", "a pillow"), ("rake up fallen leaves", "a rake", "a fork and a plate"),
    ("iron a wrinkled shirt", "a hot iron", "a cold brick"), ("check if you have a fever", "a thermometer", "a calendar"),
    ("paint a wall", "a brush", "a needle"), ("wipe up spilled juice", "a paper towel", "a magazine cover"),
    ("protect your head on a bicycle", "a helmet", "a scarf"), ("water the plants", "a watering can", "a toaster"),
    ("toast a slice of bread", "a toaster", "a washing machine"), ("clean a carpet", "a vacuum cleaner", "a blender"),
    ("cross a river by car", "a bridge", "a tunnel of paper"), ("sharpen a pencil", "a pencil sharpener", "an eraser"),
    ("remove a pencil mark", "an eraser", "a stapler"), ("hold sheets of paper together", "a stapler", "a marble"),
    ("see your own face", "a mirror", "a brick"), ("drink juice without lifting the glass", "a straw", "a nail"),
    ("chop down a tree", "an axe", "a teaspoon"), ("keep food fresh on a picnic", "a cooler with ice", "a box of hot coals"),
    ("wake up at six in the morning", "an alarm clock", "a picture frame"), ("mow the lawn", "a lawn mower", "a hair dryer"),
    ("blow up a bicycle tire", "a pump", "a funnel of sand"), ("strain cooked pasta", "a colander", "an envelope"),
    ("send a letter", "a stamp and an envelope", "a bowl and a spoon"), ("hang up a wet coat", "a hook", "a balloon"),
    ("comb tangled hair", "a comb", "a key"), ("crack a walnut", "a nutcracker", "a feather"),
    ("listen to a heartbeat", "a stethoscope", "a flashlight"), ("pull out a nail", "pliers", "a sponge"),
    ("spread butter on toast", "a butter knife", "a screwdriver bit"), ("water a horse", "a trough of water", "a bag of stones"),
]  # fmt: skip
"""(goal, what helps, what does not)."""

TRAIN_ITEMS, TEST_ITEMS = 1200, 320


def things(half: str) -> dict[str, list[str]]:
    """Kind → its things in the training half ("train", two thirds) or the test half ("test").

    A word that stands under two kinds (cricket) is left out."""
    words = {kind: text.split() for kind, text in KINDS.items()}
    seen: dict[str, int] = {}
    for names in words.values():
        for name in names:
            seen[name.lower()] = seen.get(name.lower(), 0) + 1
    pick = (lambda i: i % 3 == 2) if half == "test" else (lambda i: i % 3 != 2)
    unique = {kind: [n for n in names if seen[n.lower()] == 1] for kind, names in words.items()}
    return {kind: [n for i, n in enumerate(names) if pick(i)] for kind, names in unique.items()}


def uses(half: str) -> list[tuple[str, str, str]]:
    return [use for i, use in enumerate(USES) if (i % 3 == 2) == (half == "test")]


def items(half: str) -> list[dict]:
    """The items of one half in the published form, the formats as in MIX, shuffled; the same on every machine."""
    count = TEST_ITEMS if half == "test" else TRAIN_ITEMS
    rng = random.Random(half)
    by_question: dict[str, dict] = {}
    turns = dict.fromkeys(MIX, 0)  # items of each kind so far: the right answer moves on with each
    for index in range(count):
        maker = MIX[index % len(MIX)]
        for _ in range(1000):  # another draw where the item is there already
            item = maker(half, rng, turns[maker])
            if item["instruction"] not in by_question:
                break
        by_question[item["instruction"]] = item
        turns[maker] += 1
    assert len(by_question) == count, "the table is too small for that many different items"
    shuffled = list(by_question.values())
    rng.shuffle(shuffled)
    return shuffled


QUESTIONS = ("is {0} {1}?", "would you call {0} {1}?")


def _true_false(half: str, rng: random.Random, turn: int) -> dict:
    kinds = things(half)
    kind = rng.choice(sorted(kinds))
    true = turn % 2 == 0
    thing = rng.choice(kinds[kind] if true else kinds[_other(kind, rng)])
    named = _a(thing, _named(thing, kinds)), _a(kind, kind)
    question = rng.choice(QUESTIONS).format(*named)
    text = f"Please answer the following question with true or false, question: {question}\n\nAnswer format: true/false"
    return _item(text, "true" if true else "false")


def _four_answers(half: str, rng: random.Random, turn: int) -> dict:
    kinds = things(half)
    kind, right = rng.choice(sorted(kinds)), turn % 4
    others = [k for k in sorted(kinds) if k != kind and not _near(k, kind)]
    options = [rng.choice(kinds[k]) for k in rng.sample(others, 4)]
    options[right] = rng.choice(kinds[kind])
    shown = " ".join(f"Answer{i}: {option}" for i, option in enumerate(options, 1))
    text = (
        f"Please choose the correct answer to the question: Which of these is {_a(kind, kind)}?\n\n{shown}\n\n"
        "Answer format: answer1/answer2/answer3/answer4"
    )
    return _item(text, f"answer{right + 1}")


def _two_solutions(half: str, rng: random.Random, turn: int) -> dict:
    table, right = uses(half), turn % 2
    goal, good, bad = rng.choice(table)
    if rng.random() < 0.5:
        bad = rng.choice([other for g, other, _ in table if g != goal and other not in (good, bad)])
    pair = [good, bad] if right == 0 else [bad, good]
    text = (
        f"Please choose the correct solution to the question: How do you {goal}?\n\n"
        f"Solution1: Use {pair[0]}. Solution2: Use {pair[1]}.\n\nAnswer format: solution1/solution2"
    )
    return _item(text, f"solution{right + 1}")


def _two_options(half: str, rng: random.Random, turn: int) -> dict:
    kinds, right = things(half), turn % 2
    kind = rng.choice(sorted(kinds))
    pair = [rng.choice(kinds[kind]), rng.choice(kinds[_other(kind, rng)])]
    pair = pair if right == 0 else pair[::-1]
    text = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"Everybody knows that _ is the name of {_a(kind, kind)}.\n\n"
        f"Option1: {pair[0]} Option2: {pair[1]} Answer format: option1/option2"
    )
    return _item(text, f"option{right + 1}")


MIX = (
    _true_false, _four_answers, _true_false, _two_solutions, _true_false, _two_options, _true_false, _true_false
)  # fmt: skip
"""Makers in turn: five in eight are true/false, which a small model learns in a few minutes; binding a number to one of four
options takes it far longer (60 steps: 85 % against chance level)."""


def _item(text: str, answer: str) -> dict:
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _near(one: str, other: str) -> bool:
    return any({one, other} <= pair for pair in NEAR)


def _other(kind: str, rng: random.Random) -> str:
    return rng.choice([k for k in sorted(KINDS) if k != kind and not _near(k, kind)])


_WITHOUT_ARTICLE = {"country", "city", "planet", "month", "color", "metal", "sport", "drink"}
_PLURAL = {"jeans", "trousers", "pliers"}


def _named(thing: str, kinds: dict[str, list[str]]) -> str:
    """The article rule of a thing: by its kind."""
    kind = next(k for k, names in kinds.items() if thing in names)
    return "" if kind in _WITHOUT_ARTICLE or thing in _PLURAL else thing


def _a(text: str, rule: str) -> str:
    """`an apple`, `a city`; the bare word where the rule is empty."""
    return text if not rule else f"{'an' if rule[0].lower() in 'aeio' or rule == 'umbrella' else 'a'} {text}"
