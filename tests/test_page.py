"""The server's web page, in a headless Chromium.

Questions go to the real server with a real model where it is built, else to tests/mock_server.py, which also has the
bad days and the answers that no model gives on demand. ``EDGEKV_SCREENSHOT=FILE.png`` writes a picture of the page.
"""

import json
import os
import pydoc
import re
import shutil
import urllib.request
from urllib.parse import urlsplit

import pytest

from mock_server import PAGE, MockServer
from served import SERVER, served

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

pytestmark = pytest.mark.slow

ANSWER = ["The narrator", " is", " **Ishmael**", ",", " who", " goes", " to", " sea", "."]
PATIENCE = 300e3  # ms, for a real model on a busy machine
DROP = """([name, text, type]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name, {type}));
    for (const kind of ["dragenter", "dragover", "drop"]) {
        document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
    }
}"""
PASTE = """(text) => {
    const data = new DataTransfer();
    data.setData("text/plain", text);
    document.getElementById("ask").dispatchEvent(
        new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
}"""
# the lengths that the text of the last answer has had
WATCH = """() => {
    window.lengths = [];
    new MutationObserver(() => {
        const texts = document.querySelectorAll(".answer .text");
        if (texts.length) window.lengths.push(texts[texts.length - 1].textContent.length);
    }).observe(document.getElementById("log"), {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def chromium():
    if sync_playwright is None:
        pytest.skip("playwright is not installed: pip install 'edgekv[test]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    expect.set_options(timeout=30e3)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens the page of a server. What it asks of others, its errors, and what its policy stopped fail the test."""
    contexts, wrong = [], []

    def visit(url, **options):
        context = chromium.new_context(viewport={"width": 1200, "height": 800}, **options)
        contexts.append(context)
        context.set_default_timeout(30e3)

        def look(route):
            if urlsplit(route.request.url).netloc == urlsplit(url).netloc:
                return route.continue_()
            wrong.append(f"asked for {route.request.url}")
            return route.abort()

        def log(message):
            # what the server refuses is logged too, and is what some tests are about
            if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
                wrong.append(message.text)

        context.route("**/*", look)
        page = context.new_page()
        page.on("console", log)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("websocket", lambda socket: wrong.append(f"asked for {socket.url}"))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.fixture(scope="module")
def server(request, chromium):
    """The URL of a server that evicts: the real one if it is built."""
    if not SERVER.exists():
        with MockServer(ANSWER * 250) as mock:
            yield mock.url
        return
    model = request.getfixturevalue("smollm2_qfilters")
    flags = ["--kv-evict", "kvdiff", "--kv-budget", 512, "-c", 4096, "-np", 1, "-ub", 256, "-b", 256, "--metrics"]
    with served(SERVER, model, *flags, "-t", 2, "--alias", "SmolLM2-135M") as real:
        assert real.get("/").body == PAGE.read_bytes(), "the server was built with another page: build again"
        yield real.url


@pytest.fixture
def mock():
    with MockServer(ANSWER) as server:
        yield server


@pytest.fixture(scope="module")
def document():
    """2,000 to 3,000 tokens of plain text."""
    return pydoc.plain(pydoc.render_doc(__import__("textwrap")))[:9000]


def get(url, path):
    with urllib.request.urlopen(url + path, timeout=30) as answer:
        return answer.read().decode()


def ask(page, question, timeout=30e3):
    """Asks and waits for the end of the answer."""
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    done(page, timeout)


def done(page, timeout=30e3):
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=timeout)


def answers(page):
    return page.locator(".answer .text")


def data(locator):
    """The data-* attributes that are numbers, by their names in JSON."""
    found = locator.evaluate("node => Object.fromEntries([...node.attributes].map(a => [a.name, a.value]))")
    return {name.removeprefix("data-").replace("-", "_"): float(value) for name, value in found.items()
            if name.startswith("data-") and re.fullmatch(r"-?[\d.]+(e-?\d+)?", value)}


def sent(page):
    """The bodies of the questions that the page asks from now on."""
    bodies = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.url.endswith("/completions") else None)
    return bodies


def settings(page, **values):
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name="Save").click()


