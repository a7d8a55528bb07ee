// What model.py computes when it speaks, as one call: some tokens in, the logits of the next ones out.
//
// A step of a small model is some 200 small operations. Called one by one from Python they take longer than the work, so
// here they are one parallel region: the threads share the rows of each matrix and meet at a barrier where the next
// operation needs all of the last one's result. Reading the weights is what takes the time: they are read once a step,
// in fp32, bf16 or int8 with a scale a row, and multiplied in fp32. All sums and norms are fp32.
//
// B sequences, T new tokens each, R = B * T rows; C width, H query heads, K key/value heads, D head size, F
// feed-forward width, V vocabulary. Matrices are (rows out, columns in), as in torch.
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct Matrix {
    const void* weight;
    const float* scale;  // (rows), for int8 alone
};
struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *norm_in, *norm_mid, *norm_q, *norm_k;
    void *keys, *values;  // (B, slots, K, D): position p in slot p % slots
    int64_t slots, window;
};
struct Model {
    int64_t C, H, K, D, F, V, layers, gated;
    double eps;
    const float *cos, *sin;  // (context, D)
    const float* norm;
    Matrix embed, head;
    const Layer* layer;
};

// 1. Numbers: what is stored, read as LANES floats ----------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct Bf16 {
    uint16_t bits;  // the upper half of a float
    Bf16() = default;
    explicit Bf16(float value) {
        uint32_t whole;
        std::memcpy(&whole, &value, 4);
        bits = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;  // to the nearest, ties to even
    }
    operator float() const {
        uint32_t whole = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &whole, 4);
        return value;
    }
};

template <class To, class From> static inline To read(const From* p) {
    To v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
#if defined(__AVX512F__)  // one instruction, which g++ 12 does not find by itself
static inline Ints widen(Bytes v) { return (Ints)_mm512_cvtepi8_epi32((__m128i)v); }
static inline Ints widen(Halves v) { return (Ints)_mm512_cvtepu16_epi32((__m256i)v); }
#elif defined(__AVX2__)
static inline Ints widen(Bytes v) { return (Ints)_mm256_cvtepi8_epi32(_mm_set_epi64x(0, read<int64_t>(&v))); }
static inline Ints widen(Halves v) { return (Ints)_mm256_cvtepu16_epi32((__m128i)v); }
#else
static inline Ints widen(Bytes v) { return __builtin_convertvector(v, Ints); }
static inline Ints widen(Halves v) { return __builtin_convertvector(v, Ints); }
#endif
static inline Floats load(const float* p) { return read<Floats>(p); }
static inline Floats load(const Bf16* p) { return (Floats)(widen(read<Halves>(p)) << 16); }
static inline Floats load(const int8_t* p) { return __builtin_convertvector(widen(read<Bytes>(p)), Floats); }
#ifdef __x86_64__  // keep a value in its register: g++ would read it anew for each product
#define HOLD(v) asm("" : "+x"(v))
#else
#define HOLD(v)
#endif
static inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// 2. Products -----------------------------------------------------------------------------------------------------------

template <class W> constexpr int AHEAD = sizeof(W) == 1 ? 4096 : sizeof(W) == 2 ? 1024 : 0;  // bytes, found by trying
template <class W> constexpr int LINE = std::max(4, 64 / (LANES * int(sizeof(W))));  // vectors in a line of the cache

// out[n][m] = row n of w (N, columns) times row m of x (M, columns): each load serves several products. U sums of each
// take turns, so that no addition waits for the last one.
template <int N, int M, int U, class W>
[[gnu::always_inline]] static inline void tile(const W* w, const float* x, int64_t columns, float (&out)[N][M]) {
    Floats sums[N][M][U] = {};
    int64_t c = 0;
    for (; c + U * LANES <= columns; c += U * LANES) {
        if (AHEAD<W> && N == 1)  // narrow weights go by faster than the hardware calls the next
            for (int64_t byte = 0; byte < U * LANES * int64_t(sizeof(W)); byte += 64)
                __builtin_prefetch((const char*)(w + c) + AHEAD<W> + byte);
        for (int u = 0; u < U; u++) {
            Floats ws[N];
            for (int n = 0; n < N; n++) ws[n] = load(w + n * columns + c + u * LANES);
            for (int m = 0; m < M; m++) {
                Floats xs = load(x + m * columns + c + u * LANES);
                if (N > 1 && M > 1) HOLD(xs);
                for (int n = 0; n < N; n++) {
                    if (N > 1 && M > 1) HOLD(ws[n]);
                    sums[n][m][u] += ws[n] * xs;
                }
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) {
            for (int u = 1; u < U; u++) sums[n][m][0] += sums[n][m][u];
            out[n][m] = sum(sums[n][m][0]);
            for (int64_t rest = c; rest < columns; rest++)
                out[n][m] += float(w[n * columns + rest]) * x[m * columns + rest];
        }
}

struct Part {
    int64_t from, to;
    Part(int64_t all, int64_t unit = 1) {  // what this thread does of `all`, in whole units
        int64_t units = (all + unit - 1) / unit, threads = omp_get_num_threads(), me = omp_get_thread_num();
        from = std::min(all, units * me / threads * unit);
        to = std::min(all, units * (me + 1) / threads * unit);
    }
};

struct Product {  // y (R, rows) = x (R, columns) times a matrix (rows, columns), or added to y
    const float* x;
    float* y;
    int64_t R, rows, columns;
    bool add;
};

template <int N, int M, int U, class W>
static inline void put(const Product& p, const W* w, const float* scale, int64_t n, int64_t r) {
    float out[N][M];
    tile<N, M, U>(w, p.x + r * p.columns, p.columns, out);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) {
            float& y = p.y[(r + j) * p.rows + n + i];
            y = (p.add ? y : 0) + out[i][j] * (scale ? scale[n + i] : 1);
        }
}

// N rows of the matrix, which begin at w and are number n and the next, for all rows of x. Meanwhile the `bytes` of the
// next rows are called from memory, a part with each product.
template <int N, class W>
__attribute__((noinline)) static void strip(const Product& p, const W* w, const float* scale, int64_t n, const char* next, int64_t bytes) {
    int64_t r = 0, share = (bytes * 4 / p.R + 63) / 64 * 64;
    for (; r + 4 <= p.R; r += 4, next += share) {
        for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte);
        put<N, 4, 1>(p, w, scale, n, r);
    }
    for (; r < p.R; r++) put<N, 1, N == 1 ? LINE<W> : 2>(p, w, scale, n, r);
}

// This thread's share of the rows: each is read once. One row of x wants them in the order of memory, several want
// them by threes, widened once for all if they are narrow.
template <class W>
static void product(const Matrix& m, int64_t rows, int64_t columns, const float* x, int64_t R, float* y, bool add = false) {
    Product p = {x, y, R, rows, columns, add};
    Part mine(rows, 3);
    std::vector<float> wide(sizeof(W) < 4 && R >= 4 ? 3 * columns : 0);
    for (int64_t n = mine.from, N; n < mine.to; n += N) {
        N = R > 1 && n + 3 <= mine.to ? 3 : 1;
        const W *w = (const W*)m.weight + n * columns, *next = w + N * columns;
        int64_t bytes = N * columns * sizeof(W);
        if (!wide.empty()) {
            for (int64_t i = 0; i < N * columns; i++) wide[i] = float(w[i]);
            N == 3 ? strip<3>(p, wide.data(), m.scale, n, (const char*)next, bytes) : strip<1>(p, wide.data(), m.scale, n, (const char*)next, bytes);
        } else
            N == 3 ? strip<3>(p, w, m.scale, n, (const char*)next, bytes) : strip<1>(p, w, m.scale, n, (const char*)next, bytes);
    }
}

// 3. The other operations -----------------------------------------------------------------------------------------------

static void rms_norm(const float* x, const float* gain, int64_t n, double eps, float* y) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) squares += x[i] * x[i];
    float factor = 1 / std::sqrt(squares / n + float(eps));
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

