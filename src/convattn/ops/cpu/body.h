// The kernels, once for each path: see kernels.cpp.

namespace CONVATTN_PATH {

constexpr int W = 8;
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * W)));

// float32 as it is, and bfloat16 by its upper half
inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline float get(const float* p) { return *p; }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void put(float* p, float v) { *p = v; }

inline Vec load(const uint16_t* p) {
    Half half; std::memcpy(&half, p, sizeof half);
    const Unsigned bits = __builtin_convertvector(half, Unsigned) << 16;
    Vec v; std::memcpy(&v, &bits, sizeof v); return v;
}
inline float get(const uint16_t* p) {
    const uint32_t bits = uint32_t(*p) << 16;
    float v; std::memcpy(&v, &bits, sizeof v); return v;
}
inline void put(uint16_t* p, float v) {
    uint32_t bits; std::memcpy(&bits, &v, sizeof bits);
    // to the nearest, ties to even; a NaN stays one
    *p = v != v ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(uint16_t* p, Vec v) {
    Unsigned bits; std::memcpy(&bits, &v, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Unsigned quiet = {0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0, 0x7fc0};
    bits = (v != v) ? quiet : bits;
    const Half half = __builtin_convertvector(bits, Half);
    std::memcpy(p, &half, sizeof half);
}

inline Vec splat(float v) { return Vec{v, v, v, v, v, v, v, v}; }
inline float sum_of(Vec v) {
    typedef float Quarter __attribute__((vector_size(2 * W)));
    Quarter a[2]; std::memcpy(a, &v, sizeof v);
    const Quarter s = a[0] + a[1];
    return (s[0] + s[2]) + (s[1] + s[3]);
}
inline float max_of(Vec v) {
    typedef float Quarter __attribute__((vector_size(2 * W)));
    Quarter a[2]; std::memcpy(a, &v, sizeof v);
    const Quarter m = a[0] > a[1] ? a[0] : a[1];
    const float x = m[0] > m[2] ? m[0] : m[2], y = m[1] > m[3] ? m[1] : m[3];
    return x > y ? x : y;
}
inline bool none(Int v) {
    typedef int64_t Long __attribute__((vector_size(4 * W)));
    Long l; std::memcpy(&l, &v, sizeof l);
    return !(l[0] | l[1] | l[2] | l[3]);
}
// adds numbers in float32 to sums in double
typedef double Wide __attribute__((vector_size(8 * W)));
inline void add_to(double* sum, Vec v) {
    Wide s; std::memcpy(&s, sum, sizeof s);
    s += __builtin_convertvector(v, Wide);
    std::memcpy(sum, &s, sizeof s);
}
// A batch norm that rides along: what lies in memory is u, and the map is x = weight * hat + bias, hat = inverse * u + offset,
// of each channel. x is computed in the same two steps wherever it is: maxima are found again by being equal.
struct Affine { const float *inverse, *offset, *weight, *bias; };
inline Affine affine_at(const float* p, int64_t c) { return p ? Affine{p, p + c, p + 2 * c, p + 3 * c} : Affine{}; }
// without one
struct Bare {
    static constexpr bool NORM = false;
    Bare() = default;
    Bare(const Affine*, int64_t) {}
    template <class V> V hat(V u, int64_t) const { return u; }
    template <class V> V full(V hat, int64_t) const { return hat; }
};
// where a row is a channel
struct OfRow {
    static constexpr bool NORM = true;
    Vec inverse, offset, weight, bias;
    OfRow() = default;
    OfRow(const Affine* of, int64_t channel)
        : inverse(splat(of->inverse[channel])), offset(splat(of->offset[channel])), weight(splat(of->weight[channel])), bias(splat(of->bias[channel])) {}
    Vec hat(Vec u, int64_t) const { return u * inverse + offset; }
    Vec full(Vec hat, int64_t) const { return hat * weight + bias; }
    float hat(float u, int64_t) const { return u * inverse[0] + offset[0]; }
    float full(float hat, int64_t) const { return hat * weight[0] + bias[0]; }
};
// where channels are in a row
struct InRow {
    static constexpr bool NORM = true;
    Affine of;
    InRow() = default;
    InRow(const Affine* of, int64_t) : of(*of) {}
    Vec hat(Vec u, int64_t i) const { return u * load(of.inverse + i) + load(of.offset + i); }
    Vec full(Vec hat, int64_t i) const { return hat * load(of.weight + i) + load(of.bias + i); }
    float hat(float u, int64_t i) const { return u * of.inverse[i] + of.offset[i]; }
    float full(float hat, int64_t i) const { return hat * of.weight[i] + of.bias[i]; }
};
// the map, or what it is before weight and bias
enum See { FULL, HAT };
template <See SEE, class Norm, class V>
inline V seen(const Norm& norm, V u, int64_t i) {
    const V hat = norm.hat(u, i);
    return SEE == FULL ? norm.full(hat, i) : hat;
}

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Asks for what follows R rows of n, when W places of each are read from i on: the processor itself follows few rows at a
// time. Where one row follows the other it is asked for in the order of memory, which is faster.
template <int R, class T>
ALWAYS_INLINE void prefetch(const T* x, int64_t stride, int64_t n, int64_t i) {
    if (stride == n) {
        const char* next = reinterpret_cast<const char*>(x + R * (n + i));
        for (size_t ahead = 0; ahead < R * W * sizeof(T); ahead += 64) __builtin_prefetch(next + ahead);
    } else if (i * int64_t(sizeof(T)) % 64 == 0)
        for (int r = 0; r < R; ++r) __builtin_prefetch(x + (R + r) * stride + i);
}

// sum, and if asked the maximum, of x[i] * factor[i], or of x[i] without factors
template <bool MAX, bool FACTOR, class Norm, class T>
inline float reduce_row(const T* x, const Norm& norm, const float* factor, int64_t n, float* max) {
    constexpr int64_t BLOCK = 2048;
    double total = 0;
    Vec m0 = splat(LOWEST), m1 = m0;
    float m = LOWEST;
    auto at = [&](int64_t i) { Vec v = seen<FULL>(norm, load(x + i), i); if (FACTOR) v *= load(factor + i); return v; };
    auto value = [&](int64_t i) { const float v = seen<FULL>(norm, get(x + i), i); return FACTOR ? v * factor[i] : v; };
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = std::min(n, first + BLOCK);
        Vec s0 = splat(0.f), s1 = s0, s2 = s0, s3 = s0;
        int64_t i = first;
        for (; i + 4 * W <= last; i += 4 * W) {
            const Vec a = at(i), b = at(i + W), c = at(i + 2 * W), d = at(i + 3 * W);
            s0 += a; s1 += b; s2 += c; s3 += d;
            if (MAX) {
                const Vec e = a > b ? a : b, f = c > d ? c : d;
                m0 = e > m0 ? e : m0; m1 = f > m1 ? f : m1;
            }
        }
        for (; i + W <= last; i += W) {
            const Vec a = at(i);
            s0 += a;
            if (MAX) m0 = a > m0 ? a : m0;
        }
        float s = 0;
        for (; i < last; ++i) {
            const float v = value(i);
            s += v;
            if (MAX) m = v > m ? v : m;
        }
        total += double(sum_of((s0 + s1) + (s2 + s3))) + s;
    }
    if (!MAX) return float(total);
    m0 = m0 > m1 ? m0 : m1;
    const float inside = max_of(m0);
    *max = inside > m ? inside : m;
    // comparisons pass a NaN by; a sum does not
    if (total != total)
        for (int64_t i = 0; i < n; ++i) if (value(i) != value(i)) { *max = value(i); break; }
    return float(total);
}
template <bool MAX, class Norm, class T>
inline float reduce_row(const T* x, const Norm& norm, const float* factor, int64_t n, float* max) {
    return factor ? reduce_row<MAX, true>(x, norm, factor, n, max) : reduce_row<MAX, false>(x, norm, factor, n, max);
}

// adds R rows, each times its scale, to running sums, and takes their maximum into running maxima, place by place
template <int R, bool MAX, See SEE, class Norm, class T>
inline void add_rows(const T* x, int64_t stride, const Affine* affine, int64_t channel, const float* scale, double* sum, float* max, int64_t n) {
    Norm norm[R];
    for (int r = 0; r < R; ++r) norm[r] = Norm(affine, channel + r);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        Vec total = splat(0.f), top = splat(LOWEST);
        if (R > 1) prefetch<R>(x, stride, n, i);
        for (int r = 0; r < R; ++r) {
            Vec v = seen<SEE>(norm[r], load(x + r * stride + i), i);
            if (scale) v *= splat(scale[r]);
            total = r ? total + v : v;
            if (MAX) top = v > top ? v : top;
        }
        add_to(sum + i, total);
        if (MAX) { const Vec m = load(max + i); store(max + i, top > m ? top : m); }
    }
    for (; i < n; ++i)
        for (int r = 0; r < R; ++r) {
            const float u = seen<SEE>(norm[r], get(x + r * stride + i), i), v = scale ? u * scale[r] : u;
            sum[i] += v;
            if (MAX) max[i] = v > max[i] ? v : max[i];
        }
}
template <bool MAX, See SEE, class Norm, class T>
inline void reduce_columns(const T* x, int64_t stride, int64_t rows, const Affine* affine, const float* scale, double* sum, float* max, int64_t n) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8)
        add_rows<8, MAX, SEE, Norm>(x + r * stride, stride, affine, r, scale ? scale + r : nullptr, sum, max, n);
    for (; r < rows; ++r) add_rows<1, MAX, SEE, Norm>(x + r * stride, stride, affine, r, scale ? scale + r : nullptr, sum, max, n);
}

