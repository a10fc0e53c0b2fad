// Runs the scan's kernels on a CPU: each thread of a block is a fibre, each barrier a switch.
//
// Stands in for primitives.cuh. Blocks run one after another: a block only ever waits for one that
// has started before it. SCAN_ELEMENT 0 (fp32) and 2 (bf16) are known.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#define DEVICE static inline
#define KERNEL(threads, blocks) static void

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T>
static inline T min(T a, T b) {
    return a < b ? a : b;
}

#if SCAN_ELEMENT == 0
typedef float Element;
#else
typedef unsigned short Element;
#endif

namespace emulated {

constexpr int BLOCK = 128, WARP = 32, STACK = 1 << 18;

struct Barrier {
    int arrived = 0, generation = 0;
};

ucontext_t scheduler, fibres[BLOCK];
std::vector<char> stacks(static_cast<size_t>(BLOCK) * STACK), shared(227 * 1024 + 16);
int thread, block, count;
bool finished[BLOCK];
Barrier block_barrier, warp_barriers[BLOCK / WARP];
float exchanged[BLOCK];

void yield() { swapcontext(&fibres[thread], &scheduler); }

void wait(Barrier& barrier, int members) {
    const int generation = barrier.generation;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

template <typename Kernel, typename Arguments>
struct Launch {
    static Kernel kernel;
    static const Arguments* arguments;
    static void enter() {
        kernel(*arguments);
        finished[thread] = true;
    }
};
template <typename Kernel, typename Arguments>
Kernel Launch<Kernel, Arguments>::kernel;
template <typename Kernel, typename Arguments>
const Arguments* Launch<Kernel, Arguments>::arguments;

template <typename Kernel, typename Arguments>
void run_block(Kernel kernel, const Arguments& arguments) {
    typedef Launch<Kernel, Arguments> L;
    L::kernel = kernel, L::arguments = &arguments;
    // Nothing may count on what shared memory holds at the start.
    for (size_t i = 0; i < shared.size() / 4; ++i) {
        reinterpret_cast<float*>(shared.data())[i] = std::numeric_limits<float>::quiet_NaN();
    }
    for (int t = 0; t < BLOCK; ++t) {
        finished[t] = false;
        getcontext(&fibres[t]);
        fibres[t].uc_stack.ss_sp = &stacks[static_cast<size_t>(t) * STACK];
        fibres[t].uc_stack.ss_size = STACK;
        fibres[t].uc_link = &scheduler;
        makecontext(&fibres[t], L::enter, 0);
    }
    // Warps take turns in an order that changes: what lacks a barrier shows.
    unsigned turn = 12345;
    for (bool running = true; running;) {
        running = false;
        turn = turn * 1664525u + 1013904223u;
        const int first = turn >> 16 & 3;
        for (int w = 0; w < BLOCK / WARP; ++w) {
            for (int lane = 0; lane < WARP; ++lane) {
                thread = (w + first) % (BLOCK / WARP) * WARP + (turn & 1 << 10 ? lane : 31 - lane);
                if (finished[thread]) continue;
                running = true;
                swapcontext(&scheduler, &fibres[thread]);
            }
        }
    }
}

template <typename Kernel, typename Arguments>
void launch(Kernel kernel, int blocks, const Arguments& arguments) {
    count = blocks;
    for (block = 0; block < blocks; ++block) run_block(kernel, arguments);
}

}  // namespace emulated

DEVICE int thread_index() { return emulated::thread; }
DEVICE int block_index() { return emulated::block; }
DEVICE int block_count() { return emulated::count; }
DEVICE void* shared_base() {
    const size_t address = reinterpret_cast<size_t>(emulated::shared.data());
    return reinterpret_cast<void*>((address + 15) & ~size_t(15));
}

DEVICE float exp2_approx(float x) { return exp2f(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }
DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float infinity() { return std::numeric_limits<float>::infinity(); }

DEVICE float choose(bool condition, float a, float b) { return condition ? a : b; }

DEVICE float to_float(Element x) {
#if SCAN_ELEMENT == 0
    return x;
#else
    const unsigned bits = static_cast<unsigned>(x) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
#endif
}

DEVICE Element from_float(float x) {
#if SCAN_ELEMENT == 0
    return x;
#else
    unsigned bits;
    memcpy(&bits, &x, 4);
    return static_cast<Element>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

DEVICE Element load_if(const char* address, bool wanted) {
    return wanted ? *reinterpret_cast<const Element*>(address) : Element(0);
}

DEVICE void store_if(char* address, Element x, bool wanted) {
    if (wanted) *reinterpret_cast<Element*>(address) = x;
}

struct alignas(2 * sizeof(Element)) Pair {
    Element first, second;
};

DEVICE float2 to_floats(Pair x) { return {to_float(x.first), to_float(x.second)}; }
DEVICE Pair from_floats(float2 x) { return {from_float(x.x), from_float(x.y)}; }

// Aborts where a GPU would, at an odd place.
DEVICE void require_aligned(const char* address) {
    if (reinterpret_cast<size_t>(address) % sizeof(Pair) != 0) {
        fprintf(stderr, "a pair at an odd place\n");
        abort();
    }
}

DEVICE Pair load_pair_if(const char* address, bool wanted) {
    if (!wanted) return {Element(0), Element(0)};
    require_aligned(address);
    return *reinterpret_cast<const Pair*>(address);
}

DEVICE void store_pair_if(char* address, Pair x, bool wanted) {
    if (!wanted) return;
    require_aligned(address);
    *reinterpret_cast<Pair*>(address) = x;
}

template <typename Vector>
DEVICE Vector read_again(const Vector& place) {
    return place;
}

DEVICE void sync_warp() {
    emulated::wait(emulated::warp_barriers[emulated::thread / emulated::WARP], emulated::WARP);
}
DEVICE void sync_block() { emulated::wait(emulated::block_barrier, emulated::BLOCK); }

DEVICE float shuffle_xor(float x, int mask) {
    emulated::exchanged[emulated::thread] = x;
    sync_warp();
    const float y = emulated::exchanged[emulated::thread ^ mask];
    sync_warp();
    return y;
}

DEVICE float load_shared_result(const float* address) { return *address; }
DEVICE void prefetch(const void*) {}
DEVICE void raise_flag(int* flag) { *flag = 1; }
DEVICE void await_flag(const int* flag) {
    if (*flag == 0) {
        fprintf(stderr, "a block waits for one that has not run\n");
        abort();
    }
}
DEVICE void fence_device() {}
