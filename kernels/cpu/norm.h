// RMSNorm of one row, forward and backward, for linear.cpp, feed_forward.cpp and attention.cpp.
#pragma once
#include "tile_matmul.h"

template <class T> static inline float inverse_rms(const T* x, int64_t n, double eps) {
    Floats squares{};
    lanes(n, [&](int64_t i, auto v) { v = load<decltype(v)>(x + i), add(squares, v * v); });
    return 1 / std::sqrt(sum(squares) / n + float(eps));
}

// The same for 16 rows, `pitch` apart: sums over a vector's numbers are sums of vectors once they are transposed.
template <class T> static inline void inverse_rms_16(const T* x, int64_t pitch, int64_t n, double eps, float* inverse) {
    float squares[16 * 16] = {}, turned[16 * 16];
    for (int64_t r = 0; r < 16; r++) {
        Floats sums{};
        lanes(n, [&](int64_t i, auto v) { v = load<decltype(v)>(x + r * pitch + i), add(sums, v * v); });
        store(squares + r * 16, sums);
    }
    transpose(squares, 16, turned, 16);
    for (int64_t r = 0; r < 16; r += LANES) {
        Floats sums{};
        for (int64_t i = 0; i < LANES; i++) sums += load(turned + i * 16 + r);
        sums = sums / float(n) + float(eps);
        for (int64_t i = 0; i < LANES; i++) sums[i] = 1 / std::sqrt(sums[i]);
        store(inverse + r, sums);
    }
}

// total[0 ... n) = the sum over the threads of what each has in its part of `parts` (threads, n).
static void add_up(const std::vector<float>& parts, int64_t n, float* total) {
    std::fill(total, total + n, 0.f);
    for (size_t i = 0; i < parts.size(); i++) total[i % n] += parts[i];
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

// y = x / rms(x) * gain, and 1 / rms(x), for one row of n numbers.
template <class T, class Y>
static inline void scale_row(const T* x, const float* gain, int64_t n, float scale, Y* y) {
    lanes(n, [&](int64_t i, auto v) {
        using L = decltype(v);
        store(y + i, L(load<L>(x + i) * scale * load<L>(gain + i)));
    });
}
template <class T, class Y>
static inline void norm_row(const T* x, const float* gain, int64_t n, double eps, Y* y, float& inverse) {
    scale_row(x, gain, n, inverse = inverse_rms(x, n, eps), y);
}

// The gradients of n rows of x (n, C) from those of norm(x), whose rows are `pitch` long, with `residual` (n, C) added.
static inline void norm_backward_rows(const float* x, const float* dy, int64_t pitch, const float* gain,
                                      const float* inverse, const float* residual, int64_t n, int64_t C, float* dx,
                                      float* dgain) {
    for (int64_t r = 0; r < n; r++, x += C, dy += pitch, residual += C, dx += C) {
        norm_backward(x, dy, gain, inverse[r], C, dx, dgain);
        lanes(C, [&](int64_t i, auto v) { store(dx + i, load<decltype(v)>(dx + i) + load<decltype(v)>(residual + i)); });
    }
}