# --- against the real server, if it is built -------------------------------------------------------------------------


def test_document_question_and_picture(visit, server, document):
    page = visit(server)
    page.evaluate(WATCH)
    bodies = sent(page)
    settings(page, Temperature="0", Longest_answer="48")
    page.evaluate(DROP, ["textwrap.txt", document, "text/plain"])
    chip = page.get_by_role("listitem")
    expect(chip).to_contain_text(f"{len(document.encode()) / 1024:.1f} KiB")
    expect(chip).to_contain_text(re.compile(r"\d tokens"))
    ask(page, "What does dedent do?", PATIENCE)

    lengths = page.evaluate("lengths")
    # it grows; only the marks around code go once the second one is there
    assert len(set(lengths)) >= 5 and all(now >= before - 2 for before, now in zip(lengths, lengths[1:])), lengths
    first = bodies[0]["messages"]
    assert [message["role"] for message in first] == ["user", "user"]
    assert first[0]["content"].endswith(document) and first[1]["content"] == "What does dedent do?"
    assert bodies[0]["temperature"] == 0 and bodies[0]["max_tokens"] == 48

    expect(page.locator("#attached")).to_be_empty()
    answer = answers(page).inner_text()
    ask(page, "And what does fill do?", PATIENCE)
    assert bodies[1]["messages"][:2] == first
    assert bodies[1]["messages"][2]["role"] == "assistant"
    assert re.sub(r"\W", "", bodies[1]["messages"][2]["content"]) == re.sub(r"\W", "", answer)
    assert bodies[1]["messages"][3:] == [{"role": "user", "content": "And what does fill do?"}]

    figures = json.loads(get(server, "/edgekv"))
    metrics = re.findall(r"^edgekv:(\w+) (\S+)$", get(server, "/metrics"), re.M)
    metrics = {name: float(value) for name, value in metrics}
    slot, picture = page.locator("[data-slot='0']"), page.locator("#cache")
    seen = figures["totals"]["tokens_seen"]
    expect(picture).to_have_attribute("data-tokens-seen", str(seen))
    assert data(picture) == pytest.approx(figures["totals"])
    assert metrics == pytest.approx(figures["totals"])
    shown = data(slot)
    assert shown == pytest.approx({**figures["slots"][0], "slot": 0})
    assert shown["cells_used"] < shown["tokens_seen"] and shown["evictions"] >= 2
    drawn = data(slot.locator(".bar.seen"))
    assert drawn["start"] == shown["keep"] and drawn["recent"] == shown["tokens_seen"] - shown["floor"]
    assert drawn["start"] + drawn["middle"] + drawn["recent"] == shown["tokens_seen"]
    assert drawn["start"] + drawn["kept"] + drawn["recent"] == shown["cells_used"]
    said = slot.inner_text()
    assert f"{seen:,} tokens seen" in said
    assert f"{shown['cells_used']:,.0f} of {shown['cells_allocated']:,.0f} cells in use" in said

    timings = data(page.locator(".answer").last)
    assert timings["kv_cells_used"] == shown["cells_used"] and timings["kv_tokens_seen"] == shown["tokens_seen"]
    # the last token of an answer is never read
    assert timings["cache_n"] + timings["prompt_n"] + timings["predicted_n"] - shown["tokens_seen"] in (0, 1)
    assert f"answer {timings['predicted_n']:,.0f} at" in page.locator(".figures").last.inner_text()
    if os.environ.get("EDGEKV_SCREENSHOT"):
        page.locator("#log").evaluate("log => { log.scrollTop = 0; }")
        page.screenshot(path=os.environ["EDGEKV_SCREENSHOT"])


def test_stop(visit, server):
    page = visit(server)
    settings(page, Temperature="0", Longest_answer="2000")
    page.get_by_label("Question", exact=True).fill("Count to a thousand.")
    page.keyboard.press("Enter")
    expect(answers(page)).not_to_be_empty(timeout=PATIENCE)
    page.keyboard.press("Escape")
    done(page)
    expect(page.locator(".note")).to_have_text("Stopped.")
    text = answers(page).inner_text()
    assert data(page.locator("#cache"))["tokens_seen"] >= 0
    settings(page, Longest_answer="8")
    ask(page, "And to ten?", PATIENCE)
    assert answers(page).first.inner_text() == text
    expect(answers(page).last).not_to_be_empty()
    assert page.locator(".error").count() == 0


