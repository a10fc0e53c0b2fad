// The backward's way over chunks and pieces, and its kernels; see lanes.cuh.

// The block's sums for dB and dC of the chunk, from its warps'; a warp has one of each tile's steps.
DEVICE void write_dprojections(const BackwardArguments& p, const Piece& piece, int begin,
                               int group, const Shared& shared, const SharedOfGroups* of_groups) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int state = group * GROUP + (lane & 3) * 4 + (lane >> 2 & 3);
    const int remaining = state < STATES ? p.plan.length - begin - warp : 0;
    const long long row =
        (static_cast<long long>(piece.channel_block) * p.plan.length + begin + warp) *
            p.plan.batch + piece.batch;
    float* target = p.dprojections + row * 2 * STATES + (lane >> 4) * STATES + state;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const float(&parts)[THREADS] =
            GROUPS > 1 ? of_groups->sums[i * TILE + warp] : shared.tiles[i].dy[warp];
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < WARPS; ++k) sum += parts[k * 32 + lane];
        if (i * TILE < remaining) *target = sum;
        target += static_cast<long long>(TILE) * p.plan.batch * 2 * STATES;
    }
}

DEVICE void prefetch_chunk(const BackwardArguments& p, const Piece& piece, int begin) {
    // A lane a step: the warp's channels lie together.
    const int thread = thread_index(), time = begin + thread % 32;
    const int channel = piece.channel_block * THREADS + thread / 32 * 32;
    if (thread % 32 >= CHUNK || time >= p.plan.length || channel >= p.plan.channels) return;
    prefetch(column(p.u, time, piece.batch, channel).data);
    prefetch(column(p.delta, time, piece.batch, channel).data);
    prefetch(column(p.dy, time, piece.batch, channel).data);
    if (GATED) prefetch(column(p.z, time, piece.batch, channel).data);
}

template <bool FIRST, bool LAST>
DEVICE void run_group(const BackwardArguments& p, const Piece& piece, Own& own, const Lane& lane,
                      Slots& slots, Shared& shared, SharedOfGroups* of_groups, Source& source,
                      Raw& raw, int chunk, int group) {
    const int first_channel = piece.channel_block * THREADS;
    const int channels = p.plan.channels - first_channel, warp = lane.thread / 32;
    const float* checkpoint =
        p.checkpoints + state_offset(p.plan, chunk, piece.batch, first_channel);
    float h[4][4];
    load_slots(h, checkpoint, lane, channels, group);
    scan_chunk<FIRST>(shared, lane, slots, own, source, raw, h);
    for (int tile = TILES - 1; tile >= 0; --tile) {
        KeptStates& kept = shared.states[tile > 0 ? tile - 1 : 0][warp];
        if (tile == 0) {
            sync_warp();
            load_slots(h, checkpoint, lane, channels, group);
            keep_states(kept, lane.thread % 32, h);
        }
        run_tile<FIRST, LAST>(p, own, lane, slots, shared.tiles[tile], kept,
                              places_of(shared, of_groups, kept, tile, warp),
                              chunk * CHUNK + tile * TILE, piece.batch);
    }
}

DEVICE void run_groups(const BackwardArguments& p, const Piece& piece, Own& own, const Lane& lane,
                       Slots& slots, Shared& shared, SharedOfGroups* of_groups, Source& source,
                       Raw& raw, int chunk) {
    for (int group = 0; group < GROUPS; ++group) {
        load_group(p, piece, lane, group, false, slots);
        if (group > 0) {
            stage_projections(p, piece, chunk * CHUNK, group, shared);
            sync_block();
        }
        if (group == 0) {
            run_group<true, false>(p, piece, own, lane, slots, shared, of_groups, source, raw,
                                   chunk, group);
        } else if (group < GROUPS - 1) {
            run_group<false, false>(p, piece, own, lane, slots, shared, of_groups, source, raw,
                                    chunk, group);
        } else {
            run_group<false, true>(p, piece, own, lane, slots, shared, of_groups, source, raw,
                                   chunk, group);
        }
        keep_group(p, piece, lane, group, slots);
        sync_block();
        write_dprojections(p, piece, chunk * CHUNK, group, shared, of_groups);
        sync_block();
    }
}

// The number in `values` of the channel that a lane hands over or writes the sums of.
DEVICE float pick(const Own& own, float2 values) { return own.half ? values.y : values.x; }

DEVICE Own make_own(const BackwardArguments& p, const Piece& piece) {
    Own own;
    const int lane = thread_index() % 32;
    own.half = lane / 16;
    own.first = thread_index() / 32 * 32 + lane % 16 * 2;
    const int channel = piece.channel_block * THREADS + own.first;
    own.active = channel < p.plan.channels;
    own.channel = own.active ? channel : 0;
    const int second = min(own.channel + 1, p.plan.channels - 1);
    own.D = own.bias = make_float2(0.0f, 0.0f);
    if (p.D != nullptr) own.D = make_float2(p.D[own.channel], p.D[second]);
    if (p.delta_bias != nullptr) {
        own.bias = make_float2(p.delta_bias[own.channel], p.delta_bias[second]);
    }
    own.dD = own.dbias = own.chunk_dD = own.chunk_dbias = make_float2(0.0f, 0.0f);
    return own;
}

