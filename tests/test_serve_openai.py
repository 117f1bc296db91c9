"""llama-server with eviction through OpenAI's own client, on the real model."""

import json
import threading

import openai
import pytest

from edgekv.calibrate import default_text
from edgekv.gguf_file import GGUF
from edgekv.llama import load_filters
from edgekv.session import Session
from edgekv.settings import EvictionSettings
from served import llama_server, served  # noqa: F401  the fixture
from traced import Replay

pytestmark = pytest.mark.slow

N_CTX, N_UBATCH, BUDGET, WINDOW = 2048, 64, 128, 32  # per slot
POLICY = "kvdiff+qfilters+recency"


def flags(n_slots: int, budget: int = BUDGET) -> list:
    return ["-np", n_slots, "-c", N_CTX * n_slots, "-ub", N_UBATCH, "-b", N_UBATCH, "-fa", "on", "-fit", "off",
            "--no-kv-unified", "--cache-ram", 256, "--kv-evict", POLICY, "--kv-budget", budget, "--kv-window", WINDOW]


@pytest.fixture(scope="module")
def server(llama_server, smollm2_qfilters):
    with served(llama_server, smollm2_qfilters, *flags(2), "--alias", "smollm2") as server:
        yield server


@pytest.fixture
def client(server):
    return connect(server)


