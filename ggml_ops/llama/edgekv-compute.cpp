#include "edgekv-compute.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

// An RPC client claims to support whatever it is asked: ours can ask the server. A library without that function talks to
// servers that may lack our operators.
static bool supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    auto * reg = ggml_backend_dev_backend_reg(dev);
    if (strcmp(ggml_backend_reg_name(reg), "RPC") != 0) {
        return ggml_backend_dev_supports_op(dev, op);
    }
    using function = bool (*)(ggml_backend_dev_t, const ggml_tensor *);
    auto * ask = (function) ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_supports_op");

    return ask && (op->op == GGML_OP_VIEW || op->op == GGML_OP_PERMUTE || ask(dev, op));
}

static ggml_backend_dev_t device_of(const ggml_tensor * stored) {
    auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(stored->buffer));
    return dev ? dev : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

ggml_backend_t llama_edgekv_backend_of(const std::vector<ggml_backend_t> & backends, const ggml_tensor * stored) {
    const auto it = std::find_if(backends.begin(), backends.end(), [dev = device_of(stored)](ggml_backend_t backend) {
        return ggml_backend_get_device(backend) == dev;
    });
    return it == backends.end() ? nullptr : *it;
}

void llama_edgekv_check_devices(const llama_kv_cache & kv, ggml_cgraph * gf, const char * what) {
    std::vector<ggml_backend_dev_t> devs;
    for (const uint32_t il : kv.get_layer_ids()) {
        auto * dev = device_of(kv.get_k_storage(il));
        if (std::find(devs.begin(), devs.end(), dev) == devs.end()) {
            devs.push_back(dev);
        }
    }

    for (auto * dev : devs) {
        bool ok = true;
        for (int i = 0; ok && i < ggml_graph_n_nodes(gf); ++i) {
            ok = supports_op(dev, ggml_graph_node(gf, i));
        }
        if (!ok) {
            throw std::runtime_error(std::string(what) + " is not possible: device " + ggml_backend_dev_name(dev) +
                    " (" + ggml_backend_dev_description(dev) + ") lacks its operators; keep the KV cache on the CPU (offload_kqv = false or -ngl 0)");
        }
    }
}

llama_edgekv_computer::llama_edgekv_computer(
        const llama_kv_cache & kv,
        std::vector<ggml_backend_t> backends,
        std::vector<ggml_backend_buffer_type_t> bufts,
        ggml_cgraph * worst_case,
        bool no_alloc,
        const char * what) :
    backends(std::move(backends)) {

    llama_edgekv_check_devices(kv, worst_case, what);

    sched.reset(ggml_backend_sched_new(this->backends.data(), bufts.data(), (int) this->backends.size(),
                ggml_graph_size(worst_case), /*parallel =*/ false, /*op_offload =*/ false));

    if (no_alloc) {
        return;
    }
    place(worst_case);
    if (!ggml_backend_sched_reserve(sched.get(), worst_case)) {
        throw std::runtime_error(std::string("failed to allocate the scratch of the ") + what);
    }
}

// Left alone, the scheduler goes on with the last layer's device at the first nodes of a layer that lives elsewhere, and
// copies keys there. Backwards, because a node without a buffer of its own comes before the one that it is made for.
void llama_edgekv_computer::place(ggml_cgraph * gf) {
    const auto home = [&](const ggml_tensor * node) -> ggml_backend_t {
        for (int i = -1; i < GGML_MAX_SRC; ++i) {
            const auto * t = i < 0 ? node : node->src[i];
            const auto * stored = t && t->view_src ? t->view_src : t;
            if (stored && stored->buffer) {
                return llama_edgekv_backend_of(backends, stored);
            }
        }
        return nullptr;
    };

    ggml_backend_t backend = nullptr;
    for (int i = ggml_graph_n_nodes(gf) - 1; i >= 0; --i) {
        auto * node = ggml_graph_node(gf, i);
        if (auto * found = home(node)) {
            backend = found;
        }
        if (backend) {
            ggml_backend_sched_set_tensor_backend(sched.get(), node, backend);
        }
    }
}

bool llama_edgekv_computer::run(ggml_cgraph * gf, int n_threads) {
    for (auto * backend : backends) {
        auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
        auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set) {
            set(backend, n_threads);
        }
    }

    ggml_backend_sched_reset(sched.get());
    place(gf);

    return ggml_backend_sched_alloc_graph(sched.get(), gf) &&
           ggml_backend_sched_graph_compute(sched.get(), gf) == GGML_STATUS_SUCCESS;
}

void llama_edgekv_computer::synchronize() const {
    for (auto * backend : backends) {
        ggml_backend_synchronize(backend);
    }
}

size_t llama_edgekv_computer::n_bytes() const {
    size_t res = 0;
    for (auto * backend : backends) {
        res += ggml_backend_sched_get_buffer_size(sched.get(), backend);
    }
    return res;
}

llama_edgekv_beside::llama_edgekv_beside(
        const ggml_tensor * stored, ggml_type type, const int64_t (&ne)[4], const std::string & name, bool no_alloc, const char * what) {
    ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(params));

    tensor = ggml_new_tensor(ctx.get(), type, 4, ne);
    ggml_set_name(tensor, name.c_str());

    auto * buft = ggml_backend_buffer_get_type(stored->buffer);
    if (no_alloc) {
        buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
        tensor->buffer = buf.get();
    } else {
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    }
    if (!buf) {
        throw std::runtime_error(std::string("failed to allocate ") + what);
    }
    ggml_backend_buffer_clear(buf.get(), 0);
}

llama_edgekv_readback::llama_edgekv_readback(const llama_kv_cache & kv, ggml_type type, const std::vector<int64_t> & n, const char * name, bool no_alloc) {
    const auto ids = kv.get_layer_ids();

    std::vector<ggml_backend_buffer_type_t> bufts;
    for (const uint32_t il : ids) {
        bufts.push_back(ggml_backend_buffer_get_type(kv.get_k_storage(il)->buffer));
    }

    parts.resize(ids.size());
    for (size_t first = 0; first < ids.size(); ++first) {
        if (parts[first].tensor) {
            continue;
        }
        int64_t sum = 0;
        for (size_t i = first; i < ids.size(); ++i) {
            sum += bufts[i] == bufts[first] ? n[i] : 0;
        }

        llama_edgekv_beside dev(kv.get_k_storage(ids[first]), type, { sum, 1, 1, 1 }, name, no_alloc, name);

        int64_t offset = 0;
        for (size_t i = first; i < ids.size(); ++i) {
            if (bufts[i] == bufts[first]) {
                parts[i] = { dev.tensor, offset, n[i] };
                offset += n[i];
            }
        }
        devices.push_back(std::move(dev));
    }
}

ggml_tensor * llama_edgekv_readback::view(ggml_context * ctx, size_t i_layer, int64_t ne0, int64_t ne1, int64_t from) const {
    const auto & part = parts[i_layer];
    const size_t size = ggml_type_size(part.tensor->type);

    return ggml_view_2d(ctx, part.tensor, ne0, ne1, ne0*size, (part.first + from)*size);
}

size_t llama_edgekv_readback::n_bytes() const {
    size_t res = 0;
    for (const auto & device : devices) {
        res += ggml_backend_buffer_get_size(device.buf.get());
    }
    return res;
}
