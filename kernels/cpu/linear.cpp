// Linear layers fused with their neighbours, for training on a CPU: norm(x) W^T and x + a W^T, and their gradients.
// fused_layers.py builds the attention half of a layer from them, with attention.cpp in between.
//
// R tokens, C width of x, N or K width of the other side. x and its gradients are fp32, other activations E.
#include "linear.h"
#include "norm.h"

extern "C" int heed_multiplied_size() { return sizeof(X); }

// y = norm(x), both (R, C), and 1 / rms of each row, which the backward needs.
extern "C" void heed_norm(const float* x, const float* gain, E* y, float* inverse, int64_t R, int64_t C, double eps,
                          int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < R; r++) norm_row(x + r * C, gain, C, eps, y + r * C, inverse[r]);
}

extern "C" void heed_norm_backward(const E* dy, const float* x, const float* gain, const float* inverse, float* dx,
                                   float* dgain, int64_t R, int64_t C, int64_t threads) {
    std::vector<float> parts(threads * C);
#pragma omp parallel num_threads(threads)
    {
        Part mine(R);
        for (int64_t r = mine.from; r < mine.to; r++)
            norm_backward(x + r * C, dy + r * C, gain, inverse[r], C, dx + r * C, &parts[omp_get_thread_num() * C]);
    }
    add_up(parts, C, dgain);
}

// Some rows of a matrix to pack: `rows` of K numbers each, one after another.
struct Segment {
    const void* data;
    int64_t rows;
};

template <class T> static void pack_matrix(const std::vector<const T*>& w, int64_t K, X* product, X* gradient, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Rows rows(32, K);
        int64_t N = w.size(), width = rows.width, height = round_up(N, 32);
        Part mine(N, 32);
        for (int64_t n = mine.from; n < mine.to; n += 32) {
            rows.clear_edges(std::min<int64_t>(32, N - n), K);
            for (int64_t i = 0; i < std::min<int64_t>(32, N - n); i++)
                lanes(K, [&](int64_t k, auto v) { store(rows.row(i) + k, w[n + i] ? load<decltype(v)>(w[n + i] + k) : decltype(v){}); });
            for (int64_t k = 0; k < width; k += 16) {
                pack(rows.row(0) + k, rows.pitch, gradient + k * height + n * 16);
                if (k % 32 == 0)
                    for (int64_t c = 0; c < 32; c += 16)
                        pack_transposed(rows.row(c) + k, rows.pitch, product + (n + c) * width + k * 16);
            }
        }
    }
}

template <class T>
static void pack_segments(const Segment* segments, int64_t count, int64_t unit, int64_t K, X* product, X* gradient, int64_t threads) {
    std::vector<const T*> rows;
    for (int64_t s = 0; s < count; s++) {
        for (int64_t i = 0; i < segments[s].rows; i++) rows.push_back((const T*)segments[s].data + i * K);
        rows.resize(round_up(rows.size(), unit), nullptr);
    }
    pack_matrix<T>(rows, K, product, gradient, threads);
}

// The matrix W (N, K) of stacked segments, each of which starts at a multiple of `unit` rows, as right operand of x W^T
// (`product`) and of dy W (`gradient`). Both have room for N x K numbers, N and K rounded up to 32. The segments are fp32
// if `fp32`, else E.
extern "C" void heed_pack(const Segment* segments, int64_t count, int64_t unit, int64_t fp32, int64_t K, X* product,
                          X* gradient, int64_t threads) {
    if (fp32) pack_segments<float>(segments, count, unit, K, product, gradient, threads);
    else pack_segments<E>(segments, count, unit, K, product, gradient, threads);
}

// f(r, n, c, sums) for blocks of 32 x 32 of `rows` times a packed matrix (rows.width, N): row r, column n.
template <class F> static void multiply_all(Rows& rows, int64_t tokens, const X* packed, int64_t N, float* sums, F f) {
    for (int64_t n = 0; n < N; n += 32)  // these columns of the weights are read once for all tokens
        for (int64_t r = 0; r < tokens; r += 32) {
            multiply<false, X>(rows.row(r), rows.pitch, right(packed, rows.width, n), rows.width, 32, sums, 32);
            for (int64_t i = 0; i < std::min<int64_t>(32, tokens - r); i++)
                lanes(std::min<int64_t>(32, N - n), [&](int64_t j, auto v) {
                    f(r + i, n + j, load<decltype(v)>(sums + i * 32 + j));
                });
        }
}

