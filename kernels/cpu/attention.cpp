// Causal attention for training on a CPU, forward and backward, from the output of the q, k and v projections to the
// input of the output projection: QK-norm, RoPE, softmax(q k^T) v. It is flash attention (Dao et al. 2022, arXiv
// 2205.14135) with blocks that fit into the cache of a core: scores never reach memory, and the backward recomputes them.
//
// One task is a sequence b and a key/value head with its G query heads. It packs keys and values for the tile matmul, then
// processes BLOCK queries at a time. E is the type of activations (-DELEMENT); sums, the softmax and gains are fp32.
//
// B sequences, T tokens, H query heads, K key/value heads, D head size. Inside a task T and D are rounded up to
// `tokens`, a multiple of BLOCK, and a multiple of 32, with zeros: causal queries see no such key, and what such queries give is not stored.
#include "norm.h"
#include "tile_matmul.h"

using E = ELEMENT;
using X = Multiplied<E>;

constexpr int64_t BLOCK = 64;   // queries at once, and in the backward keys: three blocks of scores fit into 48 KB
constexpr int64_t CHUNK = 128;  // keys at once in the forward
constexpr float LOG2_E = 1.44269504f;

struct Attention {
    int64_t B, T, H, K, D, normed, window, tokens, pitch;  // window: keys that a query sees, its own included; 0 is all
    double eps, scale;
    const float *gain_q, *gain_k, *cos, *sin;  // gains (D), ones without QK-norm; cos and sin (T, D)
    const int32_t *starts, *ends;  // (B, T): the keys of a position's document are starts ... ends - 1; null is one document
    // A token's row of qkv has `pitch` numbers; what follows its queries, keys and values is not attention's.
    int64_t width() const { return round_up(D, 32); }
    // The first key that a query of sequence b sees. It never falls from one query to the next.
    int64_t begin(int64_t b, int64_t query) const {
        int64_t start = starts ? starts[b * T + query] : 0;
        return window ? std::max(start, query + 1 - window) : start;
    }
    // The query after the last one that sees a key; keys beyond T are seen by none that is stored.
    int64_t end(int64_t b, int64_t key) const {
        int64_t end = ends && key < T ? ends[b * T + key] : tokens;
        return window ? std::min(end, key + window) : end;
    }
    bool limited() const { return window || ends; }
};

// 1. From a token's row to what is multiplied, and back --------------------------------------------------------------

// The factor of each token's norm in head h of sequence b, or 1.
static void load_scales(const Attention& m, const E* qkv, int64_t b, int64_t h, float* scales) {
    for (int64_t t = 0; t < m.T; t += 16) {
        const E* from = qkv + (b * m.T + t) * m.pitch + h * m.D;
        if (!m.normed) std::fill_n(scales + t, 16, 1.f);
        else if (t + 16 <= m.T) inverse_rms_16(from, m.pitch, m.D, m.eps, scales + t);
        else
            for (int64_t i = t; i < m.T; i++) scales[i] = inverse_rms(from + (i - t) * m.pitch, m.D, m.eps);
    }
}

// to (tokens, width) = head `h` of sequence b, normed and rotated if it is a query or a key; queries times scale.
static void load_head(const Attention& m, const E* qkv, int64_t b, int64_t h, X* to, float* scales) {
    int64_t D = m.D, half = D / 2;
    if (m.T < m.tokens || D < m.width()) std::fill_n(to, m.tokens * m.width(), X(0.f));
    const float* gain = h < m.H ? m.gain_q : m.gain_k;
    if (h < m.H + m.K) load_scales(m, qkv, b, h, scales);
    for (int64_t t = 0; t < m.T; t++, to += m.width()) {
        const E* from = qkv + (b * m.T + t) * m.pitch + h * D;
        if (h >= m.H + m.K) {
            lanes(D, [&](int64_t d, auto v) { store(to + d, load<decltype(v)>(from + d)); });
            continue;
        }
        const float *cos = m.cos + t * D, *sin = m.sin + t * D;
        float scale = (h < m.H ? m.scale : 1) * scales[t];
        lanes(half, [&](int64_t d, auto v) {
            using L = decltype(v);
            L low = load<L>(from + d) * scale * load<L>(gain + d);
            L high = load<L>(from + half + d) * scale * load<L>(gain + half + d);
            store(to + d, L(low * load<L>(cos + d) + high * load<L>(sin + d)));
            store(to + half + d, L(high * load<L>(cos + half + d) + low * load<L>(sin + half + d)));
        });
    }
}

