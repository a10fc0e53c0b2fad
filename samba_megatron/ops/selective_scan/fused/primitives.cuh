// What the kernels ask of the processor: a handful of instructions and no header of the toolkit.
//
// The tests run the same kernels on a CPU by putting another file of these names in this one's
// place. Whoever compiles defines SCAN_ELEMENT, the activations' dtype (0 for fp32, 1 for fp16, 2
// for bf16), SCAN_STATES, SCAN_CHUNK, and SCAN_GATED and SCAN_SOFTPLUS, 0 or 1.

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

extern __shared__ float4 shared_memory[];

#if SCAN_ELEMENT == 0
typedef float Element;
#else
typedef unsigned short Element;
#endif

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }
DEVICE void* shared_base() { return shared_memory; }

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float infinity() { return __int_as_float(0x7f800000); }

// A choice that is never a branch.
DEVICE float choose(bool condition, float a, float b) {
    float y;
    asm("{ .reg .pred p; setp.ne.b32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
        : "=f"(y)
        : "f"(a), "f"(b), "r"(static_cast<int>(condition)));
    return y;
}

DEVICE float to_float(Element x) {
#if SCAN_ELEMENT == 0
    return x;
#elif SCAN_ELEMENT == 1
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return __uint_as_float(static_cast<unsigned>(x) << 16);
#endif
}

DEVICE Element from_float(float x) {
#if SCAN_ELEMENT == 0
    return x;
#elif SCAN_ELEMENT == 1
    Element y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    Element y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#endif
}

// Loads and stores that a condition switches off without a branch: in straight code, steps overlap.
DEVICE Element load_if(const char* address, bool wanted) {
    Element x = 0;
#if SCAN_ELEMENT == 0
    asm("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.f32 %0, [%1]; }"
        : "+f"(x)
        : "l"(address), "r"(static_cast<int>(wanted)));
#else
    asm("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.nc.b16 %0, [%1]; }"
        : "+h"(x)
        : "l"(address), "r"(static_cast<int>(wanted)));
#endif
    return x;
}

DEVICE void store_if(char* address, Element x, bool wanted) {
#if SCAN_ELEMENT == 0
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.f32 [%0], %1; }" ::"l"(address),
                 "f"(x), "r"(static_cast<int>(wanted)));
#else
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b16 [%0], %1; }" ::"l"(address),
                 "h"(x), "r"(static_cast<int>(wanted)));
#endif
}

// Two neighbours in memory.
#if SCAN_ELEMENT == 0
typedef float2 Pair;
#else
typedef unsigned Pair;
#endif

DEVICE float2 to_floats(Pair x) {
#if SCAN_ELEMENT == 0
    return x;
#elif SCAN_ELEMENT == 1
    float2 y;
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(y.x), "=f"(y.y)
        : "r"(x));
    return y;
#else
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
#endif
}

DEVICE Pair from_floats(float2 x) {
#if SCAN_ELEMENT == 0
    return x;
#else
    Pair y;
#if SCAN_ELEMENT == 1
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(y) : "f"(x.x), "f"(x.y));
#else
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(y) : "f"(x.x), "f"(x.y));
#endif
    return y;
#endif
}

// Volatile: asked for before what is read from shared memory after it, and not when it is wanted.
DEVICE Pair load_pair_if(const char* address, bool wanted) {
#if SCAN_ELEMENT == 0
    Pair x = make_float2(0.0f, 0.0f);
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p ld.volatile.global.v2.f32 {%0, %1}, [%2]; }"
                 : "+f"(x.x), "+f"(x.y)
                 : "l"(address), "r"(static_cast<int>(wanted)));
#else
    Pair x = 0;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.volatile.global.b32 %0, [%1]; }"
                 : "+r"(x)
                 : "l"(address), "r"(static_cast<int>(wanted)));
#endif
    return x;
}

DEVICE void store_pair_if(char* address, Pair x, bool wanted) {
#if SCAN_ELEMENT == 0
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.f32 [%0], {%1, %2}; }" ::"l"(
                     address),
                 "f"(x.x), "f"(x.y), "r"(static_cast<int>(wanted)));
#else
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b32 [%0], %1; }" ::"l"(address),
                 "r"(x), "r"(static_cast<int>(wanted)));
#endif
}

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

// Read shared memory even if what it held is still in registers: these are wanted for others.
DEVICE float4 read_again(const float4& place) {
    float4 v;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(__cvta_generic_to_shared(&place))
                 : "memory");
    return v;
}

DEVICE float read_again(const float& place) {
    float v;
    asm volatile("ld.volatile.shared.f32 %0, [%1];"
                 : "=f"(v)
                 : "l"(__cvta_generic_to_shared(&place))
                 : "memory");
    return v;
}

DEVICE float2 read_again(const float2& place) {
    float2 v;
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "l"(__cvta_generic_to_shared(&place))
                 : "memory");
    return v;
}

// Reads past the caches that other multiprocessors' writes do not reach.
DEVICE float load_shared_result(const float* address) {
    float y;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(y) : "l"(address) : "memory");
    return y;
}

DEVICE void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// One thread of a block tells another block that what the block has written may be read.
DEVICE void raise_flag(int* flag) {
    asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}

DEVICE void await_flag(const int* flag) {
    int raised;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    } while (raised == 0);
}

DEVICE void fence_device() { __threadfence(); }
