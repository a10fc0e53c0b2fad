// The backward's third phase, its way over chunks and pieces, and its kernels; see staging.cuh.

// What a thread has in registers of a tile. The last step's decays are not among it: that step is
// done both ways at once.
struct Tile {
    float decay[TILE - 1][4][4];
    float h[TILE][4][4];  // before each step
    float dC[TILE];
    Element u[TILE], z[TILE], dy[TILE];  // of the thread's own channel
    float2 sums[TILE / 2];
    float dD;
};

DEVICE float gate_gradient(float dy, float y, float z) {
    const float s = sigmoid(z);
    return dy * y * s * multiply_add(z, 1.0f - s, 1.0f);
}

// What the outputs of a tile's steps go to, and how many of its steps there are.
struct Target {
    Result du, ddelta, dz;
    int remaining;
};

template <bool FIRST>
DEVICE float add_to(float* total, float part) {
    if (GROUPS == 1) return part;
    if (!FIRST) part += *total;
    *total = part;
    return part;
}

// After a step forward: the sum over states of y, and with it dz.
template <bool FIRST, bool LAST>
DEVICE void finish_forth(const Own& own, const Lane& lane, SharedOfGroups* sums,
                         const Target& target, Tile& t, int q, int place, const float (&y)[4],
                         const float (&dC)[4]) {
    t.dC[q] = sum_channels(dC);
    if (!GATED) return;
    float own_y = add_to<FIRST>(&sums->y[place][lane.thread], sum_states(y));
    if (!LAST) return;
    own_y = multiply_add(own.D, to_float(t.u[q]), own_y);
    const float dz = gate_gradient(to_float(t.dy[q]), own_y, to_float(t.z[q]));
    write(target.dz, q, dz, q < target.remaining);
}

// After a step backward: the sums over channels of dB and dC, and over states of dx and the decay's
// part of the step's gradient, and with these du and ddelta.
template <bool FIRST, bool LAST>
DEVICE void finish_back(Own& own, const Lane& lane, const SharedTile& tile, SharedOfGroups* sums,
                        const Target& target, Tile& t, int q, int place, const float (&dx)[4],
                        const float (&ddecay)[4], const float (&dB)[4]) {
    // Half of the lanes finish dB, the others dC.
    const bool has_C = lane.thread & 16;
    const float warp_dB = sum_channels(dB);
    const float mine = (has_C ? t.dC[q] : warp_dB) + shuffle_xor(has_C ? warp_dB : t.dC[q], 16);
    (q % 2 == 0 ? t.sums[q / 2].x : t.sums[q / 2].y) = mine;
    const float own_dx = add_to<FIRST>(&sums->dx[place][lane.thread], sum_states(dx));
    const float own_ddecay = add_to<FIRST>(&sums->decay[place][lane.thread], sum_states(ddecay));
    if (!LAST) return;
    const float u = to_float(t.u[q]);
    const float step = tile.step[q][lane.thread].x;
    const float2 dy_pair = tile.dy[q / 2][lane.thread];
    const float dy = q % 2 == 0 ? dy_pair.x : dy_pair.y;
    float ddelta = multiply_add(own_ddecay, LN_2, own_dx * u);
    if (SOFTPLUS) ddelta *= softplus_slope(step);
    ddelta = q < target.remaining ? ddelta : 0.0f;
    write(target.du, q, multiply_add(own_dx, step, dy * own.D), q < target.remaining);
    write(target.ddelta, q, ddelta, q < target.remaining);
    // Summed over the tile first: a quarter of the roundings of a sum over all steps.
    t.dD = q == TILE - 1 ? dy * u : multiply_add(dy, u, t.dD);
    if (q == 0) own.dD += t.dD;
    own.dbias += ddelta;
}

DEVICE void ask_tile(const BackwardArguments& p, const Own& own, int batch, int begin,
                     int remaining, Tile& t) {
    const Column u = column(p.u, begin, batch, own.channel);
    const Column z = column(p.z, begin, batch, own.channel);
    const Column dy = column(p.dy, begin, batch, own.channel);
#pragma unroll
    for (int q = 0; q < TILE; ++q) {
        const bool exists = q < remaining;
        t.u[q] = read(u, q, exists);
        if (GATED) t.z[q] = read(z, q, exists), t.dy[q] = read(dy, q, exists);
    }
}

