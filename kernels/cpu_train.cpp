// What lies between the matrix products when a block learns on a CPU, forward and backward; cpu_train.py has the rest.
//
// In torch each of these is a handful of operations, each of which walks through all activations. Here each walks once:
// it reads what a product left in the cache of the processor, computes in fp32 and rounds once. What is done by hand
// here a compiler would do, too; but it takes half a minute to begin with.
//
// R rows (tokens of all sequences), C width, H query heads, K key/value heads, D head size, T tokens in a sequence, F
// feed-forward width, V vocabulary. E is what activations are stored in (-DELEMENT); gains, sums and x are fp32.
// Threads share rows in a fixed way and sums are added up in a fixed order: the same bits each time.
#include "cpu_norm.h"

using E = ELEMENT;

// 1. RMSNorm ---------------------------------------------------------------------------------------------------------

// y = x / rms(x) * gain, and 1 / rms(x), which is all that the way back needs. x (R, C).
extern "C" void heed_norm(const float* x, const float* gain, E* y, float* inverse, int64_t R, int64_t C, double eps,
                          int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < R; r++) {
        const float* from = x + r * C;
        float scale = inverse[r] = inverse_rms(from, C, eps);
        lanes(C, [&](int64_t i, auto v) {
            using L = decltype(v);
            store(y + r * C + i, L(load<L>(from + i) * scale * load<L>(gain + i)));
        });
    }
}

extern "C" void heed_norm_backward(const E* dy, const float* x, const float* gain, const float* inverse, float* dx,
                                   float* dgain, int64_t R, int64_t C, int64_t threads) {
    std::vector<float> parts(threads * C);
#pragma omp parallel num_threads(threads)
    {
        Part mine(R);
        float* sums = &parts[omp_get_thread_num() * C];
        for (int64_t r = mine.from; r < mine.to; r++)
            norm_backward(x + r * C, dy + r * C, gain, inverse[r], C, dx + r * C, sums);
    }
    add_up(parts, C, dgain);
}
