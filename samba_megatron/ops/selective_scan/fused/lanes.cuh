// The backward: how its work lies on a warp's lanes, and what a lane hands over between chunks.
//
// It is the adjoint, from the states saved before each chunk and from the gradient of y.
//
// A warp has 32 channels and GROUP states of each. For the recurrence a lane has 4 channels x 4
// states, so that most of a sum over channels (dB, dC) or over states (y, dx, the decay's part of
// the step's gradient) is made of multiply-adds in the lane, and the rest of a few shuffles. The
// order of a lane's channels and states depends on the lane such that a halving exchange sends what
// sits in the same registers on every lane: slot i of a lane is channel i ^ (lane & 3) of its four,
// slot j is state j ^ (lane >> 2 & 3). For what is element-wise a lane has two neighbouring channels
// and two steps of a TILE: activations move in pairs, and nothing of it lies in registers while the
// recurrence needs them.
//
// A chunk goes tile by tile, forward and back. Forward, each lane turns activations into Δ, Δu and
// dy, while the states, one tile behind, run through it and are kept before each tile. Back, from
// the last tile to the first, the states run forward once more, now with all decays and states of
// the tile in registers, the adjoint runs back over them, and the sums over states become the
// gradients of the activations.
//
// More than 16 states are done 16 at a time, their contributions to sums over states added up in
// shared memory.

constexpr int GROUP = 16;
constexpr int GROUPS = STATES > GROUP ? STATES / GROUP : 1;
constexpr int TILE = 4;
constexpr int TILES = CHUNK / TILE;
constexpr int WARPS = THREADS / 32;

struct BackwardArguments {
    Plan plan;
    Strided u, delta, z, B, C;
    Strided dy;                  // gradient of the gated output
    const float* A;              // [channel, state]
    const float* D;              // [channel] or null
    const float* delta_bias;     // [channel] or null
    const unsigned char* reset;  // [time, batch] or null
    const float* checkpoints;    // [chunk, batch, channel, state]
    const float* dend;           // gradient entering each segment [segment, batch, channel, state]
                                 // or null
    Strided du, ddelta, dz;      // dz null without z
    float* dprojections;         // [channel block, time, batch, 2 * STATES]: dB then dC
    float* dA;                   // [segment, batch, channel, state]
    float* dD;                   // [segment, batch, channel]
    float* dbias;                // [segment, batch, channel]
    float* dstart;               // [batch, channel, state] or null
    float* carry;                // [job, CARRY, THREADS]
    int* flags;                  // [job], zero
};

constexpr int CARRY = GROUPS * 32 + 2;  // floats a thread hands over

struct Lane {
    int thread;
    int group;      // which 4 states: lane & 3
    int turn;       // how its states are turned: lane >> 2 & 3
    int place[4];   // the block's channel in each slot
    int low, high;  // where the projections of its slots 0, 1 and 2, 3 lie
};

struct Slots {
    float A[4][4];   // times log2(e)
    float dh[4][4];  // gradient of the state before the step last done
    float dA[4][4];
};

DEVICE Lane make_lane() {
    Lane lane;
    lane.thread = thread_index();
    lane.group = lane.thread & 3;
    lane.turn = lane.thread >> 2 & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) lane.place[i] = (lane.thread & ~3) + (i ^ lane.group);
    lane.low = (lane.turn & 1) * 8 + lane.group * 2 + (lane.turn >> 1);
    lane.high = lane.low ^ 1;
    return lane;
}

// Element j of the result is element j ^ turn of `v`.
DEVICE void turn4(float (&v)[4], int turn) {
    const bool swap_pairs = turn & 2, swap_neighbours = turn & 1;
    const float a = swap_pairs ? v[2] : v[0], b = swap_pairs ? v[3] : v[1];
    const float c = swap_pairs ? v[0] : v[2], d = swap_pairs ? v[1] : v[3];
    v[0] = swap_neighbours ? b : a, v[1] = swap_neighbours ? a : b;
    v[2] = swap_neighbours ? d : c, v[3] = swap_neighbours ? c : d;
}

