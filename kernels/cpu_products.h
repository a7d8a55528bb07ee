// Numbers and products for cpu_decode.cpp: weights in fp32, bf16 or int8, multiplied in fp32.
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

// 1. Numbers: what is stored, read as LANES floats ------------------------------------------------------------------

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

// e ** x: 2 to the whole part of x / ln 2 is an exponent, to the rest, which is at most a half, a polynomial.
static inline Floats exp(Floats x) {
    x = x < -87.f ? Floats{} - 87.f : x > 88.f ? Floats{} + 88.f : x;  // what a float can hold
    Floats t = x * 1.44269504f;
    Ints whole = __builtin_convertvector(t + (t < 0.f ? Floats{} - .5f : Floats{} + .5f), Ints);
    Floats f = t - __builtin_convertvector(whole, Floats);
    Floats power = Floats{} + .00015469f;  // ln 2 to the k-th, by k!
    for (float factor : {.00133336f, .00961813f, .05550411f, .24022651f, .69314718f, 1.f}) power = power * f + factor;
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

// 2. Products -------------------------------------------------------------------------------------------------------

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

struct Matrix {
    const void* weight;
    const float* scale;  // (rows), for int8 alone
};

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
// next rows, at `next`, are called from memory, a part with each product.
template <int N, class W>
[[gnu::noinline]] static void strip(const Product& p, const W* w, const float* scale, int64_t n, const char* next,
                                    int64_t bytes) {
    int64_t r = 0, share = (bytes * 4 / p.R + 63) / 64 * 64;
    for (; r + 4 <= p.R; r += 4, next += share) {
        for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte);
        put<N, 4, 1>(p, w, scale, n, r);
    }
    for (; r < p.R; r++) put<N, 1, N == 1 ? LINE<W> : 2>(p, w, scale, n, r);
}

// This thread's share of the matrix, whose rows are read once each. One row of x wants them in the order of memory;
// several want them by threes, and widened once for all if they are narrow.
template <class W> static void product(const Matrix& m, const Product& p) {
    Part mine(p.rows, 3);
    std::vector<float> wide(sizeof(W) < 4 && p.R >= 4 ? 3 * p.columns : 0);
    for (int64_t n = mine.from, N; n < mine.to; n += N) {
        N = p.R > 1 && n + 3 <= mine.to ? 3 : 1;
        const W* w = (const W*)m.weight + n * p.columns;
        int64_t bytes = N * p.columns * sizeof(W);
        auto with = [&](auto* rows) {
            auto strips = N == 3 ? strip<3, std::decay_t<decltype(*rows)>> : strip<1, std::decay_t<decltype(*rows)>>;
            strips(p, rows, m.scale, n, (const char*)w + bytes, bytes);
        };
        std::transform(w, w + (wide.empty() ? 0 : N * p.columns), wide.begin(), [](W value) { return float(value); });
        wide.empty() ? with(w) : with(wide.data());
    }
}
