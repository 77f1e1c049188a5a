// Channel and spatial gating of feature maps on the CPU, forward and backward.
//
// A plain C interface on raw pointers, so that one library serves every version of PyTorch. Maps are (B, C, N) with N
// positions, in one of two orders: channels first, a row of N values for each channel; or channels last, a row of C
// values for each position. Everything else is small: gates and their gradients (B, C) and (B, N), in float32.
//
// Compiled twice, for AVX2 and for any processor; the compiler vectorises the loops over a row. Sums are taken in
// blocks, each in float32 and together in double. No fast-math: a NaN has to come through.
//
// The maximum shares its gradient between equal values, as torch.amax does. Where a maximum is, its place and the
// number of places, is found in the backward pass, which reads the map anyway; only where there are several is the map
// read once more.
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

// for what is called between vectors: a call would have all of them put aside
#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE inline
#endif

namespace {

// what runs a function in all threads of PyTorch's own pool, and what tells which of them it is; null without a pool
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();
Parallel pool_parallel = nullptr;
ThreadNumber pool_thread = nullptr;

template <class Work>
struct Job {
    const Work& work;
    int64_t count;
    int threads;
    bool back;
    static void run(void* job_pointer) {
        const Job& job = *static_cast<Job*>(job_pointer);
        const int64_t here = pool_thread();
        const int64_t first = job.count * here / job.threads, last = job.count * (here + 1) / job.threads;
        for (int64_t unit = first; unit < last; ++unit) job.work(job.back ? first + last - 1 - unit : unit);
    }
};

// work(unit) for every unit, in as many threads, each from its first unit to its last or the other way
template <class Work>
void parallel(int threads, int64_t count, const Work& work, bool back = false) {
    threads = int(std::min<int64_t>(threads, count));
    if (threads <= 1 || !pool_parallel) {
        for (int64_t unit = 0; unit < count; ++unit) work(back ? count - 1 - unit : unit);
        return;
    }
    Job<Work> job{work, count, threads, back};
    pool_parallel(Job<Work>::run, &job, unsigned(threads), 0);
}

// Asks the kernel for large pages where a new map will lie, as far as whole ones do: the first touch of its pages, 4 KB
// each, can take longer than all that is computed (2 us each on a virtual machine, and a seventeenth with large ones).
void expect(void* pointer, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t LARGE = uintptr_t(1) << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(pointer) + LARGE - 1) & ~(LARGE - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(pointer) + uintptr_t(bytes)) & ~(LARGE - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)pointer, (void)bytes;
#endif
}

}  // namespace

#define CONVATTN_PATH portable
#include "body.h"
#undef CONVATTN_PATH

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CONVATTN_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define CONVATTN_PATH avx2
#include "body.h"
#undef CONVATTN_PATH
#pragma GCC pop_options
#endif