def test_document_over_the_limit(visit, server, document):
    page = visit(server)
    settings(page, Longest_answer="8")
    page.evaluate(DROP, ["long.txt", document * 5, "text/plain"])
    expect(page.locator("#attached .chip")).to_contain_text("more than the context of 4,096")
    ask(page, "What is this?", PATIENCE)
    expect(page.get_by_role("alert")).to_contain_text("exceeds the available context size")
    page.get_by_role("button", name="Edit the question").click()
    expect(page.get_by_label("Question", exact=True)).to_have_value("What is this?")
    page.get_by_label("Remove long.txt").click()
    ask(page, "What is a cache?", PATIENCE)
    expect(page.locator(".turn")).to_have_count(1)
    expect(answers(page)).not_to_be_empty()


# --- bad days --------------------------------------------------------------------------------------------------------


def test_stop_hangs_up(visit, mock):
    mock.answer = ["word "] * 2000
    page = visit(mock.url)
    page.get_by_label("Question", exact=True).fill("?")
    page.get_by_role("button", name="Send").click()
    expect(answers(page)).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    done(page)
    assert mock.hung_up.wait(30)


def test_refusal_and_retry(visit, mock):
    page = visit(mock.url)
    mock.refuse = (500, "Compute\nerror.")
    ask(page, "one")
    expect(page.get_by_role("alert").locator("span")).to_have_text("Compute error.")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("The narrator is Ishmael, who goes to sea.")
    expect(page.get_by_role("alert")).to_have_count(0)
    done(page)
    mock.refuse = (500, "Compute error.")
    ask(page, "two")
    ask(page, "three")  # what was never answered is not said again
    assert [message["content"] for message in mock.asked[-1]["messages"]] == ["one", "".join(ANSWER), "three"]


def test_stream_that_breaks(visit, mock):
    page = visit(mock.url)
    mock.breaks = 3
    ask(page, "one")
    expect(page.get_by_role("alert").locator("span")).to_have_text("Compute error.")
    expect(answers(page)).to_have_text("The narrator is Ishmael")


def test_server_that_goes_away(visit):
    with MockServer(ANSWER) as mock:
        page = visit(mock.url)
        expect(page.locator("#state")).to_have_text("mock · 4,096 tokens of context")
    ask(page, "one")
    expect(page.get_by_role("alert").locator("span")).to_have_text("No connection to the server")
    expect(page.locator("#state")).to_contain_text("No connection")


def test_model_that_loads(visit, mock):
    mock.loading = True
    page = visit(mock.url)
    expect(page.locator("#state")).to_have_text("The model is loading")
    page.get_by_label("Question", exact=True).fill("one")
    page.keyboard.press("Enter")
    expect(page.locator(".live")).to_contain_text("The model is loading")
    mock.loading = False
    expect(answers(page)).to_have_text("The narrator is Ishmael, who goes to sea.")
    expect(page.locator("#state")).to_have_text("mock · 4,096 tokens of context")


def test_key(visit, mock):
    mock.key = "sesame"
    page = visit(mock.url)
    expect(page.locator("#state")).to_have_text("The server wants an API key: see Settings")
    ask(page, "one")
    expect(page.get_by_role("alert")).to_contain_text("Invalid API Key: enter the server's API key in Settings")
    settings(page, API_key="sesame")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("The narrator is Ishmael, who goes to sea.")
    expect(page.locator("#cache")).to_have_attribute("data-enabled", "true")
    page.reload()
    expect(page.locator("#state")).to_have_text("mock · 4,096 tokens of context")


HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

- <svg onload="window.hacked = 3"></svg>
- **<b onclick=hacked()>bold</b>**

### <iframe src="javascript:parent.hacked = 4"></iframe>

