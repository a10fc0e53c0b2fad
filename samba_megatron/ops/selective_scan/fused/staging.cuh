// The backward: its layout, and the first two of its phases.
//
// It is the adjoint, from the states saved before each chunk and from the gradient of y.
//
// A warp has 32 channels and GROUP states of each. For what is element-wise a lane owns one channel;
// for the recurrence it has 4 channels x 4 states, so that most of a sum over channels (dB, dC) or
// over states (y, dx, the decay's part of the step's gradient) is made of multiply-adds in the
// lane, and the rest of a few shuffles. The order of a lane's channels and states depends on the
// lane such that a halving exchange sends what sits in the same registers on every lane: slot i of
// a lane is channel i ^ (lane & 3) of its four, slot j is state j ^ (lane >> 2 & 3).
//
// A chunk goes in three phases: (0) each lane turns its channel's activations into Δ, Δu and dy;
// (1) the states run forward and are kept before each TILE of steps; (2) from the last tile to the
// first the states run forward once more, now with all decays and states of the tile in registers,
// and then the adjoint runs back over them.
//
// More than 16 states are done 16 at a time, their contributions to sums over states added up in
// shared memory.

constexpr int BATCH_LOADS = 8;  // steps whose activations are asked for at once

// What phase 0 leaves of a tile's steps.
struct SharedTile {
    float2 step[TILE][THREADS];       // Δ and Δu
    float2 dy[TILE / 2][THREADS];     // of two steps; later the warps' sums for dB and dC
    float4 projections[TILE][2 * 8];  // B, B, C, C of two states; then of states n ^ 1
    float reset[TILE];
};

struct Shared {
    float4 states[TILES - 1][4][THREADS];  // before each tile but the first, by a thread's slots;
                                           // at last those before the first in the second's place
    SharedTile tiles[TILES];
};

// What more than one group of states needs besides.
struct SharedOfGroups {
    float2 sums[CHUNK / 2][THREADS];  // in dy's place for dB and dC
    float y[CHUNK][THREADS];
    float dx[CHUNK][THREADS];
    float decay[CHUNK][THREADS];
};

// One thread's own channel.
struct Own {
    int channel;
    bool active;
    float D, bias, dD, dbias;
};

// Phase 0

struct Raw {
    Element u[BATCH_LOADS], delta[BATCH_LOADS], z[BATCH_LOADS], dy[BATCH_LOADS];
};

DEVICE void ask_batch(const BackwardArguments& p, int batch, const Own& own, int begin, Raw& raw) {
    const int remaining = own.active ? p.plan.length - begin : 0;
    const Column u = column(p.u, begin, batch, own.channel);
    const Column delta = column(p.delta, begin, batch, own.channel);
    const Column dy = column(p.dy, begin, batch, own.channel);
    const Column z = column(p.z, begin, batch, own.channel);
#pragma unroll
    for (int k = 0; k < BATCH_LOADS; ++k) {
        const bool exists = k < remaining;
        raw.u[k] = read(u, k, exists);
        raw.delta[k] = read(delta, k, exists);
        raw.dy[k] = read(dy, k, exists);
        if (GATED) raw.z[k] = read(z, k, exists);
    }
}

DEVICE void stage_batch(const BackwardArguments& p, const Own& own, int begin, const Raw& raw,
                        Shared& shared) {
    const int thread = thread_index();
    const int remaining = own.active ? p.plan.length - begin : 0;
    float dy[2];
#pragma unroll
    for (int k = 0; k < BATCH_LOADS; ++k) {
        const int place = begin % CHUNK + k;
        float step = to_float(raw.delta[k]) + own.bias;
        if (SOFTPLUS) step = softplus(step);
        step = k < remaining ? step : 0.0f;  // and u and dy are zero: nothing changes
        const float x = step * to_float(raw.u[k]);
        dy[k % 2] = to_float(raw.dy[k]);
        if (GATED) {
            const float z = to_float(raw.z[k]);
            dy[k % 2] *= z * sigmoid(z);
        }
        SharedTile& tile = shared.tiles[place / TILE];
        tile.step[k % TILE][thread] = make_float2(step, x);
        if (k % 2 == 1) tile.dy[k % TILE / 2][thread] = make_float2(dy[0], dy[1]);
    }
}