namespace {
bool has_avx2() {
#ifdef CONVATTN_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}
bool use_avx2 = has_avx2();
}  // namespace

#ifdef CONVATTN_AVX2
#define PATH(...) \
    if (use_avx2) { using namespace avx2; __VA_ARGS__; } \
    else { using namespace portable; __VA_ARGS__; }
#else
#define PATH(...) { using namespace portable; __VA_ARGS__; }
#endif

// for each function one for float32 and one for bfloat16
#define BOTH(define) define(float, f32) define(uint16_t, bf16)

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

// PyTorch's own pool of threads: its GOMP_parallel and omp_get_thread_num; null for none
EXPORT void convattn_threads(void* parallel_function, void* number_function) {
    pool_parallel = reinterpret_cast<Parallel>(parallel_function);
    pool_thread = reinterpret_cast<ThreadNumber>(number_function);
    if (!pool_thread) pool_parallel = nullptr;
}

// the instructions in use: 1 for AVX2, 0 for those of any processor; asking for 0 or 1 sets them where they are there
EXPORT int convattn_path(int wanted) {
    if (wanted == 0) use_avx2 = false;
    if (wanted == 1) use_avx2 = has_avx2();
    return use_avx2;
}

#define SHAPE int64_t b, int64_t c, int64_t n, int last, int threads
// of one pass, which may go back from the end of the map
#define PASS SHAPE, int back
#define MAP Map{b, c, n, last != 0, threads, back != 0}

#define DEFINE(type, suffix) \
    EXPORT void convattn_pool_##suffix(PASS, const type* x, float* mean, float* max) { PATH(pool<type>(MAP, x, mean, max)) } \
    EXPORT void convattn_statistics_##suffix(PASS, const type* x, float* mean, float* squares, float* max, float* min) { \
        PATH(statistics<type>(MAP, x, Statistics{mean, squares, max, min})) \
    } \
    EXPORT void convattn_summarise_##suffix(PASS, const type* x, const float* norm, const float* channel, float* mean, \
                                            float* max) { \
        PATH(const Affine affine = affine_at(norm, c); \
             summarise<type>(MAP, x, norm ? &affine : nullptr, channel, mean, max)) \
    } \
    EXPORT void convattn_apply_##suffix(PASS, const type* x, const float* norm, const float* channel, \
                                        const float* spatial, const type* shortcut, type* y) { \
        PATH(const Affine affine = affine_at(norm, c); \
             apply<type>(MAP, x, norm ? &affine : nullptr, channel, spatial, shortcut, y)) \
    } \
    EXPORT void convattn_grad_gates_##suffix(PASS, const type* x, const type* dy, const float* norm, \
                                             const float* channel, const float* spatial, const float* max, int gated, float* dchannel, \
                                             float* dspatial, int32_t* places) { \
        PATH(const Affine affine = affine_at(norm, c); \
             grad_gates<type>(MAP, x, dy, norm ? &affine : nullptr, channel, spatial, max, gated != 0, dchannel, \
                              dspatial, places)) \
    } \
    EXPORT void convattn_grad_summary_##suffix(PASS, const type* x, const float* norm, const float* channel, \
                                               const float* smax, const float* dsmean, const float* dsmax, \
                                               const int32_t* splaces, const float* pmax, float* dchannel, \
                                               int32_t* places, float* hats) { \
        PATH(const Maxima summary({smax, dsmean, dsmax, splaces, splaces ? splaces + b * n : nullptr}); \
             const Affine affine = affine_at(norm, c); \
             grad_summary<type>(MAP, x, norm ? &affine : nullptr, channel, dsmean ? &summary : nullptr, pmax, dchannel, \
                                places, hats)) \
    } \
    EXPORT void convattn_grad_input_##suffix(PASS, const type* x, const type* dy, const float* norm, \
                                             const float* through, const float* channel, const float* spatial, const float* smax, const float* dsmean, \
                                             const float* dsmax, const int32_t* splaces, const float* pmax, \
                                             const float* dpmean, const float* dpmax, const int32_t* pplaces, \
                                             type* dx) { \
        PATH(const Maxima summary({smax, dsmean, dsmax, splaces, splaces ? splaces + b * n : nullptr}); \
             const Maxima pools({pmax, dpmean, dpmax, pplaces, pplaces ? pplaces + b * c : nullptr}); \
             const Affine affine = affine_at(norm, c); \
             grad_input<type>(MAP, x, dy, norm ? &affine : nullptr, through, channel, spatial, dsmean ? &summary : nullptr, \
                              dpmean || dpmax ? &pools : nullptr, dx)) \
    }
BOTH(DEFINE)

// what a batch norm makes of statistics, each (B, C); in training its mean and variance are written to moments, else read
EXPORT void convattn_normalise(int64_t b, int64_t c, int64_t n, int training, double eps, float* mean, float* squares,
                               float* max, float* min, const float* weight, const float* bias, float* affine,
                               float* moments, float* hat, float* mean_of_x, float* max_of_x) {
    PATH(normalise(b, c, n, training != 0, eps, Statistics{mean, squares, max, min}, weight, bias,
                   Normed{affine, moments, hat, mean_of_x, max_of_x}))
}