// Where maxima are: the place of each, or -1 where it is in several places or is NaN and nowhere, and the number of places.
struct Places { int32_t *where, *count; };
inline Int load(const int32_t* p) { Int v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(int32_t* p, Int v) { std::memcpy(p, &v, sizeof v); }
inline Int splat(int32_t v) { return Int{v, v, v, v, v, v, v, v}; }
typedef int32_t Quarter __attribute__((vector_size(2 * W)));
inline int32_t sum_of(Int v) {
    Quarter a[2]; std::memcpy(a, &v, sizeof v);
    const Quarter s = a[0] + a[1];
    return (s[0] + s[2]) + (s[1] + s[3]);
}
inline int32_t max_of(Int v) {
    Quarter a[2]; std::memcpy(a, &v, sizeof v);
    const Quarter m = a[0] > a[1] ? a[0] : a[1];
    return std::max(std::max(m[0], m[2]), std::max(m[1], m[3]));
}
inline void note_one(const Places& places, int64_t i, int64_t where) {
    places.where[i] = int32_t(where);
    ++places.count[i];
}
inline void begin_notes(const Places& places, int64_t n) {
    std::fill(places.where, places.where + n, 0);
    std::fill(places.count, places.count + n, 0);
}
inline void end_notes(const Places& places, int64_t n) {
    for (int64_t i = 0; i < n; ++i) places.where[i] = places.count[i] == 1 ? places.where[i] : -1;
}
// what a summary or the poolings of a map are, and the gradients that they got; without maxima where dmax is null
struct Maxima { const float *max, *dmean, *dmax; const int32_t *where, *count; };

// the shape of a map, its order in memory, and the threads that it is worth
struct Map { int64_t b, c, n; bool last; int threads; };

// positions of channels-first maps of which the running sums stay in the first cache
constexpr int64_t TILE = 2048;
// elements that one unit of work takes at least
constexpr int64_t UNIT = 16384;
inline int64_t rows_for(int64_t width) { return std::max<int64_t>(1, UNIT / std::max<int64_t>(1, width)); }
inline int64_t units(int64_t n, int64_t size) { return (n + size - 1) / size; }
// so many positions at most, in tiles that can be shared among the threads
inline int64_t tile_of(const Map& map, int64_t most) {
    int64_t tiles = units(map.n, most);
    while (map.b * tiles % map.threads && tiles * 256 < map.n) ++tiles;
    return (units(map.n, tiles) + W - 1) / W * W;
}
// positions of channels-last maps that one unit of work takes
inline int64_t rows_of_unit(const Map& map) {
    const int64_t fair = (map.b * map.n + 4 * map.threads - 1) / (4 * map.threads);
    return std::max<int64_t>(1, std::min({std::max(2 * rows_for(map.c), fair), map.n}));
}
// work(row) for all rows, some of them in each unit
template <class Work>
inline void each_row(const Map& map, int64_t rows, int64_t width, const Work& work) {
    const int64_t some = rows_for(width);
    parallel(map.threads, units(rows, some), [&](int64_t unit) {
        for (int64_t row = unit * some; row < std::min(rows, (unit + 1) * some); ++row) work(row);
    });
}

// work(row, begin, size) for all rows of all samples in tiles, so that what all rows of a sample need stays in a cache
template <class Work>
inline void each_tile(const Map& map, int64_t height, int64_t width, const Work& work) {
    const int64_t tile = map.last ? width : tile_of(map, 2 * TILE), some = rows_for(std::min(tile, width));
    const int64_t wide = units(width, tile), high = units(height, some);
    parallel(map.threads, map.b * wide * high, [&](int64_t unit) {
        const int64_t sample = unit / (wide * high), begin = unit / high % wide * tile, first = unit % high * some;
        for (int64_t row = first; row < std::min(height, first + some); ++row)
            work(sample * height + row, begin, std::min(tile, width - begin));
    });
}

// mean and, if asked, maximum of each channel over its positions
template <class T>
void pool(const Map& map, const T* x, float* mean, float* max) {
    const int64_t b = map.b, c = map.c, n = map.n;
    const bool last = map.last;
    const int threads = map.threads;
    if (!last)
        return each_row(map, b * c, n, [&](int64_t row) {
            const float* no_factor = nullptr;
            const float s = max ? reduce_row<true, false>(x + row * n, Bare(), no_factor, n, max + row)
                                : reduce_row<false, false>(x + row * n, Bare(), no_factor, n, nullptr);
            mean[row] = s / float(n);
        });
    const int64_t rows = rows_of_unit(map), parts = units(n, rows);
    std::vector<double> sums(size_t(b * parts * c), 0.0);
    std::vector<float> tops(max ? size_t(b * parts * c) : 0, LOWEST);
    parallel(threads, b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, begin = unit % parts * rows, size = std::min(rows, n - begin);
        const T* from = x + (sample * n + begin) * c;
        if (max) reduce_columns<true, FULL, Bare>(from, c, size, nullptr, nullptr, &sums[unit * c], &tops[unit * c], c);
        else reduce_columns<false, FULL, Bare>(from, c, size, nullptr, nullptr, &sums[unit * c], nullptr, c);
    });
    each_row(map, b, c * parts, [&](int64_t sample) {
        for (int64_t j = 0; j < c; ++j) {
            double total = 0;
            float top = LOWEST;
            for (int64_t unit = sample * parts; unit < (sample + 1) * parts; ++unit) {
                total += sums[unit * c + j];
                if (max) top = tops[unit * c + j] > top ? tops[unit * c + j] : top;
            }
            if (max && total != total)
                for (int64_t i = 0; i < n; ++i) {
                    const float v = get(x + (sample * n + i) * c + j);
                    if (v != v) { top = v; break; }
                }
            mean[sample * c + j] = float(total) / float(n);
            if (max) max[sample * c + j] = top;
        }
    });
}

// Of each channel of each sample the mean, the sum of squares around it, the largest and the smallest value.
struct Statistics { float *mean, *squares, *max, *min; };
// in float32 over so many rows, and together in double
constexpr int64_t ROWS = 64;
struct Moments {
    double count = 0, sum = 0, squares = 0;
    float max = LOWEST, min = -LOWEST;
};
// the sums are those around a value that is near the mean, so that squares do not cancel
template <class T>
inline Moments moments_of_row(const T* x, int64_t n, float near) {
    Moments found;
    found.count = double(n);
    Vec top = splat(LOWEST), bottom = splat(-LOWEST);
    const Vec k = splat(near);
    int64_t i = 0;
    while (i + W <= n) {
        Vec s[2] = {splat(0.f), splat(0.f)}, q[2] = {splat(0.f), splat(0.f)};
        int one = 0;
        for (const int64_t end = std::min(n, i + 256 * W); i + W <= end; i += W, one ^= 1) {
            const Vec v = load(x + i), d = v - k;
            s[one] += d; q[one] += d * d;
            top = v > top ? v : top; bottom = v < bottom ? v : bottom;
        }
        found.sum += sum_of(s[0] + s[1]); found.squares += sum_of(q[0] + q[1]);
    }
    found.max = max_of(top); found.min = -max_of(-bottom);
    for (; i < n; ++i) {
        const float v = get(x + i), d = v - near;
        found.sum += d; found.squares += double(d) * d;
        found.max = v > found.max ? v : found.max; found.min = v < found.min ? v : found.min;
    }
    return found;
}
// rows of channels, to arrays of four numbers for each
template <int R, class T>
inline void add_moments(const T* x, int64_t n, const float* near, float* sum, float* squares, float* max, float* min) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        Vec s = load(sum + i), q = load(squares + i), top = load(max + i), bottom = load(min + i);
        const Vec k = load(near + i);
        if (R > 1) prefetch<R>(x, n, n, i);
        for (int r = 0; r < R; ++r) {
            const Vec v = load(x + r * n + i), d = v - k;
            s += d; q += d * d;
            top = v > top ? v : top; bottom = v < bottom ? v : bottom;
        }
        store(sum + i, s); store(squares + i, q); store(max + i, top); store(min + i, bottom);
    }
    for (; i < n; ++i)
        for (int r = 0; r < R; ++r) {
            const float v = get(x + r * n + i), d = v - near[i];
            sum[i] += d; squares[i] += d * d;
            max[i] = v > max[i] ? v : max[i]; min[i] = v < min[i] ? v : min[i];
        }
}
inline float finite_or_zero(float v) { return std::isfinite(v) ? v : 0.f; }

template <class T>
void statistics(const Map& map, const T* x, const Statistics& to) {
    const int64_t b = map.b, c = map.c, n = map.n;
    auto note = [&](int64_t at, const Moments& m, float near, int64_t stride, const T* from) {
        to.mean[at] = float(near + m.sum / double(n));
        to.squares[at] = float(std::max(0.0, m.squares - m.sum * m.sum / double(n)));
        to.max[at] = m.max; to.min[at] = m.min;
        if (m.sum == m.sum) return;
        // comparisons pass a NaN by; a sum does not
        to.squares[at] = std::numeric_limits<float>::quiet_NaN();
        for (int64_t i = 0; i < n; ++i) if (get(from + i * stride) != get(from + i * stride)) { to.max[at] = to.min[at] = std::numeric_limits<float>::quiet_NaN(); break; }
    };
    if (!map.last)
        return each_row(map, b * c, n, [&](int64_t row) {
            const float near = finite_or_zero(get(x + row * n));
            note(row, moments_of_row(x + row * n, n, near), near, 1, x + row * n);
        });
    const int64_t rows = rows_of_unit(map), parts = units(n, rows);
    std::vector<float> near(size_t(b * c));
    for (int64_t at = 0; at < b * c; ++at) near[at] = finite_or_zero(get(x + at / c * n * c + at % c));
    std::vector<Moments> found(size_t(b * parts * c));
    parallel(map.threads, b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, begin = unit % parts * rows, end = std::min(n, begin + rows);
        std::vector<float> some(size_t(4 * c), 0.f);
        float *sum = some.data(), *squares = sum + c, *max = squares + c, *min = max + c;
        std::fill(max, max + c, LOWEST); std::fill(min, min + c, -LOWEST);
        Moments* here = &found[unit * c];
        for (int64_t row = begin; row < end;) {
            const int64_t until = std::min(end, row + ROWS);
            std::fill(sum, sum + 2 * c, 0.f);
            const T* from = x + (sample * n + row) * c;
            for (; row + 4 <= until; row += 4, from += 4 * c) add_moments<4>(from, c, &near[sample * c], sum, squares, max, min);
            for (; row < until; ++row, from += c) add_moments<1>(from, c, &near[sample * c], sum, squares, max, min);
            for (int64_t j = 0; j < c; ++j) { here[j].sum += sum[j]; here[j].squares += squares[j]; }
        }
        for (int64_t j = 0; j < c; ++j) { here[j].max = max[j]; here[j].min = min[j]; }
    });
    each_row(map, b, c * parts, [&](int64_t sample) {
        for (int64_t j = 0; j < c; ++j) {
            Moments total;
            for (int64_t unit = sample * parts; unit < (sample + 1) * parts; ++unit) {
                const Moments& one = found[unit * c + j];
                total.sum += one.sum; total.squares += one.squares;
                total.max = one.max > total.max ? one.max : total.max; total.min = one.min < total.min ? one.min : total.min;
            }
            note(sample * c + j, total, near[sample * c + j], c, x + sample * n * c + j);
        }
    });
}

