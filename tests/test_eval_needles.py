"""The runner of needles: every answer is what a fresh context of that setting gives, one question at a time."""

import numpy as np
import pytest

from edgekv.errors import EdgekvError
from edgekv.eval import needles
from edgekv.eval.journal import Journal
from edgekv.eval.setting import Setting, plan
from edgekv.eval.tasks import Document, Question
from edgekv.session import Session, Vocabulary
from edgekv.settings import SelectionSettings
from tinymodel import write_tiny_model

LENGTH = 400  # the tiny models' tokens are bytes


@pytest.fixture(scope="module", params=["llama", "gemma3", "lfm2"])
def model(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("needles") / "tiny.gguf", arch=request.param, n_head=4, n_head_kv=2,
                            n_embd=128, head_size=32, scale=2.0)


def documents(n: int = 3) -> list[Document]:
    rng = np.random.default_rng(0)
    made = []
    for seed in range(n):
        text = "".join(rng.choice(list("abcdefgh .")) for _ in range(LENGTH - 60))  # the same number of tokens each
        questions = tuple(Question(task, f"{task}?", f"It is {seed}", (answer,), 6)
                          for task, answer in (("one", "xy"), ("two", "z")))
        made.append(Document(f"d{seed}", seed, LENGTH, None, text, questions))
    return made


def run(model, settings, **options):
    journal = Journal.open(None, {"edgekv_eval": 1})
    scores = needles.run(model, documents(), settings, journal, n_threads=1, **options)
    answers = {}
    for key, record in journal.done.items():
        for label, found in record["answers"].items():
            answers |= {(key.split(" | ")[0], label, task): a["text"] for task, a in found.items()}
    return scores, answers


def by_hand(model, setting, document, question, mode="prompt") -> str:
    """A context of the setting's own reads the document and the question, and answers token by token."""
    evicts = setting.policy != "none"
    with Vocabulary(model) as vocabulary:
        tokens = vocabulary.tokenize(document.text)
    eviction = setting.eviction(LENGTH if mode == "bounded" else len(tokens), mode) if evicts else None
    with Session(model, n_ctx=1024, n_ubatch=64 if mode == "bounded" and evicts else 512, n_threads=1, flash_attn=True,
                 type_k=setting.type_k, type_v=setting.type_v, selection=setting.selection, settings=eviction) as s:
        s.read(tokens)
        if evicts:
            s.evict()
            assert s.stats().n_evictions and s.stats().cells_used == eviction.budget
        asked = s.tokenize(question.asked)[len(s.tokenize("")):]
        pos, step = len(tokens), 8 if setting.selection.method != "none" else 64
        for i in range(0, len(asked), step):
            logits = s.decode(asked[i:i + step], pos + i, logits="last")
        pos += len(asked)
        made = []
        while True:
            token = int(logits[-1].argmax())
            text = s.text(made)
            if s.ends(token) or "\n" in s.text([*made, token])[len(text):] or len(made) == question.n_predict:
                return text.strip()
            made.append(token)
            logits = s.decode([token], pos, logits="last")
            pos += 1


def same(got: str, want: str, question) -> None:
    """An answer ends where everything is found."""
    assert want.startswith(got) if question.score(got) == 1 else got == want


SETTINGS = plan(policies=["kvdiff", "streaming", "snapkv"], budgets=["x2", "50"], types=["f16", "q8_0"],
                selections=[SelectionSettings("quest", 64, 16, 0), SelectionSettings("quest", 64, 16, 0, per_query_head=True)])


def test_answers_are_those_of_fresh_contexts(model):
    scores, answers = run(model, SETTINGS)
    assert len(scores) == len(answers) == len(SETTINGS) * 3 * 2
    for document in documents():
        for setting in SETTINGS:
            for question in document.questions:
                got = answers[document.key, setting.label, question.task]
                same(got, by_hand(model, setting, document, question), question)
    assert len({answers[d.key, "none", "one"] for d in documents()}) > 1  # the documents matter