// running mean and variance, and the number of batches that they have seen; a momentum below 0 stands for their average
EXPORT void convattn_follow(int64_t c, int64_t count, double momentum, const float* moments, float* mean, float* var,
                            int64_t* tracked) {
    PATH(follow(c, count, momentum, moments, mean, var, tracked))
}

// The spatial gate of a summary, in float32: b samples of h x w, a window of kh x kw, then norm, sigmoid and strength,
// where norm and strength may be absent. In training the mean and the variance of the logits are written, else read.
#define WINDOW int64_t h, int64_t w, int64_t kh, int64_t kw, int threads_of_window, int training, float eps, \
               const float* weight, const float* norm_weight, const float* norm_bias, float* mean, float* var
#define GATE_OF_WINDOW \
    conv(Plane{b, h, w, kh, kw, threads_of_window}, summary, weight, window); \
    if (training && mean) moments(threads_of_window, b * h * w, window, mean, var); \
    gate_of(threads_of_window, b * h * w, window, Norm{norm_weight, norm_bias, mean, var, eps}, strength, spatial);
EXPORT void convattn_window(int64_t b, WINDOW, const float* strength, const float* summary, float* window, float* spatial) {
    PATH(GATE_OF_WINDOW)
}
#define GRAD_OF_WINDOW \
    grad_window(Plane{b, h, w, kh, kw, threads_of_window}, Norm{norm_weight, norm_bias, mean, var, eps}, training != 0, weight, \
                strength, summary, window, dspatial, sums, dsummary, dweight);
EXPORT void convattn_grad_window(int64_t b, WINDOW, const float* strength, const float* summary, const float* window,
                                 const float* dspatial, float* sums, float* dsummary, float* dweight) {
    PATH(GRAD_OF_WINDOW)
}

// a small MLP, forward and backward
#define MLP int64_t pools, int64_t width, int threads_of_mlp, const float* one, const float* one_bias, const float* two, \
            const float* two_bias
#define GATE_OF_MLP \
    mlp(Sizes{pools, b, c, width, threads_of_mlp}, pooled, Layer{one, one_bias}, Layer{two, two_bias}, first, hidden, logits, channel);
#define GRAD_OF_MLP \
    grad_mlp(Sizes{pools, b, c, width, threads_of_mlp}, pooled, one, two, first, hidden, logits, dchannel, dpooled, \
             GradLayer{done, done_bias}, GradLayer{dtwo, dtwo_bias});
EXPORT void convattn_mlp(int64_t b, int64_t c, MLP, const float* pooled, float* first, float* hidden, float* logits,
                         float* channel) {
    PATH(GATE_OF_MLP)
}
EXPORT void convattn_grad_mlp(int64_t b, int64_t c, MLP, const float* pooled, const float* first, const float* hidden,
                              const float* logits, const float* dchannel, float* dpooled, float* done, float* done_bias,
                              float* dtwo, float* dtwo_bias) {
    (void)one_bias, (void)two_bias;
    PATH(GRAD_OF_MLP)
}

// What a forward pass keeps for the backward pass, in one piece: see gates.Kept.
struct Kept {
    float *pooled, *first, *hidden, *logits, *channel, *summary, *window, *spatial;
    Kept(float* at, int64_t b, int64_t c, int64_t n, int64_t pools, int64_t width, bool has_window) {
        auto next = [&at](int64_t size) { float* here = size ? at : nullptr; at += size; return here; };
        const int64_t gate = pools ? b * c : 0, plane = has_window ? b * n : 0;
        pooled = next(pools * gate), first = next(pools * b * width), hidden = next(pools ? b * width : 0);
        logits = next(gate), channel = next(gate), summary = next(2 * plane), window = next(plane), spatial = next(plane);
    }
};
#define KEPT \
    const Kept to(kept, b, c, n, pools, width, weight != nullptr); \
    float *pooled = to.pooled, *first = to.first, *hidden = to.hidden, *logits = to.logits, *channel = to.channel; \
    float *summary = to.summary, *window = to.window, *spatial = to.spatial;

