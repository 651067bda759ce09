// 3x3 convolutions, stride 1, zeros around, by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray, CVPR 2016,
// "Fast algorithms for convolutional neural networks"): 36 products for the 16 values of an output tile, where the
// sum itself takes 144.
//
// Y = A' [(G w G') * (B' d B)] A for each tile of 4x4 outputs and the 6x6 inputs d that it sees; B, G and A are those
// of the points 0, 1, -1, 2, -2 and infinity. Summed over input channels, the products are 36 matrix products, one an
// element of the 6x6. The gradient of w follows from the same identity: G' [(A dY A') * (B' d B)] G, summed over tiles;
// that of the input is a convolution of dY with w turned round.
//
// Maps are channels_last, in float32 or bfloat16; filters [3, 3, C, K], their gradients and all sums are float32. Tiles
// go by in blocks, which stay in the second cache where channels are few.
#include "vectors.h"

namespace {

constexpr long TILE = 4, WINDOW = 6, PRODUCTS = WINDOW * WINDOW;

// ---- the transforms of one line of a tile --------------------------------------------------------------------------

struct Inputs {                                           // B' d: 6 -> 6
    static constexpr int from = 6, to = 6;
    INLINE static inline void line(const Vec* d, Vec* out) {
        Vec a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
        out[0] = 4 * d[0] - 5 * d[2] + d[4];
        out[1] = a + b;
        out[2] = a - b;
        out[3] = c + e;
        out[4] = c - e;
        out[5] = 4 * d[1] - 5 * d[3] + d[5];
    }
};
struct Outputs {                                          // A' m: 6 -> 4
    static constexpr int from = 6, to = 4;
    INLINE static inline void line(const Vec* m, Vec* out) {
        Vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
        out[0] = m[0] + a + c;
        out[1] = b + 2 * e;
        out[2] = a + 4 * c;
        out[3] = b + 8 * e + m[5];
    }
};
struct OutputGradients {                                  // A y: 4 -> 6
    static constexpr int from = 4, to = 6;
    INLINE static inline void line(const Vec* y, Vec* out) {
        Vec a = y[0] + y[2], b = y[1] + y[3], c = y[0] + 4 * y[2], e = 2 * y[1] + 8 * y[3];
        out[0] = y[0];
        out[1] = a + b;
        out[2] = a - b;
        out[3] = c + e;
        out[4] = c - e;
        out[5] = y[3];
    }
};
struct Filters {                                          // G w: 3 -> 6
    static constexpr int from = 3, to = 6;
    INLINE static inline void line(const Vec* w, Vec* out) {
        Vec a = (w[0] + w[2]) * (-1.f / 6), b = w[1] * (-1.f / 6);
        Vec c = w[0] * (1.f / 24) + w[2] * (1.f / 6), e = w[1] * (1.f / 12);
        out[0] = w[0] * .25f;
        out[1] = a + b;
        out[2] = a - b;
        out[3] = c + e;
        out[4] = c - e;
        out[5] = w[2];
    }
};
struct FilterGradients {                                  // G' s: 6 -> 3
    static constexpr int from = 6, to = 3;
    INLINE static inline void line(const Vec* s, Vec* out) {
        Vec a = s[1] + s[2], b = s[1] - s[2], c = s[3] + s[4], e = s[3] - s[4];
        out[0] = s[0] * .25f - a * (1.f / 6) + c * (1.f / 24);
        out[1] = e * (1.f / 12) - b * (1.f / 6);
        out[2] = c * (1.f / 6) - a * (1.f / 6) + s[5];
    }
};

// Columns, then rows: get(i, j) is the vector read, put(i, j, v) takes the one made.
template <class Line, class Get, class Put> INLINE inline void transform(const Get& get, const Put& put) {
    Vec between[Line::to][Line::from];
    for (int j = 0; j < Line::from; ++j) {
        Vec column[Line::from], made[Line::to];
        for (int i = 0; i < Line::from; ++i) column[i] = get(i, j);
        Line::line(column, made);
        for (int i = 0; i < Line::to; ++i) between[i][j] = made[i];
    }
    for (int i = 0; i < Line::to; ++i) {
        Vec made[Line::to];
        Line::line(between[i], made);
        for (int j = 0; j < Line::to; ++j) put(i, j, made[j]);
    }
}

// ---- maps and their tiles ------------------------------------------------------------------------------------------

template <int N> struct Number { static constexpr int value = N; };

inline long up(long n, long step) { return (n + step - 1) / step * step; }

constexpr long ROWS = 6, LEFT = 2;                        // of a matrix product, at work side by side; of what is left

struct Shape {
    long n, h, w, c, k, down, across, tiles, padded_c, padded_k, block;
    Shape(long n, long h, long w, long c, long k, long threads)
        : n(n), h(h), w(w), c(c), k(k), down(up(h, TILE) / TILE), across(up(w, TILE) / TILE), tiles(n * down * across),
          padded_c(up(c, W)), padded_k(up(k, W)) {
        long both = padded_c + padded_k;                  // few channels: a block's maps fit; many: filters are reused
        long most = 2048 / both > both / 4 ? 2048 / both : both / 4, share = (tiles + threads - 1) / threads;
        block = up(most < share ? most : share, ROWS);
    }
    long blocks() const { return (tiles + block - 1) / block; }
};

struct Floats {                                           // zeros at first
    float* data;
    explicit Floats(long count) : data((float*)calloc(count, sizeof(float))) {
        if (!data) fprintf(stderr, "compiled layers: out of memory for %ld values\n", count), abort();
    }
    ~Floats() { free(data); }
    operator float*() const { return data; }
};

// The windows of SIZE x SIZE values that begin BEFORE of a tile's own corner, transformed: out [36, block, padded].
template <class Line, int BEFORE, class T>
void windows(const Shape& s, const T* x, long channels, long padded, long first, long count, float* out) {
    constexpr int SIZE = Line::from;
    static const T nothing[W] = {};
    const long product = s.block * padded;
    for (long t = 0; t < count; ++t) {
        long at = first + t, left = at % s.across * TILE - BEFORE, top = at / s.across % s.down * TILE - BEFORE;
        const T* image = x + at / (s.across * s.down) * s.h * s.w * channels;
        const T* pixels[SIZE * SIZE];
        bool inside[SIZE * SIZE];
        for (int i = 0; i < SIZE; ++i)
            for (int j = 0; j < SIZE; ++j) {
                inside[i * SIZE + j] = top + i >= 0 && top + i < s.h && left + j >= 0 && left + j < s.w;
                pixels[i * SIZE + j] = inside[i * SIZE + j] ? image + ((top + i) * s.w + left + j) * channels : nothing;
            }
        bool whole = inside[0] && inside[SIZE - 1] && inside[SIZE * (SIZE - 1)] && inside[SIZE * SIZE - 1];
        float* to = out + t * padded;
        auto put = [=](long q) INLINE {
            return [=](int i, int j, Vec v) INLINE { store(to + (i * WINDOW + j) * product + q, v); };
        };
        long q = 0;
        if (whole)
            for (; q + W <= channels; q += W)
                transform<Line>([&](int i, int j) INLINE { return load(pixels[i * SIZE + j] + q); }, put(q));
        else
            for (; q + W <= channels; q += W)
                transform<Line>([&](int i, int j) INLINE {
                    return load(pixels[i * SIZE + j] + (inside[i * SIZE + j] ? q : 0));
                }, put(q));
        if (q < channels)
            transform<Line>([&](int i, int j) INLINE {
                return load(pixels[i * SIZE + j] + (inside[i * SIZE + j] ? q : 0), channels - q);
            }, put(q));
    }
}

// What the products [36, block, padded_k] of a block's tiles give, into y.
template <class T> void outputs(const Shape& s, const float* products, long first, long count, T* y) {
    const long k = s.k, line = s.w * k, product = s.block * s.padded_k;
    for (long t = 0; t < count; ++t) {
        long at = first + t, left = at % s.across * TILE, top = at / s.across % s.down * TILE;
        T* corner = y + ((at / (s.across * s.down) * s.h + top) * s.w + left) * k;
        long height = s.h - top, width = s.w - left;
        for (long q = 0; q < k; q += W) {
            const float* from = products + t * s.padded_k + q;
            T* to = corner + q;
            auto get = [=](int i, int j) INLINE { return load(from + (i * WINDOW + j) * product); };
            if (height >= TILE && width >= TILE && q + W <= k)
                transform<Outputs>(get, [=](int i, int j, Vec v) INLINE { store(to + i * line + j * k, v); });
            else
                transform<Outputs>(get, [=](int i, int j, Vec v) INLINE {
                    if (i < height && j < width) store(to + i * line + j * k, v, k - q);
                });
        }
    }
}

// ---- the matrix products -------------------------------------------------------------------------------------------

// out[R, V * W] = a[R, depth] b[depth, V * W], or with ADD that more; row, step: a's strides.
template <int R, int V, bool ADD>
INLINE inline void product(const float* a, long row, long step, const float* b, long b_row, long depth, float* out,
                           long out_row) {
    Vec sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = ADD ? load(out + r * out_row + v * W) : Vec{};
    for (long d = 0; d < depth; ++d) {
        Vec line[V];
        for (int v = 0; v < V; ++v) line[v] = load(b + d * b_row + v * W);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sum[r][v] += (a[r * row + d * step] - Vec{}) * line[v];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(out + r * out_row + v * W, sum[r][v]);
}

// The same for `rows` and `columns`, multiples of LEFT and W.
template <bool ADD>
void multiply(const float* a, long rows, long row, long step, const float* b, long columns, long depth, float* out) {
    auto strip = [=](auto wide, long q) INLINE {
        constexpr int V = decltype(wide)::value;
        long r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            product<ROWS, V, ADD>(a + r * row, row, step, b + q, columns, depth, out + r * columns + q, columns);
        for (; r < rows; r += LEFT)
            product<LEFT, V, ADD>(a + r * row, row, step, b + q, columns, depth, out + r * columns + q, columns);
    };
    long q = 0;
    for (; q + 2 * W <= columns; q += 2 * W) strip(Number<2>{}, q);
    if (q < columns) strip(Number<1>{}, q);
}

// ---- forward and backward ------------------------------------------------------------------------------------------

// w [3, 3, c, k] -> [36, c, padded_k].
void filters(const Shape& s, const float* w, float* out, Threads threads) {
    const long k = s.k, padded = s.padded_k, plane = s.c * k, product = s.c * padded;
    share(threads, s.c, [=](long, long first, long last) {
        for (long row = first; row < last; ++row)
            for (long q = 0; q < k; q += W) {
                const float* from = w + row * k + q;
                float* to = out + row * padded + q;
                transform<Filters>([=](int i, int j) INLINE { return load(from + (i * 3 + j) * plane, k - q); },
                                   [=](int i, int j, Vec v) INLINE { store(to + (i * WINDOW + j) * product, v); });
            }
    });
}

template <class T> void convolve(const Shape& s, const T* x, const float* w, T* y, Threads threads) {
    Floats u(PRODUCTS * s.c * s.padded_k);
    filters(s, w, u, threads);
    share(threads, s.blocks(), [&](long, long first, long last) {
        Floats v(PRODUCTS * s.block * s.padded_c), m(PRODUCTS * s.block * s.padded_k);
        for (long b = first * s.block; b < last * s.block && b < s.tiles; b += s.block) {
            long count = s.tiles - b < s.block ? s.tiles - b : s.block;
            windows<Inputs, 1>(s, x, s.c, s.padded_c, b, count, v);
            for (long f = 0; f < PRODUCTS; ++f)
                multiply<false>(v + f * s.block * s.padded_c, up(count, LEFT), s.padded_c, 1,
                                u + f * s.c * s.padded_k, s.padded_k, s.c, m + f * s.block * s.padded_k);
            outputs(s, m, b, count, y);
        }
    });
}

template <class T>
void filter_gradient(const Shape& s, const T* x, const T* dy, float* dw, Threads threads) {
    const long size = PRODUCTS * s.padded_c * s.padded_k, most = (1 << 26) / size + 1;     // sums of 256 MiB or so
    Threads summing = {threads.parallel, threads.count < most ? threads.count : most};
    Floats sums(summing.count * size);
    share(summing, s.blocks(), [&](long id, long first, long last) {
        Floats v(PRODUCTS * s.block * s.padded_c), z(PRODUCTS * s.block * s.padded_k);
        for (long b = first * s.block; b < last * s.block && b < s.tiles; b += s.block) {
            long count = s.tiles - b < s.block ? s.tiles - b : s.block;
            windows<Inputs, 1>(s, x, s.c, s.padded_c, b, count, v);
            windows<OutputGradients, 0>(s, dy, s.k, s.padded_k, b, count, z);
            for (long f = 0; f < PRODUCTS; ++f)
                multiply<true>(v + f * s.block * s.padded_c, s.padded_c, 1, s.padded_c,
                               z + f * s.block * s.padded_k, s.padded_k, count,
                               sums + id * size + f * s.padded_c * s.padded_k);
        }
    });
    share(threads, s.c, [&](long, long first, long last) {
        for (long row = first; row < last; ++row)
            for (long q = 0; q < s.k; q += W) {
                float* to = dw + row * s.k + q;
                long n = s.k - q;
                transform<FilterGradients>([&](int i, int j) INLINE {
                    Vec sum = {};
                    for (long id = 0; id < summing.count; ++id)
                        sum += load(sums + id * size + ((i * WINDOW + j) * s.padded_c + row) * s.padded_k + q);
                    return sum;
                }, [&](int i, int j, Vec v) INLINE { store(to + (i * 3 + j) * s.c * s.k, v, n); });
            }
    });
}

}  // namespace

#define SHAPE int half, long n, long h, long w, long c, long k, Parallel parallel, long count

extern "C" {

void winograd_forward(SHAPE, const void* x, const float* weights, void* y) {
    Shape s(n, h, w, c, k, count);
    if (half) convolve(s, (const bf16*)x, weights, (bf16*)y, {parallel, count});
    else convolve(s, (const float*)x, weights, (float*)y, {parallel, count});
}

void winograd_filter_gradient(SHAPE, const void* x, const void* dy, float* gradient) {
    Shape s(n, h, w, c, k, count);
    if (half) filter_gradient(s, (const bf16*)x, (const bf16*)dy, gradient, {parallel, count});
    else filter_gradient(s, (const float*)x, (const float*)dy, gradient, {parallel, count});
}

}