// The way back: dqkv of head h from its gradient `from` (tokens, width); dgain (D) is added to.
static void store_head_gradient(const Attention& m, const E* qkv, int64_t b, int64_t h, const float* from, E* dqkv,
                                float* dgain, float* scales) {
    int64_t D = m.D, half = D / 2;
    Buffer<float> turned(D);
    const float* gain = h < m.H ? m.gain_q : m.gain_k;
    if (h < m.H + m.K) load_scales(m, qkv, b, h, scales);
    for (int64_t t = 0; t < m.T; t++, from += m.width()) {
        int64_t at = (b * m.T + t) * m.pitch + h * D;
        E* to = dqkv + at;
        if (h >= m.H + m.K) {
            lanes(D, [&](int64_t d, auto v) { store(to + d, load<decltype(v)>(from + d)); });
            continue;
        }
        const float *cos = m.cos + t * D, *sin = m.sin + t * D;
        float scale = h < m.H ? m.scale : 1;
        lanes(half, [&](int64_t d, auto v) {
            using L = decltype(v);
            L low = load<L>(from + d) * scale, high = load<L>(from + half + d) * scale;
            store(turned + d, L(low * load<L>(cos + d) + high * load<L>(sin + half + d)));
            store(turned + half + d, L(high * load<L>(cos + half + d) + low * load<L>(sin + d)));
        });
        if (m.normed)
            norm_backward(qkv + at, (const float*)turned, gain, scales[t], D, to, dgain);
        else
            lanes(D, [&](int64_t d, auto v) { store(to + d, load<decltype(v)>(turned + d)); });
    }
}

// Head h of x (B * T, H * D) as `to` (tokens, width).
static void load_output(const Attention& m, const E* x, int64_t b, int64_t h, X* to) {
    if (m.T < m.tokens || m.D < m.width()) std::fill_n(to, m.tokens * m.width(), X(0.f));
    for (int64_t t = 0; t < m.T; t++)
        lanes(m.D, [&](int64_t d, auto v) {
            store(to + t * m.width() + d, load<decltype(v)>(x + ((b * m.T + t) * m.H + h) * m.D + d));
        });
}

// A matrix (tokens, width) as right operand: of K = width, N = tokens when transposed, of K = tokens, N = width if not.
static Packed<X> pack_all(const Attention& m, const X* from, X* to, bool transposed) {
    int64_t T = m.tokens, D = m.width();
    X* tile = to;
    if (transposed) {
        for (int64_t t = 0; t < T; t += 16)
            for (int64_t d = 0; d < D; d += 32, tile += TILE) pack_transposed(from + t * D + d, D, tile);
        return {to, TILE, D / 32 * TILE};
    }
    for (int64_t t = 0; t < T; t += 32)
        for (int64_t d = 0; d < D; d += 16, tile += TILE) pack(from + t * D + d, D, tile);
    return {to, D / 16 * TILE, TILE};
}
static Packed<X> at(Packed<X> b, int64_t k, int64_t n) {
    return {b.data + k / 32 * b.down + n / 16 * b.right, b.down, b.right};
}

// a and b are neighbours along K: two rows of 16 numbers of a packed tile.
static inline void store_pair(float* to, Floats a, Floats b, int64_t v) {
    store(to + v, a), store(to + 16 + v, b);
}
#ifdef __AVX512BF16__
static inline void store_pair(Bf16* to, Floats a, Floats b, int64_t) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    std::memcpy(to, &both, sizeof both);
}
#endif

// 2. Forward ---------------------------------------------------------------------------------------------------------

