// The backward's shared memory, and what runs forward over a chunk; see lanes.cuh.

// What a tile's steps are for the recurrence.
struct SharedTile {
    float2 step[TILE][THREADS];       // Δ and Δu
    float dy[TILE][THREADS];          // later the warps' sums for dB and dC
    float4 projections[TILE][2 * 8];  // B, B, C, C of two states; then of states n ^ 1
    float reset[TILE];
};

// A warp's states before a tile, by its lanes' slots.
typedef float4 KeptStates[4][32];

// A warp's sums over states of a tile: two steps a float2, a column a channel.
struct OwnSums {
    float2 y[TILE / 2][32], dx[TILE / 2][32], decay[TILE / 2][32];
};

struct Shared {
    // Before each tile but the first; at last those before the first in the second's place. Where
    // a tile's states were, its OwnSums are then.
    KeptStates states[TILES - 1][WARPS];
    SharedTile tiles[TILES];
};

// What more than one group of states needs besides.
struct SharedOfGroups {
    float sums[CHUNK][THREADS];  // in dy's place for dB and dC
    OwnSums own[TILES][WARPS];
};

// A lane's own two channels, and which two steps of a tile it does of them.
struct Own {
    int first;    // the first one's number in the block
    int channel;  // and in all
    bool active;  // whether it is there
    int half;     // the tile's first two steps, or the others
    float2 D, bias;
    float2 dD, dbias;              // over all chunks before
    float2 chunk_dD, chunk_dbias;  // over this one: fewer roundings than in one sum
};

// Staging

// The activations of a lane's two steps of a tile, as they lie in memory.
struct Raw {
    Pair u[2], delta[2], z[2], dy[2];
};

// Where a lane's next step lies in each tensor.
struct Source {
    Column u, delta, z, dy;
    int remaining;  // the chunk's steps from it on; for a channel that is not there, none
};

DEVICE Source make_source(const BackwardArguments& p, int batch, const Own& own, int begin) {
    const int time = begin + 2 * own.half;
    Source s;
    s.u = column(p.u, time, batch, own.channel);
    s.delta = column(p.delta, time, batch, own.channel);
    s.z = column(p.z, time, batch, own.channel);
    s.dy = column(p.dy, time, batch, own.channel);
    s.remaining = own.active ? min(p.plan.length, begin + CHUNK) - time : -CHUNK;
    return s;
}

DEVICE void advance(Source& s, int steps) {
    advance(s.u, steps), advance(s.delta, steps), advance(s.dy, steps);
    if (GATED) advance(s.z, steps);
    s.remaining -= steps;
}

// Asks for one of a tile's two steps and goes on to the next.
DEVICE void ask_step(Source& s, int k, Raw& raw) {
    const bool exists = s.remaining > 0;
    raw.u[k] = load_pair_if(s.u.data, exists);
    raw.delta[k] = load_pair_if(s.delta.data, exists);
    raw.dy[k] = load_pair_if(s.dy.data, exists);
    if (GATED) raw.z[k] = load_pair_if(s.z.data, exists);
    advance(s, k == 0 ? 1 : TILE - 1);
}

// A step that does not exist has a Δ and a dy of zero: it changes nothing.
DEVICE float2 stage_one(float u, float delta, float z, float& dy, float bias, bool exists) {
    float step = delta + bias;
    if (SOFTPLUS) step = softplus(step);
    step = exists ? step : 0.0f;
    if (GATED) dy *= z * sigmoid(z);
    return make_float2(step, step * u);
}

// A lane's steps of a tile as they are staged: Δ and Δu of one channel and the other; dy.
struct Staged {
    float4 step[2];
    float2 dy[2];
};

DEVICE void stage_step(const Own& own, const Raw& raw, int k, bool exists, Staged& staged) {
    const float2 u = to_floats(raw.u[k]), delta = to_floats(raw.delta[k]);
    const float2 z = GATED ? to_floats(raw.z[k]) : make_float2(0.0f, 0.0f);
    float2 dy = to_floats(raw.dy[k]);
    const float2 first = stage_one(u.x, delta.x, z.x, dy.x, own.bias.x, exists);
    const float2 second = stage_one(u.y, delta.y, z.y, dy.y, own.bias.y, exists);
    staged.step[k] = make_float4(first.x, first.y, second.x, second.y);
    staged.dy[k] = dy;
}

DEVICE void put_staged(const Own& own, const Staged& staged, SharedTile& tile) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int q = 2 * own.half + k;
        *reinterpret_cast<float4*>(&tile.step[q][own.first]) = staged.step[k];
        *reinterpret_cast<float2*>(&tile.dy[q][own.first]) = staged.dy[k];
    }
}

