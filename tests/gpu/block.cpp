#include "block.h"

#include <algorithm>
#include <vector>

#include <sys/mman.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace {

constexpr uint32_t WARP        = 32;
constexpr uint32_t MAX_THREADS = 1024;
constexpr size_t   STACK       = 64*1024;
constexpr size_t   STAGGER     = 64*5; // stacks at one place of their pages would fight for lines of the cache
constexpr size_t   RED_ZONE    = 4096;
constexpr uint8_t  UNWRITTEN   = 0xFF; // NaN as a number of any type
constexpr uint8_t  RED         = 0xA5;

// --- fibers ----------------------------------------------------------------------------------------------------------

using entry = void (*)();

#if defined(__x86_64__) || defined(__aarch64__)

#ifdef __APPLE__
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif

extern "C" void gpu_switch(void ** from, void * to);

// saves what a function must preserve on the stack, then changes the stack
__asm__(
    ".text\n"
    ".globl " SYMBOL("gpu_switch") "\n"
    ".p2align 4\n"
    SYMBOL("gpu_switch") ":\n"
#ifdef __x86_64__
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n"
    "movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
    "popq %rcx\n jmp *%rcx\n" // not ret, whose address the processor would predict wrongly
#else
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\n   stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\n    stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
    "mov x9, sp\n"
    "str x9, [x0]\n"
    "mov sp, x1\n"
    "ldp x19, x20, [sp, #0]\n   ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\n    ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\n"
    "ret\n"
#endif
);

struct fiber {
    void * sp = nullptr;

    void start(uint8_t * top, entry function) {
#ifdef __x86_64__
        void ** p = (void **) top - 8; // six registers, the address to return to, and one for the alignment of a call
        std::fill(p, p + 8, nullptr);
        p[6] = (void *) function;
#else
        void ** p = (void **) top - 20;
        std::fill(p, p + 20, nullptr);
        p[11] = (void *) function; // x30
#endif
        sp = p;
    }

    void resume_from(fiber & other) { gpu_switch(&other.sp, sp); }
};

#else

struct fiber {
    ucontext_t context;

    void start(uint8_t * top, entry function) {
        getcontext(&context);
        context.uc_stack.ss_sp   = top - STACK/2;
        context.uc_stack.ss_size = STACK/2;
        context.uc_link          = nullptr;
        makecontext(&context, function, 0);
    }

    void resume_from(fiber & other) { swapcontext(&other.context, &context); }
};

#endif

// --- a block ---------------------------------------------------------------------------------------------------------

enum state { READY, BARRIER, WARP_BARRIER, SHUFFLE, RETURNED, N_STATES };

const char * const STATES[N_STATES] = { "can run", "wait at a barrier", "wait at a warp's barrier", "wait in a shuffle",
                                        "have returned" };

struct thread {
    fiber      self;
    gpu::place where;
    state      is;
};

struct warp {
    uint32_t arrived;
    state    at;                 // what those that arrived wait in
    uint32_t round;              // of rendezvous; a lane of the next one may write while another still reads
    uint64_t slots[2][WARP];
};

thread threads[MAX_THREADS];
warp   warps[MAX_THREADS/WARP];
fiber  host;

uint32_t n_threads;
uint32_t n_arrived;              // at the block's barrier
uint32_t n_returned;

uint8_t * stacks;
std::vector<uint8_t> memory;     // red zone, shared memory, red zone
size_t shared_bytes;

const std::function<void()> * kernel;

gpu::limits the_limits;
uint64_t    the_seed;
uint64_t    random_state;
uint32_t    most_threads = MAX_THREADS;
std::string the_error;

// threads that can run, in their order; a ring
uint16_t ready[2*MAX_THREADS];
uint32_t first_ready;
uint32_t n_ready;

void push_back(uint32_t t) { ready[(first_ready + n_ready++) % (2*MAX_THREADS)] = t; }

void push_front(uint32_t t) {
    first_ready = (first_ready + 2*MAX_THREADS - 1) % (2*MAX_THREADS);
    ready[first_ready] = t;
    ++n_ready;
}