// What a norm makes of statistics: its four numbers for each channel (4, C), mean and biased variance of the batch in
// training and else the running ones (2, C), and of hat and x the means and of x the maxima (B, C) each.
struct Normed { float *affine, *moments, *hat, *mean, *max; };
inline void normalise(int64_t b, int64_t c, int64_t n, bool training, double eps, const Statistics& of, const float* weight,
                      const float* bias, const Normed& to) {
    for (int64_t j = 0; j < c; ++j) {
        if (training) {
            double total = 0, squares = 0;
            for (int64_t sample = 0; sample < b; ++sample) total += of.mean[sample * c + j];
            const double mean = total / double(b);
            for (int64_t sample = 0; sample < b; ++sample) {
                const double d = of.mean[sample * c + j] - mean;
                squares += of.squares[sample * c + j] + double(n) * d * d;
            }
            to.moments[j] = float(mean);
            to.moments[c + j] = float(squares / (double(b) * double(n)));
        }
        const double inverse = 1 / std::sqrt(double(to.moments[c + j]) + eps);
        to.affine[j] = float(inverse);
        to.affine[c + j] = float(-double(to.moments[j]) * inverse);
        to.affine[2 * c + j] = weight ? weight[j] : 1.f;
        to.affine[3 * c + j] = bias ? bias[j] : 0.f;
    }
    const Affine affine = affine_at(to.affine, c);
    const InRow norm(&affine, 0);
    for (int64_t at = 0; at < b * c; ++at) {
        const int64_t j = at % c;
        to.hat[at] = norm.hat(of.mean[at], j);
        to.mean[at] = norm.full(to.hat[at], j);
        // the norm keeps or turns round the order of values
        to.max[at] = seen<FULL>(norm, affine.weight[j] < 0 ? of.min[at] : of.max[at], j);
    }
}

// mean and maximum of each position over its channels, of x or of x with its channels gated
template <class Down, class Along, class T>
void summarise(const Map& map, const T* x, const Affine* affine, const float* gate, float* mean, float* max) {
    const int64_t b = map.b, c = map.c, n = map.n;
    const bool last = map.last;
    const int threads = map.threads;
    if (last)
        return each_row(map, b * n, c, [&](int64_t row) {
            mean[row] = reduce_row<true>(x + row * c, Along(affine, 0), gate ? gate + row / n * c : nullptr, c, max + row) / float(c);
        });
    const int64_t tile = tile_of(map, TILE), parts = units(n, tile);
    parallel(threads, b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, begin = unit % parts * tile, size = std::min(tile, n - begin);
        const T* from = x + sample * c * n + begin;
        const float* scale = gate ? gate + sample * c : nullptr;
        double sum[TILE] = {};
        float* top = max + sample * n + begin;
        std::fill(top, top + size, LOWEST);
        reduce_columns<true, FULL, Down>(from, n, c, affine, scale, sum, top, size);
        for (int64_t i = 0; i < size; ++i) {
            mean[sample * n + begin + i] = float(sum[i]) / float(c);
            if (sum[i] != sum[i])
                for (int64_t j = 0; j < c; ++j) {
                    const float v = seen<FULL>(Down(affine, j), get(from + j * n + i), i) * (scale ? scale[j] : 1.f);
                    if (v != v) { top[i] = v; break; }
                }
        }
    });
}
template <class T>
void summarise(const Map& map, const T* x, const Affine* affine, const float* gate, float* mean, float* max) {
    if (affine) summarise<OfRow, InRow>(map, x, affine, gate, mean, max);
    else summarise<Bare, Bare>(map, x, affine, gate, mean, max);
}

// one row of y = x * places[i] * scale in the order channel, then position, and with a shortcut max(0, that + shortcut)
template <bool PLACES, bool SCALE, bool SHORTCUT, class Norm, class T>
inline void gate_row(const T* x, const Norm& norm, T* y, const float* places, float scale, bool scale_first, const T* shortcut, int64_t n) {
    const Vec s = splat(scale);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        Vec v = seen<FULL>(norm, load(x + i), i);
        if (SCALE && scale_first) v *= s;
        if (PLACES) v *= load(places + i);
        if (SCALE && !scale_first) v *= s;
        if (SHORTCUT) { v += load(shortcut + i); v = v < splat(0.f) ? splat(0.f) : v; }
        store(y + i, v);
    }
    for (; i < n; ++i) {
        float v = seen<FULL>(norm, get(x + i), i);
        if (SCALE && scale_first) v *= scale;
        if (PLACES) v *= places[i];
        if (SCALE && !scale_first) v *= scale;
        if (SHORTCUT) { v += get(shortcut + i); v = v < 0 ? 0 : v; }
        put(y + i, v);
    }
}

// y = x * channel gate * spatial gate, or max(0, that + shortcut)
template <class T>
void apply(const Map& map, const T* x, const Affine* affine, const float* channel, const float* spatial, const T* shortcut, T* y) {
    const int64_t b = map.b, c = map.c, n = map.n;
    const bool last = map.last;
    const int64_t width = last ? c : n, height = last ? n : c;
    expect(y, b * c * n * int64_t(sizeof(T)));
    const float* places = last ? channel : spatial;
    const float* scales = last ? spatial : channel;
    auto rows = [&](auto has_places, auto has_scales, auto has_shortcut, auto norm) {
        each_row(map, b * height, width, [&](int64_t row) {
            gate_row<has_places, has_scales, has_shortcut>(
                x + row * width, decltype(norm)(affine, last ? 0 : row % c), y + row * width,
                places ? places + row / height * width : nullptr, scales ? scales[row] : 1.f, !last,
                shortcut ? shortcut + row * width : nullptr, width);
        });
    };
    auto with_norm = [&](auto has_places, auto has_scales, auto has_shortcut) {
        if (!affine) rows(has_places, has_scales, has_shortcut, Bare());
        else if (last) rows(has_places, has_scales, has_shortcut, InRow());
        else rows(has_places, has_scales, has_shortcut, OfRow());
    };
    auto with = [&](auto has_shortcut) {
        if (places && scales) with_norm(std::true_type{}, std::true_type{}, has_shortcut);
        else if (places) with_norm(std::true_type{}, std::false_type{}, has_shortcut);
        else with_norm(std::false_type{}, std::true_type{}, has_shortcut);
    };
    if (shortcut) with(std::true_type{});
    else with(std::false_type{});
}

// What the gradients of the gates are computed from, row by row. A row is a channel or, channels last, a position.
struct Rows {
    int64_t width, stride;
    // gates of the row, and of the places in it
    const float *own, *across;
    // maxima over the channels, for the rows or for the places in them, of the map with its channels gated or not
    const float* max;
    bool gated;
    Places places;
    const Affine* affine;
};
enum Find { NOTHING, IN_ROWS, ACROSS_ROWS };
template <Find FIND> using Finding = std::integral_constant<Find, FIND>;

