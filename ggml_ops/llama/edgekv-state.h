#pragma once

// The state of an evicted context: an envelope around the bytes that llama.cpp's caches write themselves. It holds what
// they do not know (settings, filters, floors, true positions) and checksums, so that whatever cannot be loaded is
// refused before anything is cleared.
//
//   u32 magic     where a stock state has its number of streams: each refuses the other's
//   u32 version
//   u64 size, then as many bytes: the head, see state_head in edgekv-state.cpp
//   u64 checksum of the head
//   payload       as long as the head says: the memory module's own state
//   u64 checksum of the payload

#include "llama.h"

#include <cstdint>
#include <functional>
#include <string>

class llama_io_write_i;
class llama_io_read_i;

constexpr uint32_t LLAMA_EDGEKV_STATE_MAGIC   = 0x764b6445; // "EdKv"
constexpr uint32_t LLAMA_EDGEKV_STATE_VERSION = 2;

// For the memory module: also the cells that the window of the last token no longer reaches, but that of a token before it
// does. Without them a sequence could not be cut back where it could before.
constexpr llama_state_seq_flags LLAMA_EDGEKV_STATE_ALL_CELLS = 1u << 31;

// Stand in for llama_memory_i::state_write and state_read. Without eviction they call them. They throw
// std::runtime_error with the text that llama_edgekv_last_error() has, too.
void llama_edgekv_state_write(llama_context & ctx, llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);
void llama_edgekv_state_read (llama_context & ctx, llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags);

// What a context without eviction says of a state whose first word is not its own.
const char * llama_edgekv_stream_mismatch(uint32_t n_stream);

// Lets save() write to a temporary name beside path and renames it if it has `size` bytes afterwards. Without eviction
// save() writes to path. Throws what save() throws; nothing half-written stays.
bool llama_edgekv_save_file(llama_context & ctx, const char * path, size_t size, const std::function<bool(const char *)> & save);
