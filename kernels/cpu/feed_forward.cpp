// The feed-forward half of a layer for training on a CPU: x + swiglu(norm(x)), forward and backward, each in one pass.
//
// A thread computes its tokens from x to the output, SOME at a time, and everything between stays in the cache of its core.
// The backward recomputes the activations: reading them from memory would take as long.
//
// R tokens, C width, F feed-forward width. E is what the matrices are multiplied in (-DELEMENT); x, sums and gains are
// fp32. Tokens are split between threads, and their gradients are added up in a fixed order.
#include "linear.h"
#include "norm.h"

struct FeedForward {
    int64_t R, C, F;
    double eps;
    const float *x, *gain;  // (R, C), (C)
    // Weights, packed. Gates and ups are the columns of one matrix, each rounded up to 32: (C, 2F) and (F, C); and for
    // gradients the other way round, (2F, C) and (C, F), which the forward does not read.
    const X *gate_up, *down, *gate_up_t, *down_t;
};

static inline Floats sigmoid(Floats x) { return reciprocal(1 + exp(-x)); }

// norm(x) of n tokens from `first` on, and the inverse of their root mean squares; zeros up to the next 32.
static void load_normed(const FeedForward& m, int64_t first, int64_t n, Rows& rows, float* inverse) {
    rows.clear_edges(n, m.C);
    for (int64_t i = 0; i < n; i++) norm_row(m.x + (first + i) * m.C, m.gain, m.C, m.eps, rows.row(i), inverse[i]);
}

// out (R, C), with x added if `residual`
extern "C" void heed_feed_forward(const FeedForward& m, float* out, int64_t residual, int64_t threads) {
    int64_t C = round_up(m.C, 32), F = round_up(m.F, 32);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Rows normed(SOME, C), hidden(SOME, F);
        Buffer<float> gate(32 * 32), up(32 * 32), sums(32 * 32), inverse(SOME);
        Part mine(m.R, 32);
        for (int64_t first = mine.from; first < mine.to; first += SOME) {
            int64_t n = std::min(SOME, mine.to - first);
            load_normed(m, first, n, normed, inverse);
            for (int64_t f = 0; f < F; f += 32)  // these columns of the weights are read once for all tokens
                for (int64_t r = 0; r < n; r += 32) {
                    multiply<false, X>(normed.row(r), normed.pitch, right(m.gate_up, C, f), C, 32, gate, 32);
                    multiply<false, X>(normed.row(r), normed.pitch, right(m.gate_up, C, F + f), C, 32, up, 32);
                    for (int64_t i = 0; i < 32 * 32; i += LANES) {
                        Floats g = load(gate + i);
                        store(hidden.row(r + i / 32) + f + i % 32, g * sigmoid(g) * load(up + i));
                    }
                }
            for (int64_t c = 0; c < C; c += 32)
                for (int64_t r = 0; r < n; r += 32) {
                    multiply<false, X>(hidden.row(r), hidden.pitch, right(m.down, F, c), F, 32, sums, 32);
                    for (int64_t i = 0; i < std::min<int64_t>(32, n - r); i++)
                        lanes(std::min<int64_t>(32, m.C - c), [&](int64_t j, auto v) {
                            int64_t at = (first + r + i) * m.C + c + j;
                            v = load<decltype(v)>(sums + i * 32 + j);
                            if (residual) v += load<decltype(v)>(m.x + at);
                            store(out + at, v);
                        });
                }
        }
    }
}

// dx = residual + the gradient, from dy, all (R, C); dgain (C), dgate_up (2F, C), F rounded up to 32, and ddown (C, F).
extern "C" void heed_feed_forward_backward(const FeedForward& m, const float* dy, const float* residual, float* dx,
                                           float* dgain, float* dgate_up, float* ddown, int64_t threads) {
    int64_t C = round_up(m.C, 32), F = round_up(m.F, 32);
    Gradient gate_ups(threads, m.C, 2 * F), downs(threads, m.C, m.F);
    std::vector<float> gains(threads * m.C);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        int64_t me = omp_get_thread_num();
        Rows normed(SOME, C), dout(SOME, C), hidden(SOME, F), dboth(SOME, 2 * F);
        Columns columns(C);
        Buffer<X> packed(2 * F * SOME);
        Buffer<float> gate(32 * 32), up(32 * 32), dhidden(32 * 32), dnormed(SOME * C), inverse(SOME);
        gate_ups.clear(me), downs.clear(me);
        Part mine(m.R, 32);
        for (int64_t first = mine.from; first < mine.to; first += SOME) {
            int64_t n = std::min(SOME, mine.to - first), all = round_up(n, 32);
            load_normed(m, first, n, normed, inverse), dout.load(dy + first * m.C, n, m.C);
            for (int64_t f = 0; f < F; f += 32)
                for (int64_t r = 0; r < n; r += 32) {
                    multiply<false, X>(normed.row(r), normed.pitch, right(m.gate_up, C, f), C, 32, gate, 32);
                    multiply<false, X>(normed.row(r), normed.pitch, right(m.gate_up, C, F + f), C, 32, up, 32);
                    multiply<false, X>(dout.row(r), dout.pitch, right(m.down_t, C, f), C, 32, dhidden, 32);
                    for (int64_t i = 0; i < 32 * 32; i += LANES) {
                        Floats g = load(gate + i), u = load(up + i), d = load(dhidden + i), s = sigmoid(g);
                        int64_t row = r + i / 32, at = f + i % 32;
                        store(hidden.row(row) + at, g * s * u);
                        store(dboth.row(row) + at, d * u * s * (1 + g * (1 - s)));
                        store(dboth.row(row) + F + at, d * g * s);
                    }
                }
            for (int64_t c = 0; c < C; c += 32)
                for (int64_t r = 0; r < n; r += 32)
                    multiply<false, X>(dboth.row(r), dboth.pitch, right(m.gate_up_t, 2 * F, c), 2 * F, 32,
                                       dnormed + r * C + c, C);
            norm_backward_rows(m.x + first * m.C, dnormed, C, m.gain, inverse, residual + first * m.C, n, m.C,
                               dx + first * m.C, &gains[me * m.C]);
            columns.fill(normed, all), gate_ups.add(me, columns, dboth, all, packed);
            columns.fill(dout, all), downs.add(me, columns, hidden, all, packed);
        }
#pragma omp barrier
        gate_ups.add_up(dgate_up, true, Part(gate_ups.blocks)), downs.add_up(ddown, false, Part(downs.blocks));
    }
    add_up(gains, m.C, dgain);
}
