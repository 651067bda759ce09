// Vectors of float32 or bfloat16 values, and the threads that torch itself uses.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#define INLINE __attribute__((always_inline))

namespace {

// Values of a vector: as many as a register holds, since compilers keep wider ones in memory, at a sixth of the speed.
#ifndef VECTOR
#if defined(__AVX512F__)
#define VECTOR 16
#elif defined(__AVX__)
#define VECTOR 8
#else
#define VECTOR 4
#endif
#endif
constexpr long W = VECTOR;
typedef float Vec __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t Bits __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t Half __attribute__((vector_size(2 * VECTOR)));

struct bf16 { uint16_t bits; };

inline Vec load(const float* p) { Vec v; memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
#if defined(__AVX512BF16__) && VECTOR == 16        // in one instruction; the intrinsics' header is slow
inline Vec load(const bf16* p) {
    Half h;
    Bits u;
    memcpy(&h, p, sizeof h);
    asm("vpmovzxwd %1, %0" : "=v"(u) : "vm"(h));
    return (Vec)(u << 16);
}
inline void store(bf16* p, Vec v) {
    Half h;
    asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
    memcpy(p, &h, sizeof h);
}
#else
inline Vec load(const bf16* p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Bits) << 16);
}
inline void store(bf16* p, Vec v) {                                  // to nearest, ties to even
    Bits u = (Bits)v;
    u = (v == v) ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40;
    Half h = __builtin_convertvector(u, Half);
    memcpy(p, &h, sizeof h);
}
#endif
template <class T> INLINE inline Vec load(const T* p, long n) {     // the first n values, then zeros
    if (n >= W) return load(p);
    T part[W] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}
template <class T> INLINE inline void store(T* p, Vec v, long n) {
    if (n >= W) return store(p, v);
    T part[W];
    store(part, v);
    memcpy(p, part, n * sizeof(T));
}

// ---- threads: those that torch itself uses -------------------------------------------------------------------------

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);     // GOMP_parallel
struct Threads { Parallel parallel; long count; };

template <class F> struct Job {
    const F& run;
    long threads, next;
    static void work(void* self) {
        auto job = (Job*)self;
        for (long id; (id = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->threads;) job->run(id);
    }
};

// f(id, first, last) for each thread's share of `count` things.
template <class F> void share(Threads threads, long count, const F& f) {
    auto run = [&](long id) { f(id, count * id / threads.count, count * (id + 1) / threads.count); };
    Job<decltype(run)> job{run, threads.count, 0};
    if (threads.count > 1) threads.parallel(Job<decltype(run)>::work, &job, threads.count, 0);
    else Job<decltype(run)>::work(&job);
}

}  // namespace
