// A step of Muon on a CPU (training/optimizers.py has the formulas): momentum, five Newton-Schulz iterations, the update.
// A thread processes a whole matrix, which stays in the cache of its core.
//
// E is the type of the iterations (-DELEMENT); weights, gradients and momentum are fp32. The iterations work on a wide
// matrix: m rows, n columns, m <= n, both padded with zeros to multiples of 32.
#include "linear.h"

struct MuonMatrix {
    float *weight, *momentum;  // (rows, columns)
    const float* gradient;
    int64_t rows, columns;
};

// x (m, n) = from (rows, columns) times scale, or its transpose if that is wide.
static void load_wide(const MuonMatrix& m, const float* from, float scale, Rows& x) {
    bool tall = m.rows > m.columns;
    for (int64_t r = 0; r < m.rows; r += 16)
        for (int64_t c = 0; c < m.columns; c += 16) {
            float block[256], turned[256];
            std::fill_n(block, 256, 0.f);
            for (int64_t i = r; i < std::min(r + 16, m.rows); i++)
                for (int64_t j = c; j < std::min(c + 16, m.columns); j++)
                    block[(i - r) * 16 + j - c] = from[i * m.columns + j] * scale;
            if (tall) transpose(block, 16, turned, 16);
            for (int64_t i = 0; i < 16; i++)
                lanes(16, [&](int64_t j, auto v) {
                    store(x.row((tall ? c : r) + i) + (tall ? r : c) + j,
                          load<decltype(v)>((tall ? turned : block) + i * 16 + j));
                });
        }
}

// The weight becomes weight * kept + x * scale.
static void update(const MuonMatrix& m, Rows& x, float kept, float scale) {
    bool tall = m.rows > m.columns;
    for (int64_t r = 0; r < m.rows; r += 16)
        for (int64_t c = 0; c < m.columns; c += 16) {
            float block[256], turned[256];
            for (int64_t i = 0; i < 16; i++)
                lanes(16, [&](int64_t j, auto v) {
                    store(block + i * 16 + j, load<decltype(v)>(x.row((tall ? c : r) + i) + (tall ? r : c) + j));
                });
            if (tall) transpose(block, 16, turned, 16);
            for (int64_t i = r; i < std::min(r + 16, m.rows); i++)
                for (int64_t j = c; j < std::min(c + 16, m.columns); j++) {
                    float& w = m.weight[i * m.columns + j];
                    w = w * kept + (tall ? turned : block)[(i - r) * 16 + j - c] * scale;
                }
        }
}

// out (m, m), symmetric = a times b (m, k) transposed, which is symmetric, too; f(row, column, sum) is what is stored.
template <class F> static void multiply_symmetric(Rows& a, Rows& b, int64_t m, X* packed, Rows& out, F f) {
    for (int64_t i = 0; i < m; i += 16)
        for (int64_t k = 0; k < b.width; k += 32) pack_transposed(b.row(i) + k, b.pitch, packed + i * b.width + k * 16);
    float sums[32 * 32], turned[32 * 32];
    for (int64_t i = 0; i < m; i += 32)
        for (int64_t j = i; j < m; j += 32) {
            multiply<false, X>(a.row(i), a.pitch, right(packed, a.width, j), a.width, 32, sums, 32);
            for (int64_t r = 0; r < 32; r++)
                lanes(32, [&](int64_t c, auto v) { store(sums + r * 32 + c, f(i + r, j + c, load<decltype(v)>(sums + r * 32 + c))); });
            for (int64_t r = 0; r < 32; r += 16)
                for (int64_t c = 0; c < 32; c += 16) transpose(sums + r * 32 + c, 32, turned + c * 32 + r, 32);
            for (int64_t r = 0; r < 32; r++)
                lanes(32, [&](int64_t c, auto v) {
                    store(out.row(i + r) + j + c, load<decltype(v)>(sums + r * 32 + c));
                    if (i < j) store(out.row(j + r) + i + c, load<decltype(v)>(turned + r * 32 + c));
                });
        }
}

// Newton-Schulz (Jordan et al. 2024): x = a x + (b A + c A A) x with A = x x^T, five times.
static void orthogonalize(Rows& x, int64_t m, Rows& gram, Rows& polynomial, X* packed) {
    constexpr float A = 3.4445, B = -4.7750, C = 2.0315;
    float sums[32 * 32];
    for (int step = 0; step < 5; step++) {
        multiply_symmetric(x, x, m, packed, gram, [](int64_t, int64_t, auto v) { return v; });
        multiply_symmetric(gram, gram, m, packed, polynomial, [&](int64_t r, int64_t c, auto v) {
            return decltype(v)(B * load<decltype(v)>(gram.row(r) + c) + C * v);
        });
        for (int64_t i = 0; i < m; i += 32)
            for (int64_t n = 0; n < x.width; n += 16) pack(x.row(i) + n, x.pitch, packed + n * m + i * 16);
        for (int64_t n = 0; n < x.width; n += 32)
            for (int64_t i = 0; i < m; i += 32) {
                multiply<false, X>(polynomial.row(i), polynomial.pitch, right(packed, m, n), m, 32, sums, 32);
                for (int64_t r = 0; r < 32; r++)
                    lanes(32, [&](int64_t c, auto v) {
                        X* to = x.row(i + r) + n + c;
                        store(to, decltype(v)(A * load<decltype(v)>(to) + load<decltype(v)>(sums + r * 32 + c)));
                    });
            }
    }
}

extern "C" void heed_muon(const MuonMatrix* matrices, int64_t count, double lr, double momentum, double weight_decay,
                          int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
        Tiles tiles;
        const MuonMatrix& matrix = matrices[i];
        int64_t size = matrix.rows * matrix.columns, wide = std::max(matrix.rows, matrix.columns);
        int64_t m = round_up(std::min(matrix.rows, matrix.columns), 32);
        Buffer<float> ahead(size);
        Floats squares{};
        float mu = momentum;
        lanes(size, [&](int64_t at, auto v) {
            using L = decltype(v);
            L g = load<L>(matrix.gradient + at), old = load<L>(matrix.momentum + at), kept = old + (g - old) * (1 - mu);
            L next = g + (kept - g) * mu;  // Nesterov: one step ahead
            store(matrix.momentum + at, kept), store(ahead + at, next), add(squares, L(next * next));
        });
        Rows x(m, wide), gram(m, m), polynomial(m, m);
        Buffer<X> packed(m * std::max(x.width, m));
        for (int64_t r = 0; r < m; r++) std::fill_n(x.row(r), x.width, X(0.f));
        load_wide(matrix, ahead, 1 / std::max(std::sqrt(sum(squares)), 1e-7f), x);
        orthogonalize(x, m, gram, polynomial, packed);
        update(matrix, x, 1 - lr * weight_decay, -lr * 0.2 * std::sqrt(wide));
    }
}
