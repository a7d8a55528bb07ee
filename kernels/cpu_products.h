// Products for cpu_decode.cpp: weights in fp32, bf16 or int8, multiplied in fp32.
#include "cpu_numbers.h"

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