// A block of queries and what the online softmax keeps of each: its largest score so far, in base 2, the sum of its
// weights, and of its values (width, BLOCK). Queries are columns, so that nothing is summed up within a vector.
struct Softmax {
    float top[BLOCK], total[BLOCK];
    Buffer<float> scores, sums;
    Buffer<X> weights;
    explicit Softmax(int64_t width) : scores(CHUNK * BLOCK), sums(width * BLOCK), weights(CHUNK * BLOCK) {}
    Packed<X> packed() { return {weights, BLOCK * 32, TILE}; }

    void begin(int64_t width) {
        std::fill_n(top, BLOCK, -INFINITY), std::fill_n(total, BLOCK, 0.f);
        std::fill_n((float*)sums, width * BLOCK, 0.f);
    }

    // The scores of n keys become weights.
    void add(int64_t n, int64_t width) {
        for (int64_t q = 0; q < BLOCK; q += LANES) {
            Floats before = load(top + q), most = before / LOG2_E, sum = load(total + q);
            for (int64_t k = 0; k < n; k++) keep_larger(most, load(scores + k * BLOCK + q));
            Floats now = most == -INFINITY ? Floats{} : most * LOG2_E;  // no key so far: weights of 0, not of infinity
            Floats kept = exp2(before - now);
            store(top + q, most * LOG2_E), sum *= kept;
            for (int64_t k = 0; k < n; k += 2) {
                Floats a = exp2(load(scores + k * BLOCK + q) * LOG2_E - now);
                Floats b = exp2(load(scores + (k + 1) * BLOCK + q) * LOG2_E - now);
                store_pair(weights + (k / 32 * BLOCK / 16 + q / 16) * TILE + k % 32 * 16, a, b, q % 16);
                sum += a + b;
            }
            store(total + q, sum);
            for (int64_t d = 0; d < width; d++) store(sums + d * BLOCK + q, load(sums + d * BLOCK + q) * kept);
        }
    }

    // The queries' rows of values, (BLOCK, width), and their log-sum-exp.
    void finish(int64_t width, float* rows, float* lse) {
        for (int64_t q = 0; q < BLOCK; q++) lse[q] = top[q] + std::log2(total[q]), total[q] = 1 / total[q];
        for (int64_t d = 0; d < width; d++)
            for (int64_t q = 0; q < BLOCK; q += LANES) store(sums + d * BLOCK + q, load(sums + d * BLOCK + q) * load(total + q));
        for (int64_t d = 0; d < width; d += 16)
            for (int64_t q = 0; q < BLOCK; q += 16) transpose(sums + d * BLOCK + q, BLOCK, rows + q * width + d, width);
    }
};

// Scores of n keys from `key` on, by BLOCK queries from `query` on: minus infinity where the query does not see the key.
static void hide(const Attention& m, int64_t b, int64_t key, int64_t n, int64_t query, float* scores) {
    for (int64_t k = 0; k < n; k++, scores += BLOCK) {
        int64_t from = std::clamp<int64_t>(key + k - query, 0, BLOCK);
        int64_t to = m.limited() ? std::clamp<int64_t>(m.end(b, key + k) - query, 0, BLOCK) : BLOCK;
        std::fill(scores, scores + from, -INFINITY), std::fill(scores + to, scores + BLOCK, -INFINITY);
    }
}

// kt (width, tokens) = rows (tokens, width), transposed, from the tiles that pack_transposed made of them.
static void unpack(const Attention& m, Packed<X> tiles, X* kt) {
    int64_t T = m.tokens;
    for (int64_t d = 0; d < m.width(); d += 32)
        for (int64_t t = 0; t < T; t += 16) unpack_transposed(at(tiles, d, t).data, kt + d * T + t, T);
}

