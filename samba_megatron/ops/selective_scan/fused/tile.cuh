// The backward over a tile: forward and back, and the gradients of its activations; see lanes.cuh.

// What a lane has in registers of a tile. The last step's decays are not among it: that step is
// done both ways at once.
struct Tile {
    float decay[TILE - 1][4][4];
    float h[TILE][4][4];  // before each step
    float dC[TILE];
    // Of one channel; the sums for dB on half of the lanes, for dC on the others.
    float y[TILE], dx[TILE], ddecay[TILE], sums[TILE];
};

DEVICE void clear(float (&v)[4]) { v[0] = v[1] = v[2] = v[3] = 0.0f; }

// One step, forward or backward or first the one and then the other.
template <bool FORTH, bool BACK>
DEVICE void run_step(const Operands& o, Slots& slots, Tile& t, int q, float (&y)[4],
                     float (&dx)[4], float (&ddecay)[4], float (&dB)[4], float (&dC)[4]) {
    clear(y), clear(dx), clear(ddecay), clear(dB), clear(dC);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float decay;
            if (FORTH) {
                decay = exp2_approx(multiply_add(o.step[i], slots.A[i][j], o.reset));
                const float h = multiply_add(decay, t.h[q][i][j], o.x[i] * o.B[j]);
                if (!BACK) t.decay[q][i][j] = decay, t.h[q + 1][i][j] = h;
                y[i] = multiply_add(h, o.C[j], y[i]);
                dC[j] = multiply_add(h, o.dy[i], dC[j]);
            } else {
                decay = t.decay[q][i][j];
            }
            if (BACK) {
                const float dh = multiply_add(o.dy[i], o.C[j], slots.dh[i][j]);
                dB[j] = multiply_add(dh, o.x[i], dB[j]);
                dx[i] = multiply_add(dh, o.B[j], dx[i]);
                slots.dh[i][j] = decay * dh;
                const float dexponent = slots.dh[i][j] * t.h[q][i][j];
                ddecay[i] = multiply_add(dexponent, slots.A[i][j], ddecay[i]);
                slots.dA[i][j] = multiply_add(dexponent, o.step[i], slots.dA[i][j]);
            }
        }
    }
}

// After a step forward: the sums over states of y, and over channels of dC.
DEVICE void finish_forth(Tile& t, int q, const float (&y)[4], const float (&dC)[4]) {
    t.dC[q] = sum_channels(dC);
    if (GATED) t.y[q] = sum_states(y);
}

// After a step backward: the sums over channels of dB and dC, and over states of dx and the decay's
// part of the step's gradient.
DEVICE void finish_back(const Lane& lane, Tile& t, int q, const float (&dx)[4],
                        const float (&ddecay)[4], const float (&dB)[4]) {
    const bool has_C = lane.thread & 16;
    const float warp_dB = sum_channels(dB);
    t.sums[q] = (has_C ? t.dC[q] : warp_dB) + shuffle_xor(has_C ? warp_dB : t.dC[q], 16);
    t.dx[q] = sum_states(dx);
    t.ddecay[q] = sum_states(ddecay);
}

// Two steps' sums, added to those of the groups of states before.
template <bool FIRST>
DEVICE void put_sums(float2 (&place)[TILE / 2][32], int lane, const float (&v)[TILE]) {
#pragma unroll
    for (int k = 0; k < TILE / 2; ++k) {
        float2 sum = make_float2(v[2 * k], v[2 * k + 1]);
        if (!FIRST) sum.x += place[k][lane].x, sum.y += place[k][lane].y;
        place[k][lane] = sum;
    }
}

// The sums of a tile go where all of the warp's lanes can read them.
template <bool FIRST>
DEVICE void share_sums(const Tile& t, int thread, float (&sums)[TILE][THREADS], OwnSums& own) {
    const int lane = thread % 32;
    sync_warp();  // all lanes have read what the sums take the place of
#pragma unroll
    for (int q = 0; q < TILE; ++q) sums[q][thread] = t.sums[q];
    if (GATED) put_sums<FIRST>(own.y, lane, t.y);
    put_sums<FIRST>(own.dx, lane, t.dx);
    put_sums<FIRST>(own.decay, lane, t.ddecay);
    sync_warp();
}

// A lane's two channels in two steps, from memory, for the gradients of the activations.
struct Again {
    Pair u[2], z[2], dy[2];
};

DEVICE void ask_again(const BackwardArguments& p, const Own& own, int batch, int time,
                      Again& raw) {
    Column u = column(p.u, time, batch, own.channel);
    Column z = column(p.z, time, batch, own.channel);
    Column dy = column(p.dy, time, batch, own.channel);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const bool exists = own.active && time + k < p.plan.length;
        raw.u[k] = load_pair_if(u.data, exists);
        raw.dy[k] = load_pair_if(dy.data, exists);
        if (GATED) raw.z[k] = load_pair_if(z.data, exists);
        advance(u, 1), advance(dy, 1);
        if (GATED) advance(z, 1);
    }
}

// What one channel's step gives: the gradients of its activations, and parts of those of D and bias.
struct OwnGradients {
    float du, ddelta, dz, dD;
};

