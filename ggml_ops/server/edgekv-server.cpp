#include "edgekv-server.h"

#include "llama-edgekv.h"
#include "server-task.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr int64_t SNAPSHOT_US = 100*1000;

// what the whole context has counted, and what a request is measured from
struct counts {
    uint64_t evictions   = 0;
    uint64_t evict_us    = 0;
    uint64_t steps       = 0;
    uint64_t pages_read  = 0;
    uint64_t pages_total = 0;
    uint64_t bytes_read  = 0;

    counts() = default;
    explicit counts(const llama_edgekv_stats & s) :
        evictions(s.n_evictions_all), evict_us(s.evict_us), steps(s.n_selections),
        pages_read(s.pages_read), pages_total(s.pages_total), bytes_read(s.bytes_read) {}

    counts & operator+=(const counts & o) {
        evictions += o.evictions; evict_us += o.evict_us; steps += o.steps;
        pages_read += o.pages_read; pages_total += o.pages_total; bytes_read += o.bytes_read;
        return *this;
    }
    counts operator-(const counts & o) const {
        counts res = *this;
        res.evictions -= o.evictions; res.evict_us -= o.evict_us; res.steps -= o.steps;
        res.pages_read -= o.pages_read; res.pages_total -= o.pages_total; res.bytes_read -= o.bytes_read;
        return res;
    }
};

struct slot_state {
    std::set<int> boundaries; // where somebody may want to come back to; no checkpoint has them yet

    counts   begin; // of the context, when the request began
    uint64_t evictions       = 0; // of the sequence, then
    bool     from_checkpoint = false;
};

struct state {
    llama_context *     ctx = nullptr;
    llama_edgekv_params how = {};

    bool evicts    = false;
    bool selects   = false;
    bool recurrent = false; // a state that can be cut back to nowhere

    int32_t n_keep   = 0; // --keep: 0 pins the system prompt
    int32_t n_ubatch = 0;
    int32_t n_slots  = 1;
    int32_t n_ctx    = 0; // of a slot

    size_t checkpoint_bytes = 0; // of a slot at most
    size_t checkpoint_count = 0;

    std::vector<slot_state> slots;

    counts   before; // of contexts that are gone, less what the making of this one counted
    uint64_t restores = 0;
    uint64_t reread   = 0;

    int64_t t_snapshot = 0;

    std::ofstream trace;
    std::map<const void *, int> saved; // names of prompts in the prompt cache, in the trace
    int n_saved = 0;                   // states so far
};

state & self() {
    static state s;
    return s;
}

// what other threads read
std::mutex  g_mutex;
json        g_snapshot = json::object({{"enabled", false}});
std::string g_metrics;

int64_t g_cache_ram_checkpoints = 0; // bytes, see edgekv_server_defaults()

llama_edgekv_sequence sequence(int id_slot) {
    llama_edgekv_sequence res = {};
    res.struct_size = sizeof(res);
    llama_edgekv_get_sequence(self().ctx, id_slot, &res);
    return res;
}

llama_edgekv_stats stats(int seq_id) {
    llama_edgekv_stats res = {};
    res.struct_size = sizeof(res);
    llama_edgekv_get_stats(self().ctx, seq_id, &res);
    return res;
}

void trace(const json & event) {
    auto & s = self();
    if (s.trace.is_open()) {
        s.trace << event.dump() << std::endl;
    }
}

bool cut(int id_slot, int n) {
    auto & s = self();
    if (sequence(id_slot).tokens_seen == n) {
        return true;
    }
    return llama_memory_seq_rm(llama_get_memory(s.ctx), id_slot, n, -1);
}

// a checkpoint serves a prompt that shares this many of its tokens; 0 if it does not
int reach(const common_prompt_checkpoint & c, int n_shared) {
    const int n = std::min<int64_t>(c.n_tokens, n_shared);
    return n >= c.pos_min ? n : 0;
}

size_t bytes(const server_prompt & prompt) {
    size_t res = 0;
    for (const auto & c : prompt.checkpoints) {
        res += c.size();
    }
    return res;
}