// qkv (B * T, (H + 2K) D) -> out (B * T, H * D) and lse (B, H, tokens), the scores' log-sum-exp in base 2.
extern "C" void heed_attention(const Attention& m, const E* qkv, E* out, float* lse, int64_t threads) {
    int64_t T = m.tokens, D = m.width(), G = m.H / m.K;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Buffer<X> rows(T * D), keys(T * D), packed(T * D), vt(T * D);
        Buffer<float> values(BLOCK * D), scales(T);
        Softmax softmax(D);
#pragma omp for
        for (int64_t task = 0; task < m.B * m.K; task++) {
            int64_t b = task / m.K, k = task % m.K;
            load_head(m, qkv, b, m.H + k, keys, scales), load_head(m, qkv, b, m.H + m.K + k, rows, scales);
            unpack(m, pack_all(m, rows, packed, true), vt);
            for (int64_t h = k * G; h < (k + 1) * G; h++) {
                load_head(m, qkv, b, h, rows, scales);
                Packed<X> qt = pack_all(m, rows, packed, true);
                for (int64_t q = 0; q < m.T; q += BLOCK) {
                    softmax.begin(D);
                    int64_t end = q + BLOCK, n;  // of the keys that these queries see
                    for (int64_t first = m.begin(b, q) / 32 * 32; first < end; first += n) {
                        n = std::min(CHUNK, end - first);
                        for (int64_t i = 0; i < n; i += 32)
                            multiply<false, X>(keys + (first + i) * D, D, at(qt, 0, q), D, BLOCK, softmax.scores + i * BLOCK, BLOCK);
                        if (m.limited() || first + n > q) hide(m, b, first, n, q, softmax.scores);
                        softmax.add(n, D);
                        for (int64_t d = 0; d < D; d += 32)
                            multiply<true, X>(vt + d * T + first, T, softmax.packed(), n, BLOCK, softmax.sums + d * BLOCK, BLOCK);
                    }
                    softmax.finish(D, values, lse + (b * m.H + h) * T + q);
                    for (int64_t r = 0; r < std::min(BLOCK, m.T - q); r++)
                        lanes(m.D, [&](int64_t d, auto v) {
                            store(out + ((b * m.T + q + r) * m.H + h) * m.D + d, load<decltype(v)>(values + r * D + d));
                        });
                }
            }
        }
    }
}

// 3. Backward --------------------------------------------------------------------------------------------------------

// With p = exp2(score - lse) and delta = sum(dout * out), dscore = p * (dp - delta), for `key`, one of the BLOCK keys, and
// the queries first ... first + BLOCK: a row of p and dscore, as they are multiplied.
static inline void gradient_row(const Attention& m, int64_t b, int64_t key, int64_t first, float* scores, const float* dp,
                                const float* lse, const float* delta, X* p, X* dscores) {
    int64_t to = m.limited() ? std::min(BLOCK, m.end(b, key) - first) : BLOCK;
    int64_t from = std::min(std::max<int64_t>(0, key - first), BLOCK);
    std::fill(scores, scores + from, -INFINITY), std::fill(scores + std::max<int64_t>(to, 0), scores + BLOCK, -INFINITY);
    for (int64_t i = 0; i < BLOCK; i += LANES) {
        Floats weight = exp2(load(scores + i) * LOG2_E - load(lse + i));
        store(p + i, weight), store(dscores + i, weight * (load(dp + i) - load(delta + i)));
    }
}

