// The recurrence with one thread a channel, all of the channel's states in its registers.
//
// Three uses: the forward itself; and, where time is cut in segments, what a segment adds to the
// state when it starts from zero (LOCAL), and the same of the adjoint, backward in time (ADJOINT).

constexpr int AHEAD = 8;  // steps between asking for an activation and using it
constexpr int OUTPUT = 0, LOCAL = 1, ADJOINT = 2;

struct ForwardArguments {
    Plan plan;
    Strided u;          // ADJOINT: the gradient of y
    Strided delta;
    Strided z;          // data may be null
    Strided B;          // ADJOINT: C
    Strided C;
    const float* A;              // [channel, state]
    const float* D;              // [channel] or null
    const float* delta_bias;     // [channel] or null
    const unsigned char* reset;  // [time, batch] or null
    const float* start;          // [segment, batch, channel, state] or null
    Strided y;                   // OUTPUT
    float* checkpoints;          // OUTPUT: states before each chunk [chunk, batch, channel, state]
    float* end;                  // [segment or 1, batch, channel, state] or null
    float* total_step;           // LOCAL, ADJOINT: [segment, batch, channel]
    float* carry;                // [job, STATES + 1, THREADS]
    int* flags;                  // [job], zero
};

// Both projections of one chunk in fp32, [CHUNK][B then C], and the exponents of its resets.
struct ProjectionTile {
    float values[CHUNK][2 * STATES];
    float reset[CHUNK];
};

constexpr int TILE_LOADS = CHUNK * 2 * STATES / THREADS;

template <int USE>
DEVICE void load_tile(const ForwardArguments& p, const Piece& piece, int chunk,
                      float (&values)[TILE_LOADS], float& reset) {
    const int thread = thread_index();
#pragma unroll
    for (int i = 0; i < TILE_LOADS; ++i) {
        const int index = i * THREADS + thread;
        const int place = index % (2 * STATES);
        const int time = chunk * CHUNK + index / (2 * STATES);
        const bool is_C = place >= STATES;
        const bool wanted = time < p.plan.length && !(is_C && USE != OUTPUT);
        const Strided& source = is_C ? p.C : p.B;
        const Column from = column(source, time, piece.batch, index % STATES);
        values[i] = to_float(read(from, 0, wanted));
    }
    reset = 0.0f;
    if (thread < CHUNK) {
        reset = reset_exponent(p.reset, p.plan, chunk * CHUNK + thread, piece.batch);
    }
}

DEVICE void store_tile(ProjectionTile& tile, const float (&values)[TILE_LOADS], float reset) {
    const int thread = thread_index();
#pragma unroll
    for (int i = 0; i < TILE_LOADS; ++i) {
        const int index = i * THREADS + thread;
        tile.values[index / (2 * STATES)][index % (2 * STATES)] = values[i];
    }
    if (thread < CHUNK) tile.reset[thread] = reset;
}

// One thread's channel: its constants and what it carries along time.
struct Channel {
    float A[STATES];  // times log2(e)
    float h[STATES];
    float D;
    float bias;
    float total_step;
};