bool restore(int id_slot, const common_prompt_checkpoint & c) {
    auto & s = self();
    llama_edgekv_clear_error();
    const size_t n = llama_state_seq_set_data_ext(s.ctx, c.data_tgt.data(), c.data_tgt.size(), id_slot,
            LLAMA_STATE_SEQ_FLAGS_NONE);
    if (n != c.data_tgt.size()) {
        SRV_WRN("slot %d: a checkpoint could not be restored: %s\n", id_slot, llama_edgekv_last_error());
        return false;
    }
    trace({{"restore", c.id_task}, {"slot", id_slot}});
    return true;
}

void save(int id_slot, server_prompt & prompt, const llama_edgekv_sequence & seq) {
    auto & s = self();

    const size_t size = llama_state_seq_get_size_ext(s.ctx, id_slot, LLAMA_STATE_SEQ_FLAGS_NONE);
    if (size == 0 || size > s.checkpoint_bytes || s.checkpoint_count == 0) {
        return;
    }
    auto & all = prompt.checkpoints;

    // what has nothing that the new one lacks goes first, then the least recently used
    all.remove_if([&](const common_prompt_checkpoint & old) {
        return seq.floor <= old.pos_min && old.n_tokens <= seq.tokens_seen;
    });
    while (!all.empty() && (all.size() >= s.checkpoint_count || bytes(prompt) + size > s.checkpoint_bytes)) {
        all.pop_front();
    }

    common_prompt_checkpoint c;
    c.data_tgt.resize(size);
    if (llama_state_seq_get_data_ext(s.ctx, c.data_tgt.data(), size, id_slot, LLAMA_STATE_SEQ_FLAGS_NONE) != size) {
        SRV_WRN("slot %d: a checkpoint could not be made: %s\n", id_slot, llama_edgekv_last_error());
        return;
    }
    c.update_pos(seq.tokens_seen, (llama_pos) seq.floor, (llama_pos) seq.tokens_seen);
    c.id_task = s.n_saved; // stock's, who asks whether it was this task; ours have a name in the trace
    trace({{"save", s.n_saved++}, {"slot", id_slot}});
    all.push_back(std::move(c));
}

} // namespace

// --- start ----------------------------------------------------------------------------------------------------------

void edgekv_server_defaults(common_params & params) {
    const bool evicts  = params.edgekv.evicts();
    const bool selects = params.edgekv.selects();
    if (!evicts && !selects) {
        return;
    }
    if (params.n_parallel < 0) { // stock's choice would come with a unified cache
        params.n_parallel = 4;
    }
    if (!evicts) {
        return;
    }
    // evictions happen between ubatches, and nobody could keep the state between two of one decode
    if (params.n_ubatch > 0) { // else it is the batch
        params.n_batch = std::min(params.n_batch, params.n_ubatch);
    }

    // one half of --cache-ram for prompts, one for checkpoints
    const int64_t limit = params.cache_ram_mib < 0 ? 8192 : params.cache_ram_mib;
    g_cache_ram_checkpoints = limit*1024*1024/2;
    if (params.cache_ram_mib > 0) {
        params.cache_ram_mib = std::max(1, params.cache_ram_mib/2);
    }
}

void edgekv_server_attach(llama_context * ctx, const common_params & params) {
    auto & s = self();

    s.ctx = ctx;
    s.how = {};
    s.how.struct_size = sizeof(s.how);
    const bool any = llama_edgekv_get_settings(ctx, &s.how);

    s.evicts    = any && std::string(s.how.policy) != "none";
    s.selects   = any && std::string(s.how.select) != "none";
    s.recurrent = llama_model_is_recurrent(llama_get_model(ctx)) || llama_model_is_hybrid(llama_get_model(ctx));
    s.n_keep    = params.n_keep;
    s.n_ubatch  = (int32_t) llama_n_ubatch(ctx);
    s.n_slots   = params.n_parallel;
    s.n_ctx     = (int32_t) llama_n_ctx_seq(ctx);

    // a single slot with more than half could not go to the prompt cache, which counts its checkpoints too
    s.checkpoint_bytes = g_cache_ram_checkpoints/std::max(2, s.n_slots);
    s.checkpoint_count = std::max(0, params.n_ctx_checkpoints);

    s.slots.assign(s.n_slots, {});

    if (edgekv_enabled()) {
        s.before = s.before - counts(stats(-1)); // warming up
        if (const char * file = std::getenv("EDGEKV_TRACE"); file && !s.trace.is_open()) {
            s.trace.open(file);
        }
    }
}