// dqkv from dout (B * T, H * D), in the shapes of qkv and out; dgain_q and dgain_k (D).
extern "C" void heed_attention_backward(const Attention& m, const E* qkv, const E* out, const float* lse, const E* dout,
                                        E* dqkv, float* dgain_q, float* dgain_k, int64_t threads) {
    int64_t T = m.tokens, D = m.width(), G = m.H / m.K;
    std::vector<float> parts_q(threads * m.D), parts_k(threads * m.D);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Buffer<X> rows(T * D), keys(T * D), values(T * D), kt(T * D), packed(T * D), q_pairs(T * D), q_columns(T * D),
            dout_pairs(T * D), dout_columns(T * D), weights(BLOCK * BLOCK), dscores(BLOCK * BLOCK), dscore_pairs(BLOCK * BLOCK);
        Buffer<float> scores(BLOCK * BLOCK), dweights(BLOCK * BLOCK), dq(T * D), dqt(T * D), dk(T * D), dv(T * D), delta(T);
        Buffer<float> ends(T), scales(T);
        float *sums_q = &parts_q[omp_get_thread_num() * m.D], *sums_k = &parts_k[omp_get_thread_num() * m.D];
#pragma omp for
        for (int64_t task = 0; task < m.B * m.K; task++) {
            int64_t b = task / m.K, k = task % m.K;
            load_head(m, qkv, b, m.H + k, keys, scales), load_head(m, qkv, b, m.H + m.K + k, values, scales);
            unpack(m, pack_all(m, keys, packed, true), kt);
            std::fill_n((float*)dk, T * D, 0.f), std::fill_n((float*)dv, T * D, 0.f);
            for (int64_t h = k * G; h < (k + 1) * G; h++) {
                load_head(m, qkv, b, h, rows, scales);
                Packed<X> q = pack_all(m, rows, q_pairs, false), qt = pack_all(m, rows, q_columns, true);
                load_output(m, dout, b, h, rows);
                Packed<X> g = pack_all(m, rows, dout_pairs, false), gt = pack_all(m, rows, dout_columns, true);
                std::fill_n((float*)ends, T, INFINITY), std::fill_n((float*)delta, T, 0.f);  // queries beyond T weigh nothing
                for (int64_t t = 0; t < m.T; t++) {
                    const E* o = out + ((b * m.T + t) * m.H + h) * m.D;
                    Floats products{};
                    lanes(m.D, [&](int64_t d, auto v) {
                        add(products, decltype(v)(load<decltype(v)>(o + d) * load<decltype(v)>(rows + t * D + d)));
                    });
                    delta[t] = sum(products), ends[t] = lse[(b * m.H + h) * T + t];
                }
                std::fill_n((float*)dqt, T * D, 0.f);
                for (int64_t key = 0; key < T; key += BLOCK)
                    for (int64_t i = key; i < T && m.begin(b, i) < key + BLOCK; i += BLOCK) {
                        for (int64_t r = 0; r < BLOCK; r += 32) {
                            multiply<false, X>(keys + (key + r) * D, D, at(qt, 0, i), D, BLOCK, scores + r * BLOCK, BLOCK);
                            multiply<false, X>(values + (key + r) * D, D, at(gt, 0, i), D, BLOCK, dweights + r * BLOCK, BLOCK);
                        }
                        for (int64_t r = 0; r < BLOCK; r++)
                            gradient_row(m, b, key + r, i, scores + r * BLOCK, dweights + r * BLOCK, ends + i, delta + i,
                                         weights + r * BLOCK, dscores + r * BLOCK);
                        for (int64_t r = 0; r < BLOCK; r += 32) {
                            multiply<true, X>(weights + r * BLOCK, BLOCK, at(g, i, 0), BLOCK, D, dv + (key + r) * D, D);
                            multiply<true, X>(dscores + r * BLOCK, BLOCK, at(q, i, 0), BLOCK, D, dk + (key + r) * D, D);
                            for (int64_t c = 0; c < BLOCK; c += 16)
                                pack(dscores + r * BLOCK + c, BLOCK, dscore_pairs + (r / 32 * BLOCK / 16 + c / 16) * TILE);
                        }
                        Packed<X> ds{dscore_pairs, BLOCK / 16 * TILE, TILE};
                        for (int64_t d = 0; d < D; d += 32)
                            multiply<true, X>(kt + d * T + key, T, ds, BLOCK, BLOCK, dqt + d * T + i, T);
                    }
                for (int64_t d = 0; d < D; d += 16)
                    for (int64_t t = 0; t < T; t += 16) transpose(dqt + d * T + t, T, dq + t * D + d, D);
                store_head_gradient(m, qkv, b, h, dq, dqkv, sums_q, scales);
            }
            store_head_gradient(m, qkv, b, m.H + k, dk, dqkv, sums_k, scales);
            store_head_gradient(m, qkv, b, m.H + m.K + k, dv, dqkv, sums_k, scales);
        }
    }
    add_up(parts_q, m.D, dgain_q), add_up(parts_k, m.D, dgain_k);
}
