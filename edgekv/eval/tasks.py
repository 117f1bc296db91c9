"""Documents with needles in them, and the questions about them.

``needle_documents`` makes those of ``edgekv eval niah``: one document holds the needles of several tasks and is asked
for each. ``ruler_documents`` makes the synthetic tasks of RULER (arXiv 2404.06654, section 3) that need no download,
in wordings of our own; a document has one question.

The same seed, length, tasks, haystack and tokeniser make the same documents, everywhere.
"""

from __future__ import annotations

import itertools
import random
import re
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from edgekv.errors import EdgekvError
from edgekv.eval.haystack import Haystack, Tokenize

MANY = -1  # distractors: as many as fit, instead of prose


@dataclass(frozen=True)
class Template:
    """A task's wording. Slots are ``{kind}`` or ``{kind1}``, ``{kind2}``, ...; the kinds are those of :class:`_Draw`.

    ``needles`` stand in the document in this order. ``prefix`` is how the answer begins, for small models with the
    words of the needle; ``answers`` are looked for behind it, in at most ``n_predict`` tokens. ``distractors``: how
    many more times the needles are there, with other values. ``intro`` stands before the document.
    """

    about: str
    needles: tuple[str, ...]
    question: str
    prefix: str
    answers: tuple[str, ...]
    n_predict: int
    distractors: int = 0
    intro: str = ""


NEEDLES = {
    "words": Template(
        about="a fact in words",
        needles=("The favourite fruit of {name} is the {fruit}.",),
        question="What is the favourite fruit of {name}?",
        prefix="The favourite fruit of {name} is the",
        answers=("{fruit}",),
        n_predict=6,
    ),
    "key": Template(
        about="a random key of five digits",
        needles=("The pass key of {name} is {number}. Remember it. {number} is the pass key of {name}.",),
        question="What is the pass key of {name}?",
        prefix="The pass key of {name} is",
        answers=("{number}",),
        n_predict=8,
    ),
    "keys": Template(
        about="one of four random keys",
        needles=("The pass key of {name} is {number}. Remember it. {number} is the pass key of {name}.",),
        question="What is the pass key of {name}?",
        prefix="The pass key of {name} is",
        answers=("{number}",),
        n_predict=8,
        distractors=3,
    ),
    "values": Template(
        about="two values of one thing",
        needles=tuple(f"One of the cities that {{name}} visited is {{city{i}}}." for i in (1, 2)),
        question="Which are the two cities that {name} visited?",
        prefix="The two cities that {name} visited are",
        answers=("{city1}", "{city2}"),
        n_predict=16,
    ),
    "chain": Template(
        about="the value of a thing that is another thing's; the answer's beginning leads along the link",
        needles=("The number of {name1} is {number}.", "The number of {name2} is the number of {name1}."),
        question="What is the number of {name2}?",
        prefix="The number of {name2} is the number of {name1}, which is",
        answers=("{number}",),
        n_predict=8,
    ),
}

_INTRO = "Secret {kind} are hidden in the text below. Keep them in mind: a question about them comes at its end."


def _secret(about: str, thing: str, slot: str, n_predict: int, **more) -> Template:
    return Template(
        about=about,
        intro=_INTRO.format(kind=thing + "s"),
        needles=(f"The secret {thing} of {{key}} is {slot}.",),
        question=f"What is the secret {thing} of {{key}} in the text above?",
        prefix=f"The secret {thing} of {{key}} is",
        answers=(slot,),
        n_predict=n_predict,
        **more,
    )