bool edgekv_evicts()  { return self().evicts; }
bool edgekv_enabled() { return self().evicts || self().selects; }

// --- requests -------------------------------------------------------------------------------------------------------

// tokens that can be pinned beside the window
static uint32_t room() {
    return self().how.budget - self().how.window;
}

// what a request wants pinned, and the BOS token, which nobody counts, if there is room for it
static uint32_t pinned(const server_task & task) {
    const bool bos = llama_vocab_get_add_bos(llama_model_get_vocab(llama_get_model(self().ctx)));
    return (uint32_t) std::min<int64_t>((int64_t) task.params.n_keep + bos, room());
}

std::string edgekv_refusal(const server_task & task) {
    if (!edgekv_evicts()) {
        return "";
    }
    if (task.params.n_keep < 0) {
        return "n_keep: -1 would keep the whole prompt; say how many of its first tokens to keep";
    }
    if (task.params.n_keep > 0 && (uint32_t) task.params.n_keep > room()) {
        return string_format("n_keep: %d tokens and the window of %u exceed the budget of %u",
                task.params.n_keep, self().how.window, self().how.budget);
    }
    return "";
}

int edgekv_begin(int id_slot, server_prompt & prompt, const server_task & task, int n_shared) {
    auto & s    = self();
    auto & slot = s.slots[id_slot];

    auto seq = sequence(id_slot);

    slot.boundaries.clear();
    slot.from_checkpoint = false;
    slot.begin     = counts(stats(-1));
    slot.evictions = seq.n_evictions;
    if (!s.evicts) {
        return n_shared;
    }

    // after an error the slot may know more tokens than the cache holds, and a request needs one to read
    const int wanted = (int) std::min<int64_t>({ n_shared, task.n_tokens() - 1, seq.tokens_seen });

    int n = wanted == seq.tokens_seen || wanted >= seq.floor ? wanted : 0;

    while (true) {
        auto best = prompt.checkpoints.end();
        int n_best = n;
        llama_pos floor_best = (llama_pos) seq.floor;
        for (auto it = prompt.checkpoints.begin(); it != prompt.checkpoints.end(); ++it) {
            const int r = reach(*it, wanted);
            // among equals the one that was evicted from least: an answer given again is the same one then
            if (r > n_best || (r == n_best && r > 0 && it->pos_min < floor_best)) {
                best       = it;
                n_best     = r;
                floor_best = it->pos_min;
            }
        }
        if (best == prompt.checkpoints.end()) {
            break;
        }
        if (restore(id_slot, *best)) {
            n = n_best;
            slot.from_checkpoint = true;
            s.restores++;
            prompt.checkpoints.splice(prompt.checkpoints.end(), prompt.checkpoints, best); // the last to go
            break;
        }
        prompt.checkpoints.erase(best);
        seq = sequence(id_slot); // a failure may have cleared it
        n = std::min<int>(n, seq.tokens_seen);
    }

    if (!cut(id_slot, n)) {
        n = 0;
        cut(id_slot, 0);
    }
    edgekv_trace_cut(id_slot, n);

    if (wanted - n > s.n_ubatch) {
        SRV_INF("slot %d: %d tokens are read again: no checkpoint goes back to where the prompt differs "
                "(--cache-ram gives them more room)\n", id_slot, wanted - n);
    }
    s.reread += wanted - n;

    // what follows the shared beginning is no longer the checkpoints'
    for (auto & c : prompt.checkpoints) {
        c.n_tokens = std::min<int64_t>(c.n_tokens, n_shared);
    }
    prompt.checkpoints.remove_if([](const common_prompt_checkpoint & c) { return c.n_tokens < c.pos_min; });

    // what was asked for, or the system prompt
    const auto & places = task.params.edgekv_places;
    const uint32_t keep = task.params.n_keep > 0 ? pinned(task) :
                          std::min<uint32_t>(std::max(4, places.system), room());
    if (sequence(id_slot).n_keep != keep) {
        llama_edgekv_set_keep(s.ctx, id_slot, keep);
        trace({{"keep", (int) keep}, {"slot", id_slot}});
    }

    // where another conversation may part, where the message begins, where a question behind a document may, and the answer
    seq = sequence(id_slot);
    const int answer = task.n_tokens() - 1;
    for (const int b : { (int) places.system, (int) places.message, task.n_tokens() - s.n_ubatch, answer }) {
        const bool covered = std::any_of(prompt.checkpoints.begin(), prompt.checkpoints.end(),
            [&](const common_prompt_checkpoint & c) { return c.pos_min <= seq.floor && reach(c, b) == b; });
        if (b > 0 && (b > n || b == answer) && !covered) {
            slot.boundaries.insert(b);
        }
    }

    slot.evictions = seq.n_evictions; // a restored state has its own
    return n;
}

