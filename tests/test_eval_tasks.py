"""Documents with needles: a solver that only reads them must find every answer, where and as long as asked for."""

import functools
import hashlib
import os
import random
import re
import subprocess
from collections import Counter
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.calibrate import default_text
from edgekv.errors import EdgekvError
from edgekv.eval import haystack as haystacks
from edgekv.eval import tasks
from edgekv.eval.haystack import Haystack, default_paragraphs, paragraphs
from edgekv.eval.tasks import NEEDLES, RULER, TASKS, Question, needle_documents, ruler_documents
from process import python

LISTS = ("cwe", "fwe")


def pieces(text):
    """Tokens as of a BPE: at most five letters, single digits, and line ends that merge with what is before them."""
    return [hash_of(t) for t in re.findall(r" ?[^\W\d]{1,5}|\d|[.:]?\n+|[^\w\n]|_", text)]


def characters(text):
    return [ord(c) for c in text]


def with_a_token_before(text):
    """As of a vocabulary that puts a space before every text: the parts have more tokens than the whole."""
    return [0] + pieces(text)


def more_as_a_whole(text):
    """The parts have fewer tokens than the whole."""
    return pieces(text) + [0] * (len(text) // 150)


def hash_of(token):
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=4).digest(), "big")


@pytest.fixture(scope="module")
def hay():
    return Haystack(default_paragraphs())


def niah(hay, tokenize=pieces, **kwargs):
    given = {"lengths": (600,), "seeds": range(3), "tasks": tuple(NEEDLES)} | kwargs
    return list(needle_documents(hay, tokenize, **given))


def ruler(task, hay, tokenize=pieces, **kwargs):
    return list(ruler_documents(task, hay, tokenize, **({"lengths": (1000,), "seeds": range(3)} | kwargs)))


# a solver of its own: the table of wordings as regular expressions, nothing of the code that draws and places


KINDS = {
    "number": r"\d{5}", "long": r"\d{7}", "var": "[A-Z]{3}", "key": "[a-z]+-[a-z]+", "n": r"\d+",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "before": "[A-Z]{3}",
}  # fmt: skip


def pattern(text, known=()):
    """A wording as a regular expression with a group per slot, or the value where it is known."""
    known, seen, shape = dict(known), set(), ""
    for i, part in enumerate(re.split(r"\{(\w+)\}", text)):
        if i % 2 == 0:
            shape += re.escape(part)
        elif part in known:
            shape += re.escape(known[part])
        elif part in seen:
            shape += f"(?P={part})"
        else:
            shape += f"(?P<{part}>{KINDS.get(part.rstrip('0123456789'), '[A-Za-z]+')})"
            seen.add(part)
    return shape


def template_of(question, hops=4):
    template = (NEEDLES | RULER)[question.task]
    if question.task != "vt":
        return template.needles, template.question, template.answers
    first, link = template.needles
    links = [link.replace("{before}", f"{{var{i}}}").replace("{var}", f"{{var{i + 1}}}") for i in range(hops)]
    return [first, *links], template.question, [f"{{var{i}}}" for i in range(hops + 1)]


def solve(text, question, hops=4):
    """The answers to a question, in order, from the lines of a document alone."""
    return tuple(answer.format_map(found(text, question, hops)) for answer in template_of(question, hops)[2])


def own_needles(text, question):
    """The lines that the answer follows from, in the order of the wording."""
    return [needle.format_map(found(text, question)) for needle in template_of(question)[0]]


def found(text, question, hops=4):
    """What stands in the slots of the needles that belong to a question."""
    needles, wording, _ = template_of(question, hops)
    known = re.fullmatch(pattern(wording), question.text).groupdict()
    left = list(needles)
    while left:
        for needle in left:
            shape = pattern(needle, known)
            same = [n for n in left if re.sub(r"<\w+>", "", pattern(n, known)) == re.sub(r"<\w+>", "", shape)]
            matches = [m for line in text.splitlines() if (m := re.fullmatch(shape, line))]
            assert matches, f"no line for {needle!r}"
            if len(matches) == len(same):
                for n, match in zip(same, matches):
                    known |= re.fullmatch(pattern(n, known), match[0]).groupdict()
                    left.remove(n)
                break
        else:
            raise AssertionError(f"ambiguous: {left}, known {known}")
    return known


