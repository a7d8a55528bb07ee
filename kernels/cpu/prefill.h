// Many tokens at once, for decode_step.cpp: its matmuls and its attention in the tiles of tile_matmul.h.
//
// A matmul is y^T = W x^T here. The rows of a weight are the left operand just as they are stored: nothing is packed when
// a model is loaded, or kept twice. Packed are the activations x, once for all matrices that they are multiplied by.
//
// R rows (tokens) of x, T new tokens of a sequence, H query heads, K key/value heads, D head size.
#pragma once
#include "matmul.h"
#include "tile_matmul.h"

constexpr int64_t MANY = 32;  // rows: with fewer a tile would be partly empty

// 1. Matmuls ---------------------------------------------------------------------------------------------------------

// In tiles where bf16 is multiplied: bf16 weights, and int8 weights with AMX. These are exact in bf16, and x is then the
// sum of two bf16 numbers, as exact as the 16 bits of matmul.h: twice the work, which AMX alone makes worth it.
#ifdef __AMX_BF16__
template <class W> constexpr bool IN_TILES = !std::is_same_v<W, float>;
#else
template <class W> constexpr bool IN_TILES = std::is_same_v<Multiplied<W>, Bf16>;
#endif
template <class W> constexpr int TERMS = std::is_same_v<W, int8_t> ? 2 : 1;

// x (R, columns) as right operand x^T, both rounded up to 32 with zeros; for each of TERMS one after the other.
template <class W> struct Columns {
    using X = Bf16;
    int64_t rows, most;
    Buffer<X> data;
    Columns(int64_t R, int64_t columns) : rows(round_up(R, 32)), most(round_up(columns, 32)), data(TERMS<W> * rows * most) {}

    Packed<X> at(int64_t term, int64_t row, int64_t columns) const {
        int64_t width = round_up(columns, 32);
        return {data + term * rows * most + row * width, TILE, width * 16};
    }
    // 16 rows of x, from number `first` on: those from R on are zeros.
    void pack(const float* x, int64_t R, int64_t columns, int64_t first) {
        alignas(64) X part[TERMS<W>][16 * 32];
        for (int64_t c = 0; c < columns; c += 32) {
            int64_t n = std::min<int64_t>(32, columns - c);
            if (first + 16 > R || n < 32) std::memset((void*)part, 0, sizeof part);
            for (int64_t r = 0; r < std::min<int64_t>(16, R - first); r++)
                lanes(n, [&](int64_t i, auto v) {
                    v = load<decltype(v)>(x + (first + r) * columns + c + i);
                    for (auto& term : part) {
                        store(term + r * 32 + i, v);
                        v = v - load<decltype(v)>(term + r * 32 + i);  // what is left of it
                    }
                });
            for (int term = 0; term < TERMS<W>; term++)
                pack_transposed(part[term], 32, (X*)at(term, first, columns).data + c * 16);
        }
    }
};

// This thread's share of a matrix, 32 rows at a time, for all rows of x.
template <class W> static void product(const Matrix& m, const Product& p, const Columns<W>& x) {
    using X = Bf16;
    int64_t width = round_up(p.columns, 32), pitch = width + GAP;
    Buffer<X> w(32 * pitch);
    Buffer<float> sums(32 * 32), turned(32 * 32);
    Part mine(p.rows, 32);
    for (int64_t n = mine.from; n < mine.to; n += 32) {
        int64_t count = std::min<int64_t>(32, p.rows - n);
        if (p.columns < width) std::memset((void*)w.data, 0, 32 * pitch * sizeof(X));
        for (int64_t i = 0; i < count; i++) {
            const W* row = (const W*)m.weight + (n + i) * p.columns;
            if constexpr (std::is_same_v<W, X>) std::copy_n(row, p.columns, w + i * pitch);
            else lanes(p.columns, [&](int64_t c, auto v) { store(w + i * pitch + c, load<decltype(v)>(row + c)); });
        }
        for (int64_t r = 0; r < p.R; r += 32) {
            multiply<false, X>(w, pitch, x.at(0, r, p.columns), width, 32, sums, 32);
            if (TERMS<W> == 2) multiply<true, X>(w, pitch, x.at(1, r, p.columns), width, 32, sums, 32);
            for (int i = 0; i < 32; i += 16)
                for (int j = 0; j < 32; j += 16) transpose(sums + i * 32 + j, 32, turned + j * 32 + i, 32);
            for (int64_t j = 0; j < std::min<int64_t>(32, p.R - r); j++) {
                float* y = p.y + (r + j) * p.rows + n;
                lanes(count, [&](int64_t i, auto v) {
                    using L = decltype(v);
                    v = load<L>(turned + j * 32 + i);
                    if (m.scale) v = v * load<L>(m.scale + n + i);
                    store(y + i, p.add ? L(v + load<L>(y + i)) : v);
                });
            }
        }
    }
}

// 2. Attention -------------------------------------------------------------------------------------------------------