// All of a forward pass in one call, which takes a small map less time than six: a channel gate where there are `pools`, a
// spatial gate where there is `weight`, and what is kept of both.
#define DEFINE_GATED(type, suffix) \
    EXPORT void convattn_gated_##suffix(SHAPE, const type* x, const type* shortcut, type* y, const float* strength, int parallel, \
                                        MLP, WINDOW, float* kept) { \
        KEPT \
        PATH(Map map{b, c, n, last != 0, threads, false}; \
             if (channel) { \
                 pool<type>(turn(map), x, pooled, pools > 1 ? pooled + b * c : nullptr); \
                 GATE_OF_MLP \
                 blend(b * c, channel, strength); \
             } \
             if (spatial) { \
                 summarise<type>(turn(map), x, nullptr, parallel ? nullptr : channel, summary, summary + b * n); \
                 GATE_OF_WINDOW \
             } \
             apply<type>(turn(map), x, nullptr, channel, spatial, shortcut, y)) \
    }
BOTH(DEFINE_GATED)

// All of a backward pass in one call. What is null is not asked for. Not for two gates that both see the map, whose gradient
// takes one pass more.
#define DEFINE_GRAD_GATED(type, suffix) \
    EXPORT void convattn_grad_gated_##suffix(SHAPE, const type* x, const type* dy, type* dx, const float* strength, float* dstrength, \
                                             MLP, WINDOW, float* kept, float* done, float* done_bias, float* dtwo, \
                                             float* dtwo_bias, float* dweight, float* dnorm_weight, float* dnorm_bias) { \
        (void)one_bias, (void)two_bias; \
        KEPT \
        float sums[3] = {0, 0, 0}; \
        PATH(Map map{b, c, n, last != 0, threads, false}; \
             const Piece<float> dchannel(channel ? b * c : 0), dpooled(channel ? pools * b * c : 0); \
             const Piece<float> dspatial(spatial ? b * n : 0), dsummary(spatial ? 2 * b * n : 0); \
             const Piece<int32_t> in_channels(spatial ? 2 * b * n : 0), in_positions(channel ? 2 * b * c : 0); \
             const float* top_channel = spatial ? summary + b * n : nullptr; \
             const float* top_position = dx && channel && pools > 1 ? pooled + b * c : nullptr; \
             const bool gated = channel && spatial; \
             grad_gates<type>(turn(map), x, dy, nullptr, channel, spatial, top_channel, gated, dchannel, dspatial, in_channels); \
             if (spatial) { GRAD_OF_WINDOW } \
             const Maxima of_summary({top_channel, dsummary, dsummary.from(b * n), in_channels, in_channels.from(b * n)}); \
             if (gated || top_position) \
                 grad_summary<type>(turn(map), x, nullptr, channel, gated ? &of_summary : nullptr, top_position, dchannel, \
                                    in_positions, nullptr); \
             if (channel) { \
                 sums[2] += grad_blend(b * c, logits, strength, dchannel); \
                 GRAD_OF_MLP \
             } \
             float* dmax = top_position ? dpooled.from(b * c) : nullptr; \
             const Maxima of_pools({top_position, dpooled, dmax, in_positions, in_positions.from(b * c)}); \
             if (dx) grad_input<type>(turn(map), x, dy, nullptr, nullptr, channel, spatial, spatial ? &of_summary : nullptr, \
                                      channel ? &of_pools : nullptr, dx)) \
        if (dnorm_weight) *dnorm_weight = sums[0]; \
        if (dnorm_bias) *dnorm_bias = sums[1]; \
        if (dstrength) *dstrength = sums[2]; \
    }
BOTH(DEFINE_GRAD_GATED)

}  // extern "C"

#include "module.h"