def lines_of(document, hay):
    """The lines behind the intro, and for each whether it is prose of the haystack."""
    prose = "\n" + "\n".join(hay.paragraphs)
    lines = document.text.splitlines()
    lines = lines[lines.index("") + 1 :] if "" in lines else lines
    return [(line, f"\n{line}" in prose) for line in lines]  # the last may be cut short


def n_tokens(document, tokenize):
    asked = [f"\n\nQuestion: {q.text}\nAnswer: {q.prefix}" for q in document.questions]
    assert asked == [q.asked for q in document.questions]
    return len(tokenize(document.text)) + max(len(tokenize(text)) for text in asked)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("question_first", [False, True])
def test_needle_answers_follow_from_the_document(hay, separate, question_first):
    documents = niah(hay, seeds=range(20), separate=separate, question_first=question_first)
    assert len(documents) == (20 * len(NEEDLES) if separate else 20)
    for document in documents:
        assert len(document.questions) == (1 if separate else len(NEEDLES))
        for question in document.questions:
            assert solve(document.text, question) == question.answers
            assert question.score(" " + ", ".join(question.answers) + ".") == 1
            assert document.text.count(question.text) == question_first
    tasks_asked = Counter(question.task for document in documents for question in document.questions)
    assert tasks_asked == dict.fromkeys(NEEDLES, 20)


@pytest.mark.parametrize("task", [task for task in RULER if task not in LISTS])
def test_ruler_answers_follow_from_the_document(hay, task):
    for document in ruler(task, hay, seeds=range(10)):
        (question,) = document.questions
        assert question.task == task
        assert solve(document.text, question) == question.answers
        assert document.text.startswith(RULER[task].intro + "\n\n")


def test_ruler_counts(hay):
    """How many needles of which kind there are, and that those of multikey_2 are the haystack."""
    n_needles = {"niah_single_word": 1, "niah_single_number": 1, "niah_single_uuid": 1, "niah_multikey_1": 4}
    n_needles |= {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5}
    for task, n in n_needles.items():
        for document in ruler(task, hay):
            assert sum(not prose for _, prose in lines_of(document, hay)) == n
    for document in ruler("niah_multikey_2", hay, lengths=(2000,)):
        lines = lines_of(document, hay)
        prose = [line for line, is_prose in lines if is_prose]
        assert len(lines) > 50 and len(prose) <= 1 and sum(map(len, prose)) < 120
        shape = pattern(RULER["niah_multikey_2"].needles[0])
        assert all(is_prose or re.fullmatch(shape, line) for line, is_prose in lines)


def test_needle_among_needles_is_anywhere(hay):
    places = []
    for document in ruler("niah_multikey_2", hay, seeds=range(60), lengths=(700,)):
        lines = [line for line, _ in lines_of(document, hay)]
        places.append(next(i for i, x in enumerate(lines) if document.questions[0].answers[0] in x) / (len(lines) - 1))
    assert min(places) < 0.15 and max(places) > 0.85 and 0.35 < sum(places) / 60 < 0.65


@pytest.mark.parametrize("chains,hops", [(1, 1), (1, 4), (3, 2)])
def test_chains_and_hops(hay, chains, hops):
    for document in ruler("vt", hay, chains=chains, hops=hops):
        (question,) = document.questions
        assert solve(document.text, question, hops) == question.answers and len(set(question.answers)) == hops + 1
        assigned = re.findall(r"VAR ([A-Z]{3}) = (?:VAR ([A-Z]{3})|\d{5})\.", document.text)
        assert len(assigned) == chains * (hops + 1) == len({var for var, _ in assigned})
        seen = set()
        for var, before in assigned:  # nothing is handed on before it has a value
            assert not before or before in seen
            seen.add(var)
        assert len(set(re.findall(r"= (\d+)\.", document.text))) == chains


