// Linear layers inside heed's fused layers: packed weights, and the gradients of weights.
//
// A weight (rows, columns) as torch keeps it is packed once an optimizer step (heed_pack in linear.cpp). A thread
// sums up the gradients of weights over its own tokens, SOME at a time; `Gradient` adds up those of all threads.
#pragma once
#include "tile_matmul.h"

using E = ELEMENT;
using X = Multiplied<E>;

constexpr int64_t SOME = 256;  // tokens at once: their activations fit into the cache of a core

// The columns from n on of a packed matrix that sums over k, both rounded up to 32.
static inline Packed<X> right(const X* packed, int64_t k, int64_t n) { return {packed + n * k, TILE, k * 16}; }

// Activations of up to SOME tokens, `width` numbers each, rounded up to 32.
struct Rows {
    int64_t width, pitch;
    Buffer<X> data;
    Rows(int64_t tokens, int64_t n) : width(round_up(n, 32)), pitch(width + GAP), data(tokens * pitch) {}
    X* row(int64_t r) { return data + r * pitch; }
    // Zeros the padding of n tokens of m numbers: up to multiples of 32 rows and columns.
    void clear_edges(int64_t n, int64_t m) {
        if (n % 32) std::fill_n(row(n), (round_up(n, 32) - n) * pitch, X(0.f));
        if (m < width)
            for (int64_t r = 0; r < n; r++) std::fill_n(row(r) + m, width - m, X(0.f));
    }
    template <class T> void load(const T* from, int64_t n, int64_t m) {
        clear_edges(n, m);
        for (int64_t r = 0; r < n; r++)
            lanes(m, [&](int64_t i, auto v) { store(row(r) + i, ::load<decltype(v)>(from + r * m + i)); });
    }
};

// The same, transposed: a row for each number, a column for each token.
struct Columns {
    static constexpr int64_t PITCH = SOME + GAP;
    Buffer<X> data, tile;
    explicit Columns(int64_t n) : data(round_up(n, 32) * PITCH), tile(TILE) {}
    void fill(Rows& rows, int64_t tokens) {
        for (int64_t m = 0; m < rows.width; m += 32)
            for (int64_t i = 0; i < tokens; i += 16) {
                pack_transposed(rows.row(i) + m, rows.pitch, (X*)tile);
                unpack_transposed((X*)tile, data + m * PITCH + i, PITCH);
            }
    }
};

// The sum over tokens of a_t b_t^T, M x N numbers, stored in blocks of 32 x 32. Each thread has a sum of its own.
struct Gradient {
    static constexpr int64_t BLOCK = 32 * 32;
    int64_t threads, M, N, down, blocks;
    Buffer<float> all;
    Gradient(int64_t threads, int64_t M, int64_t N)
        : threads(threads), M(M), N(N), down(round_up(M, 32) / 32), blocks(down * round_up(N, 32) / 32),
          all(threads * blocks * BLOCK) {}
    void clear(int64_t thread) { std::fill_n(all + thread * blocks * BLOCK, blocks * BLOCK, 0.f); }

    // a transposed, b as it is; `packed` has room for b.
    void add(int64_t thread, Columns& a, Rows& b, int64_t tokens, X* packed) {
        for (int64_t i = 0; i < tokens; i += 32)
            for (int64_t n = 0; n < b.width; n += 16) pack(b.row(i) + n, b.pitch, packed + n * tokens + i * 16);
        float* sums = all + thread * blocks * BLOCK;
        for (int64_t n = 0; n < b.width; n += 32)
            for (int64_t m = 0; m < down; m++, sums += BLOCK)
                multiply<true, X>(a.data + m * 32 * a.PITCH, a.PITCH, right(packed, tokens, n), tokens, 32, sums, 32);
    }

    // total (M, N), or (N, M) if transposed = the sum of all threads; of its blocks those that are `mine`.
    void add_up(float* total, bool transposed, Part mine) {
        Buffer<float> sums(BLOCK), turned(BLOCK);
        for (int64_t block = mine.from; block < mine.to; block++) {
            int64_t m = block % down * 32, n = block / down * 32;
            std::copy_n(all + block * BLOCK, BLOCK, (float*)sums);
            for (int64_t t = 1; t < threads; t++)
                lanes(BLOCK, [&](int64_t i, auto v) {
                    v = load<decltype(v)>(all + (t * blocks + block) * BLOCK + i);
                    store(sums + i, load<decltype(v)>(sums + i) + v);
                });
            int64_t rows = std::min<int64_t>(32, M - m), columns = std::min<int64_t>(32, N - n);
            if (!transposed) {
                for (int64_t i = 0; i < rows; i++) std::copy_n(sums + i * 32, columns, total + (m + i) * N + n);
                continue;
            }
            for (int64_t i = 0; i < 32; i += 16)
                for (int64_t j = 0; j < 32; j += 16) transpose(sums + i * 32 + j, 32, turned + j * 32 + i, 32);
            for (int64_t j = 0; j < columns; j++) std::copy_n(turned + j * 32, rows, total + (n + j) * M + m);
        }
    }
};
