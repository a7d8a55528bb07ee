// A decode step of model.py as one call: some tokens in, the logits of the next ones out.
//
// A step of a small model is some 200 small operations. Called one by one from Python they take longer than the work;
// here they are one parallel region: the threads share the rows of each matrix and meet at a barrier where the next
// operation needs all of the last one's result. Reading the weights is what takes the time: they are read once a step,
// in fp32, bf16 or int8 with a scale a row (matmul.h). A prompt is many tokens at once, and arithmetic takes the time:
// it is done in tiles (prefill.h). All sums and norms are fp32.
//
// B sequences, T new tokens each, R = B * T rows; C width, H query heads, K key/value heads, D head size, F
// feed-forward width, V vocabulary. Matrices are (rows out, columns in), as in torch.
#include <numeric>

#include "prefill.h"

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *norm_in, *norm_mid, *norm_q, *norm_k;
    void *keys, *values;  // (B, slots, K, D): position p in slot p % slots
    int64_t slots, window;
};
struct Model {
    int64_t C, H, K, D, F, V, layers, gated, context;
    double eps;
    const float *cos, *sin;  // (context, D)
    const float* norm;
    Matrix embed, head;
    const Layer* layer;
    int64_t cache_rows;
};

// 1. Operations -----------------------------------------------------------------------------------------------------

static void rms_norm(const float* x, const float* gain, int64_t n, double eps, float* y) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    float factor = 1 / std::sqrt(squares / n + float(eps));
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

// One head, normed, then turned by its position: x * cos + roll(x, D / 2) * sin.
static void place(const float* x, const float* gain, const Model& m, int64_t position, float* y) {
    float normed[m.D];
    rms_norm(x, gain, m.D, m.eps, normed);
    const float *cos = m.cos + position * m.D, *sin = m.sin + position * m.D;
    for (int64_t d = 0, half = m.D / 2; d < m.D; d++)
        y[d] = normed[d] * cos[d] + normed[d < half ? d + half : d - half] * sin[d];
}

// What a token's query heads draw from some positions: for each head the largest score, the sum of e ** (score - largest)
// and that of these numbers times the values. Such parts can be joined to one of all positions, as in flash attention.
struct Drawn {
    float *largest, *total, *values;  // (H), (H), (H, D)
};

// The positions from ... to of a sequence's keys and values. These lie position after position, the heads of each side by
// side, and memory is fastest read in that order: so all heads take a chunk of positions before the next.
template <class E>
static void attend(const float* q, int64_t pitch, const E* keys, const E* values, const Layer& l, const Model& m,
                   int64_t from, int64_t to, Drawn drawn) {
    using X = std::conditional_t<std::is_same_v<E, Bf16> && PAIRS, Bf16, float>;
    constexpr int64_t CHUNK = 64;  // by trial
    int64_t D = m.D, stride = m.K * D, group = m.H / m.K;
    float scale = 1 / std::sqrt(float(D));
    std::vector<float> scores(m.H * CHUNK);
    std::vector<X> queries(m.H * D);
    for (int64_t h = 0; h < m.H; h++)
        for (int64_t d = 0; d < D; d++) queries[h * D + d] = X(q[h * pitch + d] * scale);
    std::fill_n(drawn.largest, m.H, -INFINITY);
    std::fill_n(drawn.total, m.H, 0.f);
    std::fill_n(drawn.values, m.H * D, 0.f);
    for (int64_t n; from < to; from += n) {
        int64_t slot = from % l.slots;
        n = std::min({CHUNK, to - from, l.slots - slot});
        for (int64_t i = 0; i < n; i++)
            for (int64_t h = 0; h < m.H; h++) {
                float score[1][1];
                tile<1, 1, 1>(keys + (slot + i) * stride + h / group * D, &queries[h * D], D, score);
                scores[h * CHUNK + i] = score[0][0];
            }
        for (int64_t h = 0; h < m.H; h++) {
            float *weights = &scores[h * CHUNK], before = drawn.largest[h];
            float largest = drawn.largest[h] = std::max(before, *std::max_element(weights, weights + n));
            float kept = std::exp(before - largest);
            each(weights, n, [&](auto score) { return exp(score - largest); });
            drawn.total[h] = std::accumulate(weights, weights + n, drawn.total[h] * kept);
            each(drawn.values + h * D, D, [&](auto sum) { return sum * kept; });
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t h = 0; h < m.H; h++) {
                const E* value = values + (slot + i) * stride + h / group * D;
                lanes(D, [&](int64_t d, auto kind) {
                    using V = decltype(kind);
                    float* sum = drawn.values + h * D + d;
                    store(sum, load<V>(sum) + scores[h * CHUNK + i] * load<V>(value + d));
                });
            }
    }
}

