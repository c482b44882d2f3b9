"""Conversations with Hermes-style tool calls, from schema to final answer."""

import random
from collections.abc import Callable
from typing import NamedTuple

from llmd_plugins.sources.demo import words
from llmd_plugins.sources.demo.exchanges import (
    Exchange,
    Maker,
    any_name,
    any_word,
    arithmetic,
    ask,
    coin,
    draw,
    dumps,
    fact,
    greeting,
    is_held_out,
    operand,
    spelling,
    storytelling,
)
from llmd_plugins.sources.demo.messages import Conversation, Message, assistant, system_prompt, turns, user


class Use(NamedTuple):
    """One use of a tool: the question, its calls' arguments, what each returns and the answer that follows."""

    question: str
    arguments: list[dict[str, object]]
    results: list[object]
    answer: str


class Tool(NamedTuple):
    """A tool as one conversation has it: the names that its schema uses vary."""

    schema: Message
    use: Callable[[random.Random], Use]

    @property
    def name(self) -> str:
        """What the model has to call it."""
        return str(self.schema["function"]["name"])


def schema(rng: random.Random, names: str, summaries: list[str], properties: dict[str, tuple[str, str]]) -> Message:
    """A function schema as clients of the OpenAI API send it; some describe their parameters, some do not."""
    described, strict = rng.random() < 0.5, rng.random() < 0.85
    fields = {
        key: {"type": kind, "description": text} if described else {"type": kind} for key, (kind, text) in properties.items()
    }
    parameters: Message = {"type": "object", "properties": fields}
    if strict:
        parameters["required"] = list(properties)
    function = {"name": rng.choice(names.split()), "description": rng.choice(summaries), "parameters": parameters}
    return {"type": "function", "function": function}