DEVICE OwnGradients differentiate(float u, float z, float dy, float step, float D, float y,
                                  float dx, float ddecay) {
    OwnGradients g;
    if (GATED) {
        const float s = sigmoid(z);
        const float slope = s * multiply_add(z, 1.0f - s, 1.0f);
        g.dz = dy * multiply_add(D, u, y) * slope;
        dy *= z * s;
    }
    g.du = multiply_add(dx, step, dy * D);
    g.ddelta = multiply_add(ddecay, LN_2, dx * u);
    if (SOFTPLUS) g.ddelta *= softplus_slope(step);
    g.dD = dy * u;
    return g;
}

DEVICE void write_pair(const Result& r, int steps, float first, float second, bool wanted) {
    store_pair_if(r.data + static_cast<long long>(steps) * r.time_stride,
                  from_floats(make_float2(first, second)), wanted);
}

// Two steps of a tile from their sums; `time` is the first one's.
DEVICE void finish_own(const BackwardArguments& p, Own& own, int batch, int time,
                       const SharedTile& tile, const OwnSums& sums, const Again& raw) {
    const Result du = result(p.du, time, batch, own.channel);
    const Result ddelta = result(p.ddelta, time, batch, own.channel);
    const Result dz = result(p.dz, time, batch, own.channel);
    const int place = own.first % 32;
    const float4 no = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    // One channel's first and second step, and the other's.
    const float4 y = GATED ? reinterpret_cast<const float4&>(sums.y[own.half][place]) : no;
    const float4 dx = reinterpret_cast<const float4&>(sums.dx[own.half][place]);
    const float4 decay = reinterpret_cast<const float4&>(sums.decay[own.half][place]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float2 u = to_floats(raw.u[k]), dy = to_floats(raw.dy[k]);
        const float2 z = GATED ? to_floats(raw.z[k]) : make_float2(0.0f, 0.0f);
        const float4 step =
            reinterpret_cast<const float4&>(tile.step[2 * own.half + k][own.first]);
        const OwnGradients a = differentiate(u.x, z.x, dy.x, step.x, own.D.x, k ? y.y : y.x,
                                             k ? dx.y : dx.x, k ? decay.y : decay.x);
        const OwnGradients b = differentiate(u.y, z.y, dy.y, step.z, own.D.y, k ? y.w : y.z,
                                             k ? dx.w : dx.z, k ? decay.w : decay.z);
        const bool exists = own.active && time + k < p.plan.length;
        write_pair(du, k, a.du, b.du, exists);
        write_pair(ddelta, k, a.ddelta, b.ddelta, exists);
        if (GATED) write_pair(dz, k, a.dz, b.dz, exists);
        own.chunk_dD.x += a.dD, own.chunk_dD.y += b.dD;
        if (exists) own.chunk_dbias.x += a.ddelta, own.chunk_dbias.y += b.ddelta;
    }
}

// Where a tile's sums go. Those over states take the place of the states kept before it.
struct Places {
    float (&sums)[TILE][THREADS];
    OwnSums& own;
};

DEVICE Places places_of(Shared& shared, SharedOfGroups* of_groups, KeptStates& kept, int tile,
                        int warp) {
    if (GROUPS == 1) return {shared.tiles[tile].dy, reinterpret_cast<OwnSums&>(kept)};
    return {*reinterpret_cast<float(*)[TILE][THREADS]>(of_groups->sums[tile * TILE]),
            of_groups->own[tile][warp]};
}

// Forward and back over a tile from the states kept before it. `begin` is its first step's time.
template <bool FIRST, bool LAST>
DEVICE void run_tile(const BackwardArguments& p, Own& own, const Lane& lane, Slots& slots,
                     const SharedTile& tile, const KeptStates& kept, const Places& places,
                     int begin, int batch) {
    Tile t;
    Again raw;
    const int time = begin + 2 * own.half;
    recall_states(kept, lane.thread % 32, t.h[0]);
    float y[4], dx[4], ddecay[4], dB[4], dC[4];
#pragma unroll
    for (int q = 0; q < TILE - 1; ++q) {
        const Operands o = read_operands<false>(tile, lane, q);
        run_step<true, false>(o, slots, t, q, y, dx, ddecay, dB, dC);
        finish_forth(t, q, y, dC);
    }
    const int end = TILE - 1;
    const Operands o = read_operands<false>(tile, lane, end);
    run_step<true, true>(o, slots, t, end, y, dx, ddecay, dB, dC);
    finish_forth(t, end, y, dC);
    finish_back(lane, t, end, dx, ddecay, dB);
#pragma unroll
    for (int q = TILE - 2; q >= 0; --q) {
        if (q == 0) recall_states(kept, lane.thread % 32, t.h[0]);
        if (LAST && q == 0) ask_again(p, own, batch, time, raw);
        const Operands o = read_operands<true>(tile, lane, q);
        run_step<false, true>(o, slots, t, q, y, dx, ddecay, dB, dC);
        finish_back(lane, t, q, dx, ddecay, dB);
    }
    share_sums<FIRST>(t, lane.thread, places.sums, places.own);
    if (LAST) finish_own(p, own, batch, time, tile, places.own, raw);
}