// Where the sums that a lane hands over lie: one channel's dD and dbias.
DEVICE float* carried_sums(const BackwardArguments& p, const Piece& piece) {
    return p.carry +
           (static_cast<long long>(piece.job) * CARRY + GROUPS * 32) * THREADS + thread_index();
}

DEVICE void resume_sums(const float* carried, Own& own) {
    const float dD = load_shared_result(carried), dbias = load_shared_result(carried + THREADS);
    (own.half ? own.dD.y : own.dD.x) = dD;
    (own.half ? own.dbias.y : own.dbias.x) = dbias;
}

// A channel's sum from the two lanes that have it, to the one that writes it.
DEVICE float gather(const Own& own, float2 sums) {
    return pick(own, sums) + shuffle_xor(own.half ? sums.x : sums.y, 16);
}

DEVICE void end_backward_piece(const BackwardArguments& p, const Piece& piece, const Own& own,
                               const Lane& lane, const Slots& slots) {
    const float dD = gather(own, own.dD), dbias = gather(own, own.dbias);
    if (piece.hands_over) {
        if (GROUPS == 1) keep_group(p, piece, lane, 0, slots);
        float* carried = carried_sums(p, piece);
        carried[0] = dD, carried[THREADS] = dbias;
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
    if (own.active && own.channel + own.half < p.plan.channels) {
        const long long row =
            (static_cast<long long>(piece.segment) * p.plan.batch + piece.batch) *
                p.plan.channels +
            own.channel + own.half;
        p.dD[row] = dD, p.dbias[row] = dbias;
    }
}

// Stages a chunk's projections and the first tile's steps, and asks for the second's.
DEVICE void stage_chunk(const BackwardArguments& p, const Piece& piece, const Own& own,
                        int begin, Shared& shared, Source& source, Raw& raw) {
    source = make_source(p, piece.batch, own, begin);
#pragma unroll
    for (int k = 0; k < 2; ++k) ask_step(source, k, raw);
    stage_projections(p, piece, begin, 0, shared);
    Staged staged;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        stage_step(own, raw, k, source.remaining > -TILE, staged);
        ask_step(source, k, raw);
    }
    put_staged(own, staged, shared.tiles[0]);
    sync_block();
}

DEVICE void run_backward_piece(const BackwardArguments& p, const Piece& piece) {
    Shared& shared = *static_cast<Shared*>(shared_base());
    SharedOfGroups* of_groups = reinterpret_cast<SharedOfGroups*>(&shared + 1);
    const Lane lane = make_lane();
    Own own = make_own(p, piece);
    Slots slots;
    if (piece.continues) {
        receive(p.flags + piece.job);
        resume_sums(carried_sums(p, piece), own);
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
        Source source;
        Raw raw;
        stage_chunk(p, piece, own, chunk * CHUNK, shared, source, raw);
        if (chunk > chunk_base) prefetch_chunk(p, piece, (chunk - 1) * CHUNK);
        if (GROUPS > 1) {
            run_groups(p, piece, own, lane, slots, shared, of_groups, source, raw, chunk);
        } else {
            run_group<true, true>(p, piece, own, lane, slots, shared, of_groups, source, raw,
                                  chunk, 0);
            sync_block();
            write_dprojections(p, piece, chunk * CHUNK, 0, shared, of_groups);
            sync_block();
        }
        own.dD.x += own.chunk_dD.x, own.dD.y += own.chunk_dD.y;
        own.dbias.x += own.chunk_dbias.x, own.dbias.y += own.chunk_dbias.y;
        own.chunk_dD = own.chunk_dbias = make_float2(0.0f, 0.0f);
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

struct ReduceArguments {
    int tokens;
    int channel_blocks;
    const float* dprojections;  // [channel block, token, 2 * STATES]
    Element *dB, *dC;           // [token, state]
};

// dB and dC from the channel blocks' parts, always in the same order; a thread a number.
KERNEL(THREADS, 8) reduce_projections(const ReduceArguments p) {
    const long long index = static_cast<long long>(block_index()) * THREADS + thread_index();
    const long long count = static_cast<long long>(p.tokens) * 2 * STATES;
    if (index >= count) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int block = 0; block < p.channel_blocks; ++block) {
        sum += p.dprojections[block * count + index];
    }
    const int column = static_cast<int>(index % (2 * STATES));
    Element* target = column < STATES ? p.dB : p.dC;
    target[index / (2 * STATES) * STATES + column % STATES] = from_float(sum);
}
