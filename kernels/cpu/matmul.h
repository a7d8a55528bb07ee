// Matmuls for decode_step.cpp: weights in fp32, bf16 or int8 times activations in fp32.
//
// fp32 weights are multiplied in fp32. With int8 weights x is rounded to 16 bits, a row at a time: two multiplications
// are one instruction, added up in 32 bits. bf16 weights are multiplied in fp32, too, unless the processor multiplies bf16:
// then x is rounded to bf16, as torch does.
#pragma once
#include "simd.h"

// 1. What is multiplied at once: a vector of x's type X, and the sums that come of it -------------------------------

typedef int16_t Shorts __attribute__((vector_size(LANES * 4)));

template <class X> constexpr int PACK = sizeof(X) == 2 ? 2 * LANES : LANES;  // numbers in a vector
static inline Floats pack(const float* p, float) { return load(p); }
static inline Floats pack(const Bf16* p, float) { return load(p); }
static inline Floats pack(const int8_t* p, float) { return load(p); }
static inline Shorts pack(const int16_t* p, int16_t) { return read<Shorts>(p); }
static inline Shorts pack(const int8_t* p, int16_t) {
#if defined(__AVX512BW__)  // one instruction, which g++ 12 does not find by itself
    return (Shorts)_mm512_cvtepi8_epi16(read<__m256i>(p));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Shorts)_mm256_cvtepi8_epi16(read<__m128i>(p));
#else
    typedef int8_t Twice __attribute__((vector_size(LANES * 2)));
    return __builtin_convertvector(read<Twice>(p), Shorts);
#endif
}
static inline void multiply(Floats& sums, Floats w, Floats x) { sums += w * x; }
static inline void multiply(Ints& sums, Shorts w, Shorts x) {
#if defined(__AVX512VNNI__)
    sums = (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    sums += (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
    Ints a = (Ints)w, b = (Ints)x;
    sums += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
static inline float sum(Ints v) { return sum(__builtin_convertvector(v, Floats)); }

#ifdef __AVX512BF16__
constexpr bool PAIRS = true;  // of bf16 numbers are multiplied
typedef uint16_t Pairs __attribute__((vector_size(LANES * 4)));
static inline Pairs pack(const Bf16* p, Bf16) { return read<Pairs>(p); }
static inline void multiply(Floats& sums, Pairs w, Pairs x) {
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)w, (__m512bh)x);
}
#else
constexpr bool PAIRS = false;
#endif
template <class X> using Sums = std::conditional_t<std::is_same_v<X, int16_t>, Ints, Floats>;

// 2. A tile: some rows of the matrix by some rows of x ---------------------------------------------------------------

constexpr int REGISTERS = LANES == 16 ? 32 : 16;
// U of a tile: sums of whole numbers are exact in any order
template <class X, int SIZE> constexpr int SUMS = !std::is_same_v<X, int16_t> ? 2 : SIZE > 3 ? 1 : 4;
template <class W> constexpr int AHEAD = sizeof(W) == 1 ? 4096 : sizeof(W) == 2 && !PAIRS ? 1024 : 0;  // bytes, by trial

// out[n][m] = row n of w (N, columns) times row m of x (M, columns): each load serves several multiplications.
//
// A product has the same bits in a tile of any size, so what a sequence gets does not depend on the others in its batch. It
// is always U sums, of every U-th vector each, added up at the end. They are computed side by side, so that no addition
// waits for the last one, or one after another where there are not enough registers.
template <int N, int M, int U, class W, class X>
[[gnu::always_inline]] static inline void tile(const W* w, const X* x, int64_t columns, float (&out)[N][M]) {
    constexpr int SIDES = N * M * U + N + 1 > REGISTERS ? 1 : U;
    int64_t whole = columns / PACK<X> * PACK<X>;
    Sums<X> totals[N][M];
    for (int first = 0; first < U; first += SIDES) {
        Sums<X> sums[N][M][SIDES] = {};
        auto step = [&](int64_t c, int side) {
            decltype(pack(w, X())) ws[N];
            for (int n = 0; n < N; n++) ws[n] = pack(w + n * columns + c, X());
            for (int m = 0; m < M; m++) {
                auto xs = pack(x + m * columns + c, X());
                if (N > 1 && M > 1) HOLD(xs);
                for (int n = 0; n < N; n++) {
                    if (N > 1 && M > 1) HOLD(ws[n]);
                    multiply(sums[n][m][side], ws[n], xs);
                }
            }
        };
        int64_t c = first * PACK<X>;
        for (; c + SIDES * PACK<X> <= whole; c += U * PACK<X>) {
            if (AHEAD<W> && N == 1)  // narrow weights go by faster than the hardware calls the next
                for (int64_t byte = 0; byte < U * PACK<X> * int64_t(sizeof(W)); byte += 64)
                    __builtin_prefetch((const char*)(w + c) + AHEAD<W> + byte);
            for (int side = 0; side < SIDES; side++) step(c + side * PACK<X>, side);
        }
        for (int side = 0; side < SIDES - 1; side++)
            if (c + side * PACK<X> < whole) step(c + side * PACK<X>, side);
        for (int n = 0; n < N; n++)
            for (int m = 0; m < M; m++)
                for (int side = 0; side < SIDES; side++) {
                    if (first + side) totals[n][m] += sums[n][m][side];
                    else totals[n][m] = sums[n][m][side];
                    HOLD(totals[n][m]);  // g++ would add up in another order
                }
    }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) {
            out[n][m] = sum(totals[n][m]);
            for (int64_t rest = whole; rest < columns; rest++) {
                out[n][m] += float(w[n * columns + rest]) * float(x[m * columns + rest]);
                HOLD(out[n][m]);
            }
        }
}

