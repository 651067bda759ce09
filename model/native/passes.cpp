// The passes over memory that a norm layer needs, together with the addition and the ReLU after it.
//
// Maps hold float32 or bfloat16; arithmetic is float32, sums over many values are float64. They come as rows of
// `channels` values (channels_last; `plane` is 0) or as planes of `plane` values, one a channel (contiguous). Rows are
// taken together to periods, whose length is a multiple of a vector's.
#include "vectors.h"

namespace {

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

struct Maps {
    long total, channels, plane, period, tile;      // tile: values of a row that are at work side by side
    Maps(long total, long channels, long plane) : total(total), channels(channels), plane(plane), period(channels) {
        while (!plane && period % W) period += channels;
        tile = period % (3 * W) ? 4 * W : 3 * W;
        for (long step = period; !plane && period % tile;) period += step;
    }
    long shares() const { return plane ? channels : (total + period - 1) / period; }     // what threads divide
};

// A per-channel vector repeated up to a period; zeros where there is none.
struct Repeated {
    float* data;
    Repeated(const Maps& m, const float* from) : data((float*)malloc(m.period * sizeof(float))) {
        for (long j = 0; j < m.channels; ++j) data[j] = from ? from[j] : 0.f;
        for (long j = m.channels; j < m.period; ++j) data[j] = data[j - m.channels];
    }
    ~Repeated() { free(data); }
    operator const float*() const { return data; }
};

// ---- the passes ----------------------------------------------------------------------------------------------------

// What a pass knows of the channels that it is at, in registers, and what it has summed up.
struct Channels { Vec centre, scale, shift, slope, level, dot, sum; };

// One thread's share of a pass: `begin(k, read)` fills k by `read(vector)`, `one(i, n, k)` does n <= W values from the
// i-th on, `end(k, c)` takes what was summed up for channels (of a period) c to c + W, or for channel c alone.
template <bool PLANES, class Begin, class One, class End>
INLINE inline void walk(const Maps& m, long first, long last, const Begin& begin, const One& one, const End& end) {
    if (PLANES) {
        for (long c = first; c < last; ++c) {
            Channels k;
            begin(k, [=](const float* p) INLINE { return p[c] - Vec{}; });
            for (long at = c * m.plane, done = 0, all = m.channels * m.plane; at < m.total; at += all) {
                long j = 0;
                for (; j + W <= m.plane; j += W) one(at + j, W, k);
                if (j < m.plane) one(at + j, m.plane - j, k);
                if ((done += m.plane) < 256 * W && at + all < m.total) continue;
                end(k, c);
                done = 0;
            }
        }
        return;
    }
    auto run = [&](auto four) INLINE {
        constexpr bool FOUR = decltype(four)::value;
        long period = m.period, tile = m.tile, whole = m.total / period;
        long rows = period == tile ? 256 : 4096 / period < 8 ? 8 : 4096 / period;      // what stays in the first cache
        for (long s = first; s < last; s += rows) {
            long stop = s + rows < last ? s + rows : last;
            for (long j = 0; j < period; j += tile) {
                Channels a, b, c, d;
                begin(a, [=](const float* p) INLINE { return load(p + j); });
                begin(b, [=](const float* p) INLINE { return load(p + j + W); });
                begin(c, [=](const float* p) INLINE { return load(p + j + 2 * W); });
                if (FOUR) begin(d, [=](const float* p) INLINE { return load(p + j + 3 * W); });
                long i = s * period + j;
                for (long r = s; r < (stop < whole ? stop : whole); ++r, i += period) {
                    one(i, W, a);
                    one(i + W, W, b);
                    one(i + 2 * W, W, c);
                    if (FOUR) one(i + 3 * W, W, d);
                }
                if (stop > whole) {                                          // the last period may be short
                    if (i < m.total) one(i, m.total - i, a);
                    if (i + W < m.total) one(i + W, m.total - i - W, b);
                    if (i + 2 * W < m.total) one(i + 2 * W, m.total - i - 2 * W, c);
                    if (FOUR && i + 3 * W < m.total) one(i + 3 * W, m.total - i - 3 * W, d);
                }
                end(a, j);
                end(b, j + W);
                end(c, j + 2 * W);
                if (FOUR) end(d, j + 3 * W);
            }
        }
    };
    if (m.tile == 4 * W) run(Yes{});
    else run(No{});
}

// y = relu(x * scale + shift + residual).
template <class T, bool PLANES, bool ADD>
void apply(const Maps& m, const T* x, const T* residual, T* y, const float* scale, const float* shift,
           Threads threads) {
    share(threads, m.shares(), [=](long, long first, long last) {
        walk<PLANES>(m, first, last, [=](Channels& k, auto read) INLINE {
            k.scale = read(scale);
            k.shift = read(shift);
        }, [=](long i, long n, Channels& k) INLINE {
            Vec v = load(x + i, n) * k.scale + k.shift;
            if (ADD) v += load(residual + i, n);
            store(y + i, (v <= 0) ? Vec{} : v, n);                       // what isn't a number stays so
        }, [](Channels&, long) INLINE {});
    });
}

// dot = sum of g * (x - centre) and sum = sum of g. MOMENTS: g = x - centre. Else g = dy, MASKED: where
// x * scale + shift > 0, else 0; SPLIT: where y > 0, else 0, and g is written.
enum Kind { MOMENTS, MASKED, SPLIT };

template <class T, bool PLANES, Kind KIND>
void sums(const Maps& m, const T* dy, const T* x, const T* y, T* g, const float* centre, const float* scale,
          const float* shift, float* dot, float* sum, Threads threads) {
    long width = PLANES ? m.channels : m.period;
    auto all = (double*)calloc(threads.count * width * 2, sizeof(double));
    share(threads, m.shares(), [=](long id, long first, long last) {
        double *dots = all + id * width * 2, *totals = dots + width;
        walk<PLANES>(m, first, last, [=](Channels& k, auto read) INLINE {
            k.centre = read(centre);
            k.scale = read(scale);
            k.shift = read(shift);
            k.dot = k.sum = Vec{};
        }, [=](long i, long n, Channels& k) INLINE {
            Vec u = load(x + i, n), c = u - k.centre, v = c;
            if (KIND != MOMENTS) v = load(dy + i, n);
            if (KIND == MASKED) v = (u * k.scale + k.shift > 0) ? v : Vec{};
            if (KIND == SPLIT) v = (load(y + i, n) > 0) ? v : Vec{};
            if (KIND == SPLIT) store(g + i, v, n);
            if (KIND == MOMENTS && n < W) for (long q = n; q < W; ++q) v[q] = 0;
            k.sum += v;
            k.dot += v * c;
        }, [=](Channels& k, long c) INLINE {
            for (long i = 0; i < W; ++i) {
                dots[PLANES ? c : c + i] += k.dot[i];
                totals[PLANES ? c : c + i] += k.sum[i];
            }
            k.dot = k.sum = Vec{};
        });
    });
    for (long c = 0; c < m.channels; ++c) {
        double d = 0, t = 0;
        for (long id = 0; id < threads.count; ++id)
            for (long j = c; j < width; j += m.channels) {
                d += all[id * width * 2 + j];
                t += all[(id * 2 + 1) * width + j];
            }
        if (KIND == MOMENTS) {                                              // dot: the variance, sum: the mean
            double n = m.total / m.channels;
            d = d / n - t / n * (t / n);
            t = centre[c] + t / n;
        }
        dot[c] = d;
        sum[c] = t;
    }
    free(all);
}

// dx = g * scale + (x - centre) * slope + level; g = dy, MASKED: where x * scale + shift > 0, else 0.
template <class T, bool PLANES, bool MASKED>
void input_gradient(const Maps& m, const T* dy, const T* x, T* dx, const float* centre, const float* scale,
                    const float* shift, const float* slope, const float* level, Threads threads) {
    share(threads, m.shares(), [=](long, long first, long last) {
        walk<PLANES>(m, first, last, [=](Channels& k, auto read) INLINE {
            k.centre = read(centre);
            k.scale = read(scale);
            k.shift = read(shift);
            k.slope = read(slope);
            k.level = read(level);
        }, [=](long i, long n, Channels& k) INLINE {
            Vec v = load(dy + i, n), u = load(x + i, n);
            if (MASKED) v = (u * k.scale + k.shift > 0) ? v : Vec{};
            store(dx + i, v * k.scale + ((u - k.centre) * k.slope + k.level), n);
        }, [](Channels&, long) INLINE {});
    });
}

// A value near each channel's mean: that of its first values.
template <class T> void guess(const Maps& m, const T* x, float* centre) {
    for (long c = 0; c < m.channels; ++c) {
        long n = m.plane ? m.plane : m.total / m.channels < 64 ? m.total / m.channels : 64;
        double sum = 0;
        for (long r = 0; r < n; ++r) sum += load(x + (m.plane ? c * n + r : r * m.channels + c), 1)[0];
        centre[c] = sum / n;
    }
}

}  // namespace

