// Graphs of edgekv's operators on the emulated device. Each tensor lies between red zones, the scratch of an operator
// behind its result; after an operator only those may have changed.

#include "device.h"
#include "half.h"

#include "ggml-backend.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace {

constexpr size_t  ALIGNMENT = 256;  // of a tensor's memory
constexpr size_t  RED_ZONE  = 1024;
constexpr uint8_t UNWRITTEN = 0xFF; // NaN as a number of any type, -1 as an index

struct memory {
    std::unique_ptr<uint8_t[]> bytes;
    uint8_t *             first;
    size_t                size;
    ggml_backend_buffer_t buffer;
};

size_t padded(size_t n, size_t to) { return (n + to - 1)/to*to; }

bool is_ours(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_EDGEKV_SCORE:
        case GGML_OP_EDGEKV_KEY_MEAN:
        case GGML_OP_EDGEKV_CHOOSE:
        case GGML_OP_EDGEKV_COMPACT:
        case GGML_OP_EDGEKV_SUMMARIZE:
        case GGML_OP_EDGEKV_PAGE_SCORES:
        case GGML_OP_EDGEKV_CHOOSE_PAGES:
        case GGML_OP_EDGEKV_ATTN:
            return true;
        default:
            return false;
    }
}

std::string name(const ggml_tensor * op) { return std::string(ggml_op_name(op->op)) + ": "; }

// of a tensor's memory: the numbers, and the scratch of the operator that makes them
size_t room(const ggml_tensor * t) {
    return padded(ggml_nbytes(t), 16) + (is_ours(t) && !t->view_src ? device::scratch(t) : 0);
}

void compute(ggml_tensor * op, const memory & m) {
    const ggml_tensor * whole = op->view_src ? op->view_src : op;
    const size_t n_scratch = device::scratch(op);
    if (op->view_src && n_scratch > 0) {
        return gpu::fail("a view has no room for scratch");
    }
    if (op == whole) {
        std::fill((uint8_t *) op->data, (uint8_t *) op->data + room(op), UNWRITTEN);
    }

    std::vector<uint8_t> before(m.first, m.first + m.size);
    const auto allow = [&](const void * data, size_t n) {
        const uint8_t * p = (const uint8_t *) data;
        std::copy(p, p + n, before.begin() + (p - m.first));
    };
    uint8_t * scratch = (uint8_t *) op->data + padded(ggml_nbytes(op), 16);
    device::compute(op, scratch);
    if (!gpu::error().empty()) {
        return;
    }
    allow(whole->data, ggml_nbytes(whole));
    allow(scratch, n_scratch);
    if (const ggml_tensor * counters = op->src[GGML_MAX_SRC - 1]) {
        allow(counters->data, ggml_nbytes(counters));
    }
    const auto changed = std::mismatch(before.begin(), before.end(), m.first).second;
    if (changed != m.first + m.size) {
        gpu::fail("it wrote outside of its result of " + std::to_string(ggml_nbytes(op)) + " bytes and scratch of " +
                std::to_string(n_scratch) + ", at byte " + std::to_string(changed - (uint8_t *) op->data));
    }
}

} // namespace

extern "C" {

// Places the tensors of a context.
memory * gpu_allocate(ggml_context * ctx) {
    auto * m = new memory();
    m->size = RED_ZONE;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        m->size += t->view_src ? 0 : padded(room(t), ALIGNMENT) + RED_ZONE;
    }
    m->bytes.reset(new uint8_t[m->size + ALIGNMENT]);
    m->first = (uint8_t *) (((uintptr_t) m->bytes.get() + ALIGNMENT - 1)/ALIGNMENT*ALIGNMENT);
    std::fill(m->first, m->first + m->size, UNWRITTEN);
    m->buffer = ggml_backend_cpu_buffer_from_ptr(m->first, m->size);

    uint8_t * next = m->first + RED_ZONE;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (t->view_src) {
            ggml_backend_view_init(t);
        } else {
            ggml_backend_tensor_alloc(m->buffer, t, next);
            next += padded(room(t), ALIGNMENT) + RED_ZONE;
        }
    }
    return m;
}

void gpu_free(memory * m) {
    ggml_backend_buffer_free(m->buffer);
    delete m;
}

bool gpu_supports(const ggml_tensor * op) { return !is_ours(op) || device::supports(op); }

// Runs the operators of a graph in their order; what went wrong, or NULL.
const char * gpu_compute(const memory * m, ggml_cgraph * graph, uint64_t seed, uint32_t most_threads) {
    gpu::begin(device::limits, seed, most_threads);
    for (int i = 0; i < ggml_graph_n_nodes(graph) && gpu::error().empty(); ++i) {
        ggml_tensor * op = ggml_graph_node(graph, i);
        if (is_ours(op)) {
            compute(op, *m);
        } else if (op->op != GGML_OP_NONE && op->op != GGML_OP_VIEW && op->op != GGML_OP_PERMUTE) {
            gpu::fail(name(op) + "not one of the device's operators");
        }
        if (!gpu::error().empty()) {
            static std::string text;
            text = name(op) + gpu::error();
            return text.c_str();
        }
    }
    return nullptr;
}

void gpu_plant(int which) { gpu::planted = which; }

uint16_t gpu_float_to_half(float x)    { return gpu::float_to_half(x); }
float    gpu_half_to_float(uint16_t x) { return gpu::half_to_float(x); }

} // extern "C"