thread & pop() {
    const uint32_t t = ready[first_ready];
    first_ready = (first_ready + 1) % (2*MAX_THREADS);
    --n_ready;
    return threads[t];
}

enum : uint64_t { FORWARD = 0, BACKWARD = 1 };

bool shuffled() { return the_seed > BACKWARD; }

uint64_t random_bits() { // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state*0x2545F4914F6CDD1DULL;
}

// 0 .. n - 1 in the order of this run
void order(uint32_t n, uint32_t * out) {
    for (uint32_t i = 0; i < n; ++i) {
        out[i] = the_seed == BACKWARD ? n - 1 - i : i;
    }
    if (shuffled()) {
        for (uint32_t i = n; i > 1; --i) {
            std::swap(out[i - 1], out[gpu::draw(i)]);
        }
    }
}

void go_on() {
    thread & me = threads[gpu::here->thread];

    if (n_ready == 0) {
        uint32_t count[N_STATES] = {};
        for (uint32_t t = 0; t < n_threads; ++t) {
            ++count[threads[t].is];
        }
        std::string what = "not all threads of a block reach the same point:";
        for (int s = 0; s < N_STATES; ++s) {
            if (count[s]) {
                what += " " + std::to_string(count[s]) + " " + STATES[s] + ",";
            }
        }
        what.pop_back();
        gpu::fail(what);
    }

    thread & next = pop();
    next.is   = READY;
    gpu::here = &next.where;
    if (&next != &me) {
        next.self.resume_from(me.self);
    }
}

void release_block() {
    uint32_t of_warps[MAX_THREADS/WARP];
    uint32_t of_lanes[WARP];

    n_arrived = 0;
    order(n_threads/WARP, of_warps);
    for (uint32_t i = 0; i < n_threads/WARP; ++i) {
        order(WARP, of_lanes);
        for (const uint32_t lane : of_lanes) {
            push_back(of_warps[i]*WARP + lane);
        }
    }
}

void release_warp(uint32_t w) {
    uint32_t of_lanes[WARP];

    warps[w].arrived = 0;
    warps[w].round  += 1;
    order(WARP, of_lanes);
    if (shuffled() && gpu::draw(2)) { // the others first
        for (uint32_t i = 0; i < WARP; ++i) {
            push_back(w*WARP + of_lanes[i]);
        }
    } else {
        for (uint32_t i = WARP; i > 0; --i) {
            push_front(w*WARP + of_lanes[i - 1]);
        }
    }
}

void meet(state what) {
    const uint32_t t = gpu::here->thread;
    warp & w = warps[t/WARP];

    if (w.arrived > 0 && w.at != what) {
        gpu::fail(std::string("lanes of a warp part: some ") + STATES[w.at] + ", some " + STATES[what]);
    }
    w.at = what;
    threads[t].is = what;
    if (++w.arrived == WARP) {
        release_warp(t/WARP);
    }
    go_on();
}

void run_thread() {
    (*kernel)();
    threads[gpu::here->thread].is = RETURNED;
    if (++n_returned == n_threads) {
        host.resume_from(threads[gpu::here->thread].self);
    }
    go_on();
}

void run_block(gpu::dim block, gpu::dim blocks) {
    memset(gpu::shared(), UNWRITTEN, shared_bytes);

    n_ready = n_returned = 0;
    for (uint32_t t = 0; t < n_threads; ++t) {
        threads[t].where = { t, n_threads, block, blocks };
        threads[t].is    = READY;
        threads[t].self.start(stacks + (t + 1)*STACK - t%16*STAGGER, run_thread);
    }
    for (uint32_t w = 0; w < n_threads/WARP; ++w) {
        warps[w].arrived = 0;
    }
    release_block();

    thread & next = pop();
    gpu::here = &next.where;
    next.self.resume_from(host);
    gpu::here = nullptr;

    static const std::vector<uint8_t> red(RED_ZONE, RED);
    if (the_error.empty() && (memcmp(memory.data(), red.data(), RED_ZONE) != 0 ||
                              memcmp(memory.data() + RED_ZONE + shared_bytes, red.data(), RED_ZONE) != 0)) {
        gpu::fail("a block wrote outside of its shared memory of " + std::to_string(shared_bytes) + " bytes");
    }
}

} // namespace