// One group's B and C of the chunk, and the resets. A lane has one of both's columns, a warp one of
// each tile's steps.
DEVICE void stage_projections(const BackwardArguments& p, const Piece& piece, int begin,
                              int group, Shared& shared) {
    static_assert(TILE == WARPS && 2 * GROUP == 32, "a warp a step, a lane a column");
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const bool is_C = lane >= GROUP;
    const int place = lane % GROUP, state = group * GROUP + place;
    const Column from = column(is_C ? p.C : p.B, begin + warp, piece.batch, state);
    const int remaining = state < STATES ? p.plan.length - begin - warp : 0;
    float values[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        values[i] = to_float(read(from, i * TILE, i * TILE < remaining));
    }
    const int pair = place / 2 * 4 + is_C * 2, odd = place & 1;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        float* row = reinterpret_cast<float*>(shared.tiles[i].projections[warp]);
        row[pair + odd] = row[32 + pair + (odd ^ 1)] = values[i];
    }
    if (thread_index() < CHUNK) {
        const int step = thread_index();
        shared.tiles[step / TILE].reset[step % TILE] =
            reset_exponent(p.reset, p.plan, begin + step, piece.batch);
    }
}

// A step's operands in a lane's slots.
struct Operands {
    float step[4], x[4], dy[4], B[4], C[4], reset;
};

template <bool AGAIN>
DEVICE Operands read_operands(const SharedTile& tile, const Lane& lane, int q) {
    Operands o;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2& at_step = tile.step[q][lane.place[i]];
        const float& at_dy = tile.dy[q][lane.place[i]];
        const float2 step = AGAIN ? read_again(at_step) : at_step;
        o.step[i] = step.x, o.x[i] = step.y;
        o.dy[i] = AGAIN ? read_again(at_dy) : at_dy;
    }
    const float4 &at_low = tile.projections[q][lane.low], &at_high = tile.projections[q][lane.high];
    const float4 low = AGAIN ? read_again(at_low) : at_low;
    const float4 high = AGAIN ? read_again(at_high) : at_high;
    o.B[0] = low.x, o.B[1] = low.y, o.B[2] = high.x, o.B[3] = high.y;
    o.C[0] = low.z, o.C[1] = low.w, o.C[2] = high.z, o.C[3] = high.w;
    o.reset = tile.reset[q];
    return o;
}

// Forward over a chunk

DEVICE void keep_states(KeptStates& kept, int lane, const float (&h)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        kept[i][lane] = make_float4(h[i][0], h[i][1], h[i][2], h[i][3]);
    }
}

DEVICE void recall_states(const KeptStates& kept, int lane, float (&h)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 v = read_again(kept[i][lane]);
        h[i][0] = v.x, h[i][1] = v.y, h[i][2] = v.z, h[i][3] = v.w;
    }
}

DEVICE void scan_step(const SharedTile& tile, const Lane& lane, const Slots& slots, int q,
                      float (&h)[4][4]) {
    const Operands o = read_operands<false>(tile, lane, q);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float decay = exp2_approx(multiply_add(o.step[i], slots.A[i][j], o.reset));
            h[i][j] = multiply_add(decay, h[i][j], o.x[i] * o.B[j]);
        }
    }
}

// Keeps the states before each tile; and, if STAGE, stages each tile while the tile before it is
// scanned: one waits for exponentials, the other for memory. `raw` holds the second tile's
// activations, of which `source` is one tile ahead.
template <bool STAGE>
DEVICE void scan_chunk(Shared& shared, const Lane& lane, const Slots& slots, const Own& own,
                       Source& source, Raw& raw, float (&h)[4][4]) {
    const int warp = lane.thread / 32;
    for (int tile = 1; tile < TILES; ++tile) {
        Staged staged;
#pragma unroll
        for (int q = 0; q < TILE; ++q) {
            if (STAGE && q % 2 == 0) {
                // The source is past this step by one tile.
                const bool exists = source.remaining > -TILE;
                stage_step(own, raw, q / 2, exists, staged);
                ask_step(source, q / 2, raw);
            }
            scan_step(shared.tiles[tile - 1], lane, slots, q, h);
        }
        if (STAGE) put_staged(own, staged, shared.tiles[tile]);
        keep_states(shared.states[tile - 1][warp], lane.thread % 32, h);
        if (STAGE) sync_warp();
    }
}
