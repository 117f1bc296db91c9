#include "edgekv-state.h"

#include "edgekv-evict.h"
#include "edgekv-hash.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"

#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <vector>

#ifdef _WIN32
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

namespace {

constexpr uint64_t MAX_PIECE = 256u << 20;

[[noreturn]] void fail(const std::string & text) {
    llama_edgekv_set_error(text);
    throw std::runtime_error(text);
}

// --- what an envelope says -------------------------------------------------------------------------------------------

struct state_head {
    llama_edgekv_evictor::identity id = {};

    std::string policy;
    uint32_t    mode   = 0;
    uint32_t    budget = 0;
    uint32_t    window = 0;

    uint64_t n_payload = 0;

    uint8_t whole = 0; // all sequences, or one

    struct sequence {
        uint32_t  n_used = 0;
        uint32_t  n_keep = 0;
        llama_pos n_past = 0;
        int64_t   head   = -1; // see swa_head()

        llama_edgekv_evictor::stream stream;
    };
    std::vector<sequence> sequences;
};

// One walk over the fields for both directions.
struct writer {
    std::vector<uint8_t> bytes;

    template <typename T> void operator()(const T & x) {
        const auto * p = (const uint8_t *) &x;
        bytes.insert(bytes.end(), p, p + sizeof(x));
    }
    void text(const std::string & s) {
        (*this)((uint32_t) s.size());
        bytes.insert(bytes.end(), s.begin(), s.end());
    }
    void list(const std::vector<llama_pos> & v, size_t n) {
        GGML_ASSERT(v.size() == n);
        const auto * p = (const uint8_t *) v.data();
        bytes.insert(bytes.end(), p, p + n*sizeof(v[0]));
    }
    template <typename V> void resize(V & v) { (*this)((uint32_t) v.size()); }
};

struct reader {
    const std::vector<uint8_t> & bytes;
    size_t at = 0;

    void take(void * dst, size_t n) {
        if (n > bytes.size() - at) {
            fail("the state is damaged");
        }
        if (n > 0) { // of an empty list there may be no address
            memcpy(dst, bytes.data() + at, n);
        }
        at += n;
    }
    template <typename T> void operator()(T & x) { take(&x, sizeof(x)); }
    uint32_t count() {
        uint32_t n;
        take(&n, sizeof(n));
        if (n > bytes.size() - at) { // whatever is counted has a byte at least
            fail("the state is damaged");
        }
        return n;
    }
    void text(std::string & s) {
        s.resize(count());
        take(&s[0], s.size());
    }
    void list(std::vector<llama_pos> & v, size_t n) {
        if (n*sizeof(v[0]) > bytes.size() - at) {
            fail("the state is damaged");
        }
        v.resize(n);
        take(v.data(), n*sizeof(v[0]));
    }
    template <typename V> void resize(V & v) { v.resize(count()); }
};

template <typename Walk, typename Head>
void walk_fields(Walk & f, Head & h) {
    f(h.id.model); f(h.id.filters); f(h.id.layout); f(h.id.n_cells); f(h.id.n_cells_swa); f(h.id.n_ctx_seq);
    f.text(h.policy); f(h.mode); f(h.budget); f(h.window);
    f(h.n_payload); f(h.whole);
    f.resize(h.sequences);
}

template <typename Walk, typename Sequence>
void walk_fields(Walk & f, Sequence & s, const llama_edgekv_evictor & evict) {
    f(s.n_used); f(s.n_keep); f(s.n_past); f(s.head); f(s.stream.floor); f(s.stream.n_evictions); f(s.stream.n_moved);
    f.resize(s.stream.moved); // empty before the first eviction
    if (s.stream.moved.empty()) {
        if (s.stream.n_moved > 0) {
            fail("the state is damaged");
        }
        return;
    }
    if (s.stream.moved.size() != evict.n_layers()) {
        fail("the state is damaged");
    }
    // a tail that was removed since may have left fewer than were moved
    uint32_t stride = (uint32_t) (s.stream.moved[0].size()/evict.n_head_kv(0));
    f(stride);
    for (size_t i = 0; i < evict.n_layers(); ++i) {
        f.list(s.stream.moved[i], (size_t) stride*evict.n_head_kv(i));
    }
    if (s.stream.n_moved > stride) {
        fail("the state is damaged");
    }
}

// --- streams of bytes ------------------------------------------------------------------------------------------------

struct io_count : public llama_io_write_i {
    size_t n = 0;

