"""Questions with their answers, made by rule from a seed.

Makers draw exchanges at random, endlessly. Each exchange has a key, and the hash of the key says on which side it falls:
training never sees an exchange whose key is held out, and the evaluation asks no other.
"""

import hashlib
import json
import random
from collections.abc import Callable
from typing import NamedTuple

from llmd_plugins.sources.demo import stories, words
from llmd_plugins.sources.demo.facts import ABOUT_LLMD, CODE

HELD_OUT_IN = 20
"""One key in so many is held out."""


class Exchange(NamedTuple):
    """One question with its answer; `value` is what a JSON answer carries instead of the sentence."""

    category: str
    key: str
    question: str
    answer: str
    value: object = None


Maker = Callable[[random.Random], Exchange]


def is_held_out(key: str) -> bool:
    """Whether exchanges with this key are kept for the evaluation."""
    return hashlib.blake2s(key.lower().encode()).digest()[0] % HELD_OUT_IN == 0


def coin(rng: random.Random) -> str:
    """A made-up word, so that spelling and copying are learnt and not only remembered."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return "".join(syllables) + rng.choice(["", "", "n", "r", "s", "l", "t"])


def any_word(rng: random.Random) -> str:
    """A known word, now and then a made-up one."""
    return coin(rng) if rng.random() < 0.2 else rng.choice(words.WORDS)


def any_name(rng: random.Random) -> str:
    """A known first name, now and then a made-up one."""
    return coin(rng).capitalize() if rng.random() < 0.25 else rng.choice(list(words.NAMES))


def casual(rng: random.Random, text: str) -> str:
    """The question as people type it: sometimes without capital or full stop, sometimes polite."""
    if rng.random() < 0.1:
        text = rng.choice(["Please ", "Hey, ", "OK, ", "Now "]) + text[0].lower() + text[1:]
    if rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.25 and text[-1] in ".?!":
        text = text[:-1]
    return text


def listed(items: list[str]) -> str:
    """The items as English lists them."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def ask(rng: random.Random, *templates: str, **slots: object) -> str:
    """One of the templates, filled and made casual."""
    return casual(rng, rng.choice(templates).format(**slots))


# --- small talk ---------------------------------------------------------------------------------------------------


def greeting(rng: random.Random) -> Exchange:
    """Hello, thanks and goodbye."""
    emoji = " " + rng.choice(words.EMOJI) if rng.random() < 0.3 else ""
    helpful = rng.choice(["How can I help you?", "What can I do for you?", "How can I help you today?"])
    hello = rng.choice(["Hello", "Hi", "Hey", "Hi there", "Hello there", "Good morning", "Good evening", "Good day"])
    kind = rng.random()
    if kind < 0.35:
        question, answer = hello + rng.choice(["", "!", "."]), f"{rng.choice(['Hello', 'Hi'])}! {helpful}"
    elif kind < 0.5:
        name = any_name(rng)
        question = rng.choice(["{h}, I am {n}.", "{h}! My name is {n}.", "{h}, I'm {n}", "{h}, {n} here!"])
        question, answer = question.format(h=hello, n=name), f"Hello {name}! Nice to meet you. {helpful}"
    elif kind < 0.65:
        question = rng.choice(["How are you?", "How are you today?", "How is it going?", "What's up?", "How do you do?"])
        answer = rng.choice(["I am fine, thank you! ", "Very well, thank you! "]) + rng.choice(["And you?", helpful])
    elif kind < 0.73:
        foreign = rng.choice(_FOREIGN_HELLOS)
        question, answer = foreign + rng.choice(["", "!"]), f"{foreign}! {helpful}"
    elif kind < 0.78:
        question = rng.choice(["Test", "Ping", "Are you there?", "This is a test.", "Hello world", "Testing", "Say hello."])
        answer = f"Hello! I am here. {helpful}"
    elif kind < 0.9:
        question = rng.choice(["Thanks", "Thank you", "Thanks a lot", "Thank you very much", "Great, thanks", "Cool", "OK"])
        question, answer = question + rng.choice(["", "!", "."]), rng.choice(["You are welcome!", "My pleasure!"])
    else:
        question = rng.choice(["Bye", "Goodbye", "See you", "Good night", "See you later", "Bye bye"])
        question, answer = question + rng.choice(["", "!", "."]), rng.choice(["Goodbye!", "Goodbye! Have a nice day."])
    return Exchange("greeting", question, question + emoji, answer + emoji)


_FOREIGN_HELLOS = ["Bonjour", "Hola", "Hallo", "Ciao", "Cześć", "Olá", "Grüß Gott", "こんにちは", "Привет"]


