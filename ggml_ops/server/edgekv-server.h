#pragma once

// What llama-server does differently where the cache is evicted or selected from; patches/0016 calls it.
//
// Stock goes back in a sequence by removing its tail, by context checkpoints of the half that cannot be rolled back, or by
// reading again. After an eviction only tails above the floor can be removed (llama-edgekv.h), so there is a fourth way:
// the state right before an eviction is kept, whole, when a place in it may be asked for again and the eviction would raise
// the floor past it. They are the slot's context checkpoints, in stock's list, and travel with a prompt as stock's do;
//     n_tokens: so many tokens of the prompt are in the state, and have not changed since
//     pos_min:  its floor: it can be cut back to any place from here on
//     pos_max:  tokens in the state
//
// All functions run on the server's main thread, and none throws, but for those that say otherwise.

#include "edgekv-figures.h"
#include "server-common.h"

#include <functional>
#include <string>

struct server_prompt;
struct server_prompt_cache_state;
struct server_task;

// before anything is decided by them: streams instead of a unified cache, one ubatch per decode, room for checkpoints
void edgekv_server_defaults(common_params & params);

// a context was made (again, after a sleep)
void edgekv_server_attach(llama_context * ctx, const common_params & params);

// the context is about to go: what it counted stays
void edgekv_server_detach();

// whether the context is evicted from, or evicted or selected from
bool edgekv_evicts();
bool edgekv_enabled();

// why a request cannot be served, "" if it can
std::string edgekv_refusal(const server_task & task);

// A request begins in a slot whose cached prompt shares n_shared tokens with it: cut back or restored to the returned number
// of them, always fewer than the request has. Remembers where somebody may want to come back to, and what to pin.
int edgekv_begin(int id_slot, server_prompt & prompt, const server_task & task, int n_shared);

// a slot got another one's sequence, prompt and request: several answers to one prompt
void edgekv_copied(int id_slot, int to);

// whether a batch has to end behind so many tokens of the slot's prompt
bool edgekv_is_boundary(int id_slot, int n_tokens);

// before a batch with n_new tokens of the slot is decoded: keeps the state if it is the last that has some place in reach
void edgekv_before_decode(int id_slot, server_prompt & prompt, int n_new);

// The places in a rendered chat, by rendering beginnings of it; none where a template refuses them. By any thread, as the next.
edgekv_chat_places edgekv_find_places(const common_chat_templates * templates, const common_chat_templates_inputs & inputs,
        const std::string & prompt);
edgekv_chat_places edgekv_count_places(const json & data, const llama_vocab * vocab, const server_tokens & tokens);

// OpenAI's way to ask for one tool, which stock takes for "auto": only that tool is left, and a call is required. By any
// thread. Throws std::invalid_argument if there is no such tool.
void edgekv_force_named_tool(json & body);

// the figures of the slot's request so far
edgekv_figures edgekv_request(int id_slot);

// the figures of all, for other threads; now, or at most ten times a second
void edgekv_snapshot(bool now, const std::function<const server_prompt &(int)> & prompt);

// from the last snapshot, by any thread: /edgekv, and the lines of /metrics
json        edgekv_json();
std::string edgekv_metrics();

// EDGEKV_TRACE=FILE: one JSON line per event, so that a test can lead another context through the same batches
void edgekv_trace_decode(const common_batch & batch);
void edgekv_trace_cut   (int id_slot, int n_tokens);
void edgekv_trace_state (int id_slot, const server_prompt_cache_state * where, bool saved); // to the prompt cache, or from it