    void write(const void *, size_t size) override { n += size; }
    void write_tensor(ggml_tensor *, size_t, size_t size) override { n += size; }
    size_t n_bytes() override { return n; }
};

// passes on what it hashes; pieces of any length
struct io_hash : public llama_io_write_i {
    llama_io_write_i & out;

    uint64_t             hash = 0;
    std::vector<uint8_t> rest;
    std::vector<uint8_t> buffer;

    explicit io_hash(llama_io_write_i & out) : out(out) {}

    void write(const void * src, size_t size) override {
        out.write(src, size);
        rest.insert(rest.end(), (const uint8_t *) src, (const uint8_t *) src + size);
        const size_t n = rest.size()/8*8;
        hash = llama_edgekv_hash(hash, rest.data(), n);
        rest.erase(rest.begin(), rest.begin() + n);
    }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        buffer.resize(size);
        ggml_backend_tensor_get(tensor, buffer.data(), offset, size);
        write(buffer.data(), size);
    }
    size_t n_bytes() override { return out.n_bytes(); }

    uint64_t finish() { return llama_edgekv_hash(hash, rest.data(), rest.size()); }
};

struct io_memory : public llama_io_read_i {
    const std::vector<uint8_t> & bytes;
    size_t at = 0;

    explicit io_memory(const std::vector<uint8_t> & bytes) : bytes(bytes) {}

    const uint8_t * take(size_t size) {
        if (size > bytes.size() - at) {
            throw std::runtime_error("the state is shorter than it says");
        }
        at += size;
        return bytes.data() + at - size;
    }
    void read(void * dst, size_t size) override { memcpy(dst, take(size), size); }
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        ggml_backend_tensor_set(tensor, take(size), offset, size);
    }
    size_t n_bytes() override { return at; }
};

// --- checks ----------------------------------------------------------------------------------------------------------

void check_call(const llama_edgekv_evictor & evict, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (evict.settings().policy->needs & llama_edgekv_policy::QUERIES) {
        fail(std::string("the queries that policy '") + evict.settings().policy->name + "' looks at are not part of a state");
    }
    if (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        fail("where eviction is on, the state of one half of the memory cannot be saved or loaded");
    }
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        fail("where eviction is on, a state cannot stay on the device");
    }
    if (seq_id >= 0 && (uint32_t) seq_id >= evict.n_streams()) {
        fail(format("there is no sequence %d", seq_id));
    }
}

void check_head(const state_head & head, const llama_edgekv_evictor & evict, bool whole) {
    const auto & cfg = evict.settings();
    const auto   id  = evict.get_identity();

    const auto same = [](const char * what, const std::string & saved, const std::string & here) {
        if (saved != here) {
            fail(std::string("the state was saved with ") + what + " " + saved + ", this context has " + here);
        }
    };

    if (head.id.model != id.model) {
        fail("the state belongs to another model");
    }
    same("policy", head.policy, cfg.policy->name);
    same("mode",   std::to_string(head.mode),   std::to_string(cfg.mode));
    same("budget", std::to_string(head.budget), std::to_string(cfg.budget));
    same("window", std::to_string(head.window), std::to_string(cfg.window));
    if (head.id.filters != id.filters) {
        fail("the state was saved with other filters");
    }
    if (head.id.layout != id.layout) {
        fail("the state was saved with other types of K and V, or another setting of flash attention");
    }
    if (!!head.whole != whole) {
        fail(whole ? "the state is that of one sequence, not of a whole context" : "the state is that of a whole context, not of one sequence");
    }
    if (head.sequences.size() != (whole ? evict.n_streams() : 1)) {
        fail(format("the state has %zu sequences, this context has %u", head.sequences.size(), evict.n_streams()));
    }
    if (head.id.n_cells_swa > id.n_cells_swa) {
        fail("the state was saved with a larger ubatch, its sliding window does not fit");
    }
}

