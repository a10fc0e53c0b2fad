// What the forward and the backward share: sizes, element-wise functions and the division of work.

constexpr int STATES = SCAN_STATES;
constexpr int CHUNK = SCAN_CHUNK;  // time steps between two saved states
constexpr int THREADS = 128;       // and channels of a block
constexpr bool GATED = SCAN_GATED, SOFTPLUS = SCAN_SOFTPLUS;
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

// A tensor [time, batch, channel or state] whose last dimension is contiguous. Strides count bytes.
struct Strided {
    const char* data;
    int time_stride;
    int batch_stride;
};

// How a call's work is divided. A row is one sequence's block of channels; its time is cut into
// `segments` of `segment_chunks` chunks, and each (segment, row) is a job.
struct Plan {
    int length;
    int batch;
    int channels;
    int channel_blocks;
    int chunks;          // of the whole sequence
    int segments;
    int segment_chunks;
    int worker_chunks;   // consecutive chunks, in the line of all jobs, that a block works on
};

// One worker's part of one job: the chunks whose ordinal numbers, in the order in which the
// recurrence passes them, are first … last - 1.
struct Piece {
    int job;
    int segment;
    int batch;
    int channel_block;
    int first;
    int last;
    bool continues;      // another worker did the chunks before `first`
    bool hands_over;     // another worker does the chunks from `last`
};

// All jobs' chunks lie in one line, of which each worker takes an equal stretch no shorter than a
// job: a job is cut at most once, its end going to the worker that starts with it. That worker does
// the job's earlier chunks, at its own start, and its neighbour does the later ones, at its end: no
// worker waits long. (McNaughton's wrap-around rule.)
//
// Blocks start in the order of their numbers, and the last worker is the first block: who waits,
// waits for a block that has started before it, however few the card has room for.
DEVICE int this_worker() { return block_count() - 1 - block_index(); }

DEVICE int first_job(const Plan& plan, int worker) {
    return static_cast<int>(static_cast<long long>(worker) * plan.worker_chunks /
                            plan.segment_chunks);
}

DEVICE bool find_piece(const Plan& plan, int worker, int job, Piece& piece) {
    const int rows = plan.batch * plan.channel_blocks;
    if (job >= rows * plan.segments) return false;
    const long long start = static_cast<long long>(job) * plan.segment_chunks;
    const long long from = static_cast<long long>(worker) * plan.worker_chunks - start;
    const long long until = from + plan.worker_chunks;
    if (until <= 0) return false;
    const int low = from > 0 ? static_cast<int>(from) : 0;
    const int high = until < plan.segment_chunks ? static_cast<int>(until) : plan.segment_chunks;
    piece.job = job;
    piece.segment = job / rows;
    piece.batch = job % rows / plan.channel_blocks;
    piece.channel_block = job % plan.channel_blocks;
    piece.first = low == 0 ? plan.segment_chunks - high : 0;
    piece.last = low == 0 ? plan.segment_chunks : plan.segment_chunks - low;
    piece.continues = piece.first > 0;
    piece.hands_over = piece.last < plan.segment_chunks;
    return true;
}

DEVICE void receive(const int* flag) {
    if (thread_index() == 0) await_flag(flag);
    sync_block();
}

DEVICE void hand_over(int* flag) {
    fence_device();
    sync_block();
    if (thread_index() == 0) raise_flag(flag);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), and log1p(e) = 2 atanh(e / (2 + e)), whose argument is
// at most a third; the polynomial is atanh's to 4e-9.
DEVICE float softplus(float x) {
    const float e = exp2_approx(-fabsf(x) * LOG2_E);
    const float s = e * reciprocal(2.0f + e);
    const float q = s * s;
    float p = multiply_add(q, 0.1408732863f, 0.1398070942f);
    p = multiply_add(q, p, 0.2001242686f);
    p = multiply_add(q, p, 0.3333315797f);
    p = multiply_add(q, p, 1.0f);
    return multiply_add(2.0f * s, p, fmaxf(x, 0.0f));
}

// The derivative of softplus from its value: 1 - e^-s, by its series where that would cancel.
DEVICE float softplus_slope(float s) {
    float p = multiply_add(s, -1.0f / 720.0f, 1.0f / 120.0f);
    p = multiply_add(s, p, -1.0f / 24.0f);
    p = multiply_add(s, p, 1.0f / 6.0f);
    p = multiply_add(s, p, -1.0f / 2.0f);
    p = multiply_add(s, p, 1.0f);
    return choose(s < 0.25f, s * p, 1.0f - exp2_approx(-s * LOG2_E));
}

DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_approx(-x * LOG2_E)); }

// One channel's numbers of one sequence from some time on. A step further is one multiply-add.
struct Column {
    const char* data;
    int time_stride;
};

DEVICE Column column(const Strided& tensor, int time, int batch, int channel) {
    Column c;
    c.time_stride = tensor.time_stride;
    c.data = tensor.data + static_cast<long long>(time) * tensor.time_stride +
             static_cast<long long>(batch) * tensor.batch_stride +
             channel * static_cast<int>(sizeof(Element));
    return c;
}

// What lies some steps on, or zero if it is not wanted.
DEVICE Element read(const Column& c, int steps, bool wanted) {
    return load_if(c.data + static_cast<long long>(steps) * c.time_stride, wanted);
}

DEVICE void advance(Column& c, int steps) {
    c.data += static_cast<long long>(steps) * c.time_stride;
}

// The same of a result.
struct Result {
    char* data;
    int time_stride;
};

DEVICE Result result(const Strided& tensor, int time, int batch, int channel) {
    const Column c = column(tensor, time, batch, channel);
    return {const_cast<char*>(c.data), c.time_stride};
}

DEVICE void write(const Result& r, int steps, float value, bool wanted) {
    store_if(r.data + static_cast<long long>(steps) * r.time_stride, from_float(value), wanted);
}

DEVICE void advance(Result& r, int steps) {
    r.data += static_cast<long long>(steps) * r.time_stride;
}

// Offset of a channel's states in a tensor [outer, batch, channel, state].
DEVICE long long state_offset(const Plan& plan, int outer, int batch, int channel) {
    return ((static_cast<long long>(outer) * plan.batch + batch) * plan.channels + channel) *
           STATES;
}

// What is added to the decay's exponent at a step: minus infinity where a document starts.
DEVICE float reset_exponent(const unsigned char* reset, const Plan& plan, int time, int batch) {
    const bool starts = reset != nullptr && time < plan.length &&
                        reset[static_cast<long long>(time) * plan.batch + batch] != 0;
    return starts ? -infinity() : 0.0f;
}
