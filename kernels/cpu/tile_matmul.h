// Small matmuls for the C++ files: 32 rows at a time, both operands in the cache of one core.
//
// X is the type that is multiplied: bf16 where the processor multiplies bf16, two neighbours at a time, else fp32. Sums
// are fp32. The left operand is row-major. The right operand is packed in tiles of 32 (K) x 16 (N) numbers, in which
// PAIR neighbours along K are side by side, [32 / PAIR][16][PAIR]: the layout of AMX and of vdpbf16ps.
//
// AMX multiplies a tile of 16 x 32 by one of 32 x 16 in one instruction. Without it vectors do the same.
#pragma once
#include "simd.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __AVX512BF16__
constexpr bool BF16_PAIRS = true;
#else
constexpr bool BF16_PAIRS = false;
#endif

template <class E> using Multiplied = std::conditional_t<std::is_same_v<E, Bf16> && BF16_PAIRS, Bf16, float>;
template <class X> constexpr int PAIR = 4 / sizeof(X);
constexpr int64_t TILE = 32 * 16;  // numbers in a tile of the right operand
constexpr int64_t GAP = 32;        // rows a power of two apart would compete for a few lines of the cache

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory that begins at a line of the cache; what it holds at first is undefined.
template <class T> struct Buffer {
    T* data;
    explicit Buffer(int64_t n) : data((T*)std::aligned_alloc(64, round_up(n * sizeof(T) + 1, 64))) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data); }
    operator T*() const { return data; }
};

// 1. AMX: a thread configures its tile registers before use, and releases them ----------------------------------------

#ifdef __AMX_BF16__
// Linux grants AMX to a process on request, once: ARCH_REQ_XCOMP_PERM for XTILEDATA.
static const bool AMX = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        if (AMX) _tile_loadconfig(&shape);
    }
    ~Tiles() {
        if (AMX) _tile_release();
    }
};
#else
struct Tiles {
    ~Tiles() {}
};
#endif

// 2. c (32, n) = a (32, k) b (k, n), or added to c. k and n are multiples of 32 --------------------------------------

template <class X> struct Packed {  // a right operand: its tiles along K are `down` numbers apart, along N `right`
    const X* data;
    int64_t down, right;
};

#ifdef __AMX_BF16__
template <bool ADD>
static inline void multiply_amx(const Bf16* a, int64_t lda, Packed<Bf16> b, int64_t k, int64_t n, float* c, int64_t ldc) {
    asm volatile("" ::: "memory");  // g++ 12 does not know that tiles are loaded from memory
    for (int64_t j = 0; j < n; j += 32) {
        float *left = c + j, *right = left + 16, *low_left = left + 16 * ldc, *low_right = low_left + 16;
        // clang-format off
        if (ADD) {
            _tile_loadd(0, left, ldc * 4); _tile_loadd(1, right, ldc * 4);
            _tile_loadd(2, low_left, ldc * 4); _tile_loadd(3, low_right, ldc * 4);
        } else {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        }
        const Bf16* tiles = b.data + j / 16 * b.right;
        for (int64_t i = 0; i < k; i += 32, tiles += b.down) {
            _tile_loadd(6, tiles, 64); _tile_loadd(7, tiles + b.right, 64);
            _tile_loadd(4, a + i, lda * 2); _tile_loadd(5, a + 16 * lda + i, lda * 2);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, left, ldc * 4); _tile_stored(1, right, ldc * 4);
        _tile_stored(2, low_left, ldc * 4); _tile_stored(3, low_right, ldc * 4);
        // clang-format on
    }
}
#endif

static inline void multiply_add(Floats& sum, const float* a, const float* b) { sum += *a * read<Floats>(b); }
#ifdef __AVX512BF16__
static inline void multiply_add(Floats& sum, const Bf16* a, const Bf16* b) {
    __m512i pair = _mm512_set1_epi32(read<int32_t>(a));
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)read<__m512i>(b));
}
#endif