void edgekv_copied(int id_slot, int to) {
    auto & s = self();
    if (edgekv_enabled()) {
        s.slots[to] = s.slots[id_slot];
    }
    trace({{"copy", id_slot}, {"slot", to}});
}

bool edgekv_is_boundary(int id_slot, int n_tokens) {
    return self().slots[id_slot].boundaries.count(n_tokens) > 0;
}

void edgekv_before_decode(int id_slot, server_prompt & prompt, int n_new) {
    auto & s    = self();
    auto & slot = s.slots[id_slot];

    if (slot.boundaries.empty()) {
        return;
    }
    const auto seq = sequence(id_slot);

    const bool due = s.recurrent ? slot.boundaries.count((int) seq.tokens_seen) > 0 : (uint32_t) n_new > seq.n_room;
    if (!due) {
        return;
    }
    const auto first  = slot.boundaries.lower_bound((int) seq.floor);
    const auto behind = slot.boundaries.upper_bound((int) seq.tokens_seen);

    const bool reached = first != slot.boundaries.end() && *first <= seq.tokens_seen;
    slot.boundaries.erase(slot.boundaries.begin(), behind);
    if (!reached) {
        return;
    }
    try {
        save(id_slot, prompt, seq);
    } catch (const std::exception & e) { // going back will cost more, going on must not fail
        SRV_WRN("slot %d: a checkpoint could not be made: %s\n", id_slot, e.what());
    }
}

// --- places of a chat -----------------------------------------------------------------------------------------------

static size_t common_prefix(const std::string & a, const std::string & b) {
    return std::mismatch(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()).first - a.begin();
}

edgekv_chat_places edgekv_find_places(const common_chat_templates * templates, const common_chat_templates_inputs & inputs,
        const std::string & prompt) {
    edgekv_chat_places res;
    if (!edgekv_evicts()) {
        return res;
    }
    const auto beginning = [&](std::vector<common_chat_msg> messages) -> int32_t {
        common_chat_templates_inputs part = inputs;
        part.messages = std::move(messages);
        part.add_generation_prompt  = false;
        part.continue_final_message = COMMON_CHAT_CONTINUATION_NONE;
        try {
            return (int32_t) common_prefix(common_chat_templates_apply(templates, part).prompt, prompt);
        } catch (const std::exception &) { // there are templates that want a user to speak first, or last
            return 0;
        }
    };

    // a message that begins like no other: all that is common stands in front of what the first one says
    common_chat_msg other;
    other.role    = "user";
    other.content = "\x01";

    std::vector<common_chat_msg> system;
    for (const auto & m : inputs.messages) {
        if (m.role != "system" && m.role != "developer") {
            break;
        }
        system.push_back(m);
    }
    system.push_back(other);

    res.system = beginning(std::move(system));
    if (inputs.messages.size() > 1) {
        res.message = beginning({ inputs.messages.begin(), inputs.messages.end() - 1 });
    }
    return res;
}

edgekv_chat_places edgekv_count_places(const json & data, const llama_vocab * vocab, const server_tokens & tokens) {
    edgekv_chat_places res;
    if (!data.contains("edgekv_places") || !edgekv_evicts()) {
        return res;
    }
    const auto & prompt = data.at("prompt").get<std::string>();
    const auto & places = data.at("edgekv_places");

    const auto count = [&](int32_t n_chars) -> int32_t {
        const auto part = common_tokenize(vocab, prompt.substr(0, n_chars), true, true);
        // a token may reach across the end
        return n_chars > 0 ? (int32_t) server_tokens(part, false).get_common_prefix(tokens) : 0;
    };
    res.system  = count(places.at(0).get<int32_t>());
    res.message = count(places.at(1).get<int32_t>());
    return res;
}