// e ** x: 2 to the whole part of x / ln 2 is an exponent, to the rest, which is at most a half, a polynomial.
static inline Floats exp(Floats x) {
    x = x < -87.f ? Floats{} - 87.f : x > 88.f ? Floats{} + 88.f : x;  // what a float can hold
    Floats t = x * 1.44269504f;
    Ints whole = __builtin_convertvector(t + (t < 0.f ? Floats{} - .5f : Floats{} + .5f), Ints);
    Floats f = t - __builtin_convertvector(whole, Floats);
    Floats power = 1 + f * (.69314718f + f * (.24022651f + f * (.05550411f + f * (.00961813f + f * (.00133336f + f * .00015469f)))));
    return power * (Floats)((whole + 127) << 23);
}
// n numbers of p become f of them, LANES at a time.
template <class F> static inline void each(float* p, int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats y = f(load(p + i));
        std::memcpy(p + i, &y, sizeof y);
    }
    for (; i < n; i++) p[i] = f(Floats{} + p[i])[0];
}

// One head, normed, then turned by its position: x * cos + roll(x, D / 2) * sin.
static void place(const float* x, const float* gain, const Model& m, int64_t position, float* y) {
    float normed[m.D];
    rms_norm(x, gain, m.D, m.eps, normed);
    const float *cos = m.cos + position * m.D, *sin = m.sin + position * m.D;
    for (int64_t d = 0; d < m.D; d++) y[d] = normed[d] * cos[d] + normed[d < m.D / 2 ? d + m.D / 2 : d - m.D / 2] * sin[d];
}