namespace gpu {

const place * here;
int           planted;

uint8_t * shared() { return memory.data() + RED_ZONE; }

void barrier() {
    threads[gpu::here->thread].is = BARRIER;
    if (++n_arrived == n_threads) {
        release_block();
    }
    go_on();
}

void warp_barrier() { meet(WARP_BARRIER); }

uint64_t exchange(uint64_t bits, uint32_t from) {
    warp & w = warps[here->thread/WARP];
    uint64_t * slots = w.slots[w.round%2];

    slots[here->thread%WARP] = bits;
    meet(SHUFFLE);
    return from < WARP ? slots[from] : ~uint64_t(0);
}

void begin(const limits & limits, uint64_t seed, uint32_t most) {
    the_limits   = limits;
    the_seed     = seed;
    random_state = (seed + 1)*0x9E3779B97F4A7C15ULL;
    most_threads = std::clamp(most/WARP*WARP, WARP, MAX_THREADS);
    the_error.clear();
}

uint32_t block_size(uint32_t n) { return std::min(n, most_threads); }

uint32_t draw(uint32_t n) {
    return the_seed == FORWARD ? 0 : the_seed == BACKWARD ? n - 1 : (uint32_t) (((random_bits() >> 32)*n) >> 32);
}

void fail(const std::string & what) {
    if (the_error.empty()) {
        the_error = what;
    }
    if (here) { // the fibers of the block are left as they are
        thread & me = threads[gpu::here->thread];
        here = nullptr;
        host.resume_from(me.self);
    }
}

const std::string & error() { return the_error; }

void launch(dim blocks, uint32_t n, size_t bytes, const std::function<void()> & function) {
    const uint64_t n_blocks = (uint64_t) blocks.x*blocks.y*blocks.z;

    if (!the_error.empty()) {
        return;
    }
    if (n == 0 || n > MAX_THREADS || n%WARP != 0) {
        return fail("a block of " + std::to_string(n) + " threads");
    }
    if (n_blocks == 0 || n_blocks > INT32_MAX || std::max(blocks.y, blocks.z) > the_limits.grid_yz) {
        return fail("a grid of " + std::to_string(blocks.x) + " x " + std::to_string(blocks.y) + " x " +
                    std::to_string(blocks.z));
    }
    if (bytes > the_limits.shared) {
        return fail(std::to_string(bytes) + " bytes of shared memory, more than " + std::to_string(the_limits.shared));
    }
    if (!stacks) {
        void * p = mmap(nullptr, MAX_THREADS*STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (p == MAP_FAILED) {
            return fail("no memory for stacks");
        }
        stacks = (uint8_t *) p;
    }

    n_threads    = n;
    shared_bytes = bytes;
    kernel       = &function;
    memory.assign(2*RED_ZONE + bytes, RED);

    std::vector<uint32_t> of_blocks(n_blocks);
    order((uint32_t) n_blocks, of_blocks.data());
    for (const uint32_t b : of_blocks) {
        n_arrived = 0;
        run_block({ b%blocks.x, b/blocks.x%blocks.y, b/blocks.x/blocks.y }, blocks);
        if (!the_error.empty()) {
            return;
        }
    }
}

} // namespace gpu

// What the compiler calls where kernels do what C++ leaves undefined (-fsanitize=alignment,bounds,shift), in place of the
// sanitizer's own library. Each gets a place in the source first.

namespace {

struct source {
    const char * file;
    uint32_t     line;
    uint32_t     column;
};

void undefined(const char * what, const void * data) {
    const source * at = (const source *) data;
    gpu::fail(std::string(what) + " at " + (at->file ? at->file : "?") + ":" + std::to_string(at->line));
}

} // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(const void * data, uintptr_t) {
    undefined("a misaligned address", data);
}

void __ubsan_handle_out_of_bounds(const void * data, uintptr_t) {
    undefined("an index out of an array", data);
}

void __ubsan_handle_shift_out_of_bounds(const void * data, uintptr_t, uintptr_t) {
    undefined("a shift by too much", data);
}

} // extern "C"