void edgekv_force_named_tool(json & body) {
    if (!body.contains("tool_choice") || !body.at("tool_choice").is_object()) {
        return;
    }
    const json & choice   = body.at("tool_choice");
    const json   function = json_value(choice, "function", json::object());
    const auto   name     = json_value(function, "name", json_value(choice, "name", std::string())); // /v1/responses has it there
    if (json_value(choice, "type", std::string()) != "function" || name.empty()) {
        throw std::invalid_argument("tool_choice: give auto, none, required, or "
                                    "{\"type\": \"function\", \"function\": {\"name\": ...}}");
    }
    json left = json::array();
    for (const json & tool : json_value(body, "tools", json::array())) {
        if (json_value(json_value(tool, "function", json::object()), "name", std::string()) == name) {
            left.push_back(tool);
        }
    }
    if (left.empty()) {
        throw std::invalid_argument("tool_choice: there is no tool named " + name);
    }
    body["tools"]       = std::move(left);
    body["tool_choice"] = "required";
}

// --- figures --------------------------------------------------------------------------------------------------------

static double read_per_step(const counts & c, double cells_used) {
    return c.pages_total ? cells_used*c.pages_read/c.pages_total : cells_used;
}

edgekv_figures edgekv_request(int id_slot) {
    edgekv_figures res;
    if (!edgekv_enabled()) {
        return res;
    }
    const auto & slot = self().slots[id_slot];

    const auto seq = sequence(id_slot);
    const auto all = stats(-1);
    const auto had = counts(all) - slot.begin;

    res.on              = true;
    res.tokens_seen     = seq.tokens_seen;
    res.cells_used      = seq.cells_used;
    res.evictions       = seq.n_evictions - slot.evictions;
    res.evict_ms        = had.evict_us/1000.0;
    res.read_per_step   = read_per_step(had, seq.cells_used);
    res.kv_bytes        = all.kv_bytes;
    res.from_checkpoint = slot.from_checkpoint;
    return res;
}

void edgekv_figures::add_to(common_json & timings) const {
    if (!on) {
        return;
    }
    timings["kv_tokens_seen"]     = tokens_seen;
    timings["kv_cells_used"]      = cells_used;
    timings["kv_evictions"]       = evictions;
    timings["kv_evict_ms"]        = evict_ms;
    timings["kv_read_per_step"]   = read_per_step;
    timings["kv_bytes"]           = kv_bytes;
    timings["kv_checkpoint_used"] = from_checkpoint ? 1 : 0;
}

namespace {

// one slot in the figures of all
struct slot_figures {
    llama_edgekv_sequence seq = {};