```html"><img src=x onerror=alert(5)>
</code></pre><script>window.hacked = 6</script>
```
[link](javascript:alert(7)) ![image](https://example.com/x.png)"""


def test_markup_is_text(visit, mock):
    mock.answer = [HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]
    mock.gap = 0.001
    page = visit(mock.url)
    page.evaluate(DROP, ["<img src=x onerror=alert(1)>.txt", "<script>window.hacked = 8</script>", "text/plain"])
    ask(page, "<script>window.hacked = 9</script>")
    mock.refuse = (400, "<img src=x onerror='window.hacked = 10'>")
    ask(page, "two")
    expect(page.get_by_role("alert")).to_contain_text("<img src=x onerror='window.hacked = 10'>")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#log").locator("script, img, svg, iframe, b[onclick], a").count() == 0
    shown = answers(page).first.inner_text()
    for literal in ("<script>window.hacked = 1</script>", "<svg onload=", "</code></pre><script>", "(javascript:"):
        assert literal in shown
    assert "<script>window.hacked = 9</script>" in page.locator(".question").first.inner_text()


# --- what it shows ---------------------------------------------------------------------------------------------------


MARKDOWN = """# Title

One **bold** and *soft*,
2*3*4, `a*b*c` and snake_case.

1. first

   ```py
   x = 1

   y = 2
   ```
2. second
   - inner **one**
   - inner two

* star
---
~~~
- no list
~~~
```c
open"""
TREE = """node => {
    const tree = (n) => n.nodeType === Node.TEXT_NODE ? n.data
        : n.className === "code" ? ["code", n.querySelector("span").textContent, n.querySelector("code").textContent]
        : [n.tagName.toLowerCase(), ...[...n.childNodes].map(tree).filter((c) => c !== "")];
    return [...node.children].map(tree);
}"""


@pytest.mark.parametrize("size", [1, 5, 10_000])  # of the pieces in which it comes
def test_markdown(visit, mock, size):
    mock.answer, mock.gap = [MARKDOWN[i : i + size] for i in range(0, len(MARKDOWN), size)], 0.001
    page = visit(mock.url)
    ask(page, "?")
    assert answers(page).evaluate(TREE) == [
        ["h3", "Title"],
        ["p", "One ", ["strong", "bold"], " and ", ["em", "soft"], ",\n2*3*4, ", ["code", "a*b*c"], " and snake_case."],
        ["ol", ["li", ["p", "first"], ["code", "py", "x = 1\n\ny = 2"]],
         ["li", ["p", "second"], ["ul", ["li", ["p", "inner ", ["strong", "one"]]], ["li", ["p", "inner two"]]]]],
        ["ul", ["li", ["p", "star"]]],
        ["hr"],
        ["code", "", "- no list"],
        ["code", "c", "open"],
    ]


def test_odd_markdown_ends(visit, mock):
    """Nothing hangs or overflows on what a model may repeat for ever."""
    mock.gap = 0
    page = visit(mock.url)
    for text in ("- " * 20_000, "*" * 20_000, "**a " * 5_000, "`" * 20_000, "# " * 20_000, "1. " * 20_000,
                 "- - -x\n" * 500, "  " * 20_000 + "x", "```\n" * 2_000, "_ " * 20_000 + "x",
                 "# a" + " #" * 20_000 + "x"):
        mock.answer = [text]
        ask(page, "?")
        page.get_by_role("button", name="New conversation").click()


@pytest.mark.parametrize("clipboard", [True, False])
def test_code_is_copied(visit, mock, clipboard):
    """Without a clipboard API too: plain HTTP to another machine has none."""
    mock.answer = ["Look:\n\n```py\nx = 1\n", "if x:\n    y = 2\n```\nDone."]
    page = visit(mock.url, permissions=["clipboard-read", "clipboard-write"])
    if not clipboard:
        page.evaluate("() => { window.reader = navigator.clipboard;"
                      " Object.defineProperty(navigator, 'clipboard', {value: undefined}); }")
    ask(page, "?")
    button = page.get_by_role("button", name="Copy the code")
    button.click()
    expect(button).to_have_text("Copied")
    assert page.evaluate("(window.reader || navigator.clipboard).readText()") == "x = 1\nif x:\n    y = 2"


def test_progress(visit, mock, document):
    mock.gap, mock.waits = 0.5, (384, 3)
    page = visit(mock.url)
    page.evaluate(DROP, ["a.txt", document, "text/plain"])
    page.get_by_label("Question", exact=True).fill("?")
    page.keyboard.press("Enter")
    live = page.locator(".live")
    words = len(document.split()) + 2  # the name, the question
    # 384 took 1.5 s
    expect(live).to_have_text(f"Reading: 384 of {words:,} tokens, about {round((words - 384) / 256)} s left")
    meter = page.get_by_role("progressbar", name="Prompt read")
    assert meter.evaluate("m => [m.value, m.max]") == [384, words]
    mock.go.release()
    expect(live).to_have_text("3 tokens, 2.0 tokens/s")
    expect(answers(page)).to_have_text("The narrator is Ishmael")
    assert meter.count() == 0
    mock.go.release()
    done(page)
    expect(live).to_have_count(0)
    expect(page.locator(".figures summary")).to_contain_text(f"prompt {words:,}, ")


def test_picture_is_to_scale(visit, mock):
    mock.seen, mock.used, mock.floor, mock.evictions = 2619, 571, 2432, 16
    page = visit(mock.url, reduced_motion="reduce")
    slot = page.locator("[data-slot='0']")
    expect(slot).to_contain_text("354 of 2,402 kept, 15 %")  # 571 - 30 - (2619 - 2432) of 2432 - 30
    expect(slot).to_contain_text("the window of 128 is underlined")

    def width(selector):
        return slot.locator(selector).bounding_box()["width"]

    token = width(".bar.seen") / 2619
    for selector, tokens in {".bar.cells": 768, ".bar.seen .start": 30, ".bar.seen .middle": 2402,
                             ".bar.seen .recent": 187, ".bar.cells .start": 30, ".bar.cells .middle": 354,
                             ".bar.cells .recent": 187, ".window i": 128}.items():
        assert width(selector) == pytest.approx(tokens * token, abs=0.5), selector
    assert "the first 30 are pinned, 354 of the next 2,402 are kept, the last 187 are complete" in (
        slot.get_by_role("img").first.get_attribute("aria-label"))

    mock.seen = mock.used = 400
    mock.floor = mock.evictions = 0
    expect(slot).to_contain_text("400 tokens seen")
    assert data(slot.locator(".bar.seen")) == {"start": 30, "middle": 0, "kept": 0, "recent": 370}
    expect(slot).not_to_contain_text("evicted from")


def test_full_cache(visit, mock):
    mock.evicts, mock.alias = False, "/models/full.gguf"
    page = visit(mock.url)
    expect(page.locator("#state")).to_have_text("full.gguf · 4,096 tokens of context")
    expect(page.locator("#rules")).to_contain_text("The full cache is in use")
    ask(page, "one two three")
    ask(page, "four")
    # the first question's 3 words and the answer's 8 are there already
    assert page.locator("#totals").inner_text().split("\n") == [
        "Taken from the cache", "11 tokens", "Prompt read", "1 token", "Answer", "9 tokens", "Together", "21 tokens"]
    assert page.locator("[data-slot]").count() == 0


# --- what it sends ---------------------------------------------------------------------------------------------------


def test_settings(visit, mock):
    page = visit(mock.url)
    ask(page, "one")
    settings(page, Temperature="0.25", Top_p="0.5", Longest_answer="4", System_prompt="Be brief.")
    ask(page, "two")
    plain, full = mock.asked
    assert plain == {"messages": [{"role": "user", "content": "one"}], "stream": True, "return_progress": True,
                     "timings_per_token": True, "stream_options": {"include_usage": True}}
    assert full == {**plain, "temperature": 0.25, "top_p": 0.5, "max_tokens": 4, "messages": [
        {"role": "system", "content": "Be brief."}, *plain["messages"],
        {"role": "assistant", "content": "".join(ANSWER)}, {"role": "user", "content": "two"}]}
    expect(page.locator(".note")).to_contain_text("Cut off")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("-1")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog")).to_be_visible()  # no temperature
    page.keyboard.press("Escape")
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.25")
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")


def test_going_back(visit, mock):
    page = visit(mock.url)
    page.evaluate(DROP, ["a.txt", "some text", "text/plain"])
    ask(page, "one")
    page.get_by_role("button", name="Regenerate").click()
    done(page)
    expect(answers(page)).to_have_count(1)
    assert mock.asked[1] == mock.asked[0]
    page.get_by_role("button", name="Edit the question").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#attached .chip")).to_contain_text("a.txt")
    ask(page, "other")
    assert [message["content"] for message in mock.asked[2]["messages"]] == ["a.txt:\n\nsome text", "other"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "two")
    assert [message["content"] for message in mock.asked[3]["messages"]] == ["two"]


def test_new_conversation_ends_the_old_answer(visit, mock):
    mock.answer = ["word "] * 2000
    page = visit(mock.url)
    page.get_by_label("Question", exact=True).fill("one")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("word word")
    page.get_by_role("button", name="New conversation").click()
    assert mock.hung_up.wait(30)
    mock.answer = ANSWER
    ask(page, "two")
    expect(page.locator(".turn")).to_have_count(1)
    expect(answers(page)).to_have_text("The narrator is Ishmael, who goes to sea.")
    assert mock.asked[-1]["messages"] == [{"role": "user", "content": "two"}]


def test_templates_that_alternate(visit, mock):
    """Gemma's, for one, refuses two messages of the user in a row."""
    mock.template = "{{ raise_exception('Conversation roles must alternate user/assistant') }}"
    page = visit(mock.url)
    expect(page.locator("#state")).to_have_text("mock · 4,096 tokens of context")
    page.evaluate(DROP, ["a.txt", "some text", "text/plain"])
    ask(page, "one")
    assert mock.asked[0]["messages"] == [{"role": "user", "content": "a.txt:\n\nsome text\n\none"}]


def test_pastes_and_files(visit, mock):
    page = visit(mock.url)
    chips, hint = page.locator("#attached .chip"), page.locator("#hint")
    page.evaluate(PASTE, "long " * 1000)
    expect(chips).to_contain_text("Pasted text 1")
    page.get_by_label("Remove Pasted text 1").press("Enter")
    expect(chips).to_have_count(0)
    for name, content, why in [("a.bin", b"\xff\xfe\x00\x81", "cannot be read as text in UTF-8"),
                               ("b.bin", b"text\x00text", "is no text file"), ("c.txt", b" \n", "is empty")]:
        page.get_by_label("Text files").set_input_files({"name": name, "mimeType": "text/plain", "buffer": content})
        expect(hint).to_have_text(f"{name} {why}")
    expect(chips).to_have_count(0)
    page.get_by_label("Text files").set_input_files([
        {"name": name, "mimeType": "text/plain", "buffer": content.encode()} for name, content in
        [("d.txt", "größer"), ("e.md", "# e")]])
    expect(chips).to_have_count(2)
    ask(page, "which?")
    contents = [message["content"] for message in mock.asked[0]["messages"]]
    assert contents == ["d.txt:\n\ngrößer", "e.md:\n\n# e", "which?"]


# --- for everybody ---------------------------------------------------------------------------------------------------


def test_narrow_and_by_keyboard(visit, mock):
    mock.seen, mock.used, mock.floor, mock.evictions = 2619, 571, 2432, 16
    page = visit(mock.url, color_scheme="dark")
    page.set_viewport_size({"width": 320, "height": 640})
    expect(page.locator("#cache .brief")).to_have_text("571 cells hold 2,619 tokens · 8.4 MiB")
    assert page.locator("#slots").is_hidden()
    assert page.evaluate("document.activeElement.id") == "ask"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    assert mock.asked[0]["messages"][0]["content"] == "one\ntwo"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.ariaLabel"))
    assert {"New conversation", "Settings", "Attach a text", "Regenerate", "Edit the question", "Copy"} <= reached
    page.locator("#cache summary").press("Enter")
    expect(page.locator("#slots")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, [role=img], progress")]
        .filter((n) => !n.ariaLabel && !n.textContent.trim() && !n.labels?.length).map((n) => n.outerHTML)""")
    assert unnamed == []
    # light on dark, and readable
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"


def test_one_small_file():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.encode()) < 60_000
    assert not re.findall(r"https?://|\bsrc=|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