// One query head over the positions first ... last of its sequence's keys and values.
template <class E>
static void attend(const float* q, const E* keys, const E* values, const Layer& l, const Model& m, int64_t first, int64_t last, float* scores, float* y) {
    int64_t n = last - first + 1, stride = m.K * m.D;
    float scale = 1 / std::sqrt(float(m.D)), largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < n; i++) {
        float score[1][1];
        tile<1, 1, 2>(keys + (first + i) % l.slots * stride, q, m.D, score);
        scores[i] = score[0][0] * scale;
        largest = std::max(largest, scores[i]);
    }
    each(scores, n, [&](Floats v) { return exp(v - largest); });
    for (int64_t i = 0; i < n; i++) total += scores[i];
    for (int64_t d = 0; d < m.D; d++) y[d] = 0;
    for (int64_t i = 0; i < n; i++) {
        const E* value = values + (first + i) % l.slots * stride;
        float weight = scores[i] / total;
        for (int64_t d = 0; d < m.D; d++) y[d] += weight * float(value[d]);
    }
}

// 4. The model ----------------------------------------------------------------------------------------------------------

// W is what the weights are stored in, E what the cache is: the compiler's command line says it (-DWEIGHTS -DCACHE).
extern "C" void heed_decode(const Model& m, int64_t B, int64_t T, const int64_t* tokens, const int64_t* lengths, float* logits, int threads) {
    using W = WEIGHTS;
    using E = CACHE;
    int64_t R = B * T, D = m.D, Q = m.H * D * (m.gated ? 2 : 1), KV = m.K * D, most = 0;
    for (int64_t i = 0; i < m.layers; i++) most = std::max(most, m.layer[i].slots);
    std::vector<float> x(R * m.C), y(R * m.C), q(R * Q), k(R * KV), v(R * KV), a(R * m.H * D), f(R * m.F), g(R * m.F);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(most);
        auto norm = [&](const float* gain) {
            Part mine(R);
            for (int64_t r = mine.from; r < mine.to; r++) rms_norm(&x[r * m.C], gain, m.C, m.eps, &y[r * m.C]);
#pragma omp barrier
        };
        for (int64_t r = Part(R).from; r < Part(R).to; r++)
            for (int64_t c = 0; c < m.C; c++)
                x[r * m.C + c] = float(((const W*)m.embed.weight)[tokens[r] * m.C + c]) * (m.embed.scale ? m.embed.scale[tokens[r]] : 1);
        for (const Layer* l = m.layer; l < m.layer + m.layers; l++) {
#pragma omp barrier
            norm(l->norm_in);
            product<W>(l->q, Q, m.C, y.data(), R, q.data());
            product<W>(l->k, KV, m.C, y.data(), R, k.data());
            product<W>(l->v, KV, m.C, y.data(), R, v.data());
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
                int64_t to = (r / T * l->slots + position % l->slots) * KV + (h - m.H) * D;
                place(&k[from], l->norm_k, m, position, &k[from]);
                for (int64_t d = 0; d < D; d++) ((E*)l->keys)[to + d] = E(k[from + d]);
                for (int64_t d = 0; d < D; d++) ((E*)l->values)[to + d] = E(v[from + d]);
            }
#pragma omp barrier
            Part queries(R * m.H);
            for (int64_t i = queries.from; i < queries.to; i++) {
                int64_t r = i / m.H, h = i % m.H, last = lengths[r / T] + r % T;
                int64_t first = l->window ? std::max<int64_t>(0, last + 1 - l->window) : 0;
                int64_t cache = r / T * l->slots * KV + h / (m.H / m.K) * D;
                const float* query = &q[r * Q + h * (Q / m.H)];
                float* out = &a[(r * m.H + h) * D];
                attend(query, (E*)l->keys + cache, (E*)l->values + cache, *l, m, first, last, scores.data(), out);
                if (m.gated)
                    for (int64_t d = 0; d < D; d++) out[d] /= 1 + std::exp(-query[D + d]);
            }
#pragma omp barrier
            product<W>(l->o, m.C, m.H * D, a.data(), R, x.data(), true);
#pragma omp barrier
            norm(l->norm_mid);
            product<W>(l->gate, m.F, m.C, y.data(), R, g.data());
            product<W>(l->up, m.F, m.C, y.data(), R, f.data());
            Part mine(m.F, 3);  // the same rows as in the two products
            for (int64_t r = 0; r < R; r++) {
                float *silu = &g[r * m.F], *up = &f[r * m.F];
                each(silu + mine.from, mine.to - mine.from, [](Floats v) { return v / (1 + exp(-v)); });
                for (int64_t i = mine.from; i < mine.to; i++) up[i] *= silu[i];
            }
#pragma omp barrier
            product<W>(l->down, m.C, m.F, f.data(), R, x.data(), true);
        }
#pragma omp barrier
        for (int64_t b = Part(B).from; b < Part(B).to; b++)
            rms_norm(&x[(b * T + T - 1) * m.C], m.norm, m.C, m.eps, &y[b * m.C]);
#pragma omp barrier
        product<W>(m.head, m.V, m.C, y.data(), B, logits);
    }
}