RULER = {
    "niah_single_word": _secret("a needle in prose: a word", "word", "{word}", 12),
    "niah_single_number": _secret("a needle in prose: a number of seven digits", "number", "{long}", 16),
    "niah_single_uuid": _secret("a needle in prose: a UUID", "code", "{uuid}", 48),
    "niah_multikey_1": _secret("one of four needles in prose", "number", "{long}", 16, distractors=3),
    "niah_multikey_2": _secret("a needle among needles", "number", "{long}", 16, distractors=MANY),
    "niah_multivalue": Template(
        about="four numbers of one key",
        intro=_INTRO.format(kind="numbers"),
        needles=tuple(f"One of the secret numbers of {{key}} is {{long{i}}}." for i in (1, 2, 3, 4)),
        question="What are all the secret numbers of {key} in the text above?",
        prefix="The secret numbers of {key} are",
        answers=("{long1}", "{long2}", "{long3}", "{long4}"),
        n_predict=56,
    ),
    "niah_multiquery": Template(
        about="the numbers of four keys, asked for together",
        intro=_INTRO.format(kind="numbers"),
        needles=tuple(f"The secret number of {{key{i}}} is {{long{i}}}." for i in (1, 2, 3, 4)),
        question="What are the secret numbers of {key1}, {key2}, {key3} and {key4} in the text above?",
        prefix="The secret numbers of {key1}, {key2}, {key3} and {key4} are",
        answers=("{long1}", "{long2}", "{long3}", "{long4}"),
        n_predict=56,
    ),
    # its hops and chains are made by _tracking()
    "vt": Template(
        about="every variable that gets a value, along a chain of assignments",
        intro="Variables are assigned in the text below. Follow them: a question about them comes at its end.",
        needles=("VAR {var0} = {number}.", "VAR {var} = VAR {before}."),
        question="Which variables have the value {number} in the text above? Name all {n} of them.",
        prefix="The {n} variables that have the value {number} are: VAR",
        answers=("{var0}",),
        n_predict=12,  # per variable
    ),
    "cwe": Template(
        about="the ten most common words of a list",
        intro="Below is a numbered list of words. Some come far more often than the others: keep those in mind.",
        needles=("{i}. {word}",),
        question="Which are the {n} most common words of the list above?",
        prefix="The {n} most common words of the list are:",
        answers=(),
        n_predict=80,
    ),
    "fwe": Template(
        about="the three most frequent words of a made-up language",
        intro="Below is a text in a made-up language. Count its words, and pay no heed to the dots.",
        needles=("{word}",),
        question="Which {n} words come most often in the text above?",
        prefix="The {n} words that come most often are:",
        answers=(),
        n_predict=40,
    ),
}

#: every task, with a line about it
TASKS = {name: template.about for name, template in (NEEDLES | RULER).items()}

N_COMMON, COMMON_TIMES, UNCOMMON_TIMES = 10, 30, 3  # cwe; RULER's
N_FREQUENT = 3  # fwe
SLACK = 4  # tokens that a text may lack of its length before another is tried
TRIES = 8

_Hidden = tuple[float, float, int, str]  # a needle: its depth, its task's order at that depth, its own order, its text
_Words = tuple[list[str], tuple[str, ...]]  # the words of a list, and those that are asked for


@dataclass(frozen=True)
class Question:
    """``text`` is put behind the document, ``prefix`` is how the answer begins: the model goes on from there."""

    task: str
    text: str
    prefix: str
    answers: tuple[str, ...]
    n_predict: int

    @property
    def asked(self) -> str:
        """What stands behind the document."""
        return f"\n\nQuestion: {self.text}\nAnswer: {self.prefix}"

    def score(self, answer: str) -> float:
        """Share of ``answers`` that are in the model's continuation, as whole words, in upper or lower case."""
        found = [re.search(rf"(?<!\w){re.escape(a)}(?!\w)", answer, re.IGNORECASE) is not None for a in self.answers]
        return sum(found) / len(found)


@dataclass(frozen=True)
class Document:
    """A text and what is asked about it.

    ``length``: tokens that were asked for: the text, its longest question with the prefix, and what the caller reserved
    are together at most so many. ``depth``: share of the prose before the first needle of each task; None: anywhere.
    ``key`` names it among the documents of an evaluation.
    """

    key: str
    seed: int
    length: int
    depth: float | None
    text: str
    questions: tuple[Question, ...]