// Forward and back over a tile, from the states kept before it. `begin` is its first step's time, `first` that
// step's place in the chunk.
template <bool FIRST, bool LAST>
DEVICE void run_tile(const BackwardArguments& p, Own& own, const Lane& lane, Slots& slots,
                     SharedTile& tile, const KeptStates& kept, SharedOfGroups* sums, int begin,
                     int first, int batch) {
    Tile t;
    Target target;
    target.remaining = own.active ? p.plan.length - begin : 0;
    target.du = result(p.du, begin, batch, own.channel);
    target.ddelta = result(p.ddelta, begin, batch, own.channel);
    target.dz = result(p.dz, begin, batch, own.channel);
    if (LAST) ask_tile(p, own, batch, begin, target.remaining, t);
    recall_states(kept, lane, t.h[0]);
    float y[4], dx[4], ddecay[4], dB[4], dC[4];
#pragma unroll
    for (int q = 0; q < TILE - 1; ++q) {
        const Operands o = read_operands<false>(tile, lane, q);
        run_step<true, false>(o, slots, t, q, y, dx, ddecay, dB, dC);
        finish_forth<FIRST, LAST>(own, lane, sums, target, t, q, first + q, y, dC);
    }
    const int end = TILE - 1;
    const Operands o = read_operands<false>(tile, lane, end);
    run_step<true, true>(o, slots, t, end, y, dx, ddecay, dB, dC);
    finish_forth<FIRST, LAST>(own, lane, sums, target, t, end, first + end, y, dC);
    finish_back<FIRST, LAST>(own, lane, tile, sums, target, t, end, first + end, dx, ddecay, dB);
#pragma unroll
    for (int q = TILE - 2; q >= 0; --q) {
        if (q == 0) recall_states(kept, lane, t.h[0]);
        const Operands o = read_operands<true>(tile, lane, q);
        run_step<false, true>(o, slots, t, q, y, dx, ddecay, dB, dC);
        finish_back<FIRST, LAST>(own, lane, tile, sums, target, t, q, first + q, dx, ddecay, dB);
    }
    sync_warp();  // all lanes have read dy, whose place the sums take
#pragma unroll
    for (int k = 0; k < TILE / 2; ++k) {
        float2(&place)[THREADS] = GROUPS > 1 ? sums->sums[first / 2 + k] : tile.dy[k];
        place[lane.thread] = t.sums[k];
    }
}

// The block's sums for dB and dC of the chunk, from its warps'.
DEVICE void write_dprojections(const BackwardArguments& p, const Piece& piece, int begin,
                               int group, const Shared& shared, const SharedOfGroups* sums) {
    const int thread = thread_index(), lane = thread % 32;
    const int state = group * GROUP + (lane & 3) * 4 + (lane >> 2 & 3);
    const int column = (lane >> 4) * STATES + state;
#pragma unroll
    for (int k = 0; k < CHUNK / 2 / WARPS; ++k) {
        const int pair = thread / 32 + k * WARPS;
        const float2(&parts)[THREADS] =
            GROUPS > 1 ? sums->sums[pair] : shared.tiles[pair * 2 / TILE].dy[pair % (TILE / 2)];
        float first = 0.0f, second = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            first += parts[warp * 32 + lane].x;
            second += parts[warp * 32 + lane].y;
        }
        const int time = begin + 2 * pair;
        const long long row =
            (static_cast<long long>(piece.channel_block) * p.plan.length + time) * p.plan.batch +
            piece.batch;
        if (state >= STATES) continue;
        float* target = p.dprojections + row * 2 * STATES + column;
        if (time < p.plan.length) *target = first;
        if (time + 1 < p.plan.length) target[p.plan.batch * 2 * STATES] = second;
    }
}

DEVICE void prefetch_chunk(const BackwardArguments& p, int batch, const Own& own, int begin) {
    // A lane a step: the warp's channels lie together.
    const int lane = thread_index() % 32, time = begin + lane, channel = own.channel - lane;
    if (time >= p.plan.length || channel < 0) return;
    prefetch(column(p.u, time, batch, channel).data);
    prefetch(column(p.delta, time, batch, channel).data);
    prefetch(column(p.dy, time, batch, channel).data);
    if (p.z.data != nullptr) prefetch(column(p.z, time, batch, channel).data);
}

template <bool FIRST, bool LAST>
DEVICE void run_group(const BackwardArguments& p, const Piece& piece, Own& own, const Lane& lane,
                      Slots& slots, Shared& shared, SharedOfGroups* sums, int chunk, int group) {
    const int begin = chunk * CHUNK;
    const int first_channel = piece.channel_block * THREADS;
    const int channels = p.plan.channels - first_channel;
    const float* checkpoint =
        p.checkpoints + state_offset(p.plan, chunk, piece.batch, first_channel);
    float h[4][4];
    load_slots(h, checkpoint, lane, channels, group);
    scan_chunk(shared, lane, slots, h);
    for (int tile = TILES - 1; tile >= 0; --tile) {
        KeptStates& kept = shared.states[tile > 0 ? tile - 1 : 0];
        if (tile == 0) {
            load_slots(h, checkpoint, lane, channels, group);
            keep_states(kept, lane, h);
        }
        run_tile<FIRST, LAST>(p, own, lane, slots, shared.tiles[tile], kept, sums,
                              begin + tile * TILE, tile * TILE, piece.batch);
    }
}

