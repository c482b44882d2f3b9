"""Short stories, poems and lists: the long answers that show streaming."""

import random

from llmd_plugins.sources.demo import words

_OPENINGS = [
    "Once upon a time, there was a {adj} {hero} named {name} who lived in {place}.",
    "In {place} there lived a {adj} {hero} called {name}.",
    "{name} was a {adj} {hero} who lived in {place}.",
    "Long ago, a {adj} {hero} named {name} lived in {place}.",
]
_MORNINGS = ["One {time}", "One {weather} {time}", "Early one {time}"]
_TIMES = ["morning", "day", "evening", "afternoon"]
_WEATHERS = ["sunny", "rainy", "windy", "cold", "quiet", "warm"]

_FINDING = [
    "{morning}, {name} found {thing} under a tree.",
    "{He} did not know whose it was, so {he} asked {friend} the {other}.",
    '"That is mine!" said {friend}. "I lost it {when}."',
    "{name} gave it back at once, and {friend} was very {glad}.",
    "From that day on, {name} and {friend} were the best of friends.",
]
_SEARCH = [
    "{morning}, {name} could not find {his} {noun}.",
    "{He} looked in the {room}, behind the {spot} and even on the roof, but it was not there.",
    "Then {friend} the {other} came by and said, {quote}",
    "They looked together until the sun went down, and at last {friend} saw it {where}.",
    '"Thank you!" said {name}. "Two can see more than one."',
]
_JOURNEY = [
    "{name} had always wanted to see the {goal}.",
    "{morning}, {he} packed {food} and {thing} and set off.",
    "The way was long, but {he} met {friend} the {other}, who wanted to go there too.",
    "They walked and talked and sang until they saw the {goal} in the distance.",
    "It was even more beautiful than {name} had dreamed, and they stayed until the stars came out.",
]
_COOKING = [
    "{morning}, {name} wanted to make {dish} for {friend} the {other}.",
    "But there was no {missing} left, so {he} went to the market.",
    "On the way home it began to rain, and {name} got very wet.",
    "When {friend} opened the door, {name} laughed and gave {friend} the {missing}.",
    "They cooked together, and the {dish} was the best they had ever eaten.",
]
_FEAR = [
    "{name} was afraid of {fear}.",
    "{morning}, {he} heard somebody cry for help: it was {friend} the {other}.",
    "{name} took a deep breath and ran to help, even though {his} knees were shaking.",
    '"You are very brave," said {friend}.',
    '"No," said {name}, "I was afraid, but I came anyway."',
]
_ENDINGS = [
    "The end.",
    "And they all lived happily ever after.",
    "That night, {name} slept very well.",
    "And that is how {name} found a friend.",
    "{name} still tells this story today.",
]
_PLOTS = [_FINDING, _SEARCH, _JOURNEY, _COOKING, _FEAR]
_GENDERED = {"princess": "she", "queen": "she", "girl": "she", "king": "he", "boy": "he"}
_HIS = {"he": "his", "she": "her", "it": "its"}
_POEMS = [
    "The {a} is {x} and the {b} is {y},\nI hear a {bird} sing far and high.\nThe day is long, the wind is light,\n"
    "and soon the stars will say good night.",
    "O {a}, so {x}, so {y} and free,\nyou are the one I long to see.\nThe {b} may come, the {b} may go,\n"
    "but you will stay with me, I know.",
    "I saw the {a} at break of day,\nso {x} and {y} and far away.\nThe {b} was near, the world was new,\n"
    "and all I thought of then was you.",
]


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def fitting_name(rng: random.Random, hero: str) -> str:
    """A name for the hero; a king is not called Lucy."""
    wanted = _GENDERED.get(hero)
    return rng.choice([name for name, pronoun in words.NAMES.items() if wanted in (None, pronoun)])


def story(rng: random.Random, hero: str | None = None, name: str | None = None) -> str:
    """A story of five to seven sentences with one hero and one friend."""
    hero = hero or rng.choice(list(words.HEROES))
    name = name or fitting_name(rng, hero)
    friend = rng.choice([other for other in words.NAMES if other != name])
    he = words.NAMES.get(name, "it")
    thing = rng.choice(words.THINGS)
    morning = rng.choice(_MORNINGS).format(time=rng.choice(_TIMES), weather=rng.choice(_WEATHERS))
    slots = {
        "hero": hero, "name": name, "friend": friend, "he": he, "He": he.capitalize(), "his": _HIS[he],
        "other": rng.choice([animal for animal in words.ANIMALS if animal != hero]),
        "place": f"the {words.HEROES.get(hero, 'village')}", "morning": morning,
        "adj": rng.choice([adj for adj in words.ADJECTIVES if adj[0] not in "aeiou"]),
        "thing": article(thing), "noun": thing,
        "when": rng.choice(["yesterday", "last week", "on Sunday"]), "glad": rng.choice(["happy", "glad", "thankful"]),
        "room": rng.choice(["kitchen", "garden", "barn"]), "spot": rng.choice(["door", "chair", "old oven"]),
        "quote": rng.choice(['"Let me help you."', '"Do not be sad. I will help."', '"Four eyes are better than two."']),
        "where": rng.choice(["under a leaf", "in the grass", "on top of the hill", "in its own bag"]),
        "goal": rng.choice(["sea", "big city", "old castle", "blue lake", "high mountain"]),
        "food": rng.choice(["some bread", "some cheese", "two apples", "a cake"]),
        "dish": rng.choice(["soup", "cake", "pizza", "bread", "salad"]),
        "missing": rng.choice(["salt", "milk", "sugar", "butter", "honey"]),
        "fear": rng.choice(["the dark", "deep water", "storms", "loud sounds", "the big forest"]),
    }  # fmt: skip
    lines = [rng.choice(_OPENINGS), *rng.choice(_PLOTS), rng.choice(_ENDINGS)]
    return " ".join(lines).format(**slots)


def poem(rng: random.Random, subject: str | None = None) -> str:
    """A poem of four lines."""
    first, second = rng.sample(["sea", "moon", "rain", "sun", "wind", "snow", "rose", "hill", "river", "sky"], 2)
    one, two = rng.sample(["blue", "bright", "cold", "deep", "soft", "wild", "warm", "still"], 2)
    bird = rng.choice(["bird", "lark", "owl", "swan"])
    return rng.choice(_POEMS).format(a=subject or first, b=second, x=one, y=two, bird=bird)