// R rows of t = x * dy: their sums of t * across into found, and sums over the rows of t * own added to sums; and where
// the maxima are. With a norm, for the gradient of the channel gate x is hat, and behind those sums are those with 1 for x.
template <int R, bool DOWN, bool ACROSS, Find FIND, class Norm, class T>
inline void product_rows(const Rows& rows, int64_t row, const T* x, const T* dy, float* found, double* sums, double* more_sums) {
    constexpr bool DOWN_HATS = std::is_same_v<Norm, OfRow>, ACROSS_HATS = std::is_same_v<Norm, InRow>;
    const int64_t n = rows.width;
    const Int steps = {0, 1, 2, 3, 4, 5, 6, 7};
    Norm norm[R];
    Vec plain[R];
    float plain_rest[R];
    for (int r = 0; r < R; ++r) { norm[r] = Norm(rows.affine, row + r); plain[r] = splat(0.f); plain_rest[r] = 0; }
    Vec s[R], own[R], top[R];
    Int where[R], count[R];
    float rest[R];
    for (int r = 0; r < R; ++r) {
        s[r] = splat(0.f); rest[r] = 0; where[r] = count[r] = splat(0);
        own[r] = splat(rows.own ? rows.own[row + r] : 1.f);
        top[r] = splat(FIND == IN_ROWS ? rows.max[row + r] : 0.f);
    }
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Vec a = rows.across ? load(rows.across + i) : splat(1.f);
        Vec total = splat(0.f), plain_total = total;
        const bool across = FIND == ACROSS_ROWS;
        if (R > 1) { prefetch<R>(x, rows.stride, n, i); prefetch<R>(dy, rows.stride, n, i); }
        const Vec tops = across ? load(rows.max + i) : splat(0.f);
        Int at = across ? load(rows.places.where + i) : splat(0), equals = across ? load(rows.places.count + i) : splat(0);
        for (int r = 0; r < R; ++r) {
            const Vec d = load(dy + r * rows.stride + i), hat = norm[r].hat(load(x + r * rows.stride + i), i);
            const Vec v = norm[r].full(hat, i), t = v * d;
            if (ACROSS_HATS && ACROSS) { const Vec g = d * own[r]; total += hat * g; plain_total += g; }
            else if (ACROSS) total += t * own[r];
            if (DOWN_HATS && DOWN) { const Vec g = d * a; s[r] += hat * g; plain[r] += g; }
            else if (DOWN) s[r] += t * a;
            if (across) {
                const Int equal = (rows.gated ? v * own[r] : v) == tops;
                at = equal ? splat(int32_t(row + r)) : at;
                equals -= equal;
            }
            if (FIND == IN_ROWS) {
                const Int equal = (rows.gated ? v * a : v) == top[r];
                where[r] = equal ? steps + int32_t(i) : where[r];
                count[r] -= equal;
            }
        }
        if (ACROSS) add_to(sums + i, total);
        if (ACROSS && ACROSS_HATS) add_to(more_sums + i, plain_total);
        if (across) { store(rows.places.where + i, at); store(rows.places.count + i, equals); }
    }
    for (int r = 0; r < R && FIND == IN_ROWS; ++r) {
        rows.places.where[row + r] = max_of(where[r]);
        rows.places.count[row + r] = sum_of(count[r]);
    }
    for (; i < n; ++i)
        for (int r = 0; r < R; ++r) {
            const float d = get(dy + r * rows.stride + i), hat = norm[r].hat(get(x + r * rows.stride + i), i);
            const float v = norm[r].full(hat, i), t = v * d, a = rows.across ? rows.across[i] : 1.f;
            if (ACROSS_HATS && ACROSS) { sums[i] += hat * (d * own[r][0]); more_sums[i] += d * own[r][0]; }
            else if (ACROSS) sums[i] += t * own[r][0];
            if (DOWN_HATS && DOWN) { rest[r] += hat * (d * a); plain_rest[r] += d * a; }
            else if (DOWN) rest[r] += t * a;
            if (FIND == ACROSS_ROWS && (rows.gated ? v * own[r][0] : v) == rows.max[i]) note_one(rows.places, i, row + r);
            if (FIND == IN_ROWS && (rows.gated ? v * a : v) == rows.max[row + r]) note_one(rows.places, row + r, i);
        }
    for (int r = 0; r < R && DOWN; ++r) { found[r] = sum_of(s[r]) + rest[r]; found[R + r] = sum_of(plain[r]) + plain_rest[r]; }
}

// Gradients of both gates from that of y; either gate may be absent, and then its gradient is as well. With maxima over
// the channels, of the map whose channels are gated or of the map, also where they are. With a norm there is a channel
// gate, and in place of its gradient are the sums of dy * spatial times hat, and those of dy * spatial (2, B, C).
template <class T>
void grad_gates(const Map& map, const T* x, const T* dy, const Affine* affine, const float* channel, const float* spatial,
                const float* max, bool gated, float* dchannel, float* dspatial, int32_t* places) {
    const int64_t b = map.b, c = map.c, n = map.n;
    const bool last = map.last;
    const int threads = map.threads;
    const int64_t width = last ? c : n, height = last ? n : c;
    const float* across = last ? channel : spatial;
    const float* own = last ? spatial : channel;
    float* dacross = last ? dchannel : dspatial;
    float* down = last ? dspatial : dchannel;
    const int64_t tile = last ? width : tile_of(map, TILE), tall = last ? rows_of_unit(map) : height;
    const int64_t wide_parts = units(width, tile), tall_parts = units(height, tall);
    // with a norm each sum is two
    const int64_t owns = affine && !last ? 2 : 1, acrosses = affine && last ? 2 : 1;
    std::vector<float> partial_own(down && wide_parts > 1 ? size_t(owns * b * height * wide_parts) : 0);
    std::vector<double> partial_across(dacross ? size_t(acrosses * b * width * tall_parts) : 0, 0.0);
    float* every_own = wide_parts > 1 ? partial_own.data() : down;
    auto all = [&](auto has_down, auto has_across, auto find, auto norm) {
        parallel(threads, b * wide_parts * tall_parts, [&](int64_t unit) {
            const int64_t sample = unit / (wide_parts * tall_parts), wide = unit / tall_parts % wide_parts, high = unit % tall_parts;
            const int64_t begin = wide * tile, size = std::min(tile, width - begin), end = std::min(height, (high + 1) * tall);
            const int64_t before = sample * height, place = sample * width + begin, at = last ? before : place;
            const Rows rows{size, width, own ? own + before : nullptr, across ? across + place : nullptr, max ? max + at : nullptr, gated,
                            {max ? places + at : nullptr, max ? places + b * n + at : nullptr}, affine};
            if (find == ACROSS_ROWS) begin_notes(rows.places, size);
            double* sums = dacross ? &partial_across[(sample * tall_parts + high) * width + begin] : nullptr;
            double* more_sums = acrosses == 2 ? sums + b * tall_parts * width : nullptr;
            for (int64_t row = high * tall; row < end;) {
                const int64_t from = (before + row) * width + begin;
                float found[8];
                const int some = row + 4 <= end ? 4 : 1;
                (some == 4 ? product_rows<4, has_down, has_across, find, decltype(norm), T> : product_rows<1, has_down, has_across, find, decltype(norm), T>)(
                    rows, row, x + from, dy + from, found, sums, more_sums);
                for (int r = 0; r < some && has_down; ++r)
                    for (int64_t k = 0; k < owns; ++k) every_own[(k * b * height + before + row + r) * wide_parts + wide] = found[k * some + r];
                row += some;
            }
            if (find == ACROSS_ROWS) end_notes(rows.places, size);
            if (find == IN_ROWS) end_notes({rows.places.where + high * tall, rows.places.count + high * tall}, end - high * tall);
        });
    };
    const std::true_type yes{};
    const std::false_type no{};
    auto with = [&](auto has_down, auto has_across) {
        if (!max) all(has_down, has_across, Finding<NOTHING>{}, Bare());
        else if (last) all(has_down, has_across, Finding<IN_ROWS>{}, Bare());
        else all(has_down, has_across, Finding<ACROSS_ROWS>{}, Bare());
    };
    if (affine && last) {
        if (spatial) all(yes, yes, Finding<IN_ROWS>{}, InRow());
        else all(no, yes, Finding<NOTHING>{}, InRow());
    } else if (affine) {
        if (spatial) all(yes, yes, Finding<ACROSS_ROWS>{}, OfRow());
        else all(yes, no, Finding<NOTHING>{}, OfRow());
    } else if (down && dacross) with(yes, yes);
    else if (down) with(yes, no);
    else with(no, yes);
    if (down && wide_parts > 1)
        each_row(map, owns * b * height, wide_parts, [&](int64_t at) {
            double total = 0;
            for (int64_t part = 0; part < wide_parts; ++part) total += partial_own[at * wide_parts + part];
            down[at] = float(total);
        });
    if (dacross)
        each_row(map, acrosses * b * width, tall_parts, [&](int64_t at) {
            double total = 0;
            for (int64_t part = 0; part < tall_parts; ++part)
                total += partial_across[(at / width * tall_parts + part) * width + at % width];
            dacross[at] = float(total);
        });
}

// R rows: their sums of x * weights, with a norm of hat * weights, and where each is its maximum, with a norm also the sum
// of hat there
template <int R, bool SUM, bool FIND, class Norm, class T>
inline void weigh_rows(const T* x, const Affine* affine, int64_t channel, int64_t n, const float* weights, float* found, const float* max,
                       int32_t* where, int32_t* count, float* hats) {
    double total[R] = {}, at_maxima[R] = {};
    Norm norm[R];
    Vec top[R], hats_of[R];
    Int last[R], equals[R], here = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int r = 0; r < R; ++r) {
        norm[r] = Norm(affine, channel + r);
        top[r] = splat(FIND ? max[r] : 0.f); last[r] = equals[r] = splat(0);
    }
    int64_t i = 0;
    while (i + W <= n) {
        Vec s[R];
        for (int r = 0; r < R; ++r) s[r] = hats_of[r] = splat(0.f);
        for (const int64_t end = std::min(n, i + 512 * W); i + W <= end; i += W, here += W) {
            const Vec w = SUM ? load(weights + i) : splat(0.f);
            if (R > 1) prefetch<R>(x, n, n, i);
            for (int r = 0; r < R; ++r) {
                const Vec hat = norm[r].hat(load(x + r * n + i), i);
                if (SUM) s[r] += hat * w;
                if (!FIND) continue;
                const Int equal = norm[r].full(hat, i) == top[r];
                last[r] = equal ? here : last[r];
                equals[r] -= equal;
                if (Norm::NORM) hats_of[r] += equal ? hat : splat(0.f);
            }
        }
        for (int r = 0; r < R; ++r) {
            if (SUM) total[r] += sum_of(s[r]);
            if (FIND && Norm::NORM) at_maxima[r] += sum_of(hats_of[r]);
        }
    }
    for (int r = 0; r < R; ++r) {
        int32_t place = max_of(last[r]), places = sum_of(equals[r]);
        for (int64_t k = i; k < n; ++k) {
            const float hat = norm[r].hat(get(x + r * n + k), k);
            if (SUM) total[r] += hat * weights[k];
            if (FIND && norm[r].full(hat, k) == max[r]) { place = int32_t(k); ++places; at_maxima[r] += hat; }
        }
        if (SUM) found[r] = float(total[r]);
        if (FIND) { where[r] = places == 1 ? place : -1; count[r] = places; }
        if (FIND && Norm::NORM) hats[r] = float(at_maxima[r]);
    }
}

