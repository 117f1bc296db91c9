#pragma once

// What the server's own structures carry for edgekv-server.h.

#include "json.h"

#include <cstdint>

// The figures of one request, in the timings of its answer; none unless the cache is evicted or selected from.
struct edgekv_figures {
    bool on = false;

    int64_t  tokens_seen     = 0; // in the sequence
    int64_t  cells_used      = 0; // that hold them
    uint64_t evictions       = 0; // during the request
    double   evict_ms        = 0; // of the whole context meanwhile
    double   read_per_step   = 0; // tokens that a step reads in a layer that is selected from: the mean over all slots meanwhile
    uint64_t kv_bytes        = 0; // of the whole cache
    bool     from_checkpoint = false;

    void add_to(common_json & timings) const;
};

// Places in a chat's prompt, in tokens; in characters until it is tokenised.
struct edgekv_chat_places {
    int32_t system  = 0; // end of what stands before the first message that is not the system's
    int32_t message = 0; // where the last message begins
};
