// Greedy generation by llama.cpp without Python between two tokens: what the loop in Python costs is the difference.
//
// The model, the context and the prompt are prepared in Python. The three functions of llama.cpp are passed as
// pointers, so neither its headers nor its library are needed to compile this.

#include <algorithm>
#include <chrono>
#include <cstdint>

struct Batch {  // llama_batch
    int32_t n_tokens;
    int32_t* token;
    float* embd;
    int32_t* pos;
    int32_t* n_seq_id;
    int32_t** seq_id;
    int8_t* logits;
};

// `next` (B) are the tokens to begin with, at `position`; `out` (tokens, B) receives the tokens that follow and
// `seconds` (tokens) the time of each step since the call. Returns the first error of llama_decode, 0 if there is none.
extern "C" int generate(void* context, int (*decode)(void*, Batch), float* (*get_logits)(void*),
                        Batch (*init)(int32_t, int32_t, int32_t), const int32_t* next, int32_t* out, double* seconds,
                        int B, int position, int tokens, int vocab) {
    const auto start = std::chrono::steady_clock::now();
    Batch batch = init(B, 0, 1);  // a few hundred bytes, kept: this process measures and ends
    batch.n_tokens = B;
    std::copy(next, next + B, batch.token);
    for (int step = 0; step < tokens; ++step) {
        for (int b = 0; b < B; ++b) {
            batch.pos[b] = position + step;
            batch.n_seq_id[b] = 1;
            batch.seq_id[b][0] = b;
            batch.logits[b] = 1;
        }
        if (int failed = decode(context, batch)) return failed;
        const float* logits = get_logits(context);  // (B, vocab)
        for (int b = 0; b < B; ++b) {
            const float* row = logits + int64_t(b) * vocab;
            batch.token[b] = out[step * B + b] = std::max_element(row, row + vocab) - row;
        }
        seconds[step] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    return 0;
}