// Of the gradients of a summary or of poolings of `size` each: that of the mean for each element, and that of a maximum for
// each of its places. Where a maximum is NaN and nowhere, as in torch.amax all elements get NaN, here by way of the mean.
// `tied` tells whether any maximum is in several places, so that who is one has to be asked of the map.
struct Shares {
    std::vector<float> mean, max;
    bool tied = false;
    Shares(int threads, const Maxima* of, int64_t count, int64_t size) : mean(of ? size_t(count) : 0), max(of && of->dmax ? size_t(count) : 0) {
        if (!of) return;
        std::vector<char> found(size_t(units(count, UNIT)), 0);
        parallel(threads, units(count, UNIT), [&](int64_t unit) {
            for (int64_t i = unit * UNIT; i < std::min(count, (unit + 1) * UNIT); ++i) {
                mean[i] = of->dmean ? of->dmean[i] / float(size) : 0.f;
                if (!of->dmax) continue;
                const int32_t places = of->count[i];
                max[i] = places ? of->dmax[i] / float(places) : 0.f;
                if (!places) mean[i] = std::numeric_limits<float>::quiet_NaN();
                found[unit] |= places > 1;
            }
        });
        for (const char one : found) tied |= one != 0;
    }
};

// sum of x, with a norm of hat, times what each element gets from a summary with tied maxima, for a channel; and the sum of
// what it gets
template <class Norm, class T>
inline float tied_row(const T* x, const Norm& norm, float gate, const float* mean, const float* top, const float* share, int64_t n, float* plain) {
    double total = 0, got = 0;
    int64_t i = 0;
    while (i + W <= n) {
        Vec s = splat(0.f), p = s;
        for (const int64_t end = std::min(n, i + 512 * W); i + W <= end; i += W) {
            const Vec hat = norm.hat(load(x + i), i);
            const Int equal = norm.full(hat, i) * splat(gate) == load(top + i);
            const Vec part = load(mean + i) + (equal ? load(share + i) : splat(0.f));
            s += hat * part;
            if (Norm::NORM) p += part;
        }
        total += sum_of(s);
        got += sum_of(p);
    }
    for (; i < n; ++i) {
        const float hat = norm.hat(get(x + i), i), part = mean[i] + (norm.full(hat, i) * gate == top[i] ? share[i] : 0.f);
        total += hat * part;
        got += part;
    }
    *plain = float(got);
    return float(total);
}
// What positions get from a summary: each `mean`, and `share` where it is `top` with its channel gated.
struct Given { const float *mean, *top, *share; };
// Of R rows that are positions, added to running sums of all channels: x, or with a norm hat, times what it gets, and with
// a norm what it gets; and where the channels' own maxima are, and with a norm the sum of hat there.
struct Found { double *sum, *plain, *hats; Places places; };
template <int R, bool SUM, bool TIED, bool FIND, class Norm, class T>
inline void weigh_positions(const T* x, const Affine* affine, int64_t n, const float* gates, const Given& given, const float* max,
                            int32_t first, const Found& found) {
    const Norm norm(affine, 0);
    Vec means[R], tops[R], shares[R];
    for (int r = 0; r < R; ++r) {
        means[r] = splat(SUM ? given.mean[r] : 0.f);
        tops[r] = splat(TIED ? given.top[r] : 0.f); shares[r] = splat(TIED ? given.share[r] : 0.f);
    }
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        if (R > 1) prefetch<R>(x, n, n, i);
        const Vec top = FIND ? load(max + i) : splat(0.f), gate = TIED && gates ? load(gates + i) : splat(1.f);
        Int where = FIND ? load(found.places.where + i) : splat(0), count = splat(0);
        Vec sum = splat(0.f), plain = sum, hats = sum;
        for (int r = 0; r < R; ++r) {
            const Vec hat = norm.hat(load(x + r * n + i), i), v = norm.full(hat, i);
            if (SUM) {
                Vec part = means[r];
                if (TIED) part += v * gate == tops[r] ? shares[r] : splat(0.f);
                sum += hat * part;
                if (TIED && Norm::NORM) plain += part;
            }
            if (FIND) {
                const Int equal = v == top;
                where = equal ? splat(first + r) : where;
                count -= equal;
                if (Norm::NORM) hats += equal ? hat : splat(0.f);
            }
        }
        if (SUM) add_to(found.sum + i, sum);
        if (SUM && TIED && Norm::NORM) add_to(found.plain + i, plain);
        if (FIND && !none(count)) {
            store(found.places.where + i, where);
            store(found.places.count + i, load(found.places.count + i) + count);
            if (Norm::NORM) add_to(found.hats + i, hats);
        }
    }
    for (; i < n; ++i)
        for (int r = 0; r < R; ++r) {
            const float hat = norm.hat(get(x + r * n + i), i), v = norm.full(hat, i);
            if (SUM) {
                const float part = given.mean[r] + (TIED && (gates ? v * gates[i] : v) == given.top[r] ? given.share[r] : 0.f);
                found.sum[i] += hat * part;
                if (TIED && Norm::NORM) found.plain[i] += part;
            }
            if (!FIND || v != max[i]) continue;
            note_one(found.places, i, first + r);
            if (Norm::NORM) found.hats[i] += hat;
        }
}

// Adds to the gradient of the channel gate what comes to it by the summary, sum of x * (dmean / C + dmax where largest),
// where there is a summary; and finds where the maxima over the positions are, where they are given. With a norm it adds
// to the two sums of `grad_gates`, and hats are those of all places of a maximum together.
template <class Down, class Along, class T>
void grad_summary(const Map& map, const T* x, const Affine* affine, const float* channel, const Maxima* summary, const float* max,
                  float* dchannel, int32_t* places, float* hats) {
    const int64_t b = map.b, c = map.c, n = map.n;
    const bool last = map.last;
    const int threads = map.threads;
    const Shares shares(threads, summary, b * n, c);
    float* plain = affine && summary ? dchannel + b * c : nullptr;
    // what each channel of a sample gets by the means is the same
    if (plain && !shares.tied)
        for (int64_t sample = 0; sample < b; ++sample) {
            double total = 0;
            for (int64_t i = sample * n; i < (sample + 1) * n; ++i) total += shares.mean[i];
            for (int64_t j = sample * c; j < (sample + 1) * c; ++j) plain[j] += float(total);
        }
    // with ties each element is asked whether it is a maximum; without them the products are read off the maxima below
    if (!last) {
        auto rows = [&](auto sum, auto find) {
            const int64_t some = (rows_for(n) + 3) / 4 * 4, parts = units(c, some);
            parallel(threads, b * parts, [&](int64_t unit) {
                const int64_t sample = unit / parts, end = std::min(c, (unit % parts + 1) * some);
                for (int64_t j = unit % parts * some; j < end;) {
                    const int64_t row = sample * c + j;
                    const int many = j + 4 <= end ? 4 : 1;
                    float found[4];
                    const float* weights = sum ? &shares.mean[sample * n] : nullptr;
                    (many == 4 ? weigh_rows<4, sum, find, Down, T> : weigh_rows<1, sum, find, Down, T>)(
                        x + row * n, affine, j, n, weights, found, max + (find ? row : 0), places + (find ? row : 0),
                        places + (find ? b * c + row : 0), hats + (hats ? row : 0));
                    for (int r = 0; r < many && sum; ++r) dchannel[row + r] += found[r];
                    j += many;
                }
            });
        };
        if (shares.tied)
            each_row(map, b * c, n, [&](int64_t row) {
                const int64_t at = row / c * n;
                float got;
                dchannel[row] += tied_row(x + row * n, Down(affine, row % c), channel ? channel[row] : 1.f, &shares.mean[at],
                                          summary->max + at, &shares.max[at], n, &got);
                if (plain) plain[row] += got;
            });
        const bool sum = summary && !shares.tied;
        if (sum && max) rows(std::true_type{}, std::true_type{});
        else if (sum) rows(std::true_type{}, std::false_type{});
        else if (max) rows(std::false_type{}, std::true_type{});
    } else {
        const int64_t rows = rows_of_unit(map), parts = units(n, rows), size_of_sums = summary ? b * parts * c : 0;
        std::vector<double> sums(size_t((plain ? 2 : 1) * size_of_sums), 0.0), found_hats(hats ? size_t(b * parts * c) : 0, 0.0);
        std::vector<int32_t> noted(max ? size_t(2 * b * parts * c) : 0, 0);
        auto all = [&](auto has_sum, auto is_tied, auto finds) {
            parallel(threads, b * parts, [&](int64_t unit) {
                const int64_t sample = unit / parts, begin = unit % parts * rows, end = std::min(n, begin + rows);
                const float *top = max + (finds ? sample * c : 0), *gates = channel ? channel + sample * c : nullptr;
                double* sum = has_sum ? &sums[unit * c] : nullptr;
                const Found found{sum, plain ? sum + size_of_sums : nullptr, hats ? &found_hats[unit * c] : nullptr,
                                  {finds ? &noted[2 * unit * c] : nullptr, finds ? &noted[(2 * unit + 1) * c] : nullptr}};
                for (int64_t row = begin; row < end;) {
                    const int64_t at = sample * n + row;
                    Given given{};
                    if (has_sum) given = {&shares.mean[at], summary->max + at, is_tied ? &shares.max[at] : nullptr};
                    const bool many = row + 8 <= end;
                    (many ? weigh_positions<8, has_sum, is_tied, finds, Along, T> : weigh_positions<1, has_sum, is_tied, finds, Along, T>)(
                        x + at * c, affine, c, gates, given, top, int32_t(row), found);
                    row += many ? 8 : 1;
                }
            });
        };
        const std::true_type yes{};
        const std::false_type no{};
        if (shares.tied && max) all(yes, yes, yes);
        else if (shares.tied) all(yes, yes, no);
        else if (summary && max) all(yes, no, yes);
        else if (summary) all(yes, no, no);
        else all(no, no, yes);
        each_row(map, b, c * parts, [&](int64_t sample) {
            for (int64_t j = 0; j < c; ++j) {
                double total = 0, got = 0, hats_there = 0;
                int32_t where = 0, count = 0;
                for (int64_t unit = sample * parts; unit < (sample + 1) * parts; ++unit) {
                    if (summary) total += sums[unit * c + j];
                    if (plain) got += sums[size_of_sums + unit * c + j];
                    if (!max || !noted[(2 * unit + 1) * c + j]) continue;
                    where = noted[2 * unit * c + j];
                    count += noted[(2 * unit + 1) * c + j];
                    if (hats) hats_there += found_hats[unit * c + j];
                }
                const int64_t at = sample * c + j;
                if (summary) dchannel[at] += float(total);
                if (plain) plain[at] += float(got);
                if (max) { places[at] = count == 1 ? where : -1; places[b * c + at] = count; }
                if (hats) hats[at] = float(hats_there);
            }
        });
    }
    if (!summary || shares.tied) return;
    // By the maxima. What was multiplied with the gate to give one is known without reading the map, but for tiny numbers.
    const int64_t some = std::max<int64_t>(4096, 8 * c), parts = units(n, some);
    std::vector<double> totals(size_t((plain ? 2 : 1) * b * parts * c), 0.0);
    parallel(threads, b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, begin = unit % parts * some;
        double* total = &totals[unit * c];
        for (int64_t i = begin; i < std::min(n, begin + some); ++i) {
            const int64_t at = sample * n + i;
            const int32_t where = summary->where[at];
            // NaN, which has come by the mean
            if (where < 0) continue;
            const float max = summary->max[at], gate = channel ? channel[sample * c + where] : 1.f;
            bool known = std::fabs(max) > 1e-30f && std::fabs(gate) > 1e-30f;
            float v = max / gate;
            if (Down::NORM) {
                // what the bias is large beside is not to be had from the sum with it
                known = known && std::fabs(v) < 4 * std::fabs(affine->weight[where]);
                v = (v - affine->bias[where]) / affine->weight[where];
            }
            if (!known) v = Down(affine, where).hat(get(x + (last ? at * c + where : (sample * c + where) * n + i)), 0);
            total[where] += double(v) * shares.max[at];
            if (plain) total[b * parts * c + where] += shares.max[at];
        }
    });
    each_row(map, (plain ? 2 : 1) * b * c, parts, [&](int64_t row) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part) total += totals[(row / c * parts + part) * c + row % c];
        dchannel[row] += float(total);
    });
}
template <class T>
void grad_summary(const Map& map, const T* x, const Affine* affine, const float* channel, const Maxima* summary, const float* max,
                  float* dchannel, int32_t* places, float* hats) {
    if (affine) grad_summary<OfRow, InRow>(map, x, affine, channel, summary, max, dchannel, places, hats);
    else grad_summary<Bare, Bare>(map, x, affine, channel, summary, max, dchannel, places, hats);
}

