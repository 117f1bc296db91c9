// The Metal backend's operators on the emulated device: a command encoder that runs kernels by their names.

#include "../device.h"
#include "ggml-metal-device.h"
#include "library.h"

#include "ggml-edgekv-metal.cpp"

struct ggml_metal_pipeline {
    std::string      name;
    const gpu::entry * entry;
};

struct ggml_metal_encoder {
    struct dispatch {
        ggml_metal_pipeline * pipeline;
        gpu::bindings         bindings;
        size_t                shared;
        gpu::dim              blocks;
        uint32_t              threads;
    };

    ggml_metal_pipeline * pipeline = nullptr;
    gpu::bindings         bindings;
    size_t                shared = 0;

    std::vector<std::vector<uint8_t>> bytes;   // that were set, until they are used
    std::vector<dispatch>             pending; // since the last barrier: they may run at once, so in any order

    void run() {
        while (!pending.empty()) {
            const size_t i = gpu::draw((uint32_t) pending.size());
            const dispatch d = pending[i];
            pending.erase(pending.begin() + i);
            gpu::launch(d.blocks, d.threads, d.shared, [&] { d.pipeline->entry->call(d.bindings); });
        }
        bytes.clear();
    }
};

namespace gpu {

std::map<std::string, entry> & entries() {
    static std::map<std::string, entry> all;
    return all;
}

} // namespace gpu

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t, const char * name) {
    static std::map<std::string, ggml_metal_pipeline> pipelines;
    const auto it = gpu::entries().find(name);
    if (it == gpu::entries().end()) {
        gpu::fail(std::string("there is no kernel ") + name);
        return {};
    }
    auto & pipeline = pipelines[name];
    pipeline = { name, &it->second };
    ggml_metal_pipeline_with_params res = {};
    res.pipeline = &pipeline;
    return res;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(
        ggml_metal_library_t lib, const char * base, const char *, ggml_metal_cv_t) {
    return ggml_metal_library_get_pipeline(lib, base);
}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params) {
    return (int) gpu::block_size(1024);
}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t e, ggml_metal_pipeline_with_params p) {
    e->pipeline = p.pipeline;
    e->bindings = {}; // Metal would keep them, but a kernel's launch should not live on another's
    e->shared   = 0;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t e, void * data, size_t size, int i) {
    if (size > 4096) {
        return gpu::fail("more than 4 KiB of bytes for a kernel");
    }
    e->bytes.emplace_back((uint8_t *) data, (uint8_t *) data + size);
    e->bindings.buffers.resize(std::max<size_t>(e->bindings.buffers.size(), i + 1));
    e->bindings.buffers[i] = { e->bytes.back().data(), size };
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t e, ggml_metal_buffer_id buffer, int i) {
    e->bindings.buffers.resize(std::max<size_t>(e->bindings.buffers.size(), i + 1));
    e->bindings.buffers[i] = { (uint8_t *) buffer.metal + buffer.offs, 0 };
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t e, size_t size, int i) {
    if (i != 0 || size%16 != 0) {
        return gpu::fail("shared memory that is not the first, or not a multiple of 16 bytes");
    }
    e->shared = size;
    e->bindings.has_shared = true;
}

void ggml_metal_encoder_dispatch_threadgroups(
        ggml_metal_encoder_t e, int x, int y, int z, int threads, int threads_y, int threads_z) {
    if (!e->pipeline || !gpu::error().empty()) {
        return gpu::fail("a dispatch without a kernel");
    }
    const gpu::entry & entry = *e->pipeline->entry;
    const size_t n_buffers = entry.n_pointers - e->bindings.has_shared;
    if (e->bindings.buffers.size() < n_buffers) {
        return gpu::fail(e->pipeline->name + ": takes " + std::to_string(n_buffers) + " buffers, " +
                std::to_string(e->bindings.buffers.size()) + " are set");
    }
    for (size_t i = 0; i < n_buffers; ++i) {
        if (entry.sizes[i] != e->bindings.buffers[i].size) {
            return gpu::fail(e->pipeline->name + ": buffer " + std::to_string(i) + " is of another kind or size");
        }
    }
    if (threads_y != 1 || threads_z != 1) {
        return gpu::fail("a block of more than one dimension");
    }
    const gpu::dim blocks = { (uint32_t) x, (uint32_t) y, (uint32_t) z };
    e->pending.push_back({ e->pipeline, e->bindings, e->shared, blocks, (uint32_t) threads });
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t e) { e->run(); }

namespace device {

const gpu::limits limits = { INT32_MAX, 32*1024 };

bool   supports(const ggml_tensor * op) { return ggml_edgekv_metal_supports_op(op); }
size_t scratch (const ggml_tensor * op) { return ggml_edgekv_metal_scratch(op); }

// encode finds the scratch behind the result itself
void compute(ggml_tensor * op, uint8_t *) {
    ggml_metal_encoder encoder;
    ggml_edgekv_metal_encode(nullptr, &encoder, op,
            [](const ggml_tensor * t) -> ggml_metal_buffer_id { return { t->data, 0 }; });
    encoder.run();
}

} // namespace device