DEVICE void stage_chunk(const BackwardArguments& p, int batch, const Own& own, int begin,
                        Shared& shared) {
    Raw raw[2];
    ask_batch(p, batch, own, begin, raw[0]);
#pragma unroll
    for (int k = 0; k < CHUNK / BATCH_LOADS; ++k) {
        if (k + 1 < CHUNK / BATCH_LOADS) {
            ask_batch(p, batch, own, begin + (k + 1) * BATCH_LOADS, raw[(k + 1) % 2]);
        }
        stage_batch(p, own, begin + k * BATCH_LOADS, raw[k % 2], shared);
    }
}

// One group's B and C of the chunk, and the resets.
DEVICE void stage_projections(const BackwardArguments& p, const Piece& piece, int begin,
                              int group, Shared& shared) {
    constexpr int loads = CHUNK * 2 * GROUP / THREADS;
    const int thread = thread_index();
    float values[loads];
#pragma unroll
    for (int i = 0; i < loads; ++i) {
        const int index = i * THREADS + thread;
        const int time = begin + index / (2 * GROUP);
        const int place = index % (2 * GROUP);
        const int state = group * GROUP + place % GROUP;
        const Strided& source = place < GROUP ? p.B : p.C;
        const bool exists = time < p.plan.length && state < STATES;
        values[i] = to_float(read(column(source, time, piece.batch, state), 0, exists));
    }
#pragma unroll
    for (int i = 0; i < loads; ++i) {
        const int index = i * THREADS + thread;
        const int place = index % (2 * GROUP), state = place % GROUP;
        const int step = index / (2 * GROUP);
        float* pairs =
            reinterpret_cast<float*>(shared.tiles[step / TILE].projections[step % TILE]);
        const int C_half = place < GROUP ? 0 : 2;
        pairs[state / 2 * 4 + C_half + (state & 1)] = values[i];
        pairs[32 + state / 2 * 4 + C_half + (state & 1 ^ 1)] = values[i];
    }
    if (thread < CHUNK) {
        shared.tiles[thread / TILE].reset[thread % TILE] =
            reset_exponent(p.reset, p.plan, begin + thread, piece.batch);
    }
}

template <bool AGAIN>
DEVICE Operands read_operands(const SharedTile& tile, const Lane& lane, int q) {
    Operands o;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 &at_step = tile.step[q][lane.place[i]], &at_dy = tile.dy[q / 2][lane.place[i]];
        const float2 step = AGAIN ? read_again(at_step) : at_step;
        const float2 dy = AGAIN ? read_again(at_dy) : at_dy;
        o.step[i] = step.x, o.x[i] = step.y;
        o.dy[i] = q % 2 == 0 ? dy.x : dy.y;
    }
    const float4 &at_low = tile.projections[q][lane.low], &at_high = tile.projections[q][lane.high];
    const float4 low = AGAIN ? read_again(at_low) : at_low;
    const float4 high = AGAIN ? read_again(at_high) : at_high;
    o.B[0] = low.x, o.B[1] = low.y, o.B[2] = high.x, o.B[3] = high.y;
    o.C[0] = low.z, o.C[1] = low.w, o.C[2] = high.z, o.C[3] = high.w;
    o.reset = tile.reset[q];
    return o;
}

// Phase 1

typedef float4 KeptStates[4][THREADS];

DEVICE void keep_states(KeptStates& kept, const Lane& lane, const float (&h)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        kept[i][lane.thread] = make_float4(h[i][0], h[i][1], h[i][2], h[i][3]);
    }
}

DEVICE void recall_states(const KeptStates& kept, const Lane& lane, float (&h)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 v = read_again(kept[i][lane.thread]);
        h[i][0] = v.x, h[i][1] = v.y, h[i][2] = v.z, h[i][3] = v.w;
    }
}

DEVICE void scan_chunk(Shared& shared, const Lane& lane, const Slots& slots, float (&h)[4][4]) {
    for (int tile = 1; tile < TILES; ++tile) {
#pragma unroll
        for (int q = 0; q < TILE; ++q) {
            const Operands o = read_operands<false>(shared.tiles[tile - 1], lane, q);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float decay =
                        exp2_approx(multiply_add(o.step[i], slots.A[i][j], o.reset));
                    h[i][j] = multiply_add(decay, h[i][j], o.x[i] * o.B[j]);
                }
            }
        }
        keep_states(shared.states[tile - 1], lane, h);
    }
}