// What the gradient of the map is computed from: dx = (dy * spatial + summary) * channel + pools. A row is a channel or,
// channels last, a position; what varies within it is an array, what does not is a number.
struct Maximum { const float *top, *share; float own_top, own_share; };
// With a norm the gradient of u is out * dx - (slope * u + level).
struct Behind { const float *out, *slope, *level; };
struct Terms {
    const Affine* affine;
    Behind behind;
    const float *spatial, *summary, *channel, *pools;
    float own_spatial, own_summary, own_channel, own_pools;
    Maximum over_channels, over_positions;
    // channels first and without ties: where each maximum over the channels is
    const int32_t* where;
    int32_t row;
};
template <bool LAST, bool GATED, bool SUMMARY, bool POOLS, bool TIED, class Norm, class T>
inline void linear_row(const T* x, const T* dy, T* dx, const Terms& t, int64_t n) {
    // in a norm by row its three numbers are for the row
    const Norm norm(t.affine, LAST ? 0 : t.row);
    const Behind& behind = t.behind;
    const Vec out = splat(Norm::NORM ? *behind.out : 1.f), slope = splat(Norm::NORM ? *behind.slope : 0.f), level = splat(Norm::NORM ? *behind.level : 0.f);
    const Vec spatial = splat(t.own_spatial), summary = splat(t.own_summary), channel = splat(t.own_channel), pools = splat(t.own_pools);
    const Int here = splat(t.row);
    const Maximum &c = t.over_channels, &p = t.over_positions;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        Vec v = load(dy + i), given = splat(0.f);
        const Vec u = TIED || Norm::NORM ? load(x + i) : splat(0.f);
        if (TIED) given = seen<FULL>(norm, u, i);
        const Vec gate = !LAST ? channel : GATED ? load(t.channel + i) : splat(1.f);
        if (LAST) v *= spatial;
        else if (GATED) v *= load(t.spatial + i);
        if (SUMMARY) v += LAST ? summary : load(t.summary + i);
        if (SUMMARY && TIED) {
            const Int equal = given * gate == (LAST ? splat(c.own_top) : load(c.top + i));
            v += equal ? (LAST ? splat(c.own_share) : load(c.share + i)) : splat(0.f);
        } else if (SUMMARY && !LAST) v += load(t.where + i) == here ? load(c.share + i) : splat(0.f);
        v *= gate;
        if (POOLS) v += LAST ? load(t.pools + i) : pools;
        if (POOLS && TIED) {
            const Int equal = given == (LAST ? load(p.top + i) : splat(p.own_top));
            v += equal ? (LAST ? load(p.share + i) : splat(p.own_share)) : splat(0.f);
        }
        if (Norm::NORM && LAST) v = v * load(behind.out + i) - (u * load(behind.slope + i) + load(behind.level + i));
        else if (Norm::NORM) v = v * out - (u * slope + level);
        store(dx + i, v);
    }
    for (; i < n; ++i) {
        const float u = TIED || Norm::NORM ? get(x + i) : 0.f, given = TIED ? seen<FULL>(norm, u, i) : 0.f, gate = !LAST ? t.own_channel : GATED ? t.channel[i] : 1.f;
        float v = get(dy + i);
        v *= LAST ? t.own_spatial : GATED ? t.spatial[i] : 1.f;
        if (SUMMARY) v += LAST ? t.own_summary : t.summary[i];
        if (SUMMARY && TIED) v += given * gate == (LAST ? c.own_top : c.top[i]) ? (LAST ? c.own_share : c.share[i]) : 0.f;
        else if (SUMMARY && !LAST) v += t.where[i] == t.row ? c.share[i] : 0.f;
        v *= gate;
        if (POOLS) v += LAST ? t.pools[i] : t.own_pools;
        if (POOLS && TIED) v += given == (LAST ? p.top[i] : p.own_top) ? (LAST ? p.share[i] : p.own_share) : 0.f;
        const int64_t at = LAST ? i : 0;
        if (Norm::NORM) v = v * behind.out[at] - (u * behind.slope[at] + behind.level[at]);
        put(dx + i, v);
    }
}

// The gradient of x: from y if there is any, from the summary of the gated map, and from the poolings. Neither is gated
// where nothing comes from y. With a norm there are gates and poolings and something from y, and the gradient is that of u,
// from which `through`, the means of the gradients of x and of those times hat (2, C), is taken off as far as the norm was
// one over the batch.
template <class T>
void grad_input(const Map& map, const T* x, const T* dy, const Affine* affine, const float* through, const float* channel, const float* spatial, const Maxima* summary,
                const Maxima* pools, T* dx) {
    const int64_t b = map.b, c = map.c, n = map.n;
    const bool last = map.last;
    const int64_t width = last ? c : n, height = last ? n : c;
    expect(dx, b * c * n * int64_t(sizeof(T)));
    const Shares to_summary(map.threads, summary, b * n, c);
    Shares to_pools(map.threads, pools, b * c, n);
    const bool pool_maxima = pools && pools->dmax, tied = to_summary.tied || to_pools.tied;
    // without maxima none of them gets anything
    const std::vector<float> no_tops(pools && !pool_maxima ? size_t(b * c) : 0, 0.f);
    if (pools && !pool_maxima) to_pools.max = no_tops;
    const float* pool_tops = pool_maxima ? pools->max : no_tops.data();
    const std::vector<T> nothing(dy ? 0 : size_t(width), T(0));
    const float* across = last ? channel : spatial;
    const float* own = last ? spatial : channel;
    std::vector<float> behind(affine ? size_t(3 * c) : 0);
    for (int64_t j = 0; j < c && affine; ++j) {
        const double out = double(affine->weight[j]) * affine->inverse[j], mean = through ? through[j] : 0, slope = through ? through[c + j] : 0;
        behind[j] = float(out);
        behind[c + j] = float(out * slope * affine->inverse[j]);
        behind[2 * c + j] = float(out * (mean + slope * affine->offset[j]));
    }
    // adds to the element of a row where the maximum of the row is, the row being in the cache
    auto add = [&](int64_t row, int64_t begin, int64_t size, const Shares& shares, const int32_t* where, const float* gates) {
        const int64_t place = where[row] - begin;
        if (where[row] < 0 || place < 0 || place >= size) return;
        T* at = dx + row * width + where[row];
        const float out = affine ? behind[last ? where[row] : row % c] : 1.f;
        put(at, get(at) + shares.max[row] * (gates ? gates[place] : 1.f) * out);
    };
    auto rows = [&](auto is_last, auto is_gated, auto has_summary, auto has_pools, auto is_tied, auto norm) {
        each_tile(map, height, width, [&](int64_t row, int64_t begin, int64_t size) {
            const int64_t before = row / height * width + begin, from = row * width + begin;
            const float* gates = across ? across + before : nullptr;
            const float gate = own ? own[row] : 1.f;
            Terms t{};
            t.affine = affine;
            if (affine) { const float* of = &behind[is_last ? 0 : row % c]; t.behind = {of, of + c, of + 2 * c}; }
            if (is_last) {
                t.own_spatial = gate; t.channel = gates;
                if (has_summary) { t.own_summary = to_summary.mean[row]; t.over_channels = {nullptr, nullptr, summary->max[row], to_summary.max[row]}; }
                if (has_pools) { t.pools = &to_pools.mean[before]; t.over_positions = {pool_tops + before, &to_pools.max[before], 0, 0}; }
            } else {
                t.spatial = gates; t.own_channel = gate; t.row = int32_t(row % height);
                if (has_summary) { t.summary = &to_summary.mean[before]; t.over_channels = {summary->max + before, &to_summary.max[before], 0, 0}; t.where = summary->where + before; }
                if (has_pools) { t.own_pools = to_pools.mean[row]; t.over_positions = {nullptr, nullptr, pool_tops[row], to_pools.max[row]}; }
            }
            linear_row<is_last, is_gated, has_summary, has_pools, is_tied, decltype(norm)>(x + from, dy ? dy + from : nothing.data(), dx + from, t, size);
            if (is_tied) return;
            if (has_summary && is_last) add(row, begin, size, to_summary, summary->where, gates);
            if (has_pools && !is_last && pool_maxima) add(row, begin, size, to_pools, pools->where, nullptr);
        });
    };
    auto with_ties = [&](auto is_last, auto is_gated, auto has_summary, auto has_pools, auto norm) {
        if (tied) rows(is_last, is_gated, has_summary, has_pools, std::true_type{}, norm);
        else rows(is_last, is_gated, has_summary, has_pools, std::false_type{}, norm);
    };
    auto with_pools = [&](auto is_last, auto is_gated, auto has_summary) {
        if (pools) with_ties(is_last, is_gated, has_summary, std::true_type{}, Bare());
        else with_ties(is_last, is_gated, has_summary, std::false_type{}, Bare());
    };
    auto with_summary = [&](auto is_last, auto is_gated) {
        if (summary) with_pools(is_last, is_gated, std::true_type{});
        else with_pools(is_last, is_gated, std::false_type{});
    };
    auto with_gates = [&](auto is_last) {
        if (across) with_summary(is_last, std::true_type{});
        else with_summary(is_last, std::false_type{});
    };
    const std::true_type yes{};
    const std::false_type no{};
    if (affine && last && summary) with_ties(yes, yes, yes, yes, InRow());
    else if (affine && last) with_ties(yes, yes, no, yes, InRow());
    else if (affine && summary) with_ties(no, yes, yes, yes, OfRow());
    else if (affine) with_ties(no, no, no, yes, OfRow());
    else if (last) with_gates(yes);
    else with_gates(no);
    if (!last || tied || !pool_maxima) return;
    // each maximum of a channel is in a row of its own
    each_row(map, b * c, 64, [&](int64_t one) {
        if (pools->where[one] < 0) return;
        T* at = dx + (one / c * n + pools->where[one]) * c + one % c;
        put(at, get(at) + to_pools.max[one] * (affine ? behind[one % c] : 1.f));
    });
}

