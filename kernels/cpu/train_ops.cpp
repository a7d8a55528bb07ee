// What lies between the matrix products when a block learns on a CPU, forward and backward; train_ops.py has the rest.
//
// In torch each of these is a handful of operations, each of which walks through all activations. Here each walks once:
// it reads what a product left in the cache of the processor, computes in fp32 and rounds once. What is done by hand
// here a compiler would do, too; but it takes half a minute to begin with.
//
// R rows (tokens of all sequences), C width, H query heads, K key/value heads, D head size, T tokens in a sequence, F
// feed-forward width, V vocabulary. E is what activations are stored in (-DELEMENT); gains, sums and x are fp32.
// Threads share rows in a fixed way and sums are added up in a fixed order: the same bits each time.
#include "simd.h"

using E = ELEMENT;

template <class T> static inline float inverse_rms(const T* x, int64_t n, double eps) {
    Floats squares{};
    lanes(n, [&](int64_t i, auto v) { v = load<decltype(v)>(x + i), add(squares, v * v); });
    return 1 / std::sqrt(sum(squares) / n + float(eps));
}

// total[0 ... n) = the sum over the threads of what each has in its part of `parts` (threads, n).
static void add_up(const std::vector<float>& parts, int64_t n, float* total) {
    std::fill(total, total + n, 0.f);
    for (size_t i = 0; i < parts.size(); i++) total[i % n] += parts[i];
}

// 1. RMSNorm ---------------------------------------------------------------------------------------------------------

// y = x / rms(x) * gain, and 1 / rms(x), which is all that the way back needs. x (R, C).
extern "C" void heed_norm(const float* x, const float* gain, E* y, float* inverse, int64_t R, int64_t C, double eps,
                          int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < R; r++) {
        const float* from = x + r * C;
        float scale = inverse[r] = inverse_rms(from, C, eps);
        lanes(C, [&](int64_t i, auto v) {
            using L = decltype(v);
            store(y + r * C + i, L(load<L>(from + i) * scale * load<L>(gain + i)));
        });
    }
}

// With n = x / rms(x) and g = dy * gain: dx = (g - n * mean(g * n)) / rms(x), dgain = the sum over rows of dy * n.
// x, dy and dx are one row of n numbers; dgain is added to.
template <class X, class Y, class Z>
static inline void norm_backward(const X* x, const Y* dy, const float* gain, float scale, int64_t n, Z* dx,
                                 float* dgain) {
    Floats products{};
    lanes(n, [&](int64_t i, auto v) {
        using L = decltype(v);
        L normed = load<L>(x + i) * scale, d = load<L>(dy + i);
        store(dgain + i, L(load<L>(dgain + i) + d * normed));
        add(products, L(d * load<L>(gain + i) * normed));
    });
    float mean = sum(products) / n;
    lanes(n, [&](int64_t i, auto v) {
        using L = decltype(v);
        store(dx + i, L((load<L>(dy + i) * load<L>(gain + i) - load<L>(x + i) * scale * mean) * scale));
    });
}

extern "C" void heed_norm_backward(const E* dy, const float* x, const float* gain, const float* inverse, float* dx,
                                   float* dgain, int64_t R, int64_t C, int64_t threads) {
    std::vector<float> parts(threads * C);
#pragma omp parallel num_threads(threads)
    {
        Part mine(R);
        float* sums = &parts[omp_get_thread_num() * C];
        for (int64_t r = mine.from; r < mine.to; r++)
            norm_backward(x + r * C, dy + r * C, gain, inverse[r], C, dx + r * C, sums);
    }
    add_up(parts, C, dgain);
}

// 2. Heads: from one row a token to one matrix a head, normed and turned by their position ---------------------------

struct Heads {
    int64_t B, T, H, K, D, normed;
    double eps, scale;  // scale: of the queries, and so of the scores
    const float *gain_q, *gain_k, *cos, *sin;  // gains (D), ones without QK-norm; cos and sin (T, D)
};

// Head h of the H + 2K in a row of qkv: a query, a key or a value, and where the matrix (T, D) of its sequence b begins.
template <class P> static inline P matrix(const Heads& m, int64_t b, int64_t h, P q, P k, P v) {
    if (h < m.H) return q + (b * m.H + h) * m.T * m.D;
    return h < m.H + m.K ? k + (b * m.K + h - m.H) * m.T * m.D : v + (b * m.K + h - m.H - m.K) * m.T * m.D;
}

