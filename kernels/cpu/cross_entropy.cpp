// The head and the loss in one when a model trains on a CPU: see cross_entropy.py, whose formulas these are.
//
// Threads share the vocabulary, so that each one's columns of the head, and of its gradient, stay in the cache of its core
// while all tokens pass by, some at a time. They meet where a row's log-sum-exp, and then its dx, is put together.
//
// N tokens, C width, V vocabulary. E is the type of x (-DELEMENT); logits, sums and dw are fp32.
#include "linear.h"

static inline Floats tanh(Floats x) { return 1 - 2 / (exp(2 * x) + 1); }
static inline float tanh(float x) { return std::tanh(x); }
static inline float exp(float x) { return std::exp(x); }

struct Loss {
    int64_t N, C, V;
    double z_loss, softcap;  // without a softcap it is 0
    const E* x;              // (N, C)
    const X *head, *head_t;  // the head's weight (V, C), packed for x W^T and for dy W
    const int64_t* targets;  // (N); one that is not in the vocabulary does not count
    float* losses;           // (N)
    E* dx;                   // (N, C), or null
    float* dw;               // (V, C), or null
};

// One thread's columns of the head, from `from` to `to`, and `n` tokens' logits of them.
struct Share {
    const Loss& m;
    int64_t from, to, pitch;
    Buffer<float> logits;
    float cap = m.softcap;
    Share(const Loss& m, Part part, int64_t tokens)
        : m(m), from(part.from), to(part.to), pitch(round_up(to - from, 32) + 16), logits(tokens * pitch) {}
    float* row(int64_t r) { return logits + r * pitch; }

    // Row r of the logits, softcapped: its largest, and the sum of exp(logit - largest). Without a softcap these numbers
    // take the logits' place.
    void exponentiate(int64_t r, float& top, float& total) {
        Floats most = Floats{} - INFINITY, sums{};
        float* x = row(r);
        if (cap) each(x, to - from, [&](auto v) { return cap * decltype(v)(tanh(v / cap)); });
        lanes(to - from, [&](int64_t i, auto v) { keep_larger(most, load<decltype(v)>(x + i)); });
        top = largest(most);
        lanes(to - from, [&](int64_t i, auto v) {
            v = exp(load<decltype(v)>(x + i) - top);
            if (!cap) store(x + i, v);
            add(sums, v);
        });
        total = sum(sums);
    }

    // dloss/dlogit of row r: exp(logit - lse) * factor, minus 1 at the target, times the slope of the softcap.
    void differentiate(int64_t r, int64_t target, float top, float own_top, float factor, X* g) {
        float* x = row(r);
        float rescale = factor * std::exp(own_top - top), slope = 1, at = 0;
        if (target >= from && target < to) at = x[target - from];
        lanes(to - from, [&](int64_t i, auto v) {
            using L = decltype(v);
            v = load<L>(x + i);
            if (cap) {
                L t = v / cap;
                v = exp(v - top) * factor * (1 - t * t);
            } else {
                v *= rescale;
            }
            store(g + i, v);
        });
        if (target >= from && target < to) {
            if (cap) slope = 1 - at / cap * at / cap, at = std::exp(at - top) * factor;
            else at *= rescale;
            g[target - from] = X((at - 1) * slope);
        }
    }
};

extern "C" void heed_linear_cross_entropy(const Loss& m, int64_t threads) {
    int64_t width = round_up(m.C, 32), vocabulary = round_up(m.V, 32), share = round_up(m.V / threads + 1, 32);
    // So many tokens at a time that a thread's logits take a megabyte, if that is at least 32.
    int64_t tokens = std::max<int64_t>(32, std::min(SOME / 2, (1 << 18) / share / 32 * 32));
    Buffer<float> tops(threads * tokens), totals(threads * tokens), at_targets(tokens), dx(threads * tokens * width);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        int64_t me = omp_get_thread_num(), crew = omp_get_num_threads();
        Share mine(m, Part(m.V, 32), tokens);
        int64_t columns = mine.to - mine.from;
        Rows x(tokens, m.C), g(tokens, columns);
        Columns x_columns(m.C);
        Gradient dw(1, m.C, columns);
        Buffer<X> room(m.dw ? g.width * tokens : 0);
        dw.clear(0);
        for (int64_t first = 0; first < m.N; first += tokens) {
            int64_t n = std::min(tokens, m.N - first);
            x.load(m.x + first * m.C, n, m.C);
            for (int64_t v = 0; v < columns; v += 32)
                for (int64_t r = 0; r < n; r += 32)
                    multiply<false, X>(x.row(r), x.pitch, right(m.head, width, mine.from + v), width, 32, mine.row(r) + v,
                                       mine.pitch);
            for (int64_t r = 0; r < n; r++) {
                int64_t target = m.targets[first + r];
                float at = target >= mine.from && target < mine.to ? mine.row(r)[target - mine.from] : 0;
                if (target >= mine.from && target < mine.to) at_targets[r] = mine.cap ? mine.cap * std::tanh(at / mine.cap) : at;
                tops[me * tokens + r] = -INFINITY, totals[me * tokens + r] = 0;
                if (columns) mine.exponentiate(r, tops[me * tokens + r], totals[me * tokens + r]);
            }
#pragma omp barrier
            g.clear_edges(n, columns);
            for (int64_t r = 0; r < n; r++) {
                int64_t target = m.targets[first + r];
                bool counts = target >= 0 && target < m.V;
                float top = -INFINITY, total = 0, z = m.z_loss;
                for (int64_t t = 0; t < crew; t++) top = std::max(top, tops[t * tokens + r]);
                for (int64_t t = 0; t < crew; t++) total += totals[t * tokens + r] * std::exp(tops[t * tokens + r] - top);
                float lse = top + std::log(total);
                if (me == 0) m.losses[first + r] = counts ? std::log(total) + (top - at_targets[r]) + z * lse * lse : 0;
                if (!m.dx && !m.dw) continue;
                if (counts) mine.differentiate(r, target, top, tops[me * tokens + r], (1 + 2 * z * lse) / total, g.row(r));
                else std::fill_n(g.row(r), g.width, X(0.f));
            }
            if (m.dx && columns)  // this thread's part of dx, over its columns
                for (int64_t c = 0; c < width; c += 32)
                    for (int64_t r = 0; r < n; r += 32) {
                        Packed<X> weights = right(m.head_t, vocabulary, c);
                        weights.data += mine.from * 16;
                        multiply<false, X>(g.row(r), g.pitch, weights, g.width, 32, dx + (me * tokens + r) * width + c, width);
                    }
            if (m.dw) x_columns.fill(x, round_up(n, 32)), dw.add(0, x_columns, g, round_up(n, 32), room);
#pragma omp barrier
            Part rows(n);
            for (int64_t r = rows.from; m.dx && r < rows.to; r++)
                lanes(m.C, [&](int64_t c, auto v) {
                    v = decltype(v){};
                    for (int64_t t = 0; t < crew; t++)
                        if (!Part(m.V, 32, t).empty()) v += load<decltype(v)>(dx + (t * tokens + r) * width + c);
                    store(m.dx + (first + r) * m.C + c, v);
                });
        }
        if (m.dw) dw.add_up(m.dw + mine.from * m.C, true, Part(dw.blocks, 1, 0, 1));
    }
}