_SKIES = ["sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "clear"]


def weather(rng: random.Random) -> Tool:
    """The weather of one city or of two."""
    key = rng.choice(["city", "city", "location", "place"])
    temperature = rng.choice(["temperature", "temperature", "temp", "temperature_c", "degrees"])
    sky = rng.choice(["condition", "weather", "sky", "conditions"])

    def use(rng: random.Random) -> Use:
        cities = rng.sample(words.CITIES, 1 if rng.random() < 0.8 else 2)
        results: list[object] = []
        sentences = []
        for city in cities:
            degrees, kind = rng.randint(-15, 39), rng.choice(_SKIES)
            results.append({temperature: degrees, sky: kind} if rng.random() < 0.9 else f"{kind}, {degrees} degrees")
            sentences.append(f"It is {degrees} degrees and {kind} in {city}.")
        question = ask(
            rng, "What is the weather in {c}?", "How is the weather in {c}?", "What's the weather like in {c}?",
            "Weather in {c}?", "Is it raining in {c}?", "How warm is it in {c}?", "What is the temperature in {c}?",
            "What's the weather in {c} today?", "Tell me the weather in {c}.", c=" and ".join(cities),
        )  # fmt: skip
        return Use(question, [{key: city} for city in cities], results, " ".join(sentences))

    names = "get_weather get_weather get_current_weather weather fetch_weather weather_lookup"
    summaries = ["Get the weather of a city", "Get the current weather", "Current weather in a city", "Look up the weather"]
    made = schema(rng, names, summaries, {key: ("string", "The name of the city")})
    if rng.random() < 0.2:
        # Clients like to offer a unit; nobody here asks for one.
        made["function"]["parameters"]["properties"]["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        made["function"]["parameters"]["required"] = [key]
    return Tool(made, use)


def clock(rng: random.Random) -> Tool:
    """The time in a city."""
    key = rng.choice(["city", "city", "location", "place"])
    field = rng.choice(["time", "time", "local_time", "now"])

    def use(rng: random.Random) -> Use:
        city, time = rng.choice(words.CITIES), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        question = ask(rng, "What time is it in {c}?", "What is the time in {c}?", "Time in {c}?", "How late is it in {c}?",
                       "Tell me the time in {c}.", "What's the local time in {c}?", c=city)  # fmt: skip
        return Use(question, [{key: city}], [{field: time} if rng.random() < 0.85 else time], f"It is {time} in {city}.")

    summaries = ["Get the time in a city", "Get the current time", "Current local time of a city", "Look up the time"]
    names = "get_time get_time get_current_time time current_time get_local_time"
    return Tool(schema(rng, names, summaries, {key: ("string", "The name of the city")}), use)


def calculator(rng: random.Random) -> Tool:
    """An expression worked out; the numbers may be big, for the model only copies them."""
    key = rng.choice(["expression", "expression", "formula", "input"])
    field = rng.choice(["result", "result", "value", "answer"])

    def use(rng: random.Random) -> Use:
        big = rng.random() < 0.5
        a, b = (rng.randint(10, 9999), rng.randint(2, 999)) if big else (operand(rng), operand(rng))
        sign = rng.choice("+-*")
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        question = ask(rng, "What is {a} {s} {b}?", "Calculate {a} {s} {b}.", "{a} {s} {b}", "How much is {a} {s} {b}?",
                       "Use the calculator: {a} {s} {b}", a=a, b=b, s=sign)  # fmt: skip
        expression = f"{a} {sign} {b}"
        returned: object = {field: result} if rng.random() < 0.85 else str(result)
        return Use(question, [{key: expression}], [returned], f"{expression} = {result}")

    summaries = ["Evaluate an expression", "Calculate a mathematical expression", "A calculator", "Do arithmetic"]
    names = "calculator calculator calculate calc evaluate compute"
    return Tool(schema(rng, names, summaries, {key: ("string", "The expression to evaluate")}), use)


def messenger(rng: random.Random) -> Tool:
    """A message to somebody."""
    to, body = rng.choice([("to", "text"), ("recipient", "message"), ("name", "text"), ("to", "message")])

    def use(rng: random.Random) -> Use:
        name, text = any_name(rng), f"the {any_word(rng)} is {rng.choice(words.ADJECTIVES)}"
        question = ask(rng, "Tell {n} that {t}.", "Send a message to {n}: {t}", "Write to {n} that {t}.",
                       "Message {n}: {t}", n=name, t=text)  # fmt: skip
        returned = {"status": rng.choice(["sent", "ok", "done"])}
        return Use(question.removesuffix("."), [{to: name, body: text}], [returned], f"I sent your message to {name}.")

    names = "send_message send_message message send_text notify"
    fields = {to: ("string", "Who gets it"), body: ("string", "What it says")}
    return Tool(schema(rng, names, ["Send a message", "Send a text message to a person", "Write to somebody"], fields), use)


def timer(rng: random.Random) -> Tool:
    """A timer with a number of minutes."""
    key = rng.choice(["minutes", "minutes", "duration", "length_minutes"])

    def use(rng: random.Random) -> Use:
        minutes = rng.randint(2, 90)
        question = ask(rng, "Set a timer for {m} minutes.", "Wake me in {m} minutes.", "Start a timer of {m} minutes.",
                       "Timer for {m} minutes", "Remind me in {m} minutes.", m=minutes)  # fmt: skip
        returned = {"status": rng.choice(["ok", "started", "set"])}
        return Use(question, [{key: minutes}], [returned], f"The timer is set for {minutes} minutes.")

    names = "set_timer set_timer start_timer timer create_timer"
    summaries = ["Set a timer", "Start a timer", "Set a kitchen timer"]
    return Tool(schema(rng, names, summaries, {key: ("integer", "In minutes")}), use)


def search(rng: random.Random) -> Tool:
    """Something looked up."""
    key = rng.choice(["query", "query", "q", "text"])

    def use(rng: random.Random) -> Use:
        query = f"{rng.choice(words.ADJECTIVES)} {any_word(rng)}" if rng.random() < 0.5 else any_word(rng)
        found = f"The {any_word(rng)} is {rng.choice(words.ADJECTIVES)}."
        question = ask(rng, "Search for {q}", "Look up {q}", "Search the web for {q}", "Find {q} on the web", q=query)
        return Use(question, [{key: query}], [{rng.choice(["result", "text", "snippet"]): found}], f"I found this: {found}")

    names = "search search_web web_search google lookup"
    summaries = ["Search the web", "Look something up", "Web search"]
    return Tool(schema(rng, names, summaries, {key: ("string", "What to look for")}), use)


def gadget(rng: random.Random) -> Tool:
    """A function of any name, so that names are read from the schema and not remembered."""
    verb, noun = rng.choice(words.VERBS), rng.choice(words.THINGS + words.ANIMALS + words.PLACES)
    name, key = f"{verb}_{noun}", rng.choice(["name", "id", "value", "target", "item", "key", coin(rng)])
    kind = rng.choice(["string", "string", "integer"])

    def use(rng: random.Random) -> Use:
        value: object = rng.randint(1, 200) if kind == "integer" else any_word(rng)
        question = ask(rng, "Use {f} with {v}", "Call {f} for {v}", "Call {f} with {v}", "{V} the {o} {v}", "{V} {o} {v}",
                       f=name, v=value, V=verb.capitalize(), o=noun)  # fmt: skip
        return Use(question, [{key: value}], [{"status": "ok"}], "Done.")

    return Tool(schema(rng, name, [f"{verb.capitalize()} a {noun}"], {key: (kind, "What to use")}), use)


ToolMaker = Callable[[random.Random], Tool]
TOOLS: dict[ToolMaker, int] = {weather: 6, clock: 3, calculator: 3, messenger: 2, timer: 2, search: 2, gadget: 4}


def some_makers(rng: random.Random) -> list[ToolMaker]:
    """One to four different kinds of tools."""
    count = rng.choice([1, 1, 2, 2, 3, 3, 4])
    makers: list[ToolMaker] = []
    while len(makers) < count:
        maker = rng.choices(list(TOOLS), list(TOOLS.values()))[0]
        if maker not in makers:
            makers.append(maker)
    return makers


def missing(rng: random.Random, makers: list[ToolMaker]) -> Exchange:
    """A question for a tool that is not there."""
    absent = rng.choice([maker for maker in (weather, clock, messenger, timer, search) if maker not in makers])
    _, use = draw_use(rng, [absent(rng)], held_out=False)
    return Exchange("tool call", use.question, use.question, "I have no function for that.")


def toolless(rng: random.Random, makers: list[ToolMaker]) -> Exchange:
    """A question that is answered without a tool."""
    if rng.random() < 0.2:
        return missing(rng, makers)
    plain: dict[Maker, int] = {fact: 3, greeting: 2, spelling: 1, storytelling: 1}
    return draw(rng, plain if calculator in makers else plain | {arithmetic: 2})


def calling(tool: Tool, use: Use) -> Message:
    """The assistant's message that calls the tool."""
    calls = [{"type": "function", "function": {"name": tool.name, "arguments": each}} for each in use.arguments]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def draw_use(rng: random.Random, tools: list[Tool], held_out: bool) -> tuple[Tool, Use]:
    """A tool of the list and a use of it on the wanted side of the split."""
    while True:
        tool = rng.choice(tools)
        use = tool.use(rng)
        if is_held_out(use.question) == held_out:
            return tool, use


def tool_chat(rng: random.Random, num_turns: int, held_out: bool = False) -> Conversation:
    """A conversation with tools; some of its questions need none. The last turn is a call or the answer after one."""
    makers = some_makers(rng)
    tools = [maker(rng) for maker in makers]
    messages = system_prompt(rng)
    for _ in range(num_turns - 1):
        needless = rng.random() < 0.35
        messages += turns([toolless(rng, makers)]) if needless else finished(*draw_use(rng, tools, False))
    schemas = [each.schema for each in tools]
    if rng.random() < 0.12 and not held_out:
        return Conversation("tool answer", messages + turns([toolless(rng, makers)]), schemas)
    tool, use = draw_use(rng, tools, held_out)
    if rng.random() < 0.4:
        return Conversation("tool call", [*messages, user(use.question), calling(tool, use)], schemas)
    return Conversation("tool answer", messages + finished(tool, use), schemas)


def finished(tool: Tool, use: Use) -> list[Message]:
    """Question, call, what the tool returned, and the answer."""
    returned = [{"role": "tool", "name": tool.name, "content": _content(result)} for result in use.results]
    return [user(use.question), calling(tool, use), *returned, assistant(use.answer)]


def _content(result: object) -> str:
    return result if isinstance(result, str) else dumps(result)