def needle_documents(
    haystack: Haystack,
    tokenize: Tokenize,
    *,
    lengths: Iterable[int],
    seeds: Iterable[int],
    tasks: Sequence[str] = ("words", "key", "values", "chain"),
    depths: Iterable[float | None] = (None,),
    separate: bool = False,
    question_first: bool = False,
    reserve: int = 0,
) -> Iterator[Document]:
    """A document for each length, seed and depth, made when it is asked for. Those that differ in depth only have the
    same needles in the same prose.

    Args:
        tasks: of ``NEEDLES``; a document holds the needles of all, in a random order.
        depths: where the first needle of a task lies, to the nearest gap between two paragraphs, the others behind it
            (distractors are anywhere); None: anywhere.
        separate: a document per task.
        question_first: all questions also stand before the document.
        reserve: tokens of ``length`` to leave free, for a chat template or the answer.

    Raises:
        EdgekvError: an unknown task, a depth that is none (at once), or a length too short for the needles (when it is
            the document's turn).
    """
    tasks, lengths, seeds, depths = (tuple(dict.fromkeys(x)) for x in (tasks, lengths, seeds, depths))
    _check(tasks, NEEDLES)
    for depth in depths:
        if depth is not None and not 0 <= depth <= 1:
            raise EdgekvError(f"--depths {depth}: must be between 0 (the start of the text) and 1 (its end)")
    templates = {task: NEEDLES[task] for task in tasks}
    groups = [{task: template} for task, template in templates.items()] if separate else [templates]
    make = _Maker(haystack, tokenize, question_first, reserve)
    return (make.needles(group, *case) for *case, group in itertools.product(lengths, seeds, depths, groups))


def ruler_documents(
    task: str,
    haystack: Haystack,
    tokenize: Tokenize,
    *,
    lengths: Iterable[int],
    seeds: Iterable[int],
    chains: int = 1,
    hops: int = 4,
    question_first: bool = False,
    reserve: int = 0,
) -> Iterator[Document]:
    """A document with one question for each length and seed, made when it is asked for.

    Args:
        task: one of ``RULER``.
        chains, hops: of ``vt``: so many variables get a value, and each hands it on so many times.
        question_first, reserve: as in :func:`needle_documents`.

    Raises:
        EdgekvError: an unknown task, or too few chains or hops (at once), or a length too short for the task (when it
            is the document's turn).
    """
    _check((task,), RULER)
    if chains < 1 or hops < 1:
        raise EdgekvError(f"{chains} chains with {hops} hops: vt needs at least one of each")
    make = _Maker(haystack, tokenize, question_first, reserve)
    cases = itertools.product(tuple(dict.fromkeys(lengths)), tuple(dict.fromkeys(seeds)))
    if task == "cwe":
        return (make.listed(task, _common_words, N_COMMON, *case) for case in cases)
    if task == "fwe":
        return (make.listed(task, _frequent_words, N_FREQUENT, *case) for case in cases)
    template = RULER[task]
    if task == "vt":
        task, template = f"vt:{chains}x{hops}", _tracking(template, chains, hops)
    return (make.needles({task: template}, *case, depth=None) for case in cases)


def _check(tasks: Sequence[str], known: Iterable[str]) -> None:
    if not tasks:
        raise EdgekvError(f"--tasks: none is named, choose from {', '.join(known)}")
    for task in tasks:
        if task not in known:
            raise EdgekvError(f"--tasks {task}: unknown task, choose from {', '.join(known)}")


def _tracking(template: Template, chains: int, hops: int) -> Template:
    """``vt``'s template with its hops written out; other chains are distractors."""
    names = [f"{{var{i}}}" for i in range(hops + 1)]
    first, link = template.needles
    n = str(hops + 1)
    return replace(
        template,
        needles=(first, *(link.format(var=var, before=before) for before, var in zip(names, names[1:]))),
        question=template.question.replace("{n}", n),
        prefix=template.prefix.replace("{n}", n),
        answers=tuple(names),
        n_predict=template.n_predict * (hops + 1),
        distractors=chains - 1,
    )