// qkv (B * T, (H + 2K) D) -> q (B, H, T, D), k and v (B, K, T, D).
extern "C" void heed_heads(const Heads& m, const E* qkv, E* q, E* k, E* v, int64_t threads) {
    int64_t D = m.D, half = D / 2, all = m.H + 2 * m.K;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < m.B * all; i++) {
        int64_t b = i / all, h = i % all;
        const float* gain = h < m.H ? m.gain_q : m.gain_k;
        E* to = matrix(m, b, h, q, k, v);
        for (int64_t t = 0; t < m.T; t++, to += D) {
            const E* from = qkv + ((b * m.T + t) * all + h) * D;
            if (h >= m.H + m.K) {
                std::copy(from, from + D, to);
                continue;
            }
            const float *cos = m.cos + t * D, *sin = m.sin + t * D;
            float scale = (h < m.H ? m.scale : 1) * (m.normed ? inverse_rms(from, D, m.eps) : 1);
            lanes(half, [&](int64_t d, auto v) {
                using L = decltype(v);
                L low = load<L>(from + d) * scale * load<L>(gain + d);
                L high = load<L>(from + half + d) * scale * load<L>(gain + half + d);
                store(to + d, L(low * load<L>(cos + d) + high * load<L>(sin + d)));
                store(to + half + d, L(high * load<L>(cos + half + d) + low * load<L>(sin + half + d)));
            });
        }
    }
}

// The way back: dqkv from dq, dk, dv, in the same shapes; dgain_q and dgain_k (D).
extern "C" void heed_heads_backward(const Heads& m, const E* qkv, const E* dq, const E* dk, const E* dv, E* dqkv,
                                    float* dgain_q, float* dgain_k, int64_t threads) {
    int64_t D = m.D, half = D / 2, all = m.H + 2 * m.K;
    std::vector<float> parts_q(threads * D), parts_k(threads * D);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> turned(D);
        float *dy = turned.data(), *sums_q = &parts_q[omp_get_thread_num() * D];
        float* sums_k = &parts_k[omp_get_thread_num() * D];
        Part mine(m.B * m.T * all);  // in the order in which dqkv is written
        for (int64_t i = mine.from; i < mine.to; i++) {
            int64_t b = i / all / m.T, t = i / all % m.T, h = i % all;
            const E *d = matrix(m, b, h, dq, dk, dv) + t * D, *from = qkv + i * D;
            E* to = dqkv + i * D;
            if (h >= m.H + m.K) {
                std::copy(d, d + D, to);
                continue;
            }
            const float *cos = m.cos + t * D, *sin = m.sin + t * D, *gain = h < m.H ? m.gain_q : m.gain_k;
            float scale = h < m.H ? m.scale : 1;
            lanes(half, [&](int64_t i, auto v) {
                using L = decltype(v);
                L low = load<L>(d + i) * scale, high = load<L>(d + half + i) * scale;
                store(dy + i, L(low * load<L>(cos + i) + high * load<L>(sin + half + i)));
                store(dy + half + i, L(high * load<L>(cos + half + i) + low * load<L>(sin + i)));
            });
            if (m.normed)
                norm_backward(from, dy, gain, inverse_rms(from, D, m.eps), D, to, h < m.H ? sums_q : sums_k);
            else
                lanes(D, [&](int64_t i, auto v) { store(to + i, load<decltype(v)>(dy + i)); });
        }
    }
    add_up(parts_q, D, dgain_q), add_up(parts_k, D, dgain_k);
}

// 3. Attention's softmax ---------------------------------------------------------------------------------------------

// Scores of a block of queries, (N, G * queries, keys): N pairs of a sequence and a key head, G query heads of each. The
// first query stands at position `first`, the first key at `low`. A query sees no later key, and with a window only the
// last `window`, its own included; 0 is no window.
struct Scores {
    int64_t N, G, queries, keys, first, low, window;
    int64_t begin(int64_t row) const { return window ? std::max<int64_t>(0, end(row) - window) : 0; }
    int64_t end(int64_t row) const { return first + row % queries - low + 1; }
};

// Scores become weights, in their place; what is not seen becomes 0.
extern "C" void heed_softmax(const Scores& m, E* scores, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> wide(m.keys);
        float* x = wide.data();
#pragma omp for
        for (int64_t row = 0; row < m.N * m.G * m.queries; row++) {
            int64_t begin = m.begin(row), n = m.end(row) - begin;
            E *all = scores + row * m.keys, *p = all + begin;
            Floats most = Floats{} - INFINITY, total{};
            lanes(n, [&](int64_t i, auto v) { v = load<decltype(v)>(p + i), store(x + i, v), keep_larger(most, v); });
            float top = largest(most);
            lanes(n, [&](int64_t i, auto v) { v = exp(load<decltype(v)>(x + i) - top), store(x + i, v), add(total, v); });
            float factor = 1 / sum(total);
            lanes(n, [&](int64_t i, auto v) { store(p + i, decltype(v)(load<decltype(v)>(x + i) * factor)); });
            std::fill(all, p, E(0.f));
            std::fill(p + n, all + m.keys, E(0.f));
        }
    }
}