// The online softmax of a query. Of a chunk of n keys it sees those from ... to: their scores become weights, the others'
// are 0. `top`, `total` and `sums` are what it keeps: the largest score so far, the sums of weights and of values.
template <class X>
static inline void softmax_row(float* scores, int64_t from, int64_t to, int64_t n, float& top, float& total, float* sums,
                               int64_t width, X* weights) {
    std::fill(scores, scores + from, -INFINITY), std::fill(scores + to, scores + n, -INFINITY);
    Floats most = Floats{} + top, added{};
    for (int64_t i = 0; i < n; i += LANES) keep_larger(most, load(scores + i));
    float before = top;
    top = largest(most);
    if (top == -INFINITY) return (void)std::fill_n(weights, n, X(0.f));  // it sees none so far
    float kept = std::exp(before - top);
    if (kept != 1) each(sums, width, [&](auto v) { return v * kept; });
    for (int64_t i = 0; i < n; i += LANES) {
        Floats weight = exp(load(scores + i) - top);
        store(weights + i, weight), added += weight;
    }
    total = total * kept + sum(added);
}

// A key/value head of a sequence and the query heads that share it: positions `first` ... `first` + T are new, and so are
// their queries. Flash attention as in attention.cpp, of keys and values that are read from the cache.
template <class E> struct Sequence {
    using X = Multiplied<E>;
    static constexpr int64_t CHUNK = 512;  // keys at once
    const E *keys, *values;                // position p in slot p % slots; slots are `stride` numbers apart
    int64_t first, T, slots, stride, D, window;

    // The first position that a query sees, and those that a block of 32 new ones begins with.
    int64_t begin(int64_t position) const { return window ? std::max<int64_t>(0, position + 1 - window) : 0; }

    // rows (32, width) = the cache from `position` on, with zeros beyond the last.
    void load_rows(const E* cache, int64_t position, X* rows, int64_t width) const {
        int64_t n = std::min<int64_t>(32, first + T - position);
        if (n < 32 || D < width) std::fill_n(rows, 32 * width, X(0.f));
        for (int64_t i = 0; i < n; i++) {
            const E* from = cache + (position + i) % slots * stride;
            lanes(D, [&](int64_t d, auto v) { store(rows + i * width + d, load<decltype(v)>(from + d)); });
        }
    }

    // Queries and outputs of G heads side by side: head g of token t at q + t * q_pitch + g * q_head, and at
    // out + t * out_pitch + g * D. `mine` are blocks of 32 tokens, those of a head one after another.
    void attend(const float* q, int64_t q_pitch, int64_t q_head, float* out, int64_t out_pitch, Part mine) const {
        int64_t low = begin(first), n = round_up(first + T - low, 32), width = round_up(D, 32), blocks = (T + 31) / 32;
        if (mine.empty()) return;
        float scale = 1 / std::sqrt(float(D)), top[32], total[32];
        Buffer<X> rows(32 * width), kt(n * width), v(n * width), weights(32 * CHUNK);
        Buffer<float> scores(32 * CHUNK), sums(32 * width);
        for (int64_t p = 0; p < n; p += 32) {
            load_rows(keys, low + p, rows, width);
            for (int64_t i = 0; i < 32; i += 16)
                for (int64_t d = 0; d < width; d += 32)
                    pack_transposed(rows + i * width + d, width, kt + (p + i) * width + d * 16);
            load_rows(values, low + p, rows, width);
            for (int64_t d = 0; d < width; d += 16) pack(rows + d, width, v + p * width + d * 32);
        }
        for (int64_t block = mine.from; block < mine.to; block++) {
            int64_t g = block / blocks, t = block % blocks * 32, count = std::min<int64_t>(32, T - t);
            std::fill_n((X*)rows, 32 * width, X(0.f));
            for (int64_t r = 0; r < count; r++)
                lanes(D, [&](int64_t d, auto x) {
                    using L = decltype(x);
                    store(rows + r * width + d, L(load<L>(q + (t + r) * q_pitch + g * q_head + d) * scale));
                });
            std::fill_n(top, 32, -INFINITY), std::fill_n(total, 32, 0.f), std::fill_n((float*)sums, 32 * width, 0.f);
            int64_t newest = first + t, end = std::min(n, round_up(newest + 32 - low, 32)), some;
            for (int64_t at = (begin(newest) - low) / 32 * 32; at < end; at += some) {
                some = std::min(CHUNK, end - at);
                multiply<false, X>(rows, width, {kt + at * width, TILE, width * 16}, width, some, scores, CHUNK);
                for (int64_t r = 0; r < 32; r++) {
                    int64_t from = std::clamp<int64_t>(begin(newest + r) - low - at, 0, some);
                    int64_t to = std::clamp<int64_t>(newest + r + 1 - low - at, from, some);
                    softmax_row(scores + r * CHUNK, from, to, some, top[r], total[r], sums + r * width, width,
                                weights + r * CHUNK);
                }
                multiply<true, X>(weights, CHUNK, {v + at * width, 32 * width, TILE}, some, width, sums, width);
            }
            for (int64_t r = 0; r < count; r++)
                lanes(D, [&](int64_t d, auto x) {
                    using L = decltype(x);
                    store(out + (t + r) * out_pitch + g * D + d, L(load<L>(sums + r * width + d) / total[r]));
                });
        }
    }
};