@pytest.mark.parametrize("length,times", [(500, None), (1200, None), (6000, (30, 3))])
def test_common_words(hay, length, times):
    for document in ruler("cwe", hay, lengths=(length,), seeds=range(5)):
        (question,) = document.questions
        entries = re.findall(r"(\d+)\. (\w+)", document.text)
        assert [int(i) for i, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries).most_common()
        assert {word for word, _ in counts[:10]} == set(question.answers) and len(question.answers) == 10
        assert len({n for _, n in counts[:10]}) == 1 and counts[9][1] >= 3 * counts[10][1]
        assert len({n for _, n in counts[10:-1]}) == 1  # the last may have been cut short
        if times:
            assert (counts[0][1], counts[10][1]) == times


@pytest.mark.parametrize("length", [300, 1000, 6000])
def test_frequent_words(hay, length):
    for document in ruler("fwe", hay, lengths=(length,), seeds=range(5)):
        (question,) = document.questions
        body = document.text.split("\n\n")[1].split()
        counts = Counter(body).most_common()
        assert counts[0][0] == "..."
        assert [word for word, _ in counts[1:4]] == list(question.answers)
        numbers = [n for _, n in counts]
        assert numbers[1] > numbers[2] > numbers[3] > numbers[4]
        for rank, n in enumerate(numbers[1:], 2):  # zeta, alpha 2
            assert abs(n - len(body) / (1.6449340668 * rank**2)) <= 1
        assert set(body).isdisjoint(hay.words)


def test_lists_can_be_made_from_some_number_on(hay):
    """What the search for their length relies on."""
    for words in tasks._common_words, tasks._frequent_words:
        made = [words(random.Random(0), n, hay) for n in range(1, 400)]
        first = next(i for i, x in enumerate(made) if x is not None)
        assert None not in made[first:]
        assert [len(text) for text, _ in made[first:]] == list(range(first + 1, 400))


# lengths


@functools.cache
def longest_word(hay, tokenize):
    return max(len(tokenize(" " + word)) for word in sorted(set(hay.text.split()), key=len)[-100:])