template <bool ADD, class X>
static inline void multiply(const X* a, int64_t lda, const Packed<X>& b, int64_t k, int64_t n, float* c, int64_t ldc) {
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<X, Bf16>)
        if (AMX) return multiply_amx<ADD>(a, lda, b, k, n, c, ldc);
#endif
    constexpr int ROWS = LANES == 16 ? 8 : 4, VECTORS = 16 / LANES;
    for (int64_t j = 0; j < n; j += 16)
        for (int64_t r = 0; r < 32; r += ROWS) {
            Floats sums[ROWS][VECTORS] = {};
            if (ADD)
                for (int i = 0; i < ROWS; i++)
                    for (int v = 0; v < VECTORS; v++) sums[i][v] = load(c + (r + i) * ldc + j + v * LANES);
            const X* tile = b.data + j / 16 * b.right;
            for (int64_t i = 0; i < k; i += 32, tile += b.down)
                for (int64_t p = 0; p < 32; p += PAIR<X>)
                    for (int row = 0; row < ROWS; row++)
                        for (int v = 0; v < VECTORS; v++)
                            multiply_add(sums[row][v], a + (r + row) * lda + i + p, tile + p * 16 + v * LANES * PAIR<X>);
            for (int i = 0; i < ROWS; i++)
                for (int v = 0; v < VECTORS; v++) store(c + (r + i) * ldc + j + v * LANES, sums[i][v]);
        }
}

// 3. Packing ---------------------------------------------------------------------------------------------------------

// to[j][i] = from[i][j] for 16 x 16 numbers of 32 bits; `pitch` and `step` are the lengths of their rows.
static inline void transpose(const void* from, int64_t pitch, void* to, int64_t step) {
    typedef int32_t __attribute__((may_alias)) Word;  // whatever type the numbers have
    const Word* source = (const Word*)from;
    Word* target = (Word*)to;
#ifdef __AVX512F__
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = read<__m512i>(source + i * pitch);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    auto put = [&](int row, __m512i value) { std::memcpy(target + row * step, &value, 64); };
    for (int i = 0; i < 4; i++) {
        put(i, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88)), put(8 + i, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
        put(4 + i, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
        put(12 + i, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) target[j * step + i] = source[i * pitch + j];
#endif
}

// One tile of the right operand whose columns are 16 rows of `from`, 32 numbers of each.
template <class X> static inline void pack_transposed(const X* from, int64_t pitch, X* tile) {
    for (int k = 0; k < 32; k += 16 * PAIR<X>) transpose(from + k, pitch / PAIR<X>, tile + k * 16, 16);
}

// One tile of the right operand whose rows are 32 rows of `from`, 16 numbers of each.
static inline void pack(const float* from, int64_t pitch, float* tile) {
    for (int i = 0; i < 32; i++) std::memcpy(tile + i * 16, from + i * pitch, 64);
}
#ifdef __AVX512BF16__
static inline void pack(const Bf16* from, int64_t pitch, Bf16* tile) {
    for (int i = 0; i < 32; i += 2, from += 2 * pitch) {
        Ints pairs = widen(read<Halves>(from)) | widen(read<Halves>(from + pitch)) << 16;
        std::memcpy(tile + i * 16, &pairs, sizeof pairs);
    }
}
#endif

// The 16 columns of such a tile as 32 rows of `to`, which are `pitch` numbers long: what pack_transposed read, transposed.
static inline void unpack_transposed(const float* tile, float* to, int64_t pitch) {
    for (int i = 0; i < 32; i++) std::memcpy(to + i * pitch, tile + i * 16, 64);
}
#ifdef __AVX512BF16__
static inline void unpack_transposed(const Bf16* tile, Bf16* to, int64_t pitch) {
    for (int i = 0; i < 32; i += 2) {
        __m512i pairs = read<__m512i>(tile + i * 16);
        __m256i even = _mm512_cvtepi32_epi16(pairs), odd = _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16));
        std::memcpy(to + i * pitch, &even, 32), std::memcpy(to + (i + 1) * pitch, &odd, 32);
    }
}
#endif