def test_bounded_caches_are_bounded(model):
    settings = plan(policies=["kvdiff", "streaming"], budgets=["x4"])
    _, answers = run(model, settings, mode="bounded")
    for document in documents():
        for setting in settings:
            for question in document.questions:
                same(answers[document.key, setting.label, question.task],
                     by_hand(model, setting, document, question, "bounded"), question)


def test_what_cannot_be_run(model):
    both = Setting("kvdiff", "x2", selection=SelectionSettings("quest", 64, 16, 0))
    with pytest.raises(EdgekvError, match="judged one by one"):
        run(model, [Setting(), both])
    with pytest.raises(ValueError, match="two settings are called"):
        run(model, [Setting("kvdiff", "x2"), Setting("kvdiff", "x2")])


def test_only_what_is_needed_is_computed(model, monkeypatch):
    """A question is tokenised once per document, and no more logits are computed than for its answer."""
    decode, tokenize, logits, texts = Session.decode, Session.tokenize, [], []

    def recorded(self, tokens, *args, **kwargs):
        out = decode(self, tokens, *args, **kwargs)
        if len(tokens) < 64:  # not the document
            logits.append((len(tokens), 0 if out is None else len(out)))
        return out

    monkeypatch.setattr(Session, "decode", recorded)
    monkeypatch.setattr(Session, "tokenize", lambda self, text: texts.append(text) or tokenize(self, text))
    run(model, plan(policies=["kvdiff", "streaming"], budgets=["x2", "x4"],
                    selections=[SelectionSettings("quest", 64, 16, 0)]))
    questions = [q.asked for d in documents() for q in d.questions]
    assert all(texts.count(asked) == 2 * questions.count(asked) for asked in questions)  # in two groups

    with Vocabulary(model) as vocabulary:
        asked, one, two = (len(vocabulary.tokenize(questions[0] + end)) - len(vocabulary.tokenize(""))
                           for end in ("", " xy", " z"))
    assert (one, 1 + one - asked) in logits  # a question with a draft of its answer
    assert (8, 0) in logits and (asked % 8, 1) in logits  # in steps that select
    assert {made for _, made in logits} == {0, 1, 1 + one - asked, 1 + two - asked}


def test_labels_say_what_was_asked():
    tuned = Setting("streaming", "x4", window=9, keep=3)
    assert tuned.label == "streaming x4 window 9 keep 3" and tuned.method == "streaming"
    assert Setting("streaming", "512").label == "streaming 512"
    assert Setting(selection=SelectionSettings(budget=256)).label == "quest 256"
    assert Setting(selection=SelectionSettings("quest", 0, 32, 0, per_query_head=True)).label == (
        "quest auto page 32 dense 0 per query head")
    every = [Setting(policy, "x4", window, keep) for policy in ("kvdiff", "streaming") for window in (None, 4, 9)
             for keep in (None, 4, 9)]
    every += [Setting(type_k=k, type_v=v, selection=SelectionSettings("quest", budget, page, dense, False, each))
              for k in ("f16", "q8_0") for v in ("f16", "q8_0") for budget in (0, 16) for page in (8, 16)
              for dense in (0, 2) for each in (False, True)]
    assert len({s.label for s in every}) == len(every)


def test_logits_of_the_last_tokens(model):
    tokens = list(range(300, 309))
    with Session(model, n_ctx=64, n_ubatch=16, n_threads=1) as s:
        found = {}
        for n in ("all", 0, "none", 1, "last", 4, 9):
            s.clear()
            found[n] = s.decode(tokens, 0, logits=n)
        with pytest.raises(ValueError, match="logits 10 of 9 tokens"):
            s.decode(tokens, 9, logits=10)
        with pytest.raises(ValueError, match="logits 'some' of 9 tokens"):
            s.decode(tokens, 9, logits="some")
    assert found["all"].shape == found[9].shape and found[4].shape[0] == 4 and found[1].shape[0] == 1
    assert found[0] is found["none"] is None
    for n in (1, "last", 4, 9):
        np.testing.assert_allclose(found[n], found["all"][-len(found[n]):], rtol=0, atol=1e-4)
    assert abs(np.diff(found["all"], axis=0)).max() > 1e-2  # each token has its own