def assert_lengths(hay, documents, tokenize, reserve=0):
    """None is longer than it may be, all are shorter by less than a word, most by a few tokens."""
    spare = sorted(document.length - reserve - n_tokens(document, tokenize) for document in documents)
    assert spare[0] >= 0 and spare[-1] <= longest_word(hay, tokenize)
    assert spare[len(spare) // 2] <= tasks.SLACK


@pytest.mark.parametrize("tokenize", [pieces, characters])
@pytest.mark.parametrize("question_first,reserve", [(False, 0), (True, 37)])
def test_needle_lengths(hay, tokenize, question_first, reserve):
    given = {"question_first": question_first, "reserve": reserve, "seeds": range(6)}
    assert_lengths(hay, niah(hay, tokenize, lengths=(1300, 2500), **given), tokenize, reserve)


@pytest.mark.parametrize("tokenize", [with_a_token_before, more_as_a_whole])
def test_lengths_where_parts_do_not_add_up(hay, tokenize):
    documents = niah(hay, tokenize, lengths=(1500, 3000), tasks=("words", "key"))
    documents += ruler("niah_multikey_2", hay, tokenize, lengths=(1500, 3000))
    assert_lengths(hay, documents, tokenize)


@pytest.mark.parametrize("task", RULER)
def test_ruler_lengths(hay, task):
    documents = ruler(task, hay, lengths=(600, 1501), reserve=11, question_first=task == "vt", seeds=range(5))
    assert_lengths(hay, documents, pieces, 11)


def test_lengths_by_a_real_vocabulary(hay, smollm2):
    from edgekv.session import Session

    with Session(smollm2, n_ctx=64, n_threads=1) as session:

        def tokenize(text):
            return session.tokenize(text, special=False)

        documents = niah(hay, tokenize, lengths=(512, 1024), seeds=range(5))
        documents += [document for task in RULER for document in ruler(task, hay, tokenize, lengths=(1024,))]
        assert_lengths(hay, documents, tokenize)


@pytest.mark.parametrize("task", [None, "niah_multiquery", "cwe"])
def test_too_short(hay, task):
    """The error names the least length, which then works but for the values drawn."""

    def make(length):
        one = {"lengths": (length,), "seeds": (0,)}
        return ruler(task, hay, **one) if task else niah(hay, **one)

    for length in -1, 40:
        with pytest.raises(EdgekvError, match=f"^--lengths {length}: too short for .*, at least [0-9]+ tok") as error:
            make(length)
    assert make(int(re.search(r"least (\d+)", str(error.value))[1]) + 20)


# places


@settings(max_examples=40, deadline=None)
@given(depth=st.floats(0, 1), length=st.integers(400, 3000), seed=st.integers(0, 10**9), separate=st.booleans())
def test_needles_lie_at_their_depth(hay, depth, length, seed, separate):
    for document in niah(hay, lengths=(length,), seeds=(seed,), depths=(depth,), separate=separate):
        assert document.depth == depth and document.seed == seed and document.length == length
        lines = lines_of(document, hay)
        total = sum(len(line) for line, prose in lines if prose)
        longest = max(len(line) for line, prose in lines if prose)
        start = [own_needles(document.text, question)[0] for question in document.questions]
        for needle in start:
            at = [line for line, _ in lines].index(needle)
            before = sum(len(line) for line, prose in lines[:at] if prose)
            assert abs(before - depth * total) <= longest / 2 + 1


def test_depth_moves_needles_only(hay):
    start, middle, end = niah(hay, seeds=(5,), depths=(0, 0.5, 1), tasks=("words", "chain"))
    assert start.questions == middle.questions == end.questions
    assert len({start.key, middle.key, end.key}) == 3
    prose = [[line for line, prose in lines_of(x, hay) if prose] for x in (start, middle, end)]
    assert prose[0][:-1] == prose[1][:-1] == prose[2][:-1]
    is_prose = [p for _, p in lines_of(start, hay)]
    assert not any(is_prose[:2])  # both first needles stand before everything; the chain's second is anywhere
    assert not any([p for _, p in lines_of(end, hay)][-3:])


def test_needles_are_anywhere_without_a_depth(hay):
    places = []
    for document in niah(hay, seeds=range(150), tasks=("words",), lengths=(1500,)):
        assert document.depth is None
        lines = lines_of(document, hay)
        at = next(i for i, (_, prose) in enumerate(lines) if not prose)
        places.append(sum(len(x) for x, _ in lines[:at]) / sum(len(x) for x, prose in lines if prose))
    counts, _ = zip(*[(sum(i / 5 <= p < (i + 1) / 5 or (i == 4 and p == 1) for p in places), i) for i in range(5)])
    assert min(counts) > 12 and sum(counts) == 150  # 30 each are expected


def test_a_task_keeps_the_order_of_its_needles(hay):
    for document in niah(hay, seeds=range(30), depths=(None, 1.0)) + ruler("vt", hay, seeds=range(20)):
        lines = document.text.splitlines()
        for question in document.questions:
            places = [lines.index(needle) for needle in own_needles(document.text, question)]
            assert places == sorted(places)


# values


def test_values_are_distinct(hay):
    for document in niah(hay, seeds=range(30)):
        needles = [line for line, prose in lines_of(document, hay) if not prose]
        assert len(needles) == sum(len(t.needles) * (1 + t.distractors) for t in NEEDLES.values())
        values = Counter()
        shapes = {needle for t in NEEDLES.values() for needle in t.needles}
        for line in set(needles):
            match = next(m for shape in shapes if (m := re.fullmatch(pattern(shape), line)))
            values.update({(slot.rstrip("123"), value.lower()) for slot, value in match.groupdict().items()})
        n = {kind: [values[slot, value] for slot, value in values if slot == kind] for kind in KINDS | {"name": 0}}
        for kind in "name", "number":
            slots = [set(re.findall(rf"{{{kind}\d?}}", "".join(t.needles))) for t in NEEDLES.values()]
            assert len(n[kind]) == sum(len(s) * (1 + t.distractors) for s, t in zip(slots, NEEDLES.values()))
        numbers = [value for slot, value in values if slot == "number"]
        assert not any(a != b and b.startswith(a) for a in numbers for b in numbers)
        assert not any(number in hay.text for number in numbers)
        assert len({value for _, value in values}) == len(values)  # no city is also a fruit, no name a city


def test_numbers_are_not_the_haystacks():
    """Of the numbers of five digits all but 300 are in the text; each of these is drawn once."""
    numbers = list(map(str, range(10_000, 100_000)))
    lines = [" ".join(numbers[i : i + 100]) for i in range(0, len(numbers), 100)]
    draw = tasks._Draw(random.Random(0), Haystack(lines[:-3]))
    drawn = [draw.value("number") for _ in range(40)]
    assert len(set(drawn)) == 40 and set(drawn) <= set(numbers[-300:])

    with pytest.raises(EdgekvError, match="^-f: these texts have nearly every number"):
        niah(Haystack(lines), seeds=(0,), tasks=("key",))


def test_pools():
    pools = tasks.POOLS
    assert len(pools["name"]) >= 40 and len(pools["city"]) >= 40 and len(pools["fruit"]) >= 25
    assert len(tasks.ADJECTIVES) * len(tasks.NOUNS) >= 9000
    everything = [word.lower() for pool in (*pools.values(), tasks.ADJECTIVES, tasks.NOUNS) for word in pool]
    assert len(everything) == len(set(everything))
    assert all(word.isalpha() for word in everything)


def test_too_many_needles(hay, monkeypatch):
    monkeypatch.setattr(tasks, "NOUNS", ["river"])
    with pytest.raises(EdgekvError, match="^--lengths: too long, there is not a key for every needle$"):
        ruler("niah_multikey_2", hay, lengths=(6000,))


def test_registry():
    assert list(TASKS) == [*NEEDLES, *RULER] and len(TASKS) == len(NEEDLES) + len(RULER)
    assert all(about and "\n" not in about and len(about) < 100 for about in TASKS.values())


# the same everywhere


def digest(documents):
    return hashlib.sha256(repr([astuple(document) for document in documents]).encode()).hexdigest()


def all_documents(hay):
    documents = niah(hay, depths=(None, 0.3)) + niah(hay, separate=True)
    return documents + [document for task in RULER for document in ruler(task, hay)]


def test_same_in_another_process(hay):
    here = digest(all_documents(hay))
    assert here == digest(all_documents(hay))
    code = (
        "import test_eval_tasks as t\n"
        "hay = t.Haystack(t.default_paragraphs()); print(hay.sha256, t.digest(t.all_documents(hay)))"
    )
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    out = subprocess.run(python(code), env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.split() == [hay.sha256, here]


def test_documents_differ(hay):
    documents = all_documents(hay) + niah(hay, lengths=(700,)) + niah(hay, tasks=("words",), lengths=(700,))
    assert len({document.key for document in documents}) == len(documents)
    by_seed = niah(hay, seeds=range(20), tasks=("key",))
    assert len({document.text for document in by_seed}) == len({d.questions[0].answers for d in by_seed}) == 20
    assert len({document.text.splitlines()[0] for document in by_seed}) > 15
    more = niah(hay, seeds=(1, 1, 2), lengths=(600, 600), tasks=("key", "key"))
    assert [document.seed for document in more] == [1, 2]
    assert more == niah(hay, seeds=range(3), tasks=("key",))[1:]  # a document does not depend on the others


# scores


@pytest.mark.parametrize(
    "answers,answer,score",
    [
        (["Paris"], " Paris. It is", 1),
        (["Paris"], "PARIS", 1),
        (["Paris"], " the city of Parisians", 0),
        (["Paris"], "", 0),
        (["12345"], " 12345, remember", 1),
        (["123"], " 51234 and 1234 and 0123", 0),
        (["12345"], "12345.\n67890", 1),
        (["lime", "lemon", "fig"], " Lemon, figs and LIME", 2 / 3),
        (["lime", "lemon"], " lemon, lemon", 1 / 2),
        (["apple"], " pineapple", 0),
        (["3f2a-b.c"], " 3F2A-b.c", 1),
        (["3f2a-b.c"], " 3f2a-bxc", 0),
    ],
)
def test_scores(answers, answer, score):
    assert Question("t", "?", "", tuple(answers), 8).score(answer) == score


def test_scores_of_planted_answers(hay):
    """The right document's needle is full marks, another's is none."""
    first, second = niah(hay, seeds=(1, 2))
    for q1, q2 in zip(first.questions, second.questions):
        assert q1.score(first.text) == 1
        if q1.task in ("key", "keys", "chain"):
            assert q1.score(second.text) == 0 and q1.score("".join(q2.answers)) == 0


@pytest.mark.parametrize(
    "kwargs,error",
    [
        ({"tasks": ("words", "nothing")}, "--tasks nothing: unknown task, choose from words, key, "),
        ({"tasks": ("vt",)}, "--tasks vt: unknown task, choose from words"),
        ({"tasks": ()}, "--tasks: none is named, choose from words"),
        ({"depths": (0.5, 1.5)}, "--depths 1.5: must be between 0"),
        ({"depths": (float("nan"),)}, "--depths nan: must be between 0"),
    ],
)
def test_wrong_arguments(hay, kwargs, error):
    with pytest.raises(EdgekvError, match="^" + re.escape(error)) as error:
        needle_documents(hay, pieces, **({"lengths": (600,), "seeds": (0,)} | kwargs))  # at once, not when iterated
    assert "\n" not in str(error.value)


def test_wrong_arguments_of_ruler(hay):
    with pytest.raises(EdgekvError, match="^--tasks key: unknown task, choose from niah_single_word, "):
        ruler_documents("key", hay, pieces, lengths=(600,), seeds=(0,))
    with pytest.raises(EdgekvError, match="^1 chains with 0 hops"):
        ruler_documents("vt", hay, pieces, lengths=(600,), seeds=(0,), hops=0)


# the haystack


def test_default_prose(hay):
    assert len(hay.paragraphs) > 1000 and len(hay.text) > 200_000
    assert len(set(hay.paragraphs)) == len(hay.paragraphs)
    for paragraph in hay.paragraphs:
        assert len(paragraph) <= haystacks.LONGEST and paragraph == " ".join(paragraph.split())
        assert ">>>" not in paragraph
    prose = [p for p in hay.paragraphs if p[0].isupper() and p.endswith(".") and len(p) >= 120]
    assert len(prose) > 0.95 * len(hay.paragraphs)  # the others are pieces of long ones


def test_default_prose_is_not_what_filters_are_calibrated_on(hay):
    calibrated_on = " ".join(default_text().lower().split())
    sentences = [s for p in hay.paragraphs for s in re.split(r"(?<=\.) ", p.lower()) if len(s.split()) >= 9]
    assert len(sentences) > 2000
    assert not [sentence for sentence in sentences if sentence in calibrated_on]


def test_which_docstrings_are_prose(monkeypatch, tmp_path):
    def prose(name, i):
        words = " ".join(f"{name} {'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for _ in range(30))
        return f"Of {words}\nand so on."

    for name in "b.py", "a/x.py", "a.py", "test/y.py", "site-packages/z.py", "a/tests/w.py":
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        tag = path.stem
        body = "\n".join(f'if 1:\n  def f{i}():\n    """{prose(tag, i)}\n\n    {prose(tag, i)}"""' for i in range(100))
        path.write_text(f'"""{prose(tag, 0)} no stop\n\nShort.\n\n>>> {prose(tag, 0)}\n\nx{prose(tag, 0)}"""\n{body}\n')
    monkeypatch.setattr(haystacks.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(haystacks, "FEWEST", 500)
    expected = [" ".join(prose(tag, i).split()) for tag in "axb" for i in range(100)]
    assert list(default_paragraphs.__wrapped__()) == expected


def test_no_sources(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text('"""' + "A module that says something in many words, as prose does. " * 4 + '"""')
    (tmp_path / "b.py").write_bytes(b'"""\xff"""')
    (tmp_path / "c.py").write_text("def broken(:")
    monkeypatch.setattr(haystacks.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(EdgekvError, match="lacks the standard library's sources; give texts of your own with -f$"):
        default_paragraphs.__wrapped__()


def test_paragraphs_of_files(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    long = " ".join(f"This is sentence {i} of a paragraph that goes on." for i in range(60))
    one.write_text(f"A heading\n\nTwo lines\nof  one paragraph.\n \n{long}\n\n\nA heading\n", encoding="utf-8")
    words = " ".join(f"größer{i}" for i in range(200))
    two.write_text(words + "\n\n" + "字" * 1200 + "\n\n" + "長い文です。" * 150, encoding="utf-8")
    ours = paragraphs([one, str(two)])
    assert ours[:2] == ("A heading", "Two lines of one paragraph.")
    assert len(set(ours)) == len(ours) and all(0 < len(p) <= haystacks.LONGEST for p in ours)
    of_long = [p for p in ours if p.startswith("This is sentence")]
    assert " ".join(of_long) == long and len(of_long) == 6 and all(p.endswith(" on.") for p in of_long)
    assert " ".join(p for p in ours if p.startswith("größer")) == words
    assert {len(p) for p in ours if p[0] == "字"} == {500, 200}
    assert all(p.endswith("。") for p in ours if p[0] == "長")


@pytest.mark.parametrize(
    "content,error",
    [
        (None, "no such file"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"short", "5 characters are too few to hide needles in, at least 2000 are needed"),
        (b"The same paragraph again.\n\n" * 500, "25 characters are too few"),
        (b"", "0 characters are too few"),
    ],
)
def test_unusable_files(tmp_path, content, error):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EdgekvError, match=re.escape(f"{path}: {error}")) as error:
        paragraphs([path])
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 5000), seed=st.integers(0, 1000))
def test_fill(hay, n, seed):
    filled = hay.fill(random.Random(seed), n, pieces)
    assert filled == hay.fill(random.Random(seed), n, pieces)
    assert n - longest_word(hay, pieces) <= sum(len(pieces(line + "\n")) for line in filled) <= n
    assert all(line in hay.paragraphs for line in filled[:-1]) and len(set(filled)) == len(filled)
    for line in filled[-1:]:
        assert any(p == line or p.startswith(line + " ") for p in hay.paragraphs)


def test_fill_begins_again():
    hay = Haystack([f"Paragraph {name} has a few words." for name in "abcde"])
    filled = hay.fill(random.Random(0), 12 * 10 * 5, pieces)
    rounds = [filled[i : i + 5] for i in range(0, 50, 5)]
    assert len(filled) > 50 and all(set(r) == set(hay.paragraphs) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 5
    # no spaces: cut between characters
    assert Haystack(["字" * 400]).fill(random.Random(0), 250, characters) == ["字" * 249]


def test_fill_counts_a_paragraph_once(hay):
    calls = Counter()

    def counting(text):
        calls[text] += 1
        return pieces(text)

    fresh = Haystack(hay.paragraphs)
    for seed in range(3):
        for _ in range(20):
            fresh.fill(random.Random(seed), 20_000, counting)
    whole = [calls[p + "\n"] for p in hay.paragraphs]
    assert max(whole) == 1 and sum(whole) > 300
    assert fresh.fill(random.Random(1), 5000, characters) == hay.fill(random.Random(1), 5000, characters)


def test_sha256(hay):
    assert hay.sha256 == hashlib.sha256("\n\n".join(hay.paragraphs).encode()).hexdigest()
    assert Haystack(["a", "b"]).sha256 != Haystack(["b", "a"]).sha256
    with pytest.raises(ValueError):
        Haystack([])
