// The output head and the loss in one, for training on a CPU. kernels/cross_entropy.py has the formulas.
//
// The vocabulary is split between threads: a thread's columns of the head and of its gradient stay in the cache of its
// core, while all tokens are processed, SOME at a time. Threads synchronize twice for these: to combine the log-sum-exp of
// each row, and to add up dx.
//
// With e = exp(logit - top), where top is the largest logit of a row, the gradient of the row is factor * e - [target]. The
// factor is known only when all threads are done with the row. So e is multiplied without it: the factor scales rows of dx
// and of x, and the target's 1 is subtracted from one row of dx and of dw, in fp32.
//
// N tokens, C width, V vocabulary. E is the type of x (-DELEMENT); logits, sums and dw are fp32.
#include "linear.h"

static inline Floats tanh(Floats x) { return 1 - 2 * reciprocal(exp(2 * x) + 1); }
static inline float tanh(float x) { return std::tanh(x); }
static inline float exp(float x) { return std::exp(x); }

struct Loss {
    int64_t N, C, V;
    double z_loss, softcap;   // without a softcap it is 0
    const E *x, *weight;      // (N, C), and the head's weight (V, C)
    const X *head, *head_t;   // the same, packed for x W^T and for dy W
    const int64_t* targets;   // (N); one that is not in the vocabulary does not count
    float* losses;            // (N)
    E* dx;                    // (N, C), or null
    float* dw;                // (V, C), or null
    bool counts(int64_t r) const { return targets[r] >= 0 && targets[r] < V; }
};

// Of a row of logits, a thread's part: the largest, and the sum of e.
struct Sum {
    float top = -INFINITY, total = 0;
};

// Writes e times the slope of the softcap for a row of n logits. Overwrites the logits.
static Sum exponentiate(float* x, int64_t n, float cap, X* e) {
    Floats most = Floats{} - INFINITY, sums{};
    if (cap) each(x, n, [&](auto v) { return cap * decltype(v)(tanh(v / cap)); });
    lanes(n, [&](int64_t i, auto v) { keep_larger(most, load<decltype(v)>(x + i)); });
    float top = largest(most);
    lanes(n, [&](int64_t i, auto v) {
        using L = decltype(v);
        L logit = load<L>(x + i), t = L(logit / (cap ? cap : 1));
        v = exp(L(logit - top)), add(sums, v);
        store(e + i, cap ? L(v * (1 - t * t)) : v);
    });
    return {top, sum(sums)};
}

extern "C" void heed_linear_cross_entropy(const Loss& m, int64_t threads) {
    int64_t width = round_up(m.C, 32), vocabulary = round_up(m.V, 32);
    float cap = m.softcap, z = m.z_loss;
    std::vector<Sum> found(threads * SOME);
    std::vector<float> at_target(SOME), slopes(m.N);
    Buffer<float> dx(m.dx ? threads * SOME * width : 0);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        int64_t me = omp_get_thread_num(), crew = omp_get_num_threads();
        Part mine(m.V, 32);
        int64_t columns = mine.to - mine.from, pitch = round_up(columns, 32) + 16;
        Rows x(SOME, m.C), e(SOME, columns);
        Columns x_columns(m.C);
        Gradient dw(1, m.C, m.dw ? columns : 0);
        Buffer<X> room(m.dw ? e.width * SOME : 0);
        Buffer<float> logits(32 * pitch);
        float factors[SOME];
        dw.clear(0);
        for (int64_t first = 0; first < m.N; first += SOME) {
            int64_t n = std::min(SOME, m.N - first);
            x.load(m.x + first * m.C, n, m.C), e.clear_edges(n, columns);
            for (int64_t r = 0; r < n && columns; r += 32) {
                for (int64_t v = 0; v < columns; v += 32)
                    multiply<false, X>(x.row(r), x.pitch, right(m.head, width, mine.from + v), width, 32, logits + v, pitch);
                for (int64_t i = r; i < std::min(r + 32, n); i++) {
                    int64_t target = m.targets[first + i] - mine.from;
                    float* row = logits + (i - r) * pitch;
                    if (target >= 0 && target < columns) at_target[i] = cap ? cap * tanh(row[target] / cap) : row[target];
                    found[me * SOME + i] = exponentiate(row, columns, cap, e.row(i));
                }
            }
#pragma omp barrier
            for (int64_t r = 0; r < n; r++) {
                Sum all, own = columns ? found[me * SOME + r] : Sum{};
                for (int64_t t = 0; t < crew; t++)
                    if (!Part(m.V, 32, t).empty()) all.top = std::max(all.top, found[t * SOME + r].top);
                for (int64_t t = 0; t < crew; t++)
                    if (!Part(m.V, 32, t).empty())
                        all.total += found[t * SOME + r].total * std::exp(found[t * SOME + r].top - all.top);
                float lse = all.top + std::log(all.total), ratio = cap ? at_target[r] / cap : 0;
                bool counts = m.counts(first + r);
                factors[r] = counts ? (1 + 2 * z * lse) / all.total * std::exp(own.top - all.top) : 0;
                if (me) continue;
                slopes[first + r] = counts ? 1 - ratio * ratio : 0;
                m.losses[first + r] = counts ? std::log(all.total) + (all.top - at_target[r]) + z * lse * lse : 0;
            }
            for (int64_t c = 0; c < width && m.dx && columns; c += 32) {  // this thread's part of dx: the sum over its columns
                Packed<X> weights = right(m.head_t, vocabulary, c);
                weights.data += mine.from * 16;
                for (int64_t r = 0; r < n; r += 32) {
                    float* to = dx + (me * SOME + r) * width + c;
                    multiply<false, X>(e.row(r), e.pitch, weights, e.width, 32, to, width);
                    for (int64_t i = 0; i < std::min<int64_t>(32, n - r); i++)
                        each(to + i * width, 32, [&](auto v) { return v * factors[r + i]; });
                }
            }
            if (m.dw && columns) {
                for (int64_t r = 0; r < n; r++)
                    lanes(m.C, [&](int64_t c, auto v) {
                        store(x.row(r) + c, decltype(v)(load<decltype(v)>(x.row(r) + c) * factors[r]));
                    });
                x_columns.fill(x, round_up(n, 32)), dw.add(0, x_columns, e, round_up(n, 32), room);
            }
#pragma omp barrier
            Part rows(m.dx ? n : 0);
            for (int64_t r = rows.from; r < rows.to; r++)
                lanes(m.C, [&](int64_t c, auto v) {
                    using L = decltype(v);
                    v = L{};
                    for (int64_t t = 0; t < crew; t++)
                        if (!Part(m.V, 32, t).empty()) v += load<L>(dx + (t * SOME + r) * width + c);
                    if (m.counts(first + r)) v -= slopes[first + r] * load<L>(m.weight + m.targets[first + r] * m.C + c);
                    store(m.dx + (first + r) * m.C + c, v);
                });
        }
        if (m.dw) dw.add_up(m.dw + mine.from * m.C, true, Part(dw.blocks, 1, 0, 1));
        for (int64_t r = 0; r < m.N && m.dw; r++)
            if (m.targets[r] >= mine.from && m.targets[r] < mine.to) {
                float* to = m.dw + m.targets[r] * m.C;
                lanes(m.C, [&](int64_t c, auto v) {
                    using L = decltype(v);
                    store(to + c, L(load<L>(to + c) - slopes[r] * load<L>(m.x + r * m.C + c)));
                });
            }
    }
}