class _Maker:
    """What the documents of one evaluation have in common."""

    def __init__(self, haystack: Haystack, tokenize: Tokenize, question_first: bool, reserve: int):
        self.haystack, self.tokenize = haystack, tokenize
        self.question_first, self.reserve = question_first, reserve

    def needles(self, templates: dict[str, Template], length: int, seed: int, depth: float | None) -> Document:
        """A document with the needles of every template, and a question for each."""
        name = _name(templates, length, seed)
        draw = _Draw(_rng(name, "values"), self.haystack)
        places = _rng(name, "places")
        hidden: list[_Hidden] = []
        questions = []
        for task, template in templates.items():
            own, slots = draw.needles(template)
            hidden += _hide(places, own, depth)
            for _ in range(template.distractors):
                hidden += _hide(places, draw.needles(template)[0], None)
            questions.append(_question(task.split(":")[0], template, slots))
        head = self._head(templates.values(), questions)
        room = self._room(length, questions)

        def text_with(paragraphs: list[str]) -> str:
            return head + "\n".join(_interleaved(paragraphs, hidden))

        bare = self.count(text_with([]))
        if bare > room:
            raise self._too_short(templates, length, length + bare - room)
        if any(template.distractors == MANY for template in templates.values()):
            (template,) = templates.values()
            self._fill_with_needles(template, draw, places, hidden, lambda: room - self.count(text_with([])))
        text = self._fitted(text_with, room, lambda: _rng(name, "prose"))
        return Document(_key(name, depth), seed, length, depth, text, tuple(questions))

    def listed(
        self, task: str, words: Callable[[random.Random, int, Haystack], _Words | None], n: int, length: int, seed: int
    ) -> Document:
        """A document of as many words as fit, and the question for the ``n`` most frequent. ``words`` makes so many; it
        can from some number on."""
        name = _name((task,), length, seed)
        template = RULER[task]
        (item,) = template.needles

        def made(n_words: int) -> tuple[int, str, Question] | None:
            """And the number of tokens to spare; None with too few words for an answer."""
            if (found := words(_rng(name, "words"), n_words, self.haystack)) is None:
                return None
            text, answers = found
            question = replace(_question(task, template, {"n": str(n)}), answers=answers)
            body = " ".join(item.format(i=i, word=word) for i, word in enumerate(text, 1))
            text = self._head((template,), [question]) + body
            return self._room(length, [question]) - self.count(text), text, question

        # the most words that fit: the bounds double, then close in
        low, best = next((i, tried) for i in itertools.count(1) if (tried := made(i)) is not None)
        if best[0] < 0:
            raise self._too_short((task,), length, length - best[0])
        high = 2 * low
        while (tried := made(high))[0] >= 0:
            low, high, best = high, 2 * high, tried
        while high - low > 1:
            middle = (low + high) // 2
            if (tried := made(middle))[0] >= 0:
                low, best = middle, tried
            else:
                high = middle
        _, text, question = best
        return Document(_key(name, None), seed, length, None, text, (question,))

    def count(self, text: str) -> int:
        return len(self.tokenize(text))

    def _head(self, templates: Iterable[Template], questions: Sequence[Question]) -> str:
        lines = [template.intro for template in templates if template.intro]
        if self.question_first:
            lines += [question.text for question in questions]
        return "\n".join(lines) + "\n\n" if lines else ""

    def _room(self, length: int, questions: Sequence[Question]) -> int:
        """Tokens for the text before the longest question."""
        return length - self.reserve - max(self.count(q.asked) for q in questions)

    def _too_short(self, tasks: Iterable[str], length: int, needed: int) -> EdgekvError:
        names = ", ".join(task.split(":")[0] for task in tasks)
        return EdgekvError(f"--lengths {length}: too short for {names}, at least {needed} tokens are needed")

    def _fitted(self, text_with: Callable[[list[str]], str], room: int, rng: Callable[[], random.Random]) -> str:
        """The text with as much prose as there is room for. The tokens of its parts are not quite those of the whole,
        so it is tried."""
        n_prose = room - self.count(text_with([]))
        best, n_best = None, -1
        for attempt in itertools.count():
            text = text_with(self.haystack.fill(rng(), n_prose, self.tokenize))
            n = self.count(text)
            if n_best < n <= room:
                best, n_best = text, n
            if room - SLACK <= n <= room or (best is not None and attempt >= TRIES):
                return best
            n_prose += room - n

    def _fill_with_needles(
        self,
        template: Template,
        draw: _Draw,
        rng: random.Random,
        hidden: list[_Hidden],
        left: Callable[[], int],
    ) -> None:
        """Adds distractors as long as there are tokens left."""
        n_left = left()
        while True:
            needles, _ = draw.needles(template)
            n_left -= sum(self.count(needle + "\n") for needle in needles)
            if n_left < 0:
                break
            hidden += _hide(rng, needles, None)
        while left() < 0:
            hidden.pop()


def _name(tasks: Iterable[str], length: int, seed: int) -> str:
    return f"{'+'.join(tasks)}/{length}/{seed}"


def _key(name: str, depth: float | None) -> str:
    return f"{name}/{'any' if depth is None else float(depth)}"


def _rng(name: str, use: str) -> random.Random:
    """A document's generator for one use; the same at every depth."""
    return random.Random(f"edgekv/{name}/{use}")