    size_t n_checkpoints    = 0;
    size_t checkpoint_bytes = 0;
};

void publish(const llama_edgekv_stats & all, const std::vector<slot_figures> & slots) {
    auto & s = self();

    counts sum = s.before;
    sum += counts(all);

    json list = json::array();
    size_t n_checkpoints = 0;
    size_t n_bytes       = 0;
    for (const auto & slot : slots) {
        list.push_back({
            {"id",               list.size()},
            {"n_ctx",            s.n_ctx},
            {"tokens_seen",      slot.seq.tokens_seen},
            {"cells_used",       slot.seq.cells_used},
            {"cells_allocated",  slot.seq.cells_allocated},
            {"floor",            slot.seq.floor},
            {"keep",             slot.seq.n_keep},
            {"evictions",        slot.seq.n_evictions},
            {"checkpoints",      slot.n_checkpoints},
            {"checkpoint_bytes", slot.checkpoint_bytes},
        });
        n_checkpoints += slot.n_checkpoints;
        n_bytes       += slot.checkpoint_bytes;
    }

    struct item {
        const char * name;
        const char * type;
        const char * help;
        double       value;
    };
    const item items[] = {
        { "tokens_seen",                "gauge",   "Tokens read into the sequences that the slots hold now", (double) all.tokens_seen },
        { "cells_used",                 "gauge",   "Cells of the cache in use, over all slots", (double) all.cells_used },
        { "cells_allocated",            "gauge",   "Cells of the cache, over all slots", (double) all.cells_allocated*s.n_slots },
        { "kv_bytes",                   "gauge",   "Bytes of the cache", (double) all.kv_bytes },
        { "scratch_bytes",              "gauge",   "Bytes reserved for evictions", (double) all.scratch_bytes },
        { "evictions_total",            "counter", "Evictions", (double) sum.evictions },
        { "evict_seconds_total",        "counter", "Seconds spent in evictions", sum.evict_us/1e6 },
        { "select_steps_total",         "counter", "Decode steps that read chosen pages only", (double) sum.steps },
        { "pages_read_total",           "counter", "Pages read by them, over layers, KV heads and tokens", (double) sum.pages_read },
        { "pages_total",                "counter", "Pages that they could have read", (double) sum.pages_total },
        { "bytes_read_total",           "counter", "Bytes of K, V and summaries read by them", (double) sum.bytes_read },
        { "checkpoints",                "gauge",   "Checkpoints of the slots", (double) n_checkpoints },
        { "checkpoint_bytes",           "gauge",   "Bytes of these checkpoints", (double) n_bytes },
        { "checkpoint_restores_total",  "counter", "Requests that went on from a checkpoint", (double) s.restores },
        { "prompt_reread_tokens_total", "counter", "Tokens read again although the slot had read them before", (double) s.reread },
    };

    json totals = json::object();
    std::string metrics;
    for (const auto & it : items) {
        const bool whole = it.value == (double) (int64_t) it.value;
        if (whole) {
            totals[it.name] = (int64_t) it.value;
        } else {
            totals[it.name] = it.value;
        }
        const std::string name = std::string("edgekv:") + it.name;
        metrics += "# HELP " + name + " " + it.help + "\n";
        metrics += "# TYPE " + name + " " + it.type + "\n";
        metrics += name + " " + totals[it.name].dump() + "\n";
    }

    json res = {{"enabled", true}, {"eviction", nullptr}, {"selection", nullptr}, {"slots", list}, {"totals", totals}};
    if (s.evicts) {
        res["eviction"] = json::object({
            {"policy", s.how.policy}, {"budget", s.how.budget}, {"window", s.how.window},
        });
    }
    if (s.selects) {
        res["selection"] = json::object({
            {"method", s.how.select}, {"budget", s.how.select_budget}, {"page_size", s.how.page_size},
            {"dense_layers", s.how.n_dense_layers},
        });
    }

    std::lock_guard<std::mutex> lock(g_mutex);
    g_snapshot = std::move(res);
    g_metrics  = std::move(metrics);
}

} // namespace

void edgekv_snapshot(bool now, const std::function<const server_prompt &(int)> & prompt) {
    auto & s = self();
    if (!s.ctx || !edgekv_enabled()) {
        return;
    }
    const int64_t t = ggml_time_us();
    if (!now && t < s.t_snapshot + SNAPSHOT_US) {
        return;
    }
    s.t_snapshot = t;

    std::vector<slot_figures> slots;
    for (int i = 0; i < s.n_slots; ++i) {
        slots.push_back({ sequence(i), prompt(i).checkpoints.size(), bytes(prompt(i)) });
    }
    publish(stats(-1), slots);
}

void edgekv_server_detach() {
    auto & s = self();
    if (s.ctx && edgekv_enabled()) {
        s.before += counts(stats(-1));
        publish({}, std::vector<slot_figures>(s.n_slots)); // a server that sleeps has no cache
    }
    s.ctx = nullptr;
}

json edgekv_json() {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_snapshot;
}

std::string edgekv_metrics() {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_metrics;
}

// --- trace ----------------------------------------------------------------------------------------------------------

void edgekv_trace_decode(const common_batch & batch) {
    if (!self().trace.is_open()) {
        return;
    }
    json tokens = json::array();
    for (const auto & t : batch.tokens) {
        tokens.push_back(json::array({ t.seq_id, t.id, t.pos[0], t.output ? 1 : 0 }));
    }
    trace({{"decode", tokens}});
}

void edgekv_trace_cut(int id_slot, int n_tokens) {
    trace({{"cut", id_slot}, {"to", n_tokens}});
}

void edgekv_trace_state(int id_slot, const server_prompt_cache_state * where, bool saved) {
    auto & s = self();
    if (!s.trace.is_open()) {
        return;
    }
    if (saved) {
        s.saved[where] = s.n_saved++;
    }
    trace({{saved ? "save" : "restore", s.saved[where]}, {"slot", id_slot}});
}