DEVICE void run_groups(const BackwardArguments& p, const Piece& piece, Own& own, const Lane& lane,
                       Slots& slots, Shared& shared, SharedOfGroups* sums, int chunk) {
    for (int group = 0; group < GROUPS; ++group) {
        load_group(p, piece, lane, group, false, slots);
        if (group > 0) {
            stage_projections(p, piece, chunk * CHUNK, group, shared);
            sync_block();
        }
        if (group == 0) {
            run_group<true, false>(p, piece, own, lane, slots, shared, sums, chunk, group);
        } else if (group < GROUPS - 1) {
            run_group<false, false>(p, piece, own, lane, slots, shared, sums, chunk, group);
        } else {
            run_group<false, true>(p, piece, own, lane, slots, shared, sums, chunk, group);
        }
        keep_group(p, piece, lane, group, slots);
        sync_block();
        write_dprojections(p, piece, chunk * CHUNK, group, shared, sums);
        sync_block();
    }
}

DEVICE Own make_own(const BackwardArguments& p, const Piece& piece) {
    Own own;
    const int channel_or_more = piece.channel_block * THREADS + thread_index();
    own.active = channel_or_more < p.plan.channels;
    own.channel = own.active ? channel_or_more : p.plan.channels - 1;
    own.D = p.D != nullptr ? p.D[own.channel] : 0.0f;
    own.bias = p.delta_bias != nullptr ? p.delta_bias[own.channel] : 0.0f;
    own.dD = own.dbias = 0.0f;
    return own;
}

DEVICE void end_backward_piece(const BackwardArguments& p, const Piece& piece, const Own& own,
                               const Lane& lane, const Slots& slots) {
    if (piece.hands_over) {
        if (GROUPS == 1) keep_group(p, piece, lane, 0, slots);
        float* carry = p.carry +
                       (static_cast<long long>(piece.job) * CARRY + GROUPS * 32) * THREADS +
                       lane.thread;
        carry[0] = own.dD, carry[THREADS] = own.dbias;
        hand_over(p.flags + piece.job);
        return;
    }
    if (GROUPS == 1) {
        write_group(p, piece, lane, 0, slots);
    } else {
        for (int group = 0; group < GROUPS; ++group) {
            Slots last;
            load_group(p, piece, lane, group, false, last);
            write_group(p, piece, lane, group, last);
        }
    }
    if (own.active) {
        const long long row =
            (static_cast<long long>(piece.segment) * p.plan.batch + piece.batch) *
                p.plan.channels +
            piece.channel_block * THREADS + lane.thread;
        p.dD[row] = own.dD, p.dbias[row] = own.dbias;
    }
}

DEVICE void run_backward_piece(const BackwardArguments& p, const Piece& piece) {
    Shared& shared = *static_cast<Shared*>(shared_base());
    SharedOfGroups* sums = reinterpret_cast<SharedOfGroups*>(&shared + 1);
    const Lane lane = make_lane();
    Own own = make_own(p, piece);
    Slots slots;
    if (piece.continues) {
        receive(p.flags + piece.job);
        const float* carry = p.carry +
                             (static_cast<long long>(piece.job) * CARRY + GROUPS * 32) * THREADS +
                             lane.thread;
        own.dD = load_shared_result(carry), own.dbias = load_shared_result(carry + THREADS);
    }
    if (GROUPS == 1) load_group(p, piece, lane, 0, !piece.continues, slots);
    for (int group = 0; GROUPS > 1 && !piece.continues && group < GROUPS; ++group) {
        load_group(p, piece, lane, group, true, slots);
        keep_group(p, piece, lane, group, slots);
    }
    const int chunk_base = piece.segment * p.plan.segment_chunks;
    for (int ordinal = piece.first; ordinal < piece.last; ++ordinal) {
        const int chunk = chunk_base + p.plan.segment_chunks - 1 - ordinal;
        if (chunk >= p.plan.chunks) continue;
        stage_projections(p, piece, chunk * CHUNK, 0, shared);
        stage_chunk(p, piece.batch, own, chunk * CHUNK, shared);
        sync_block();
        if (chunk > chunk_base) prefetch_chunk(p, piece.batch, own, (chunk - 1) * CHUNK);
        if (GROUPS > 1) {
            run_groups(p, piece, own, lane, slots, shared, sums, chunk);
        } else {
            run_group<true, true>(p, piece, own, lane, slots, shared, sums, chunk, 0);
            sync_block();
            write_dprojections(p, piece, chunk * CHUNK, 0, shared, sums);
            sync_block();
        }
    }
    end_backward_piece(p, piece, own, lane, slots);
}

KERNEL(THREADS, GROUPS > 1 ? 1 : 2) scan_backward(const BackwardArguments p) {
    Piece piece;
    const int worker = this_worker();
    for (int job = first_job(p.plan, worker); find_piece(p.plan, worker, job, piece); ++job) {
        run_backward_piece(p, piece);
    }
}