// One step of OUTPUT: returns y before the gate.
DEVICE float step_output(Channel& c, float u, float step, const float* projections, float reset) {
    const float4* B = reinterpret_cast<const float4*>(projections);
    const float4* C = B + STATES / 4;
    const float x = step * u;
    float sums[4] = {c.D * u, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < STATES; n += 4) {
        const float4 b4 = B[n / 4], c4 = C[n / 4];
        const float b[4] = {b4.x, b4.y, b4.z, b4.w}, out[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float decay = exp2_approx(multiply_add(step, c.A[n + j], reset));
            c.h[n + j] = multiply_add(decay, c.h[n + j], x * b[j]);
            sums[j] = multiply_add(c.h[n + j], out[j], sums[j]);
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// One step of LOCAL (`x` = Δu, added after the decay) or ADJOINT (`x` = dy, added before it).
template <int USE>
DEVICE void step_local(Channel& c, float x, float step, const float* projections, float reset) {
    const float4* B = reinterpret_cast<const float4*>(projections);
#pragma unroll
    for (int n = 0; n < STATES; n += 4) {
        const float4 b4 = B[n / 4];
        const float b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float decay = exp2_approx(multiply_add(step, c.A[n + j], reset));
            float& h = c.h[n + j];
            h = USE == ADJOINT ? decay * multiply_add(x, b[j], h)
                               : multiply_add(decay, h, x * b[j]);
        }
    }
    c.total_step += reset == 0.0f ? step : infinity();
}

DEVICE void store_states(float* target, const float (&h)[STATES]) {
    float4* target4 = reinterpret_cast<float4*>(target);
#pragma unroll
    for (int n = 0; n < STATES; n += 4) {
        target4[n / 4] = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
    }
}

DEVICE void load_states(float (&h)[STATES], const float* source) {
    const float4* source4 = reinterpret_cast<const float4*>(source);
#pragma unroll
    for (int n = 0; n < STATES; n += 4) {
        const float4 h4 = source4[n / 4];
        h[n] = h4.x, h[n + 1] = h4.y, h[n + 2] = h4.z, h[n + 3] = h4.w;
    }
}

template <int USE>
DEVICE void start_piece(const ForwardArguments& p, const Piece& piece, int channel, Channel& c) {
    load_states(c.A, p.A + static_cast<long long>(channel) * STATES);
#pragma unroll
    for (int n = 0; n < STATES; ++n) c.A[n] *= LOG2_E, c.h[n] = 0.0f;
    c.D = p.D != nullptr ? p.D[channel] : 0.0f;
    c.bias = p.delta_bias != nullptr ? p.delta_bias[channel] : 0.0f;
    c.total_step = 0.0f;
    if (piece.continues) {
        receive(p.flags + piece.job);
        const float* carry =
            p.carry + static_cast<long long>(piece.job) * (STATES + 1) * THREADS + thread_index();
#pragma unroll
        for (int n = 0; n < STATES; ++n) c.h[n] = load_shared_result(carry + n * THREADS);
        c.total_step = load_shared_result(carry + STATES * THREADS);
    } else if (p.start != nullptr) {
        load_states(c.h, p.start + state_offset(p.plan, piece.segment, piece.batch, channel));
    }
}

template <int USE>
DEVICE void end_piece(const ForwardArguments& p, const Piece& piece, int channel, bool active,
                      const Channel& c) {
    if (piece.hands_over) {
        float* carry =
            p.carry + static_cast<long long>(piece.job) * (STATES + 1) * THREADS + thread_index();
#pragma unroll
        for (int n = 0; n < STATES; ++n) carry[n * THREADS] = c.h[n];
        carry[STATES * THREADS] = c.total_step;
        hand_over(p.flags + piece.job);
        return;
    }
    if (!active) return;
    if (USE != OUTPUT) {
        const long long row =
            static_cast<long long>(piece.segment) * p.plan.batch + piece.batch;
        p.total_step[row * p.plan.channels + channel] = c.total_step;
        store_states(p.end + state_offset(p.plan, piece.segment, piece.batch, channel), c.h);
    } else if (p.end != nullptr && piece.segment == p.plan.segments - 1) {
        store_states(p.end + state_offset(p.plan, 0, piece.batch, channel), c.h);
    }
}

// The activations of one thread's channel, asked for AHEAD steps before they are used.
struct Stream {
    Column u, delta, z;
    Element next_u[AHEAD], next_delta[AHEAD], next_z[AHEAD];
};

// Asks for the next step, and goes on to the one after it.
template <int USE>
DEVICE void ask(Stream& s, int slot, bool wanted) {
    constexpr int direction = USE == ADJOINT ? -1 : 1;
    s.next_u[slot] = read(s.u, 0, wanted);
    s.next_delta[slot] = read(s.delta, 0, wanted);
    if (GATED && USE != LOCAL) s.next_z[slot] = read(s.z, 0, wanted);
    advance(s.u, direction), advance(s.delta, direction);
    if (GATED && USE != LOCAL) advance(s.z, direction);
}

template <int USE>
DEVICE void run_chunk(const ForwardArguments& p, const Piece& piece, int channel, bool active,
                      const ProjectionTile& tile, int begin, int limit, Channel& c, Stream& s) {
    // Positions count along the recurrence: time runs against them in the adjoint.
    constexpr int direction = USE == ADJOINT ? -1 : 1;
    const int own_length = active ? p.plan.length : 0;
    Result target = result(p.y, begin, piece.batch, channel);
    const int edge = USE == ADJOINT ? begin + CHUNK - 1 : begin;
    for (int block = 0; block < CHUNK; block += AHEAD) {
#pragma unroll
        for (int slot = 0; slot < AHEAD; ++slot) {
            const int time = edge + direction * (block + slot);
            const bool exists = time < p.plan.length;
            const float u = to_float(s.next_u[slot]);
            float step = to_float(s.next_delta[slot]) + c.bias;
            if (SOFTPLUS) step = softplus(step);
            step = exists ? step : 0.0f;  // and u is zero: nothing changes
            float gate = 1.0f;
            if (GATED && USE != LOCAL) {
                const float z = to_float(s.next_z[slot]);
                gate = z * sigmoid(z);
            }
            const int later = time + direction * AHEAD;
            ask<USE>(s, slot,
                     USE == ADJOINT ? later >= limit && later < p.plan.length : later < limit);
            const float* projections = tile.values[time - begin];
            const float reset = tile.reset[time - begin];
            if (USE == OUTPUT) {
                const float y = step_output(c, u, step, projections, reset) * gate;
                write(target, 0, y, time < own_length);
                advance(target, 1);
            } else {
                const float x = USE == LOCAL ? step * u : gate * u;
                step_local<USE>(c, x, step, projections, reset);
            }
        }
    }
}

template <int USE>
DEVICE void run_piece(const ForwardArguments& p, const Piece& piece) {
    ProjectionTile* tiles = static_cast<ProjectionTile*>(shared_base());
    const int channel_or_more = piece.channel_block * THREADS + thread_index();
    const bool active = channel_or_more < p.plan.channels;
    const int channel = active ? channel_or_more : p.plan.channels - 1;
    const int chunk_base = piece.segment * p.plan.segment_chunks;
    const int span_end = min(chunk_base + p.plan.segment_chunks, p.plan.chunks);

    Channel c;
    start_piece<USE>(p, piece, channel, c);
    Stream s;
    // Chunks in time, whichever way the recurrence runs through them.
    const int low = USE == ADJOINT ? chunk_base + p.plan.segment_chunks - piece.last
                                   : chunk_base + piece.first;
    const int high = min(span_end, USE == ADJOINT
                                       ? chunk_base + p.plan.segment_chunks - piece.first
                                       : chunk_base + piece.last);
    const int count = high - low;
    const int limit = USE == ADJOINT ? low * CHUNK : min(high * CHUNK, p.plan.length);
    if (count > 0) {
        const int start = USE == ADJOINT ? high * CHUNK - 1 : low * CHUNK;
        s.u = column(p.u, start, piece.batch, channel);
        s.delta = column(p.delta, start, piece.batch, channel);
        s.z = column(p.z, start, piece.batch, channel);
#pragma unroll
        for (int slot = 0; slot < AHEAD; ++slot) {
            ask<USE>(s, slot, (USE == ADJOINT ? start - slot : start + slot) < p.plan.length);
        }
        float values[TILE_LOADS], reset;
        load_tile<USE>(p, piece, USE == ADJOINT ? high - 1 : low, values, reset);
        for (int i = 0; i < count; ++i) {
            const int chunk = USE == ADJOINT ? high - 1 - i : low + i;
            ProjectionTile& tile = tiles[i % 2];
            store_tile(tile, values, reset);
            sync_block();
            if (i + 1 < count) {
                load_tile<USE>(p, piece, USE == ADJOINT ? chunk - 1 : chunk + 1, values, reset);
            }
            if (USE == OUTPUT && p.checkpoints != nullptr && active) {
                store_states(p.checkpoints + state_offset(p.plan, chunk, piece.batch, channel),
                             c.h);
            }
            run_chunk<USE>(p, piece, channel, active, tile, chunk * CHUNK, limit, c, s);
        }
    }
    sync_block();  // before the next piece overwrites the tiles
    end_piece<USE>(p, piece, channel, active, c);
}

template <int USE>
DEVICE void run_jobs(const ForwardArguments& p) {
    Piece piece;
    const int worker = this_worker();
    for (int job = first_job(p.plan, worker); find_piece(p.plan, worker, job, piece); ++job) {
        run_piece<USE>(p, piece);
    }
}

KERNEL(THREADS, 2) scan_forward(const ForwardArguments p) { run_jobs<OUTPUT>(p); }
KERNEL(THREADS, 2) scan_segments(const ForwardArguments p) { run_jobs<LOCAL>(p); }
KERNEL(THREADS, 2) scan_adjoint_segments(const ForwardArguments p) { run_jobs<ADJOINT>(p); }

struct CombineArguments {
    int segments;
    int batch;
    int channels;
    int backward_in_time;
    const float* A;           // [channel, state]
    const float* outer;       // [batch, channel, state] or null: what enters the first segment
    const float* local;       // [segment, batch, channel, state]
    const float* total_step;  // [segment, batch, channel]
    float* start;             // [segment, batch, channel, state]: what enters each segment
};

// Carries the segments' own contributions from one to the next; a thread a state.
KERNEL(THREADS, 1) combine_segments(const CombineArguments p) {
    const long long index = static_cast<long long>(block_index()) * THREADS + thread_index();
    const long long row = index / STATES;  // batch, channel
    const long long rows = static_cast<long long>(p.batch) * p.channels;
    if (row >= rows) return;
    const float rate = p.A[row % p.channels * STATES + index % STATES] * LOG2_E;
    float state = p.outer != nullptr ? p.outer[index] : 0.0f;
    for (int i = 0; i < p.segments; ++i) {
        const int segment = p.backward_in_time ? p.segments - 1 - i : i;
        const long long at_segment = segment * rows * STATES + index;
        p.start[at_segment] = state;
        const float total = p.total_step[segment * rows + row];
        const float decay = total == infinity() ? 0.0f : exp2_approx(rate * total);
        state = multiply_add(decay, state, p.local[at_segment]);
    }
}