// 3. A whole product -------------------------------------------------------------------------------------------------

struct Matrix {
    const void* weight;
    const float* scale;  // (rows), for int8 alone
};

struct Product {  // y (R, rows) = x (R, columns) times a matrix (rows, columns), or added to y
    const float* x;
    float* y;
    int64_t R, rows, columns;
    bool add;
};

template <class X> struct Rows {  // x of a product, as it is multiplied; row r stands for its numbers times scale[r]
    const X* x;
    const float* scale;
};

template <int N, int M, class W, class X>
static inline void put(const Product& p, const Rows<X>& rows, const W* w, const float* scale, int64_t n, int64_t r) {
    float out[N][M];
    tile<N, M, SUMS<X, N * M>>(w, rows.x + r * p.columns, p.columns, out);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < M; j++) {
            float& y = p.y[(r + j) * p.rows + n + i];
            float factor = (scale ? scale[n + i] : 1) * (rows.scale ? rows.scale[r + j] : 1);
            HOLD(factor);
            y = (p.add ? y : 0) + out[i][j] * factor;
        }
}

// N rows of the matrix, which begin at w and are number n and the next, for all rows of x. Meanwhile the `bytes` of the
// next rows, at `next`, are called from memory, a part with each product.
template <int N, class W, class X>
[[gnu::noinline]] static void strip(const Product& p, const Rows<X>& rows, const W* w, const float* scale, int64_t n,
                                    const char* next, int64_t bytes) {
    int64_t r = 0, share = (bytes * 4 / p.R + 63) / 64 * 64;
    for (; r + 4 <= p.R; r += 4, next += share) {
        for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte);
        put<N, 4>(p, rows, w, scale, n, r);
    }
    for (; r < p.R; r++) put<N, 1>(p, rows, w, scale, n, r);
}

// This thread's share of the matrix, whose rows are read once each. One row of x wants them in the order of memory;
// several want them by threes, and widened once for all if they are narrower than x.
template <class W, class X> static void multiply_all(const Matrix& m, const Product& p, const Rows<X>& x) {
    Part mine(p.rows, 3);
    std::vector<X> wide(sizeof(W) < sizeof(X) && p.R >= 4 ? 3 * p.columns : 0);
    for (int64_t n = mine.from, N; n < mine.to; n += N) {
        N = p.R > 1 && n + 3 <= mine.to ? 3 : 1;
        const W* w = (const W*)m.weight + n * p.columns;
        int64_t bytes = N * p.columns * sizeof(W);
        auto with = [&](auto* rows) {
            using T = std::decay_t<decltype(*rows)>;
            (N == 3 ? strip<3, T, X> : strip<1, T, X>)(p, x, rows, m.scale, n, (const char*)w + bytes, bytes);
        };
        if (wide.empty()) {
            with(w);
            continue;
        }
        std::transform(w, w + N * p.columns, wide.begin(), [](W value) { return X(value); });
        with((const X*)wide.data());
    }
}

template <class W> static void product(const Matrix& m, const Product& p) {
    if constexpr (std::is_same_v<W, int8_t>) {
        std::vector<int16_t> x(p.R * p.columns);
        std::vector<float> scale(p.R);
        // so few that a sum of 127 times as many, LANES side by side, stays below 2 to the 31st
        float most = std::min<float>(32767, 2147483647.f / 128 * LANES / p.columns);
        for (int64_t r = 0; r < p.R; r++) {
            const float* row = p.x + r * p.columns;
            float top = 1e-30f;
            for (int64_t c = 0; c < p.columns; c++) top = std::max(top, std::fabs(row[c]));
            scale[r] = top / most;
            for (int64_t c = 0; c < p.columns; c++) x[r * p.columns + c] = int16_t(std::rint(row[c] * (most / top)));
        }
        multiply_all<W, int16_t>(m, p, {x.data(), scale.data()});
    } else if constexpr (std::is_same_v<W, Bf16> && PAIRS) {
        std::vector<Bf16> x(p.R * p.columns);
        lanes(p.R * p.columns, [&](int64_t i, auto v) { store(&x[i], load<decltype(v)>(p.x + i)); });
        multiply_all<W, Bf16>(m, p, {x.data(), nullptr});
    } else {
        multiply_all<W, float>(m, p, {p.x, nullptr});
    }
}