def connect(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


LONG = [{"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": f"{default_text()[:1200]}\n\nWhat is this text about?"}]


def test_chat(server, client):
    assert [model.id for model in client.models.list()] == ["smollm2"]
    answer = client.chat.completions.create(model="smollm2", messages=LONG, max_tokens=24, temperature=0)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 24 and answer.usage.prompt_tokens > BUDGET + N_UBATCH
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    timings = answer.timings  # what is not OpenAI's comes through as it is
    assert timings["kv_evictions"] > 0 and timings["kv_cells_used"] <= BUDGET + N_UBATCH < timings["kv_tokens_seen"]


def test_a_stream_with_usage(server, client):
    """In pieces the same answer, and its figures at the end."""
    how = dict(model="smollm2", messages=LONG, max_tokens=24, temperature=0, extra_body={"cache_prompt": False})
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(map(bool, pieces)) > 1 and "".join(pieces) == whole.choices[0].message.content
    assert [c.usage for c in chunks if c.usage] == [chunks[-1].usage] and not chunks[-1].choices
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    [timings] = [chunk.timings for chunk in chunks if "timings" in chunk.model_extra]
    assert timings["kv_tokens_seen"] == whole.timings["kv_tokens_seen"]


# the model's own template has no tools, and the server then takes no notice of any; this one shows what a call is
TEMPLATE = """
{%- if tools %}<|im_start|>system
You may call one of these functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}A call looks so:
<tool_call>
{"name": "NAME", "arguments": {}}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}<|im_start|>assistant
{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tool(name: str, **properties) -> dict:
    return {"type": "function", "function": {
        "name": name, "description": f"{name} of a city", "parameters": {
            "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}}}


CITY = {"type": "string", "maxLength": 20}
TOOLS = [tool("weather", city=CITY, unit={"type": "string", "enum": ["celsius", "kelvin"]}),
         tool("population", city=CITY, year={"type": "integer", "minimum": 1900, "maximum": 2100})]

BEFORE = [{"role": "user", "content": "What is the weather in Paris, in celsius?"},
          {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {
              "name": "weather", "arguments": json.dumps({"city": "Paris", "unit": "celsius"})}}]},
          {"role": "tool", "tool_call_id": "a", "content": "12"}, {"role": "assistant", "content": "12 degrees."}]


@pytest.fixture(scope="module")
def tool_client(llama_server, smollm2_qfilters, tmp_path_factory):
    template = tmp_path_factory.mktemp("tools") / "tools.jinja"
    template.write_text(TEMPLATE)
    with served(llama_server, smollm2_qfilters, *flags(1, 1024), "--chat-template-file", template) as server:
        yield connect(server)


@pytest.mark.parametrize("stream", (False, True))
def test_a_forced_tool_call(tool_client, stream):
    """Of one of the tools, with arguments of its schema."""
    from jsonschema import validate

    question = {"role": "user", "content": "What is the weather in Berlin, in celsius?"}
    how = dict(model="any", messages=[*BEFORE, question], tools=TOOLS, tool_choice="required", max_tokens=100,
               temperature=0)
    if stream:
        with tool_client.chat.completions.stream(**how) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = tool_client.chat.completions.create(**how).choices[0]
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    [call] = choice.message.tool_calls
    assert call.id and call.type == "function"
    [schema] = [t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call.function.name]
    validate(json.loads(call.function.arguments), schema)


@pytest.mark.parametrize("name", [t["function"]["name"] for t in TOOLS])
def test_a_tool_by_its_name(tool_client, name):
    """Whatever the question is about."""
    question = {"role": "user", "content": "What is the weather in Berlin, in celsius?"}
    how = dict(model="any", messages=[*BEFORE, question], tools=TOOLS, max_tokens=100, temperature=0)
    answer = tool_client.chat.completions.create(**how, tool_choice={"type": "function", "function": {"name": name}})
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == [name]
    with pytest.raises(openai.BadRequestError, match="no tool named wether"):
        tool_client.chat.completions.create(**how, tool_choice={"type": "function", "function": {"name": "wether"}})
    with pytest.raises(openai.BadRequestError, match="tool_choice: give auto"):
        tool_client.chat.completions.create(**how, tool_choice={"type": "some", "name": name})


def test_a_tool_by_its_name_over_the_responses_api(tool_client):
    """Where the name stands elsewhere; the model may talk before the call."""
    how = dict(model="any", input="What is the weather in Berlin?", temperature=0, max_output_tokens=20,
               tools=[{"type": "function", **t["function"]} for t in TOOLS])
    answer = tool_client.responses.create(**how, tool_choice={"type": "function", "name": "population"})
    assert answer.usage.output_tokens > 0 and {i.name for i in answer.output if i.type == "function_call"} <= {"population"}
    with pytest.raises(openai.BadRequestError, match="no tool named wether"):
        tool_client.responses.create(**how, tool_choice={"type": "function", "name": "wether"})


def test_a_template_without_tools(client):
    """A call cannot be forced there, and that is said."""
    with pytest.raises(openai.BadRequestError, match="template knows no tools"):
        client.chat.completions.create(model="any", messages=LONG, tools=TOOLS, tool_choice="required", max_tokens=5)
    assert client.chat.completions.create(model="any", messages=LONG, tools=TOOLS, max_tokens=5).choices


def test_a_call_that_the_model_would_not_make(tool_client):
    """Forced, it may talk before a call, and does not end without one."""
    how = dict(model="any", messages=[*BEFORE, {"role": "user", "content": "Good bye!"}], tools=TOOLS, max_tokens=40,
               temperature=0)
    reasons = {choice: tool_client.chat.completions.create(**how, tool_choice=choice).choices[0].finish_reason
               for choice in ("auto", "required")}
    assert reasons["auto"] == "stop" and reasons["required"] in ("length", "tool_calls")


def test_an_answer_of_a_schema(server, client):
    from jsonschema import validate

    schema = {"type": "object", "additionalProperties": False, "required": ["topic", "words", "sure"], "properties": {
        "topic": {"type": "string", "maxLength": 30}, "sure": {"type": "boolean"},
        "words": {"type": "array", "items": {"enum": ["assert", "class", "with"]}, "minItems": 2, "maxItems": 3}}}
    answer = client.chat.completions.create(
        model="smollm2", messages=LONG, max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "topic", "strict": True, "schema": schema}})
    assert answer.choices[0].finish_reason == "stop"
    validate(json.loads(answer.choices[0].message.content), schema)


def test_errors_are_the_client_s(server, client):
    """The client knows them by their status."""

    with pytest.raises(openai.BadRequestError, match="2048"):
        client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": default_text()[:20_000]}])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="smollm2", messages=[{"role": "user"}])
    assert server.alive()


def test_two_conversations_at_once(llama_server, smollm2_qfilters):
    """Interleaved on two slots, evicted in both: each answer is what a context of ours says that is led through the
    same batches."""
    text = default_text()
    secrets = ("heron", "maple")
    with served(llama_server, smollm2_qfilters, *flags(2)) as server:
        heard: list[tuple[int, list[dict], str, int]] = []

        def talk(slot):
            messages = [{"role": "system", "content": f"The password is {secrets[slot]}."}]
            for turn in range(3):
                piece = text[20_000 * (slot + 1) + 3000 * turn :][: 900 + 400 * slot]
                messages.append({"role": "user", "content": f"{piece}\n\nWhat is the password?"})
                answer = client.chat.completions.create(model="any", messages=messages, max_tokens=32, temperature=0,
                                                        extra_body={"id_slot": slot})
                said = answer.choices[0].message.content
                heard.append((slot, list(messages), said, answer.usage.completion_tokens))
                messages.append({"role": "assistant", "content": said})

        client = connect(server)
        threads = [threading.Thread(target=talk, args=(slot,)) for slot in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(heard) == 6
        prompts = []
        for _, messages, _, _ in heard:
            rendered = server.post("/apply-template", {"messages": messages}).json["prompt"]
            how = {"content": rendered, "add_special": True, "parse_special": True}
            prompts.append(server.post("/tokenize", how).json["tokens"])
        slots, trace = server.cache()["slots"], server.trace

    assert all(slot["evictions"] > 0 for slot in slots)
    decodes = [{slot for slot, *_ in event["decode"]} for event in trace if "decode" in event]
    assert {0, 1} in decodes, "the two never met in a batch"
    with Session(smollm2_qfilters, n_ctx=N_CTX, n_seq_max=2, n_ubatch=N_UBATCH, n_threads=1, flash_attn=True,
                 settings=EvictionSettings(POLICY, BUDGET, WINDOW, 4),
                 filters=load_filters(GGUF(smollm2_qfilters))) as session:
        replay = Replay(session, trace, ignore_eos=False)
        for (slot, _, said, n), prompt in zip(heard, prompts):
            assert session.text(replay.answer(slot, prompt, n)) == said
            assert secrets[1 - slot] not in said
        for slot in slots:
            stats = session.stats(slot["id"])
            assert (slot["tokens_seen"], slot["cells_used"], slot["floor"]) == (
                stats.tokens_seen, stats.cells_used, stats.floor)