class _Draw:
    """Values for the slots of one document's needles, each given once.

    name, city, fruit, word: of the pools below. key: an adjective and a noun. number, long: five and seven digits that
    are in no number of the haystack. var: three consonants that are not in the haystack. uuid.
    """

    def __init__(self, rng: random.Random, haystack: Haystack):
        self.rng, self.haystack = rng, haystack
        self.taken: set[str] = set()
        self.pools: dict[str, list[str]] = {}

    def needles(self, template: Template) -> tuple[list[str], dict[str, str]]:
        """A template's needles with values of their own, and the values by slot."""
        names = [name for text in template.needles for _, name, _, _ in string.Formatter().parse(text) if name]
        slots = {name: self.value(name.rstrip(string.digits)) for name in dict.fromkeys(names)}
        return [text.format_map(slots) for text in template.needles], slots

    def value(self, kind: str) -> str:
        if kind in POOLS or kind == "key":
            if kind not in self.pools:
                pool = list(POOLS[kind]) if kind in POOLS else [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
                self.rng.shuffle(pool)
                self.pools[kind] = pool
            if not self.pools[kind]:
                raise EdgekvError(f"--lengths: too long, there is not a {kind} for every needle")
            return self.pools[kind].pop()
        make, where = {
            "number": (lambda: str(self.rng.randrange(10**4, 10**5)), self.haystack.digits),
            "long": (lambda: str(self.rng.randrange(10**6, 10**7)), self.haystack.digits),
            "var": (lambda: "".join(self.rng.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(3)), self.haystack.text),
            "uuid": (lambda: str(uuid.UUID(int=self.rng.getrandbits(128), version=4)), ""),
        }[kind]
        for _ in range(10_000):
            value = make()
            if value not in self.taken and value not in where:
                self.taken.add(value)
                return value
        raise EdgekvError("-f: these texts have nearly every number in them, none is left for the needles")


def _hide(rng: random.Random, needles: Sequence[str], depth: float | None) -> list[_Hidden]:
    """Places for needles that stay in this order; the first lies at ``depth``."""
    u = [rng.random() for _ in needles]
    at = sorted(u) if depth is None else [depth] + sorted(depth + (1 - depth) * x for x in u[1:])
    tie = rng.random()
    return [(place, tie, i, needle) for i, (place, needle) in enumerate(zip(at, needles))]


def _interleaved(paragraphs: Sequence[str], hidden: Sequence[_Hidden]) -> list[str]:
    """Needles among paragraphs, each in the gap that is nearest to its depth, counted in characters."""
    gaps = list(itertools.accumulate((len(p) for p in paragraphs), initial=0))
    lines, gap = [], 0
    for depth, _, _, needle in sorted(hidden):
        at = depth * gaps[-1]
        while gap < len(paragraphs) and abs(gaps[gap + 1] - at) <= abs(gaps[gap] - at):
            lines.append(paragraphs[gap])
            gap += 1
        lines.append(needle)
    return lines + list(paragraphs[gap:])


def _question(task: str, template: Template, slots: dict[str, str]) -> Question:
    return Question(
        task,
        template.question.format_map(slots),
        template.prefix.format_map(slots),
        tuple(answer.format_map(slots) for answer in template.answers),
        template.n_predict,
    )


def _common_words(rng: random.Random, n: int, haystack: Haystack) -> _Words | None:
    """``n`` words: N_COMMON come COMMON_TIMES, the others UNCOMMON_TIMES, the last perhaps fewer. In a short list the
    common words take three fifths, in the same proportion, down to three times against once. None if it is shorter."""
    times = min(COMMON_TIMES, n * 3 // (5 * N_COMMON))
    if times < 3:
        return None
    others = max(1, times * UNCOMMON_TIMES // COMMON_TIMES)
    n_others = n - times * N_COMMON
    words = _vocabulary(rng, N_COMMON + -(-n_others // others), haystack)
    common, uncommon = words[:N_COMMON], words[N_COMMON:]
    text = common * times + [word for word in uncommon for _ in range(others)][:n_others]
    rng.shuffle(text)
    return text, tuple(common)


def _frequent_words(rng: random.Random, n: int, haystack: Haystack) -> _Words | None:
    """``n`` words of a made-up language, the one of rank k with a share in proportion to 1 / k^2 (zeta); rank 1 are
    the dots, as in RULER. None if the answer is not clear."""
    counts = []
    while (count := int(n * 6 / (3.141592653589793 * (len(counts) + 2)) ** 2)) > 0:
        counts.append(count)
    if len(counts) <= N_FREQUENT or len(set(counts[: N_FREQUENT + 1])) <= N_FREQUENT:
        return None
    words = _made_up_words(rng, len(counts), haystack.words)
    text = [word for word, count in zip(words, counts) for _ in range(count)]
    text += ["..."] * (n - len(text))
    rng.shuffle(text)
    return text, tuple(words[:N_FREQUENT])


def _vocabulary(rng: random.Random, n: int, haystack: Haystack) -> list[str]:
    """Words of the haystack in a random order, and made-up ones if there are too few."""
    words = list(haystack.words)
    rng.shuffle(words)
    return words[:n] + _made_up_words(rng, n - len(words), haystack.words)


def _made_up_words(rng: random.Random, n: int, but: Iterable[str]) -> list[str]:
    """Of three syllables."""
    taken, words = set(but), []
    while len(words) < n:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


NAMES = """
    Albert Alice Anna Arthur Clara Daniel David Diana Edward Elena Ellen Emma Felix Frank George Grace Gustav Hannah
    Helen Henry Hugo Irene John Julia Laura Leonard Linda Maria Martin Michael Monica Nina Nora Olga Oscar Patrick
    Peter Philip Rachel Robert Ruth Samuel Sarah Simon Sophie Susan Teresa Thomas Victor Walter
""".split()
CITIES = """
    Athens Atlanta Bangkok Beijing Berlin Bogota Boston Brussels Budapest Cairo Chicago Copenhagen Dallas Delhi Denver
    Dublin Geneva Hamburg Havana Helsinki Istanbul Jakarta Lagos Lima Lisbon London Madrid Manila Miami Milan Montreal
    Moscow Mumbai Munich Nairobi Naples Oslo Paris Prague Rome Seattle Seoul Stockholm Tokyo Toronto Tunis Vienna
    Warsaw Zurich
""".split()
FRUITS = """
    apple apricot banana blackberry blueberry cherry coconut cranberry fig grape guava kiwi lemon lime mango melon
    nectarine orange papaya peach pear pineapple plum pomegranate quince raspberry strawberry tangerine
""".split()
ADJECTIVES = """
    amber ample ancient autumn bitter black blind blue bold brave brief bright brisk broad broken calm careful cheap
    clean clever cold cool crisp curious damp daring dark deep dense distant dry dusty eager early easy empty exact
    faint fair famous fancy fierce fine firm first flat fond fresh gentle giant glad golden grand great green grey
    happy hard heavy hidden hollow honest humble icy jolly keen kind large late lazy lively lonely long loud lucky
    mellow merry mild modest narrow neat new noble odd old pale patient plain polite proud purple quick quiet rapid
    rare red rough royal rusty salty sharp shy silent
""".split()
NOUNS = """
    anchor arrow badge barrel basket beacon bell blanket boat bottle branch bridge bucket button cabin candle canyon
    carpet castle chain chair clock cloud coin comet compass copper corner cradle curtain desert diamond donkey door
    dragon drum eagle engine falcon feather fence ferry flute forest fountain garden gate glacier glove hammer harbor
    helmet hill horizon island jacket jewel kettle key kitchen ladder lake lamp lantern leaf lion marble meadow mirror
    mountain needle ocean orchard owl paddle palace pencil piano pillow planet pocket pony puzzle rabbit ribbon river
    rocket saddle sailor shadow shell ship shovel
""".split()
# the words that a key's needle gives; no noun of a key is among them
WORDS = """
    acorn bacon balcony ballet beetle biscuit bishop blossom bronze cactus camel canvas cellar chalk chapel cheese
    circus clover cobalt cotton crayon cricket crystal dolphin easel fiddle flannel gallery garlic ginger goblet
    granite gravel hamlet hazel honey hotel igloo insect ivory jungle kernel lagoon leather library linen lizard
    magnet maple mason medal mustard napkin nutmeg oyster parade parrot pepper pigeon poem pottery prairie prince
    pumpkin quartz ranger saffron salad satin scarf silk sparrow spider statue summit syrup temple thunder tiger
    timber trumpet tulip tunnel turtle velvet vinegar violin walnut willow window winter wizard zebra
""".split()
POOLS = {"name": NAMES, "city": CITIES, "fruit": FRUITS, "word": WORDS}
