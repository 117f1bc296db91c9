#include "edgekv-compute.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

void llama_edgekv_check_devices(const llama_kv_cache & kv, ggml_cgraph * gf, const char * what) {
    std::vector<ggml_backend_dev_t> devs;
    for (const uint32_t il : kv.get_layer_ids()) {
        auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(kv.get_k_storage(il)->buffer));
        if (!dev) {
            dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        }
        if (std::find(devs.begin(), devs.end(), dev) == devs.end()) {
            devs.push_back(dev);
        }
    }

    for (auto * dev : devs) {
        // an RPC client claims to support whatever it is asked
        bool ok = strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") != 0;

        for (int i = 0; ok && i < ggml_graph_n_nodes(gf); ++i) {
            ok = ggml_backend_dev_supports_op(dev, ggml_graph_node(gf, i));
        }
        if (!ok) {
            throw std::runtime_error(std::string(what) + " is not possible: device " + ggml_backend_dev_name(dev) +
                    " lacks its operators; keep the KV cache on the CPU (offload_kqv = false or -ngl 0)");
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
    if (!ggml_backend_sched_reserve(sched.get(), worst_case)) {
        throw std::runtime_error(std::string("failed to allocate the scratch of the ") + what);
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