// With p the weights and g the sum over a row of p * dp: dscore = p * (dp - g), in the place of dp.
extern "C" void heed_softmax_backward(const E* weights, E* dweights, int64_t rows, int64_t keys, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const E* p = weights + row * keys;
        E* d = dweights + row * keys;
        Floats products{};
        lanes(keys, [&](int64_t i, auto v) { add(products, load<decltype(v)>(p + i) * load<decltype(v)>(d + i)); });
        float g = sum(products);
        lanes(keys, [&](int64_t i, auto v) {
            using L = decltype(v);
            store(d + i, L(load<L>(p + i) * (load<L>(d + i) - g)));
        });
    }
}

// 4. SwiGLU ----------------------------------------------------------------------------------------------------------

// both (R, 2F), a row's gates and then its ups; y (R, F) = silu(gate) * up.
extern "C" void heed_swiglu(const E* both, E* y, int64_t R, int64_t F, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < R; r++) {
        const E *gate = both + r * 2 * F, *up = gate + F;
        lanes(F, [&](int64_t i, auto v) {
            using L = decltype(v);
            L g = load<L>(gate + i);
            store(y + r * F + i, L(g / (1 + exp(-g)) * load<L>(up + i)));
        });
    }
}

// dboth (R, 2F) from dy (R, F): silu' is s * (1 + gate * (1 - s)), s the sigmoid of the gate.
extern "C" void heed_swiglu_backward(const E* both, const E* dy, E* dboth, int64_t R, int64_t F, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < R; r++) {
        const E *gate = both + r * 2 * F, *up = gate + F;
        E *dgate = dboth + r * 2 * F, *dup = dgate + F;
        lanes(F, [&](int64_t i, auto v) {
            using L = decltype(v);
            L g = load<L>(gate + i), d = load<L>(dy + r * F + i), s = L(1 / (1 + exp(-g)));
            store(dgate + i, L(d * load<L>(up + i) * s * (1 + g * (1 - s))));
            store(dup + i, L(d * g * s));
        });
    }
}

// 5. Cross-entropy ---------------------------------------------------------------------------------------------------

static inline Floats tanh(Floats x) { return 1 - 2 / (exp(2 * x) + 1); }

// The step of cross_entropy.py on rows of logits (R, V), `stride` apart: losses (R), and the logits become their own
// gradient, if it is wanted. Without a softcap it is 0. A target that is not in the vocabulary does not count.
extern "C" void heed_cross_entropy(E* logits, const int64_t* targets, float* losses, int64_t R, int64_t V,
                                   int64_t stride, double z_loss, double softcap, int64_t gradient, int64_t threads) {
    float z = z_loss, cap = softcap;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> wide(V);
        float* x = wide.data();
#pragma omp for
        for (int64_t r = 0; r < R; r++) {
            E* row = logits + r * stride;
            int64_t target = targets[r];
            bool counts = target >= 0 && target < V;
            Floats most = Floats{} - INFINITY, sums{};
            lanes(V, [&](int64_t i, auto v) {
                using L = decltype(v);
                v = load<L>(row + i);
                if (cap) v = cap * L(tanh(v / cap));
                store(x + i, v), keep_larger(most, v);
            });
            float top = largest(most), at_target = counts ? x[target] : top;
            lanes(V, [&](int64_t i, auto v) { v = exp(load<decltype(v)>(x + i) - top), store(x + i, v), add(sums, v); });
            float total = sum(sums), lse = top + std::log(total), factor = counts ? (1 + 2 * z * lse) / total : 0;
            losses[r] = counts ? std::log(total) + (top - at_target) + z * lse * lse : 0;
            if (!gradient) continue;
            float slope = cap ? 1 - at_target / cap * at_target / cap : 1, g = counts ? (x[target] * factor - 1) * slope : 0;
            lanes(V, [&](int64_t i, auto v) {
                using L = decltype(v);
                v = load<L>(x + i) * factor;
                if (cap) {
                    L t = L(tanh(load<L>(row + i) / cap));
                    v *= 1 - t * t;
                }
                store(row + i, v);
            });
            if (counts) row[target] = E(g);
        }
    }
}