// A row attends to n positions in so many parts, whatever the batch and the number of threads.
static int64_t parts_of(int64_t n) { return std::clamp<int64_t>(n / 64, 1, 16); }

// One head's share y (D) of n parts, whose numbers begin m.H heads apart.
static void join(const Drawn& parts, int64_t n, int64_t h, const Model& m, float* y) {
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, parts.largest[i * m.H + h]);
    std::fill_n(y, m.D, 0.f);
    for (int64_t i = 0; i < n; i++) {
        float kept = std::exp(parts.largest[i * m.H + h] - largest);
        total += parts.total[i * m.H + h] * kept;
        for (int64_t d = 0; d < m.D; d++) y[d] += parts.values[(i * m.H + h) * m.D + d] * kept;
    }
    for (int64_t d = 0; d < m.D; d++) y[d] /= total;
}

// 2. The model ------------------------------------------------------------------------------------------------------

// 0, or 1 for no token, one that is not in the vocabulary, a position beyond the context or the cache, or a row beyond the
// cache. Sequence b is row rows[b] of the cache, which holds lengths[b] tokens of it. Without `logits`, the cache alone is
// filled. W is what the weights are stored in, E what the cache is: the compiler's command line says it
// (-DWEIGHTS -DCACHE).
extern "C" int heed_decode(const Model& m, int64_t B, int64_t T, const int64_t* tokens, const int64_t* rows,
                           const int64_t* lengths, float* logits, int64_t threads) {
    if (B * T == 0) return 1;
    for (int64_t i = 0; i < B * T; i++)
        if (tokens[i] < 0 || tokens[i] >= m.V) return 1;
    for (int64_t b = 0; b < B; b++) {
        int64_t end = lengths[b] + T;
        if (lengths[b] < 0 || end > m.context || rows[b] < 0 || rows[b] >= m.cache_rows) return 1;
        for (const Layer* l = m.layer; l < m.layer + m.layers; l++)  // a ring must hold the window of the first new token
            if (end > l->slots && !(l->window && l->window + T - 1 <= l->slots)) return 1;
    }
    using W = WEIGHTS;
    using E = CACHE;
    int64_t D = m.D, Q = m.H * D * (m.gated ? 2 : 1), KV = m.K * D, all = B * T;
    Buffer<float> x(all * m.C), y(all * m.C), q(all * Q), k(all * KV), v(all * KV), a(all * m.H * D), f(all * m.F),
        g(all * m.F);
    Columns<W> columns(IN_TILES<W> && all >= MANY ? all : 0, std::max({m.C, m.H * D, m.F}));
    int64_t most = parts_of(*std::max_element(lengths, lengths + B) + T), drawn_rows = (T < MANY ? all : B) * most;
    Buffer<float> largest(drawn_rows * m.H), total(drawn_rows * m.H), values(drawn_rows * m.H * D);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        int64_t R = all, skipped = 0;  // rows; and tokens of each sequence that are not among them
        // A matmul of many rows is done in tiles, for which `pack` prepares them. A thread has whole units of a matrix's rows.
        auto in_tiles = [&] { return IN_TILES<W> && R >= MANY; };
        auto unit = [&] { return in_tiles() ? 32 : 3; };
        auto pack = [&](const float* from, int64_t width) {
            if (!in_tiles()) return;
            Part mine(R, 16);
            for (int64_t r = mine.from; r < mine.to; r += 16) columns.pack(from, R, width, r);
#pragma omp barrier
        };
        auto matmul = [&](const Matrix& w, Product p) {
            if constexpr (IN_TILES<W>)
                if (in_tiles()) return product<W>(w, p, columns);
            product<W>(w, p);
        };
        auto norm = [&](const float* gain) {
            Part mine(R, in_tiles() ? 16 : 1);
            for (int64_t r = mine.from; r < mine.to; r++) rms_norm(&x[r * m.C], gain, m.C, m.eps, &y[r * m.C]);
            if (in_tiles()) return pack(y, m.C);
#pragma omp barrier
        };
        for (int64_t r = Part(R).from; r < Part(R).to; r++)
            for (int64_t c = 0; c < m.C; c++) {
                float scale = m.embed.scale ? m.embed.scale[tokens[r]] : 1;
                x[r * m.C + c] = float(((const W*)m.embed.weight)[tokens[r] * m.C + c]) * scale;
            }
        // Each row's share of the cache. The threads take turns at the parts of its positions.
        auto attend_rows = [&](const Layer& l) {
            int64_t per = R / B, me = omp_get_thread_num();
            auto drawn = [&](int64_t r, int64_t part) {
                int64_t i = r * most + part;
                return Drawn{&largest[i * m.H], &total[i * m.H], &values[i * m.H * D]};
            };
            auto end = [&](int64_t r) { return lengths[r / per] + skipped + r % per + 1; };
            auto size = [&](int64_t r) { return l.window ? std::min(l.window, end(r)) : end(r); };
            for (int64_t r = 0; r < R; r++) {
                int64_t n = size(r), begin = end(r) - n, parts = parts_of(n), cache = rows[r / per] * l.slots * KV;
                for (int64_t part = 0; part < parts; part++)
                    if ((r + part) % threads == me)
                        attend(&q[r * Q], Q / m.H, (E*)l.keys + cache, (E*)l.values + cache, l, m,
                               begin + n * part / parts, begin + n * (part + 1) / parts, drawn(r, part));
            }
#pragma omp barrier
            Part joined(R * m.H);
            for (int64_t i = joined.from; i < joined.to; i++) {
                int64_t r = i / m.H;
                join(drawn(r, 0), parts_of(size(r)), i % m.H, m, &a[i * D]);
            }
        };
        for (const Layer* l = m.layer; l < m.layer + m.layers; l++) {
#pragma omp barrier
            norm(l->norm_in);
            matmul(l->q, {y, q, R, Q, m.C, false});
            matmul(l->k, {y, k, R, KV, m.C, false});
            matmul(l->v, {y, v, R, KV, m.C, false});
#pragma omp barrier
            Part heads(R * (m.H + m.K));
            for (int64_t i = heads.from; i < heads.to; i++) {
                int64_t r = i / (m.H + m.K), h = i % (m.H + m.K), position = lengths[r / T] + r % T;
                if (h < m.H) {
                    float* query = &q[r * Q + h * (Q / m.H)];
                    place(query, l->norm_q, m, position, query);
                    continue;
                }
                int64_t from = r * KV + (h - m.H) * D;
                int64_t to = (rows[r / T] * l->slots + position % l->slots) * KV + (h - m.H) * D;
                place(&k[from], l->norm_k, m, position, &k[from]);
                for (int64_t d = 0; d < D; d++) ((E*)l->keys)[to + d] = E(k[from + d]);
                for (int64_t d = 0; d < D; d++) ((E*)l->values)[to + d] = E(v[from + d]);
            }
#pragma omp barrier
            bool last = l + 1 == m.layer + m.layers;
            if (last && !logits) break;
            if (last && T > 1) {  // from here on each sequence's last token alone is wanted
#pragma omp single
                for (int64_t b = 0; b < B; b++) {
                    std::copy_n(&x[(b * T + T - 1) * m.C], m.C, &x[b * m.C]);
                    std::copy_n(&q[(b * T + T - 1) * Q], Q, &q[b * Q]);
                }
                R = B, skipped = T - 1;
            }
            if (R / B < MANY) {
                attend_rows(*l);
            } else {
                // Where one thread would have a head more than another, they share the queries of every head instead.
                int64_t parts = B * m.K % threads ? threads : 1, group = m.H / m.K, pitch = Q / m.H;
                Part mine(B * m.K * parts);
                for (int64_t i = mine.from; i < mine.to; i++) {
                    int64_t b = i / parts / m.K, h = i / parts % m.K, cache = rows[b] * l->slots * KV + h * D;
                    Sequence<E> sequence{(E*)l->keys + cache, (E*)l->values + cache, lengths[b], T, l->slots, KV, D, l->window};
                    sequence.attend(&q[b * T * Q + h * group * pitch], Q, pitch, &a[(b * T * m.H + h * group) * D], m.H * D,
                                    Part(group * ((T + 31) / 32), 1, i % parts, parts));
                }
            }
            if (m.gated) {
#pragma omp barrier
                Part gates(R * m.H);
                for (int64_t i = gates.from; i < gates.to; i++) {
                    int64_t r = i / m.H, h = i % m.H;
                    for (int64_t d = 0; d < D; d++) a[i * D + d] /= 1 + std::exp(-q[r * Q + h * 2 * D + D + d]);
                }
            }
#pragma omp barrier
            pack(a, m.H * D);
            matmul(l->o, {a, x, R, m.C, m.H * D, true});
#pragma omp barrier
            norm(l->norm_mid);
            matmul(l->gate, {y, g, R, m.F, m.C, false});
            matmul(l->up, {y, f, R, m.F, m.C, false});
            Part mine(m.F, unit());  // the same rows as in the two matmuls
            for (int64_t r = 0; r < R; r++) {
                float *silu = &g[r * m.F], *up = &f[r * m.F];
                each(silu + mine.from, mine.to - mine.from, [](auto v) { return v / (1 + exp(-v)); });
                for (int64_t i = mine.from; i < mine.to; i++) up[i] *= silu[i];
            }
#pragma omp barrier
            pack(f, m.F);
            matmul(l->down, {f, x, R, m.C, m.F, true});
        }
        if (logits) {
#pragma omp barrier
            norm(m.norm);
            matmul(m.head, {y, logits, B, m.V, m.C, false});
        }
    }
    return 0;
}