// y (R, N) = norm(x) times a packed matrix; inverse (R) of the root mean squares of x.
extern "C" void heed_norm_linear(const float* x, const float* gain, double eps, const X* packed, E* y, float* inverse,
                                 int64_t R, int64_t C, int64_t N, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Rows normed(SOME, C);
        Buffer<float> sums(32 * 32);
        Part mine(R, 32);
        for (int64_t first = mine.from; first < mine.to; first += SOME) {
            int64_t n = std::min(SOME, mine.to - first);
            normed.clear_edges(n, C);
            for (int64_t i = 0; i < n; i++)
                norm_row(x + (first + i) * C, gain, C, eps, normed.row(i), inverse[first + i]);
            multiply_all(normed, n, packed, N, sums, [&](int64_t r, int64_t c, auto v) { store(y + (first + r) * N + c, v); });
        }
    }
}

// dx (R, C) = residual + the gradient of norm(x) W^T; dgain (C), dw (N, C).
extern "C" void heed_norm_linear_backward(const E* dy, const float* x, const float* gain, const float* inverse,
                                          const X* packed, const float* residual, float* dx, float* dgain, float* dw,
                                          int64_t R, int64_t C, int64_t N, int64_t threads) {
    Gradient gradient(threads, C, N);
    std::vector<float> gains(threads * C);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        int64_t me = omp_get_thread_num();
        Rows normed(SOME, C), dout(SOME, N);
        Columns columns(C);
        Buffer<X> room(dout.width * SOME);
        Buffer<float> sums(32 * 32), dnormed(SOME * C);
        gradient.clear(me);
        Part mine(R, 32);
        for (int64_t first = mine.from; first < mine.to; first += SOME) {
            int64_t n = std::min(SOME, mine.to - first), at = first * C;
            dout.load(dy + first * N, n, N), normed.clear_edges(n, C);
            for (int64_t i = 0; i < n; i++) scale_row(x + at + i * C, gain, C, inverse[first + i], normed.row(i));
            multiply_all(dout, n, packed, C, sums, [&](int64_t r, int64_t c, auto v) { store(dnormed + r * C + c, v); });
            norm_backward_rows(x + at, dnormed, C, gain, inverse + first, residual + at, n, C, dx + at, &gains[me * C]);
            columns.fill(normed, round_up(n, 32)), gradient.add(me, columns, dout, round_up(n, 32), room);
        }
#pragma omp barrier
        gradient.add_up(dw, true, Part(gradient.blocks));
    }
    add_up(gains, C, dgain);
}

// out (R, C) = x + a (R, K) times a packed matrix; x may be null.
extern "C" void heed_linear_add(const E* a, const X* packed, const float* x, float* out, int64_t R, int64_t K, int64_t C,
                                int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Rows rows(SOME, K);
        Buffer<float> sums(32 * 32);
        Part mine(R, 32);
        for (int64_t first = mine.from; first < mine.to; first += SOME) {
            int64_t n = std::min(SOME, mine.to - first);
            rows.load(a + first * K, n, K);
            multiply_all(rows, n, packed, C, sums, [&](int64_t r, int64_t c, auto v) {
                int64_t at = (first + r) * C + c;
                if (x) v += load<decltype(v)>(x + at);
                store(out + at, v);
            });
        }
    }
}

// da (R, K) and dw (C, K) from dy (R, C).
extern "C" void heed_linear_add_backward(const float* dy, const E* a, const X* packed, E* da, float* dw, int64_t R, int64_t K,
                                         int64_t C, int64_t threads) {
    Gradient gradient(threads, C, K);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        int64_t me = omp_get_thread_num();
        Rows rows(SOME, K), dout(SOME, C);
        Columns columns(C);
        Buffer<X> room(rows.width * SOME);
        Buffer<float> sums(32 * 32);
        gradient.clear(me);
        Part mine(R, 32);
        for (int64_t first = mine.from; first < mine.to; first += SOME) {
            int64_t n = std::min(SOME, mine.to - first);
            dout.load(dy + first * C, n, C), rows.load(a + first * K, n, K);
            multiply_all(dout, n, packed, K, sums, [&](int64_t r, int64_t c, auto v) { store(da + (first + r) * K + c, v); });
            columns.fill(dout, round_up(n, 32)), gradient.add(me, columns, rows, round_up(n, 32), room);
        }
#pragma omp barrier
        gradient.add_up(dw, false, Part(gradient.blocks));
    }
}