#define AS_TYPED(half, ...) if (half) { using T = bf16; __VA_ARGS__; } else { using T = float; __VA_ARGS__; }
#define PLANED(F, ...) (plane ? F<T, true, __VA_ARGS__> : F<T, false, __VA_ARGS__>)
#define MAPS int half, long total, long channels, long plane
#define THREADS Parallel parallel, long count

namespace {

// One pass; what is squared is the distance from the channel's first values' mean, which are part of it: no large
// numbers are subtracted from each other.
void take_moments(MAPS, const void* x, float* mean, float* var, Threads threads) {
    Maps m(total, channels, plane);
    AS_TYPED(half, guess(m, (const T*)x, mean); Repeated centre(m, mean);
             PLANED(sums, MOMENTS)(m, nullptr, (const T*)x, nullptr, nullptr, centre, centre, centre, var, mean,
                                   threads))
}

void take_apply(MAPS, const void* x, const void* residual, void* y, const float* scale, const float* shift,
                Threads threads) {
    Maps m(total, channels, plane);
    Repeated a(m, scale), b(m, shift);
    AS_TYPED(half, auto f = residual ? PLANED(apply, true) : PLANED(apply, false);
             f(m, (const T*)x, (const T*)residual, (T*)y, a, b, threads))
}

void take_sums(MAPS, const void* dy, const void* x, const void* y, void* g, const float* centre, const float* scale,
               const float* shift, float* dot, float* sum, Threads threads) {
    Maps m(total, channels, plane);
    Repeated c(m, centre), a(m, scale), b(m, shift);
    AS_TYPED(half, auto f = y ? PLANED(sums, SPLIT) : PLANED(sums, MASKED);
             f(m, (const T*)dy, (const T*)x, (const T*)y, (T*)g, c, a, b, dot, sum, threads))
}

void take_input_gradient(MAPS, const void* g, const void* x, void* dx, const float* centre, const float* scale,
                         const float* shift, const float* slope, const float* level, Threads threads) {
    Maps m(total, channels, plane);
    Repeated o(m, centre), a(m, scale), b(m, shift), k(m, slope), l(m, level);
    AS_TYPED(half, auto f = shift ? PLANED(input_gradient, true) : PLANED(input_gradient, false);
             f(m, (const T*)g, (const T*)x, (T*)dx, o, a, b, k, l, threads))
}

}  // namespace

