// Numbers for heed's C++ files: fp32, bf16 or int8 in memory, LANES floats at a time in registers; and shares of threads.
#pragma once
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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
static inline float sum(Floats v) {  // four at a time: additions one after another would wait for each other
    typedef float Four __attribute__((vector_size(16)));
    Four fours[LANES / 4];
    std::memcpy(fours, &v, sizeof v);
    for (int i = 1; i < LANES / 4; i++) {
        fours[0] += fours[i];
        HOLD(fours[0]);
    }
    float low = fours[0][0] + fours[0][1], high = fours[0][2] + fours[0][3];
    HOLD(low);
    HOLD(high);
    return low + high;
}

#if defined(__AVX512F__)  // one instruction, which g++ 12 does not find by itself
static inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
static inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

// 2 ** x: 2 to the whole part of x is an exponent, to the rest, which is at most a half, a polynomial.
static inline Floats exp2(Floats x) {
    // Below -125 it is 0: numbers that are nearly 0 take hundreds of cycles.
    Floats kept = smaller(larger(x, Floats{} - 125.f), Floats{} + 127.f);
#ifdef __AVX512F__
    Floats whole = (Floats)_mm512_roundscale_ps((__m512)kept, _MM_FROUND_TO_NEAREST_INT);
#else
    Ints exponent = __builtin_convertvector(kept + (kept < 0.f ? Floats{} - .5f : Floats{} + .5f), Ints);
    Floats whole = __builtin_convertvector(exponent, Floats);
#endif
    Floats f = kept - whole, power = Floats{} + .00015469f;  // ln 2 to the k-th, by k!
    for (float factor : {.00133336f, .00961813f, .05550411f, .24022651f, .69314718f, 1.f}) power = power * f + factor;
#ifdef __AVX512F__
    power = (Floats)_mm512_scalef_ps((__m512)power, (__m512)whole);
#else
    power = power * (Floats)((exponent + 127) << 23);
#endif
    return x > -125.f ? power : Floats{};
}
// 1 / x to the last bits: an approximation and a Newton step take a fifth of the time of a division.
static inline Floats reciprocal(Floats x) {
#ifdef __AVX512F__
    Floats y = (Floats)_mm512_rcp14_ps((__m512)x);
    return y * (2 - x * y);
#else
    return 1 / x;
#endif
}

static inline Floats exp(Floats x) { return exp2(x * 1.44269504f); }

static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
static inline void store(Bf16* p, Floats v) {  // as Bf16(float)
#ifdef __AVX512BF16__
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &narrow, sizeof narrow);
#else
    Ints whole = (Ints)v;
    Halves upper = __builtin_convertvector((whole + 0x7fff + (whole >> 16 & 1)) >> 16, Halves);
    std::memcpy(p, &upper, sizeof upper);
#endif
}

// f(i, v) for i from 0 to n: v says by its type how many numbers are meant, LANES or, at the end, a single one.
template <class F> static inline void lanes(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, Floats{});
    for (; i < n; i++) f(i, 0.f);
}
template <class V, class T> static inline V load(const T* p) {
    if constexpr (std::is_same_v<V, Floats>) return load(p);
    else return float(*p);
}
template <class T> static inline void store(T* p, float value) { *p = T(value); }
static inline void add(Floats& sum, Floats v) { sum += v; }
static inline void add(Floats& sum, float v) { sum[0] += v; }
static inline void keep_larger(Floats& most, Floats v) { most = larger(v, most); }
static inline void keep_larger(Floats& most, float v) { most[0] = std::max(most[0], v); }
static inline float largest(Floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, v[i]);
    return most;
}

// n numbers of p become f of them. The last ones are computed in vectors as well: the bits of a number do not depend on
// its place.
template <class F> static inline void each(float* p, int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(p + i, Floats(f(load(p + i))));
    if (i == n) return;
    Floats last{};
    std::memcpy(&last, p + i, (n - i) * 4);
    last = f(last);
    std::memcpy(p + i, &last, (n - i) * 4);
}

struct Part {
    int64_t from, to;
    // What this thread does of `all`, in whole units; or what thread `me` of `threads` does.
    Part(int64_t all, int64_t unit = 1, int64_t me = omp_get_thread_num(), int64_t threads = omp_get_num_threads()) {
        int64_t units = (all + unit - 1) / unit;
        from = std::min(all, units * me / threads * unit);
        to = std::min(all, units * (me + 1) / threads * unit);
    }
    bool empty() const { return from == to; }
};