void check_sequences(const state_head & head, const llama_edgekv_evictor & evict) {
    const auto id = evict.get_identity();

    for (const auto & s : head.sequences) {
        if (s.n_used > id.n_cells) {
            fail(format("the state needs %u cells, this context has %u", s.n_used, id.n_cells));
        }
        if (s.n_past > (llama_pos) id.n_ctx_seq) {
            fail(format("the state has %d tokens, this context has room for %u", s.n_past, id.n_ctx_seq));
        }
        if (s.n_past < 0 || s.n_used > (uint32_t) s.n_past || s.stream.n_moved > s.n_used || s.stream.floor < 0 ||
            s.stream.floor > s.n_past ||
            (uint64_t) s.n_keep + evict.settings().window > evict.settings().budget) { // as llama_edgekv_set_keep() has it
            fail("the state is damaged");
        }
    }
}

llama_edgekv_evictor * find_evictor(llama_context & ctx) {
    auto * kv = llama_edgekv_find_caches(ctx.get_memory()).attn;
    return kv ? kv->get_evict() : nullptr;
}

} // namespace

void llama_edgekv_state_write(llama_context & ctx, llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    auto * memory = ctx.get_memory();
    auto * evict  = find_evictor(ctx);
    if (!evict) {
        memory->state_write(io, seq_id, flags);
        return;
    }
    check_call(*evict, seq_id, flags);
    flags |= LLAMA_EDGEKV_STATE_ALL_CELLS;

    const bool whole = seq_id < 0;

    // a pending copy of a stream has to arrive first
    ctx.memory_update(false);
    ctx.synchronize();

    const auto & cfg = evict->settings();

    state_head head;
    head.id     = evict->get_identity();
    head.policy = cfg.policy->name;
    head.mode   = cfg.mode;
    head.budget = cfg.budget;
    head.window = cfg.window;
    head.whole  = whole;

    for (uint32_t s = whole ? 0 : seq_id; s < (whole ? evict->n_streams() : seq_id + 1); ++s) {
        head.sequences.push_back({ evict->n_used(s), evict->n_keep(s), evict->n_past(s), evict->swa_head(s), evict->get_stream(s) });
    }

    io_count count;
    memory->state_write(count, seq_id, flags);
    head.n_payload = count.n;

    writer w;
    walk_fields(w, head);
    for (auto & s : head.sequences) {
        walk_fields(w, s, *evict);
    }

    const uint64_t n    = w.bytes.size();
    const uint64_t hash = llama_edgekv_hash(0, w.bytes.data(), n);

    io.write(&LLAMA_EDGEKV_STATE_MAGIC,   sizeof(LLAMA_EDGEKV_STATE_MAGIC));
    io.write(&LLAMA_EDGEKV_STATE_VERSION, sizeof(LLAMA_EDGEKV_STATE_VERSION));
    io.write(&n, sizeof(n));
    io.write(w.bytes.data(), n);
    io.write(&hash, sizeof(hash));

    uint64_t checksum = 0;
    if (io.counts_only()) {
        memory->state_write(io, seq_id, flags);
    } else {
        io_hash hashed(io);
        memory->state_write(hashed, seq_id, flags);
        checksum = hashed.finish();
    }
    io.write(&checksum, sizeof(checksum));
}