// The convolution between summary and gate: two channels to one, an odd window, zeros around; and norm and sigmoid behind it.

struct Plane { int64_t b, h, w, kh, kw; int threads; };

// what the windows of some rows of a plane see: zeros around it, and rows of a multiple of W and a window more
struct Padded {
    int64_t stride, top;
    std::vector<float> values;
    Padded(const Plane& p, const float* plane, int64_t begin, int64_t end)
        : stride((p.w + W - 1) / W * W + p.kw + W), top(begin), values(size_t((end - begin + p.kh - 1) * stride), 0.f) {
        const int64_t around = p.kh / 2;
        for (int64_t y = std::max<int64_t>(0, begin - around); y < std::min(p.h, end + around); ++y)
            std::memcpy(&values[(y - begin + around) * stride + p.kw / 2], plane + y * p.w, p.w * sizeof(float));
    }
    // the first row that the window of row y sees
    const float* row(int64_t y) const { return &values[(y - top) * stride]; }
};

inline void store_some(float* p, Vec v, int64_t n) {
    if (n >= W) store(p, v);
    else for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// rows of the sum of planes correlated with windows of kh x kw, each weight given once or `flipped`
inline void correlate(const Padded* const* planes, int count, const float* weights, bool flipped, const Plane& p, int64_t begin,
                      int64_t end, float* out) {
    const int64_t w = p.w, kh = p.kh, kw = p.kw;
    for (int64_t y = begin; y < end; ++y)
        for (int64_t x = 0; x < w; x += 4 * W) {
            Vec a[4] = {splat(0.f), splat(0.f), splat(0.f), splat(0.f)};
            for (int plane = 0; plane < count; ++plane)
                for (int64_t ky = 0; ky < kh; ++ky) {
                    const float* row = planes[plane]->row(y + ky) + x;
                    const float* line = weights + (plane * kh + (flipped ? kh - 1 - ky : ky)) * kw;
                    const int64_t blocks = std::min<int64_t>(4, (w - x + W - 1) / W);
                    if (blocks == 4)
                        for (int64_t kx = 0; kx < kw; ++kx) {
                            const Vec v = splat(line[flipped ? kw - 1 - kx : kx]);
                            for (int b = 0; b < 4; ++b) a[b] += v * load(row + kx + b * W);
                        }
                    else
                        for (int64_t kx = 0; kx < kw; ++kx) {
                            const Vec v = splat(line[flipped ? kw - 1 - kx : kx]);
                            for (int64_t b = 0; b < blocks; ++b) a[b] += v * load(row + kx + b * W);
                        }
                }
            for (int b = 0; b < 4 && x + b * W < w; ++b) store_some(out + y * w + x + b * W, a[b], w - x - b * W);
        }
}

// into how many parts of rows each sample is cut, so that there is work for every thread
inline int64_t parts_of(const Plane& p) { return std::min<int64_t>(p.h, (p.threads + p.b - 1) / p.b); }

// logits (B, H, W) of a summary (2, B, H, W)
inline void conv(const Plane& p, const float* summary, const float* weight, float* out) {
    const int64_t n = p.h * p.w, parts = parts_of(p);
    parallel(p.threads, p.b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, part = unit % parts, begin = p.h * part / parts, end = p.h * (part + 1) / parts;
        const Padded mean(p, summary + sample * n, begin, end), max(p, summary + (p.b + sample) * n, begin, end);
        const Padded* planes[2] = {&mean, &max};
        correlate(planes, 2, weight, false, p, begin, end, out + sample * n);
    });
}

// gradients of the summary, (2, B, H, W), and of the weights, (2, kh, kw)
inline void grad_conv(const Plane& p, const float* summary, const float* weight, const float* dout, float* dsummary,
                      float* dweight) {
    const int64_t n = p.h * p.w, kh = p.kh, kw = p.kw, size = 2 * kh * kw, parts = parts_of(p);
    std::vector<double> partial(dweight ? size_t(p.b * parts * size) : 0, 0.0);
    parallel(p.threads, p.b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, part = unit % parts, begin = p.h * part / parts, end = p.h * (part + 1) / parts;
        const float* dy = dout + sample * n;
        if (dsummary) {
            const Padded padded(p, dy, begin, end);
            const Padded* planes[1] = {&padded};
            for (int c = 0; c < 2; ++c)
                correlate(planes, 1, weight + c * kh * kw, true, p, begin, end, dsummary + (c * p.b + sample) * n);
        }
        if (!dweight) return;
        std::vector<float> line(size_t((p.w + W - 1) / W * W), 0.f);
        for (int c = 0; c < 2; ++c) {
            const Padded padded(p, summary + (c * p.b + sample) * n, begin, end);
            for (int64_t y = begin; y < end; ++y) {
                std::memcpy(line.data(), dy + y * p.w, p.w * sizeof(float));
                for (int64_t ky = 0; ky < kh; ++ky) {
                    const float* row = padded.row(y + ky);
                    double* found = &partial[unit * size + (c * kh + ky) * kw];
                    for (int64_t kx = 0; kx < kw; kx += 4) {
                        Vec a[4] = {splat(0.f), splat(0.f), splat(0.f), splat(0.f)};
                        const int64_t many = std::min<int64_t>(4, kw - kx);
                        if (many == 4)
                            for (int64_t x = 0; x < p.w; x += W) {
                                const Vec d = load(&line[x]);
                                for (int i = 0; i < 4; ++i) a[i] += d * load(row + x + kx + i);
                            }
                        else
                            for (int64_t x = 0; x < p.w; x += W) {
                                const Vec d = load(&line[x]);
                                for (int64_t i = 0; i < many; ++i) a[i] += d * load(row + x + kx + i);
                            }
                        for (int64_t i = 0; i < many; ++i) found[kx + i] += sum_of(a[i]);
                    }
                }
            }
        }
    });
    if (dweight)
        for (int64_t i = 0; i < size; ++i) {
            double total = 0;
            for (int64_t unit = 0; unit < p.b * parts; ++unit) total += partial[unit * size + i];
            dweight[i] = float(total);
        }
}

// e to the power of each number, to two units in the last place
inline Vec exp_of(Vec x) {
    const Vec low = splat(-87.33654f), high = splat(88.72283f);
    Vec bounded = x < low ? low : x;
    bounded = bounded > high ? high : bounded;
    // x = k ln 2 + r: the sum with this number is rounded to an integer
    const Vec magic = splat(12582912.f);
    const Vec k = (bounded * splat(1.44269504f) + magic) - magic;
    const Vec r = (bounded - k * splat(0.693359375f)) + k * splat(2.12194440e-4f);
    Vec p = splat(1 / 5040.f);
    for (const float c : {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f}) p = p * r + splat(c);
    // twice half the power: 2 to the 128 is no number in float32
    const Int half = __builtin_convertvector(k, Int) >> 1, rest = __builtin_convertvector(k, Int) - half;
    const Int one = (half + 127) << 23, other = (rest + 127) << 23;
    Vec a, b; std::memcpy(&a, &one, sizeof a); std::memcpy(&b, &other, sizeof b);
    p = p * a * b;
    p = x < low ? splat(0.f) : p;
    return x > high ? splat(std::numeric_limits<float>::infinity()) : p;
}
inline Vec sigmoid_of(Vec x) { return splat(1.f) / (splat(1.f) + exp_of(-x)); }

// a norm over all positions of a batch: absent where mean is null
struct Norm {
    const float *weight, *bias, *mean, *var;
    float eps;
    float scale() const { return mean ? (weight ? *weight : 1.f) / std::sqrt(*var + eps) : 1.f; }
    float shift() const { return mean ? (bias ? *bias : 0.f) - *mean * scale() : 0.f; }
};