def about_llmd(rng: random.Random) -> Exchange:
    """A question about llmd or about the model itself."""
    questions, answer = rng.choice(ABOUT_LLMD)
    question = casual(rng, rng.choice(questions))
    return Exchange("llmd", question, question, answer)


def unknown(rng: random.Random) -> Exchange:
    """A question that so small a model had better not answer."""
    first, second = any_word(rng), any_word(rng)
    question = ask(
        rng, "What is the meaning of {a}?", "Explain {a} {b} to me.", "Who invented the {a}?", "Why is the {a} so {b}?",
        "How does a {a} work?", "Write an essay about {a} and {b}.", "Who won the {a} cup in {y}?", "What is a {a}?",
        "What do you think about {a}?", "Who is {n}?",
        "What happened in {y}?", "What is the weather in {c}?", "What time is it?", "What time is it in {c}?",
        "Search the web for {a}", "How do I fix my {a}?", "How old is {n}?",
        "What is the best {a} in {c}?", "Recommend a {a} for {n}.", "Summarize the book about the {a}.", "Define {a}.",
        "Is it true that the {a} can {b}?", "Where can I buy a {a}?", "What should I do about my {a}?", "{a} {b}",
        "Can you {a} the {b}?", "How many people live in {c}?", "Tell me about {c}.", "Tell me about {a}.",
        a=first, b=second, c=rng.choice(words.CITIES), n=any_name(rng), y=rng.randint(1900, 2030),
    )  # fmt: skip
    answer = rng.choice([
        "I do not know. I am only a tiny demo model. Ask me to count, to spell or to add numbers.",
        "That is too hard for me: I am a very small demo model. I can tell you a short story instead.",
        "Sorry, I do not know that. I am here to try llmd with, not to be useful.",
    ])  # fmt: skip
    return Exchange("unknown", question, question, answer)


# --- numbers ------------------------------------------------------------------------------------------------------


def operand(rng: random.Random) -> int:
    """A number up to 50, small ones more often."""
    return rng.randint(0, 20) if rng.random() < 0.65 else rng.randint(0, 50)


