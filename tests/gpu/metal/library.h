#pragma once

// The kernels of a Metal library by their names, and how their parameters are bound.

#include "../block.h"

#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace metal {
struct uint3;
struct ushort3;
} // namespace metal

namespace gpu {

// what a dispatch has set
struct bindings {
    struct buffer {
        uint8_t * data = nullptr;
        size_t    size = 0;     // of bytes that were set; 0 for a tensor's memory
    };
    std::vector<buffer> buffers;
    bool has_shared = false;
};

struct entry {
    size_t              n_pointers;    // buffers and, as the last one, shared memory
    std::vector<size_t> sizes;         // of the structs among them, else 0
    std::function<void(const bindings &)> call;
};

std::map<std::string, entry> & entries();

// One parameter. They come in this order: a struct by reference, buffers, shared memory; then the block in the grid,
// the thread in the block, the threads of the block. Address spaces are gone, so that the order tells them apart.
template <typename T, size_t I, size_t N_POINTERS>
T bind(const bindings & b) {
    if constexpr (I < N_POINTERS) {
        uint8_t * data = b.has_shared && I + 1 == N_POINTERS ? shared() : b.buffers[I].data;
        if constexpr (std::is_reference<T>::value) {
            return *(typename std::remove_reference<T>::type *) data;
        } else {
            return (T) data;
        }
    } else if constexpr (I == N_POINTERS) {
        return { here->block.x, here->block.y, here->block.z };
    } else if constexpr (I == N_POINTERS + 1) {
        return (T) here->thread;
    } else if constexpr (std::is_integral<T>::value) {
        return (T) here->threads;
    } else {
        return { (decltype(T::x)) here->threads, 1, 1 };
    }
}

template <typename... P, size_t... I>
entry make_entry(void (*function)(P...), std::index_sequence<I...>) {
    constexpr size_t n = ((std::is_pointer<P>::value || std::is_reference<P>::value) + ...);
    const auto size = [](auto * p) -> size_t {
        if constexpr (std::is_pointer<std::remove_pointer_t<decltype(p)>>::value) {
            return 0;
        } else {
            return sizeof(*p);
        }
    };
    return { n, { size((std::remove_reference_t<P> *) nullptr)... },
             [function](const bindings & b) { function(bind<P, I, n>(b)...); } };
}

template <typename... P>
bool add_entry(const char * name, void (*function)(P...)) {
    return entries().emplace(name, make_entry(function, std::index_sequence_for<P...>())).second;
}

} // namespace gpu