// Each slot's states from memory that holds STATES a channel; zero where there is none.
DEVICE void load_slots(float (&v)[4][4], const float* first_channel, const Lane& lane,
                       int channels, int group) {
    const int state = group * GROUP + lane.group * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float4 w = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (lane.place[i] < channels && state < STATES) {
            w = *reinterpret_cast<const float4*>(first_channel + lane.place[i] * STATES + state);
        }
        v[i][0] = w.x, v[i][1] = w.y, v[i][2] = w.z, v[i][3] = w.w;
        turn4(v[i], lane.turn);
    }
}

DEVICE void store_slots(float* first_channel, const float (&v)[4][4], const Lane& lane,
                        int channels, int group) {
    const int state = group * GROUP + lane.group * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (lane.place[i] < channels && state < STATES) {
            float w[4] = {v[i][0], v[i][1], v[i][2], v[i][3]};
            turn4(w, lane.turn);
            *reinterpret_cast<float4*>(first_channel + lane.place[i] * STATES + state) =
                make_float4(w[0], w[1], w[2], w[3]);
        }
    }
}

// Sum over the lanes that have the same channels: each lane gets its own channel's.
DEVICE float sum_states(const float (&v)[4]) {
    const float even = v[0] + shuffle_xor(v[2], 2);
    const float odd = v[1] + shuffle_xor(v[3], 2);
    return even + shuffle_xor(odd, 1);
}

// Sum over four of the lanes that have the same states: each gets one state's, its slot 0.
DEVICE float sum_channels(const float (&v)[4]) {
    const float even = v[0] + shuffle_xor(v[2], 8);
    const float odd = v[1] + shuffle_xor(v[3], 8);
    return even + shuffle_xor(odd, 4);
}

// A group's A, and its dh and dA as the chunk before in this order left them.
DEVICE void load_group(const BackwardArguments& p, const Piece& piece, const Lane& lane, int group,
                       bool begins, Slots& slots) {
    const int first_channel = piece.channel_block * THREADS;
    const int channels = p.plan.channels - first_channel;
    load_slots(slots.A, p.A + static_cast<long long>(first_channel) * STATES, lane, channels,
               group);
    const float* carry =
        p.carry + (static_cast<long long>(piece.job) * CARRY + group * 32) * THREADS + lane.thread;
    if (begins && p.dend != nullptr) {
        load_slots(slots.dh,
                   p.dend + state_offset(p.plan, piece.segment, piece.batch, first_channel), lane,
                   channels, group);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            slots.A[i][j] *= LOG2_E;
            if (begins) {
                slots.dA[i][j] = 0.0f;
                if (p.dend == nullptr) slots.dh[i][j] = 0.0f;
            } else {
                slots.dh[i][j] = load_shared_result(carry + (i * 4 + j) * THREADS);
                slots.dA[i][j] = load_shared_result(carry + (16 + i * 4 + j) * THREADS);
            }
        }
    }
}

DEVICE void keep_group(const BackwardArguments& p, const Piece& piece, const Lane& lane, int group,
                       const Slots& slots) {
    float* carry =
        p.carry + (static_cast<long long>(piece.job) * CARRY + group * 32) * THREADS + lane.thread;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            carry[(i * 4 + j) * THREADS] = slots.dh[i][j];
            carry[(16 + i * 4 + j) * THREADS] = slots.dA[i][j];
        }
    }
}

DEVICE void write_group(const BackwardArguments& p, const Piece& piece, const Lane& lane,
                        int group, const Slots& slots) {
    const int first_channel = piece.channel_block * THREADS;
    const int channels = p.plan.channels - first_channel;
    store_slots(p.dA + state_offset(p.plan, piece.segment, piece.batch, first_channel), slots.dA,
                lane, channels, group);
    if (p.dstart != nullptr && piece.segment == 0) {
        store_slots(p.dstart + state_offset(p.plan, 0, piece.batch, first_channel), slots.dh, lane,
                    channels, group);
    }
}