#define GIVEN half, total, channels, plane

extern "C" {

void norm_moments(MAPS, THREADS, const void* x, float* mean, float* var) {
    take_moments(GIVEN, x, mean, var, {parallel, count});
}

void norm_apply(MAPS, THREADS, const void* x, const void* residual, void* y, const float* scale, const float* shift) {
    take_apply(GIVEN, x, residual, y, scale, shift, {parallel, count});
}

// With y and g: SPLIT; else MASKED.
void norm_sums(MAPS, THREADS, const void* dy, const void* x, const void* y, void* g, const float* centre,
               const float* scale, const float* shift, float* dot, float* sum) {
    take_sums(GIVEN, dy, x, y, g, centre, scale, shift, dot, sum, {parallel, count});
}

void norm_input_gradient(MAPS, THREADS, const void* g, const void* x, void* dx, const float* centre, const float* scale,
                         const float* shift, const float* slope, const float* level) {
    take_input_gradient(GIVEN, g, x, dx, centre, scale, shift, slope, level, {parallel, count});
}

// Batch norm in training. known: mean, 1 / standard deviation, scale and shift, [4, channels], for the backward pass.
void norm_batch_forward(MAPS, THREADS, const void* x, const void* residual, void* y, const float* weight,
                        const float* bias, float* running_mean, float* running_var, float* known, double momentum,
                        double eps) {
    float *mean = known, *inv_std = mean + channels, *scale = inv_std + channels, *shift = scale + channels;
    double n = total / channels;
    take_moments(GIVEN, x, mean, inv_std, {parallel, count});
    for (long c = 0; c < channels; ++c) {
        float var = inv_std[c];
        if (running_mean) {
            running_mean[c] += (float)momentum * (mean[c] - running_mean[c]);
            running_var[c] += (float)momentum * ((float)(var * (n / (n - 1))) - running_var[c]);
        }
        inv_std[c] = 1 / __builtin_sqrt(var + eps);
        scale[c] = weight[c] * inv_std[c];
        shift[c] = bias[c] - mean[c] * scale[c];
    }
    take_apply(GIVEN, x, residual, y, scale, shift, {parallel, count});
}

// gradients: of weight and bias, [2, channels]. y and g: with a residual.
void norm_batch_backward(MAPS, THREADS, const void* dy, const void* x, const void* y, void* g, void* dx,
                         const float* known, float* gradients) {
    const float *mean = known, *inv_std = mean + channels, *scale = inv_std + channels, *shift = scale + channels;
    float *dot = gradients, *sum = dot + channels, *slope = (float*)malloc(2 * channels * sizeof(float));
    float* level = slope + channels;
    take_sums(GIVEN, dy, x, y, g, mean, scale, shift, dot, sum, {parallel, count});
    for (long c = 0; c < channels; ++c) {
        double along = -(double)scale[c] * channels / total;
        dot[c] *= inv_std[c];
        slope[c] = along * dot[c] * inv_std[c];
        level[c] = along * sum[c];
    }
    take_input_gradient(GIVEN, y ? g : dy, x, dx, mean, scale, y ? nullptr : shift, slope, level, {parallel, count});
    free(slope);
}

}