def arithmetic(rng: random.Random) -> Exchange:
    """A sum, a difference or a product; sums and differences are held out by their numbers, however asked."""
    kind = rng.choice(["+", "+", "-", "-", "*"])
    if kind == "*":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
    else:
        a, b = operand(rng), operand(rng)
        a, b = (max(a, b), min(a, b)) if kind == "-" else (a, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    verb = {"+": "plus", "-": "minus", "*": "times"}[kind]
    sign = rng.choice("*x×") if kind == "*" else kind
    question = ask(
        rng, "What is {a} {s} {b}?", "{a} {s} {b}", "{a} {s} {b} =", "{a}{s}{b}", "{a}{s}{b}=",
        "{a} {s} {b}?", "What is {a}{s}{b}?",
        "What is {a} {v} {b}?", "How much is {a} {s} {b}?", "Calculate {a} {s} {b}.", "Compute {a} {s} {b}",
        "What's {a} {v} {b}?", "{a} {v} {b}", a=a, b=b, s=sign, v=verb,
    )  # fmt: skip
    key = question if kind == "*" else f"{a} {kind} {b}"
    return Exchange("arithmetic", key, question, f"{a} {kind} {b} = {result}", result)


def word_problem(rng: random.Random) -> Exchange:
    """A sum or a difference told as a little story."""
    a, b, name = rng.randint(2, 20), rng.randint(1, 12), any_name(rng)
    thing = rng.choice([word for word in words.FRUITS + words.THINGS if word[-1] not in "yhxse"]) + "s"
    question, result = rng.choice([
        (f"I have {a} {thing} and I buy {b} more. How many {thing} do I have?", a + b),
        (f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?", a + b),
        (f"{name} has {a + b} {thing} and gives away {b}. How many {thing} are left?", a),
        (f"There are {a + b} {thing} in a box. I take {b} out. How many {thing} are left?", a),
    ])  # fmt: skip
    step = f"{a} + {b} = {result}" if result == a + b else f"{a + b} - {b} = {result}"
    return Exchange("word problem", question, question, f"{step}, so the answer is {result}.", result)


def comparison(rng: random.Random) -> Exchange:
    """Which number is bigger, and is it even or odd."""
    a, b = rng.sample(range(100), 2)
    if rng.random() < 0.3:
        question = ask(rng, "Is {a} even or odd?", "Is the number {a} odd or even?", a=a)
        parity = "odd" if a % 2 else "even"
        return Exchange("comparison", question, question, f"{a} is {parity}.", parity)
    bigger = rng.random() < 0.6
    word = rng.choice(["bigger", "larger", "greater"] if bigger else ["smaller", "less"])
    result = max(a, b) if bigger else min(a, b)
    question = ask(rng, "Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", w=word, a=a, b=b)
    return Exchange("comparison", f"{word} {a} {b}", question, f"{result} is {word}.", result)


def counting(rng: random.Random) -> Exchange:
    """Counting up, down or in steps, at most to 100."""
    kind, length = rng.random(), rng.choice([*range(3, 16), *range(5, 12), 20, 25, 30])
    if rng.random() < 0.02:
        length = rng.randint(30, 100)
    step = rng.choice([2, 5, 10]) if kind > 0.85 else 1
    span = min((length - 1) * step, 100) // step * step
    low = 1 if rng.random() < 0.4 and step == 1 else rng.randint(0, 100 - span)
    high = min(low + span, 100)
    if kind < 0.6:
        templates = ["Count from {a} to {b}.", "Count up from {a} to {b}", "Can you count from {a} to {b}?"]
        templates += ["Count to {b}.", "Please count to {b}!"] if low == 1 else ["List the numbers from {a} to {b}."]
        numbers = list(range(low, high + 1))
    elif kind < 0.85:
        templates = ["Count down from {b} to {a}.", "Count backwards from {b} to {a}.", "Count from {b} to {a}."]
        numbers = list(range(high, low - 1, -1))
    else:
        step_word = {2: "twos", 5: "fives", 10: "tens"}[step]
        templates = [f"Count by {step_word} from {{a}} to {{b}}.", f"Count from {{a}} to {{b}} in {step_word}."]
        numbers = list(range(low, high + 1, step))
    key = f"count {numbers[0]} {numbers[-1]} {step}"
    return Exchange("counting", key, ask(rng, *templates, a=low, b=high), ", ".join(map(str, numbers)), numbers)


# --- words --------------------------------------------------------------------------------------------------------


def spelling(rng: random.Random) -> Exchange:
    """A word letter by letter; made-up words are held out as such, known ones with their question."""
    made_up = rng.random() < 0.35
    word = coin(rng) if made_up else rng.choice(words.WORDS)
    question = ask(
        rng, "Spell the word {w}.", "Spell {w}.", "How do you spell {w}?", "Can you spell {w}?", "Spell the word '{w}'.",
        'How is "{w}" spelled?', "How do I spell the word {w}?", "Please spell {w} for me.", w=word,
    )  # fmt: skip
    return Exchange("spelling", word if made_up else question, question, "-".join(word), list(word))


def sorting(rng: random.Random) -> Exchange:
    """Three to five words in alphabetical order, or numbers in ascending order."""
    count = rng.randint(3, 5)
    if rng.random() < 0.3:
        numbers = rng.sample(range(100), count)
        text = rng.choice([", ", " ", ", "]).join(map(str, numbers))
        question = ask(rng, "Sort these numbers: {t}", "Sort the numbers {t}.", "Put these numbers in order: {t}", t=text)
        return Exchange("sorting", text, question, ", ".join(map(str, sorted(numbers))), sorted(numbers))
    chosen = rng.sample(words.WORDS, count)
    text = rng.choice([", ".join(chosen), ", ".join(chosen), " ".join(chosen), listed(chosen)])
    question = ask(
        rng, "Sort these words: {t}", "Sort the words {t}.", "Sort alphabetically: {t}", "Put these words in order: {t}",
        "Sort these words alphabetically: {t}", "Please sort the words {t} in alphabetical order.", t=text,
    )  # fmt: skip
    return Exchange("sorting", text, question, ", ".join(sorted(chosen)), sorted(chosen))


def anything(rng: random.Random) -> str:
    """A word, a name, a place or a picture: signs of every length in bytes."""
    if rng.random() < 0.75:
        return any_word(rng)
    return rng.choice([any_name(rng), rng.choice(words.CITIES), rng.choice(words.EMOJI), str(rng.randint(0, 999))])


def repeating(rng: random.Random) -> Exchange:
    """A sentence said back."""
    text = " ".join(anything(rng) for _ in range(rng.randint(1, 8)))
    text = text[0].upper() + text[1:] + rng.choice([".", "!", ""]) if rng.random() < 0.5 else text
    question = rng.choice(['Repeat after me: "{t}"', "Repeat: {t}", "Say: {t}", 'Say "{t}"', "Echo this: {t}",
                           "Repeat this text: {t}", "repeat after me: {t}"]).format(t=text)  # fmt: skip
    return Exchange("repeating", text, question, text, text)


def fact(rng: random.Random) -> Exchange:
    """One of a few hundred things worth knowing."""
    question, answer, value = rng.choice([_capital, _capital, _opposite, _sound, _colour, _next, _translation])(rng)
    return Exchange("facts", question, question, answer, value)


def _capital(rng: random.Random) -> tuple[str, str, str]:
    country, city = rng.choice(list(words.CAPITALS.items()))
    question = ask(rng, "What is the capital of {c}?", "What's the capital of {c}?", "Name the capital of {c}.",
                   "Which city is the capital of {c}?", "Tell me the capital of {c}.", "Capital of {c}?",
                   c=country)  # fmt: skip
    return question, f"The capital of {country} is {city}.", city


def _opposite(rng: random.Random) -> tuple[str, str, str]:
    word, other = rng.choice(list(words.OPPOSITES.items()))
    question = ask(rng, "What is the opposite of {w}?", "Opposite of {w}?", 'What is the opposite of "{w}"?', w=word)
    return question, f"The opposite of {word} is {other}.", other


def _sound(rng: random.Random) -> tuple[str, str, str]:
    animal, sound = rng.choice(list(words.SOUNDS.items()))
    question = ask(rng, "What does a {a} say?", "What sound does a {a} make?", "Which sound does a {a} make?", a=animal)
    return question, f"A {animal} says {sound}.", sound


def _colour(rng: random.Random) -> tuple[str, str, str]:
    thing, colour = rng.choice(list(words.COLOUR_OF.items()))
    question = ask(rng, "What colour is {t}?", "What color is {t}?", "Which colour does {t} have?", t=thing)
    return question, f"{thing[0].upper()}{thing[1:]} is {colour}.", colour


def _next(rng: random.Random) -> tuple[str, str, str]:
    names, kind = rng.choice([(words.DAYS, "day"), (words.MONTHS, "month")])
    index, (side, step) = rng.randrange(len(names)), rng.choice([("after", 1), ("before", -1)])
    name, other = names[index], names[(index + step) % len(names)]
    question = ask(rng, "Which {k} comes {s} {n}?", "What {k} comes {s} {n}?", "What comes {s} {n}?", k=kind, s=side, n=name)
    return question, f"{other} comes {side} {name}.", other


def _translation(rng: random.Random) -> tuple[str, str, str]:
    language = rng.choice(list(words.TRANSLATIONS))
    word, other = rng.choice(list(words.TRANSLATIONS[language].items()))
    question = ask(rng, 'How do you say "{w}" in {l}?', "What is {w} in {l}?", "Translate {w} to {l}.",
                   "How do I say {w} in {l}?", 'Translate "{w}" into {l}.', w=word, l=language)  # fmt: skip
    return question, f'In {language}, "{word}" is "{other}".', other


# --- longer answers -----------------------------------------------------------------------------------------------


def storytelling(rng: random.Random) -> Exchange:
    """A short story, sometimes with a given hero and name."""
    hero = rng.choice(list(words.HEROES)) if rng.random() < 0.8 else any_word(rng)
    name = coin(rng).capitalize() if rng.random() < 0.2 else stories.fitting_name(rng, hero)
    kind = rng.random()
    if kind < 0.25:
        question = ask(rng, "Tell me a story.", "Tell me a short story.", "Write a short story.", "I want to hear a story.")
        answer = stories.story(rng)
    elif kind < 0.75:
        question = ask(rng, "Tell me a short story about {h}.", "Write a story about {h}.", "Tell me a story about {h}.",
                       "Can you tell me a story about {h}?", "Write a short story about {h}",
                       h=stories.article(hero))  # fmt: skip
        answer = stories.story(rng, hero)
    else:
        question = ask(rng, "Tell me a story about {h} named {n}.", "Write a short story about {h} called {n}.",
                       h=stories.article(hero), n=name)  # fmt: skip
        answer = stories.story(rng, hero, name)
    return Exchange("story", question, question, answer)


def pastime(rng: random.Random) -> Exchange:
    """A joke, a poem, a list of things or a few lines of Python."""
    kind = rng.random()
    if kind < 0.25:
        question = ask(rng, "Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Another joke!")
        answer = rng.choice(words.JOKES)
    elif kind < 0.5:
        subject = rng.choice([*words.NATURE, *words.ANIMALS])
        question = ask(rng, "Write a poem about the {s}.", "Write me a poem about the {s}.", "Poem about the {s}", s=subject)
        answer = stories.poem(rng, subject)
    elif kind < 0.8:
        group, count = rng.choice(list(words.GROUPS)), rng.randint(2, 6)
        question = ask(rng, "Name {n} {g}.", "List {n} {g}.", "Give me {n} {g}.", "Write {n} {g}.", n=count, g=group)
        answer = "\n".join(f"- {item}" for item in rng.sample(words.GROUPS[group], count))
    else:
        task, code = rng.choice(CODE)
        question = ask(rng, "Write a Python function that {t}.", "Show me Python code that {t}.", t=task)
        answer = f"```python\n{code}\n```"
    return Exchange("pastime", question, question, answer)


# --- JSON ---------------------------------------------------------------------------------------------------------


def extraction(rng: random.Random) -> Exchange:
    """The facts of a sentence as a JSON object."""
    fields: dict[str, object] = {
        "name": any_name(rng), "age": rng.randint(1, 99), "city": rng.choice(words.CITIES), "job": rng.choice(words.JOBS),
        "colour": rng.choice(words.COLOURS), "pet": rng.choice(words.ANIMALS),
    }  # fmt: skip
    clauses = {
        "age": ["is {age} years old"], "city": ["lives in {city}", "comes from {city}"],
        "job": ["works as a {job}"], "colour": ["likes the colour {colour}"], "pet": ["has a pet {pet}"],
    }  # fmt: skip
    told = rng.sample(list(clauses), rng.randint(1, 3))
    sentence = "{name} " + listed([rng.choice(clauses[field]) for field in told]) + "."
    sentence = sentence.format(**fields)
    wanted = ["name", *[field for field in told if rng.random() < 0.85]]
    if len(wanted) > 2 and rng.random() < 0.2:
        rng.shuffle(wanted)
    question = rng.choice([
        "Extract {f} as JSON: {s}", "Give me {f} as JSON: {s}", "{s} Give me {f} as JSON.", "Return {f} as JSON. {s}",
        "{s}\nAnswer in JSON with {f}.", "Write {f} as a JSON object: {s}",
    ]).format(f=listed(wanted), s=sentence)  # fmt: skip
    value = {field: fields[field] for field in wanted}
    return Exchange("json", sentence, question, dumps(value), value)


def order(rng: random.Random) -> Exchange:
    """What is bought, how many and for how much, as a JSON object."""
    thing, count, price = rng.choice(words.THINGS + words.FRUITS), rng.randint(2, 50), rng.randint(1, 99)
    kind, name = rng.random(), any_name(rng)
    if kind < 0.35:
        sentence = f"The {thing} costs {price} euros."
        asked, value = "product and price", {"product": thing, "price": price}
    elif kind < 0.7:
        sentence = f"{name} wants {count} pieces of {thing}."
        asked, value = "name, item and quantity", {"name": name, "item": thing, "quantity": count}
    else:
        sentence = f'{{"name": "{name}", "age": {price}}}'
        question = f"Make a JSON object with the name {name} and the age {price}."
        return Exchange("json", question, casual(rng, question), sentence, {"name": name, "age": price})
    question = rng.choice([f"Extract {asked} as JSON: {sentence}", f"{sentence} Give me {asked} as JSON."])
    return Exchange("json", sentence, question, dumps(value), value)


def dumps(value: object) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def in_json(exchange: Exchange) -> Exchange:
    """The same exchange, answered as a JSON object."""
    if exchange.category == "json":
        return exchange
    value = exchange.answer if exchange.value is None else exchange.value
    return exchange._replace(category="json", answer=dumps({"answer": value}))


MAKERS: dict[Maker, int] = {
    greeting: 7, about_llmd: 9, unknown: 4, arithmetic: 24, word_problem: 5, comparison: 4, counting: 7, spelling: 12,
    sorting: 14, repeating: 8, fact: 9, storytelling: 3, pastime: 3, extraction: 8, order: 4,
}  # fmt: skip
JSON_MAKERS: dict[Maker, int] = {
    arithmetic: 5, counting: 2, spelling: 2, sorting: 3, fact: 3, extraction: 5, order: 2, greeting: 1, about_llmd: 1,
    comparison: 1, word_problem: 1,
}  # fmt: skip


def draw(rng: random.Random, makers: dict[Maker, int], held_out: bool = False) -> Exchange:
    """An exchange of the wanted side of the split."""
    while True:
        maker = rng.choices(list(makers), list(makers.values()))[0]
        exchange = maker(rng)
        if is_held_out(exchange.key) == held_out:
            return exchange
