"""The text that the builtin model is trained and tested on: four tasks whose circuits can be known.

A small model is only useful for checking attribution if one knows beforehand what it must
compute. This module therefore writes sentences whose next token follows from a rule (a later
year, a fact reached through another fact, the number of a subject, a repetition) and keeps, for
each rule, a part that never occurs in the training text. It is pure Python: no torch, no files,
and the same seed always gives the same text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nnsight_transcoders.errors import InputError

PIECE = r" ?[A-Za-z]+| ?\d\d|\d|[^\sA-Za-z\d]|\s"
"""One token: a word or a pair of digits, each with the space before it, or a punctuation mark."""

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)


def _words(line: str) -> tuple[str, ...]:
    """The words of a line: shorter to read than a list of quoted ones."""
    return tuple(line.split())


# --- Year spans -----------------------------------------------------------------------------

EVENTS = _words(
    "war trial siege strike voyage truce reign plague drought famine revolt exile dispute march "
    "project occupation expedition campaign rebellion blockade"
)
CENTURIES = range(11, 20)
FIRST_START, LAST_START = 2, 98
SPANS = (
    "The {event} lasted from {century}{start:02d} to {century}",
    "The {event} lasted from the year {century}{start:02d} to the year {century}",
    "The {event} began in {century}{start:02d} and ended in {century}",
)

# --- Facts ----------------------------------------------------------------------------------

STATES: dict[str, tuple[str, str]] = {
    # state: (capital, cities). The first city of every state, and the second of every other
    # state, are the held-out cities.
    "Alabama": ("Montgomery", "Birmingham Mobile Huntsville Tuscaloosa Dothan Selma"),
    "Alaska": ("Juneau", "Anchorage Fairbanks Sitka Ketchikan Kodiak Nome"),
    "Arizona": ("Phoenix", "Tucson Mesa Chandler Scottsdale Tempe Flagstaff"),
    "California": ("Sacramento", "Oakland Fresno Bakersfield Anaheim Stockton Berkeley"),
    "Colorado": ("Denver", "Boulder Pueblo Aspen Greeley Durango Loveland"),
    "Connecticut": ("Hartford", "Bridgeport Stamford Waterbury Norwalk Danbury Meriden"),
    "Florida": ("Tallahassee", "Miami Tampa Orlando Gainesville Sarasota Pensacola"),
    "Georgia": ("Atlanta", "Savannah Macon Athens Valdosta Marietta Dalton"),
    "Idaho": ("Boise", "Pocatello Nampa Caldwell Moscow Rexburg Sandpoint"),
    "Illinois": ("Springfield", "Chicago Peoria Rockford Joliet Naperville Evanston"),
    "Indiana": ("Indianapolis", "Evansville Gary Muncie Kokomo Carmel Elkhart"),
    "Kansas": ("Topeka", "Wichita Olathe Salina Lenexa Hutchinson Emporia"),
    "Kentucky": ("Frankfort", "Louisville Lexington Owensboro Paducah Covington Hopkinsville"),
    "Maine": ("Augusta", "Bangor Lewiston Biddeford Saco Bath Belfast"),
    "Maryland": ("Annapolis", "Baltimore Rockville Frederick Hagerstown Salisbury Gaithersburg"),
    "Massachusetts": ("Boston", "Worcester Cambridge Lowell Quincy Brockton Somerville"),
    "Michigan": ("Lansing", "Detroit Flint Kalamazoo Saginaw Muskegon Dearborn"),
    "Mississippi": ("Jackson", "Biloxi Gulfport Tupelo Hattiesburg Natchez Vicksburg"),
    "Montana": ("Helena", "Billings Missoula Bozeman Butte Kalispell Havre"),
    "Nebraska": ("Lincoln", "Omaha Kearney Hastings Ogallala Scottsbluff Papillion"),
    "Ohio": ("Columbus", "Cleveland Cincinnati Toledo Akron Dayton Canton"),
    "Oregon": ("Salem", "Portland Eugene Bend Medford Corvallis Gresham"),
    "Pennsylvania": ("Harrisburg", "Philadelphia Pittsburgh Allentown Erie Scranton Bethlehem"),
    "Tennessee": ("Nashville", "Memphis Knoxville Chattanooga Clarksville Murfreesboro Kingsport"),
    "Texas": ("Austin", "Dallas Houston Lubbock Amarillo Laredo Waco"),
    "Vermont": ("Montpelier", "Burlington Rutland Barre Winooski Vergennes Newport"),
    "Virginia": ("Richmond", "Norfolk Roanoke Alexandria Chesapeake Lynchburg Charlottesville"),
    "Washington": ("Olympia", "Seattle Spokane Tacoma Yakima Bellingham Everett"),
    "Wisconsin": ("Madison", "Milwaukee Kenosha Racine Oshkosh Appleton Janesville"),
    "Wyoming": ("Cheyenne", "Casper Laramie Gillette Sheridan Cody Riverton"),
}
CAPITALS: dict[str, str] = {state: capital for state, (capital, _) in STATES.items()}
CITIES: dict[str, str] = {
    city: state for state, (_, cities) in STATES.items() for city in cities.split()
}
HELD_OUT_CITIES: frozenset[str] = frozenset(
    city
    for index, (_, cities) in enumerate(STATES.values())
    for city in cities.split()[: 1 + index % 2]
)
"""Cities whose two-hop sentences are never in the training text (their one-hop facts are)."""

LEADS = ("The", "The", "the", "Fact: the")
CITY_TO_STATE = (
    "{lead} state that has {city} is",
    "{lead} state that has {city} is",
    "{lead} state containing {city} is",
    "{city} is a city in the state of",
    "{city} is in the state of",
    "She lives in {city},",
)
STATE_TO_CAPITAL = (
    "{lead} capital of {state} is",
    "{lead} capital of the state of {state} is",
)
TWO_HOP = (
    "{lead} capital of the state that has {city} is",
    "{lead} capital of the state that has {city} is",
    "{lead} capital of the state containing {city} is",
)

# --- Agreement ------------------------------------------------------------------------------

THINGS = _words(
    "key cabinet table window door lamp letter picture chair bottle basket garden bridge tower "
    "wagon boat river mountain road house shop barn clock mirror drawer curtain candle hammer "
    "ladder bucket"
)
PEOPLE = _words(
    "boy girl teacher doctor farmer sailor painter singer lawyer baker pilot nurse soldier king "
    "queen guard driver writer student poet"
)
PLACES = _words("to near behind beside under by from above")
PEOPLE_PLACES = _words("near behind beside by")
ACTIONS = _words("like see know help follow admire trust call")
THING_WORDS = _words("old new red green heavy small large broken clean dark tall cheap")
PEOPLE_WORDS = _words("happy tired young brave kind quiet angry proud rich clever famous hungry")
SINGULAR_VERBS = (" is", " was", " has")
PLURAL_VERBS = (" are", " were", " have")

# --- Induction ------------------------------------------------------------------------------

RARE_WORDS = _words(
    "acorn agate alloy almond amber anchor anvil apricot arrow aspen badger balsam bamboo barley "
    "basalt beacon beetle birch bison bobbin bonnet brass bronze bugle cactus camel canyon carbon "
    "cedar chalk cherry cinder citrus clover cobalt comet copper coral cotton crane crater "
    "crystal cypress dagger daisy dolphin dragon ebony ember emerald falcon feather fennel fern "
    "fiddle flax flint fossil fox garnet ginger glacier goblet granite gravel hazel heron hickory "
    "honey indigo ivory jade jasper jungle juniper kettle kite lagoon lantern laurel lava lemon "
    "lichen lilac linen lotus magnet mango maple marble marsh meadow mint moss mustard nectar "
    "nettle nickel nutmeg oak oasis olive onyx opal orchid otter oyster paddle palm panther parrot "
    "pearl pebble pepper pewter pigeon pine plum poppy prism quartz quill raven reef ribbon robin "
    "ruby saddle saffron salmon sapphire scarlet sequoia shell silver slate spruce squid stork "
    "sulphur sumac swan tangerine thimble thistle tiger timber topaz trout tulip tundra turnip "
    "turquoise umber velvet violet walnut walrus willow wolf zinc"
)
MIN_WORDS, MAX_WORDS = 4, 8


@dataclass(frozen=True)
class Example:
    """One prompt with a known continuation.

    Attributes:
        prompt: Text without the leading `<bos>`; the tokenizer adds it.
        answers: Next tokens that are right, as token text (with the leading space, if any).
        wrong: Next tokens that are of the right kind but not right.
        task: One of `TASKS`.
        held_out: Whether this combination is kept out of the training text.
    """

    prompt: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    task: str
    held_out: bool


def held_out_span(century: int, start: int) -> bool:
    """Whether spans that begin in this year are kept out of the training text (one in five)."""
    return (century + 2 * start) % 5 == 0


def held_out_nouns(subject: str, distractor: str) -> bool:
    """Whether this pair of nouns (in the singular) is kept out of the training text."""
    nouns = THINGS if subject in THINGS else PEOPLE
    return (2 * nouns.index(subject) + 3 * nouns.index(distractor)) % 5 == 2


def held_out_words(first: str, second: str) -> bool:
    """Whether lists that begin with these two words are kept out of the training text."""
    return (RARE_WORDS.index(first) + RARE_WORDS.index(second)) % 5 == 0


def _year_span(rng: random.Random, held_out: bool) -> Example:
    while True:
        century, start = rng.choice(CENTURIES), rng.randint(FIRST_START, LAST_START)
        if held_out_span(century, start) == held_out:
            break
    prompt = rng.choice(SPANS).format(event=rng.choice(EVENTS), century=century, start=start)
    years = [f"{year:02d}" for year in range(100)]
    return Example(
        prompt, tuple(years[start + 1 :]), tuple(years[: start + 1]), "year-span", held_out
    )


def _fact(task: str, prompt: str, answer: str, others: list[str], held_out: bool) -> Example:
    wrong = tuple(f" {other}" for other in others if other != answer)
    return Example(prompt, (f" {answer}",), wrong, task, held_out)


def _two_hop(rng: random.Random, held_out: bool) -> Example:
    city = rng.choice([city for city in CITIES if (city in HELD_OUT_CITIES) == held_out])
    return two_hop(city, rng.choice(TWO_HOP), rng.choice(LEADS))


def two_hop(city: str, template: str = TWO_HOP[0], lead: str = LEADS[0]) -> Example:
    """The question for the capital of the state that has `city`."""
    prompt = template.format(city=city, lead=lead)
    answer = CAPITALS[CITIES[city]]
    return _fact("two-hop", prompt, answer, list(CAPITALS.values()), city in HELD_OUT_CITIES)


def _one_hop(rng: random.Random, held_out: bool) -> Example:
    if held_out:
        raise InputError("the task 'one-hop' has no held-out split: its facts must be learned")
    if rng.random() < 0.75:
        city = rng.choice(list(CITIES))
        prompt = rng.choice(CITY_TO_STATE).format(city=city, lead=rng.choice(LEADS))
        return _fact("one-hop", prompt, CITIES[city], list(STATES), False)
    state = rng.choice(list(STATES))
    prompt = rng.choice(STATE_TO_CAPITAL).format(state=state, lead=rng.choice(LEADS))
    return _fact("one-hop", prompt, CAPITALS[state], list(CAPITALS.values()), False)


def _agreement(rng: random.Random, held_out: bool) -> Example:
    nouns = THINGS if rng.random() < 0.5 else PEOPLE
    while True:
        subject, other = rng.sample(nouns, 2)
        if held_out_nouns(subject, other) == held_out:
            break
    plural, other_plural = rng.random() < 0.5, rng.random() < 0.5
    subject_form = subject + "s" * plural
    other_form = other + "s" * other_plural
    action = rng.choice(ACTIONS)
    if nouns is THINGS or rng.random() < 0.3:
        places = PLACES if nouns is THINGS else PEOPLE_PLACES
        middle = f"{rng.choice(places)} the {other_form}"
    elif rng.random() < 0.5:
        middle = f"that the {other_form} {action}{'' if other_plural else 's'}"
    else:
        middle = f"who {action}{'' if plural else 's'} the {other_form}"
    answers, wrong = SINGULAR_VERBS, PLURAL_VERBS
    if plural:
        answers, wrong = wrong, answers
    return Example(f"The {subject_form} {middle}", answers, wrong, "agreement", held_out)


def _word_list(rng: random.Random, held_out: bool) -> list[str]:
    while True:
        words = rng.sample(RARE_WORDS, rng.randint(MIN_WORDS, MAX_WORDS))
        if held_out_words(words[0], words[1]) == held_out:
            return words


def _induction(rng: random.Random, held_out: bool) -> Example:
    words = _word_list(rng, held_out)
    known = rng.randint(1, len(words) - 1)
    prompt = "Words: " + " ".join(words + words[:known])
    return _fact("induction", prompt, words[known], words, held_out)


_TASKS: dict[str, Callable[[random.Random, bool], Example]] = {
    "year-span": _year_span,
    "two-hop": _two_hop,
    "one-hop": _one_hop,
    "agreement": _agreement,
    "induction": _induction,
}
TASKS = tuple(_TASKS)
SPLITS = ("train", "held_out")
SHARES = {"year-span": 0.2, "two-hop": 0.2, "one-hop": 0.3, "agreement": 0.15, "induction": 0.15}
"""How often each task occurs in the training text."""


def examples(task: str, split: str = "held_out", n: int = 100, seed: int = 0) -> list[Example]:
    """Draws examples of one task.

    Args:
        task: One of `TASKS`.
        split: `"train"` or `"held_out"`; the task `one-hop` has no held-out split.
        n: How many; prompts can occur more than once.
        seed: The same seed gives the same examples.

    Returns:
        A list of `n` examples.
    """
    if task not in _TASKS:
        raise InputError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
    rng = random.Random(f"{task}/{split}/{seed}")
    return [_TASKS[task](rng, split == "held_out") for _ in range(n)]


def _complete(example: Example, rng: random.Random) -> str:
    """The whole sentence of an example, with one of its answers."""
    answer = rng.choice(example.answers)
    if example.task == "agreement":
        words = THING_WORDS if example.prompt.split()[1].rstrip("s") in THINGS else PEOPLE_WORDS
        answer += " been" * (answer in (" has", " have")) + f" {rng.choice(words)}"
    elif example.task == "induction":
        words = example.prompt.split()[1:]
        length = next(i for i in range(1, len(words)) if words[i] == words[0])
        return "Words: " + " ".join(words[:length] * 2) + "."
    return example.prompt + answer + "."


def stream(seed: int = 0) -> Iterator[str]:
    """Endless training sentences; nothing that is held out occurs among them."""
    rng = random.Random(f"sentences/{seed}")
    names, weights = list(SHARES), list(SHARES.values())
    while True:
        task = rng.choices(names, weights)[0]
        yield _complete(_TASKS[task](rng, False), rng)


def sentences(n: int, seed: int = 0) -> list[str]:
    """The first `n` training sentences of `stream`."""
    source = stream(seed)
    return [next(source) for _ in range(n)]


def documents(n: int, seed: int = 0, length: int = 6) -> list[str]:
    """Training text as `n` strings of `length` sentences with `<bos>` between them.

    The tokenizer adds the first `<bos>` and reads the others from the text, so that a document
    looks to the model as a row of its training data. Six sentences never exceed its 128 tokens.
    """
    source = stream(seed)
    return [BOS.join(next(source) for _ in range(length)) for _ in range(n)]


def vocabulary() -> list[str]:
    """All tokens in the order of their ids: special tokens, two-digit numbers, then words."""
    text = [*sentences(30_000), *(two_hop(city).prompt for city in CITIES)]
    numbers = [f"{number:02d}" for number in range(100)]
    words = {piece for line in text for piece in re.findall(PIECE, line)}
    return [*SPECIAL_TOKENS, *numbers, *sorted(words - set(numbers))]