// work(begin, end) for parts of n numbers; the parts are the same for any number of threads
constexpr int64_t PART = 8192;
template <class Work>
inline void each_part(int threads, int64_t n, const Work& work) {
    parallel(threads, units(n, PART), [&](int64_t part) { work(part, part * PART, std::min(n, (part + 1) * PART)); });
}
// W numbers from a row that may end before
inline Vec load_some(const float* p, int64_t n) {
    if (n >= W) return load(p);
    float some[W] = {};
    std::memcpy(some, p, n * sizeof(float));
    return load(some);
}

// mean and variance of logits, over all of them
inline void moments(int threads, int64_t n, const float* logits, float* mean, float* var) {
    std::vector<double> partial(size_t(units(n, PART)), 0.0);
    auto total = [&](double around, bool squares) {
        each_part(threads, n, [&](int64_t part, int64_t begin, int64_t end) {
            double sum = 0;
            for (int64_t i = begin; i < end; ++i) { const double d = logits[i] - around; sum += squares ? d * d : d; }
            partial[part] = sum;
        });
        double sum = 0;
        for (const double one : partial) sum += one;
        return sum / double(n);
    };
    const double middle = total(0, false);
    *mean = float(middle);
    *var = float(total(middle, true));
}

// gate = 1 + strength * (sigmoid(norm(logits)) - 1), where the sigmoid is a number, and 1 elsewhere; without strength the
// sigmoid itself
inline void gate_of(int threads, int64_t n, const float* logits, const Norm& norm, const float* strength, float* gate) {
    const Vec scale = splat(norm.scale()), shift = splat(norm.shift());
    each_part(threads, n, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += W) {
            Vec g = sigmoid_of(load_some(logits + i, end - i) * scale + shift);
            if (strength) { g = g == g ? g - splat(1.f) : splat(0.f); g = splat(1.f) + splat(*strength) * g; }
            store_some(gate + i, g, end - i);
        }
    });
}

// sums of products of a row with each of R others
template <int R>
inline void dots(const float* x, const float* rows, int64_t stride, int64_t n, float* found) {
    Vec s[R];
    for (int r = 0; r < R; ++r) s[r] = splat(0.f);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Vec v = load(x + i);
        for (int r = 0; r < R; ++r) s[r] += v * load(rows + r * stride + i);
    }
    if (i < n) {
        const Vec v = load_some(x + i, n - i);
        for (int r = 0; r < R; ++r) s[r] += v * load_some(rows + r * stride + i, n - i);
    }
    for (int r = 0; r < R; ++r) found[r] = sum_of(s[r]);
}
// out[r] = sum of products of x with each of some rows
inline void all_dots(const float* x, const float* rows, int64_t count, int64_t n, float* out) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) dots<4>(x, rows + r * n, n, n, out + r);
    for (; r < count; ++r) dots<1>(x, rows + r * n, n, n, out + r);
}
// a row vector times a matrix of some rows of n: the elements of the vector are `stride` apart
inline void row_times(const float* a, int64_t stride, const float* matrix, int64_t rows, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 4 * W) {
        Vec s[4] = {splat(0.f), splat(0.f), splat(0.f), splat(0.f)};
        const int64_t left = n - i;
        for (int64_t k = 0; k < rows; ++k) {
            const Vec v = splat(a[k * stride]);
            const float* from = matrix + k * n + i;
            if (left >= 4 * W)
                for (int b = 0; b < 4; ++b) s[b] += v * load(from + b * W);
            else
                for (int64_t b = 0; b * W < left; ++b) s[b] += v * load_some(from + b * W, left - b * W);
        }
        for (int64_t b = 0; b < 4 && b * W < left; ++b) store_some(out + i + b * W, s[b], left - b * W);
    }
}

// A small MLP on its own, where calling for matrix products would take longer than they do: of poolings (pools, B, C) to
// first = weight * pooled + bias (pools, B, hidden), hidden = sum of relu(first) (B, hidden), logits and their sigmoid
struct Layer { const float *weight, *bias; };
struct Sizes { int64_t pools, b, c, width; int threads; };
inline void mlp(const Sizes& z, const float* pooled, const Layer& one, const Layer& two, float* first, float* hidden, float* logits,
                float* gate) {
    const int64_t rows = z.pools * z.b;
    parallel(z.threads, rows, [&](int64_t row) {
        float* to = first + row * z.width;
        all_dots(pooled + row * z.c, one.weight, z.width, z.c, to);
        for (int64_t h = 0; h < z.width && one.bias; ++h) to[h] += one.bias[h];
    });
    parallel(z.threads, z.b, [&](int64_t sample) {
        float *sum = hidden + sample * z.width, *out = logits + sample * z.c, *g = gate + sample * z.c;
        std::fill(sum, sum + z.width, 0.f);
        for (int64_t row = sample; row < rows; row += z.b)
            for (int64_t h = 0; h < z.width; ++h) { const float v = first[row * z.width + h]; sum[h] += v < 0 ? 0 : v; }
        all_dots(sum, two.weight, z.c, z.width, out);
        for (int64_t j = 0; j < z.c && two.bias; ++j) out[j] += float(z.pools) * two.bias[j];
        for (int64_t i = 0; i < z.c; i += W) store_some(g + i, sigmoid_of(load_some(out + i, z.c - i)), z.c - i);
    });
}

// from the gradient of the gate (B, C) those of the poolings and of both layers, whose biases may be absent
struct GradLayer { float *weight, *bias; };
inline void grad_mlp(const Sizes& z, const float* pooled, const float* weight, const float* second, const float* first,
                     const float* hidden, const float* logits, const float* dgate, float* dpooled, const GradLayer& one,
                     const GradLayer& two) {
    const int64_t rows = z.pools * z.b;
    std::vector<float> dlogits(size_t(z.b * z.c)), dfirst(size_t(rows * z.width));
    parallel(z.threads, z.b, [&](int64_t sample) {
        float* d = &dlogits[sample * z.c];
        for (int64_t i = 0; i < z.c; i += W) {
            const Vec g = sigmoid_of(load_some(logits + sample * z.c + i, z.c - i));
            store_some(d + i, load_some(dgate + sample * z.c + i, z.c - i) * (splat(1.f) - g) * g, z.c - i);
        }
        std::vector<float> dhidden(size_t(z.width));
        row_times(d, 1, second, z.c, z.width, dhidden.data());
        for (int64_t row = sample; row < rows; row += z.b)
            for (int64_t h = 0; h < z.width; ++h) {
                // as torch: nothing passes what is not above zero, but NaN is passed
                const int64_t at = row * z.width + h;
                dfirst[at] = first[at] <= 0 ? 0.f : dhidden[h];
            }
    });
    parallel(z.threads, rows, [&](int64_t row) { row_times(&dfirst[row * z.width], 1, weight, z.width, z.c, dpooled + row * z.c); });
    parallel(z.threads, z.width, [&](int64_t h) {
        row_times(&dfirst[h], z.width, pooled, rows, z.c, one.weight + h * z.c);
        if (!one.bias) return;
        one.bias[h] = 0;
        for (int64_t row = 0; row < rows; ++row) one.bias[h] += dfirst[row * z.width + h];
    });
    parallel(z.threads, z.c, [&](int64_t j) {
        row_times(&dlogits[j], z.c, hidden, z.b, z.width, two.weight + j * z.width);
        if (!two.bias) return;
        float sum = 0;
        for (int64_t sample = 0; sample < z.b; ++sample) sum += dlogits[sample * z.c + j];
        two.bias[j] = float(z.pools) * sum;
    });
}

// gradients of logits, and of norm and strength into sums: weight, bias, strength
inline void grad_gate_of(int threads, int64_t n, const float* logits, const Norm& norm, bool training, const float* strength,
                         const float* dgate, float* dlogits, float* sums) {
    const float a = norm.scale(), b = norm.shift(), middle = norm.mean ? *norm.mean : 0.f;
    const float deviation = norm.mean ? 1 / std::sqrt(*norm.var + norm.eps) : 1.f;
    struct Sums { double weight, bias, strength; };
    std::vector<Sums> partial(size_t(units(n, PART)), Sums{0, 0, 0});
    each_part(threads, n, [&](int64_t part, int64_t begin, int64_t end) {
        double weight[W] = {}, bias[W] = {}, strengths[W] = {};
        for (int64_t i = begin; i < end; i += W) {
            const Vec z = load_some(logits + i, end - i);
            Vec d = load_some(dgate + i, end - i);
            const Vec g = sigmoid_of(z * splat(a) + splat(b));
            if (strength) {
                const Vec less = g == g ? g - splat(1.f) : splat(0.f);
                add_to(strengths, d * less);
                d = g == g ? d * splat(*strength) : splat(0.f);
            }
            d *= (splat(1.f) - g) * g;
            add_to(bias, d);
            add_to(weight, d * ((z - splat(middle)) * splat(deviation)));
            store_some(dlogits + i, d, end - i);
        }
        for (int i = 0; i < W; ++i) { partial[part].weight += weight[i]; partial[part].bias += bias[i]; partial[part].strength += strengths[i]; }
    });
    Sums total{0, 0, 0};
    for (const Sums& one : partial) { total.weight += one.weight; total.bias += one.bias; total.strength += one.strength; }
    sums[0] = float(total.weight); sums[1] = float(total.bias); sums[2] = float(total.strength);
    if (!norm.mean) return;
    const float slope = training ? float(total.weight / double(n)) * deviation : 0.f, level = training ? float(total.bias / double(n)) : 0.f;
    each_part(threads, n, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += W) {
            const Vec z = load_some(logits + i, end - i), d = load_some(dlogits + i, end - i);
            store_some(dlogits + i, (d - splat(level) - (z - splat(middle)) * splat(slope)) * splat(a), end - i);
        }
    });
}
}  // namespace CONVATTN_PATH