void llama_edgekv_state_read(llama_context & ctx, llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    auto * memory = ctx.get_memory();
    auto * evict  = find_evictor(ctx);
    if (!evict) {
        memory->state_read(io, seq_id, flags);
        return;
    }
    check_call(*evict, seq_id, flags);

    const bool whole = seq_id < 0;

    const auto read = [&](void * dst, size_t size) {
        try {
            io.read(dst, size);
        } catch (const std::exception &) {
            fail("the state is truncated");
        }
    };

    uint32_t magic;
    uint32_t version;
    read(&magic, sizeof(magic));
    if (magic != LLAMA_EDGEKV_STATE_MAGIC) {
        fail("the state is not that of a context with eviction: it is stock, or damaged");
    }
    read(&version, sizeof(version));
    if (version != LLAMA_EDGEKV_STATE_VERSION) {
        fail(format("the state has format version %u, this library reads version %u", version, LLAMA_EDGEKV_STATE_VERSION));
    }

    uint64_t n;
    uint64_t hash;
    read(&n, sizeof(n));

    // no more than the true positions of all cells and what comes with them
    uint64_t n_max = 4096;
    for (size_t i = 0; i < evict->n_layers(); ++i) {
        n_max += (uint64_t) evict->n_streams()*evict->n_head_kv(i)*evict->get_identity().n_cells*sizeof(llama_pos);
    }
    n_max += evict->n_streams()*64;
    if (n > n_max) {
        fail("the state is damaged, or of a larger context");
    }

    std::vector<uint8_t> bytes(n);
    read(bytes.data(), n);
    read(&hash, sizeof(hash));
    if (hash != llama_edgekv_hash(0, bytes.data(), n)) {
        fail("the state is damaged: its checksum does not match");
    }

    state_head head;
    reader r { bytes };
    walk_fields(r, head);
    check_head(head, *evict, whole);
    for (auto & s : head.sequences) {
        walk_fields(r, s, *evict);
    }
    check_sequences(head, *evict);

    // piece by piece: what is not there is not allocated, whatever the head says
    std::vector<uint8_t> payload;
    uint64_t checksum;
    while (payload.size() < head.n_payload) {
        const size_t had = payload.size();
        payload.resize((size_t) std::min<uint64_t>(head.n_payload, had + MAX_PIECE));
        read(payload.data() + had, payload.size() - had);
    }
    read(&checksum, sizeof(checksum));
    if (checksum != llama_edgekv_hash(0, payload.data(), payload.size())) {
        fail("the state is damaged: its checksum does not match");
    }

    // from here on the cache changes; a copy that is still pending must not overwrite it later
    ctx.memory_update(false);
    ctx.synchronize();

    if (!whole) {
        memory->seq_rm(seq_id, -1, -1); // stock leaves it as it is if the state holds no token
    }
    try {
        io_memory in(payload);
        memory->state_read(in, seq_id, flags);
        for (size_t i = 0; i < head.sequences.size(); ++i) {
            const uint32_t strm = whole ? (uint32_t) i : (uint32_t) seq_id;
            if (evict->n_used(strm) != head.sequences[i].n_used || evict->n_past(strm) != head.sequences[i].n_past) {
                throw std::runtime_error("it has other tokens than it says");
            }
            if (!evict->is_in_order(strm)) { // which a checksum does not keep out
                throw std::runtime_error("the positions of its tokens make no sense");
            }
        }
    } catch (const std::exception & err) {
        if (whole) {
            memory->clear(true);
        } else {
            evict->drop((uint32_t) seq_id);
        }
        fail(std::string("the state cannot be restored, its sequences were cleared: ") + err.what());
    }

    for (size_t i = 0; i < head.sequences.size(); ++i) {
        const uint32_t strm = whole ? (uint32_t) i : (uint32_t) seq_id;

        evict->set_stream(strm, std::move(head.sequences[i].stream));
        evict->set_swa_head(strm, head.sequences[i].head);
        if (whole) { // who loads one sequence has said already what is to be kept of it
            evict->set_keep(strm, head.sequences[i].n_keep);
        }
    }
}

const char * llama_edgekv_stream_mismatch(uint32_t n_stream) {
    if (n_stream != LLAMA_EDGEKV_STATE_MAGIC) {
        return "n_stream mismatch";
    }
    llama_edgekv_set_error("the state is that of a context with eviction, this context has none");
    return llama_edgekv_last_error();
}

bool llama_edgekv_save_file(llama_context & ctx, const char * path, size_t size, const std::function<bool(const char *)> & save) {
    if (!find_evictor(ctx)) {
        return save(path);
    }

    const std::string temporary = std::string(path) + "." + std::to_string(getpid()) + ".tmp";

    struct guard {
        const std::string & name;
        ~guard() { std::remove(name.c_str()); } // renamed already if all went well
    } guard { temporary };

    if (!save(temporary.c_str())) {
        return false;
    }

    std::error_code error;
    if (std::filesystem::file_size(temporary, error) != size || error) {
        fail(format("%s: could not be written whole; is the disk full?", path));
    }
    std::filesystem::rename(temporary, path, error);
    if (error) {
        fail(format("%s: %s", path, error.message().c_str()));
    }
    return true;
}
