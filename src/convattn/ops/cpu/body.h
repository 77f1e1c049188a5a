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
inline float sum_of(Vec v) { float s = 0; for (int i = 0; i < W; ++i) s += v[i]; return s; }
inline float max_of(Vec v) { float m = v[0]; for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m; return m; }
inline bool none(Int v) {
    typedef int64_t Long __attribute__((vector_size(4 * W)));
    Long l; std::memcpy(&l, &v, sizeof l);
    return !(l[0] | l[1] | l[2] | l[3]);
}
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// what a maximum is: its value, its first place, and in how many places it is
struct Max { float value; int32_t first, count; };

// sum and maximum of x[i] * factor[i], or of x[i] without factors
template <class T>
inline float reduce_row(const T* x, const float* factor, int64_t n, Max* max, bool places = true) {
    constexpr int64_t BLOCK = 2048;
    double total = 0;
    Vec m0 = splat(LOWEST), m1 = m0;
    float m = LOWEST;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = std::min(n, first + BLOCK);
        Vec s0 = splat(0), s1 = s0, s2 = s0, s3 = s0;
        int64_t i = first;
        for (; i + 4 * W <= last; i += 4 * W) {
            Vec a = load(x + i), b = load(x + i + W), c = load(x + i + 2 * W), d = load(x + i + 3 * W);
            if (factor) {
                a *= load(factor + i); b *= load(factor + i + W);
                c *= load(factor + i + 2 * W); d *= load(factor + i + 3 * W);
            }
            s0 += a; s1 += b; s2 += c; s3 += d;
            if (max) {
                Vec e = a > b ? a : b, f = c > d ? c : d;
                m0 = e > m0 ? e : m0; m1 = f > m1 ? f : m1;
            }
        }
        for (; i + W <= last; i += W) {
            Vec a = load(x + i);
            if (factor) a *= load(factor + i);
            s0 += a;
            m0 = a > m0 ? a : m0;
        }
        float s = 0;
        for (; i < last; ++i) {
            const float v = factor ? get(x + i) * factor[i] : get(x + i);
            s += v;
            m = v > m ? v : m;
        }
        total += double(sum_of((s0 + s1) + (s2 + s3))) + s;
    }
    if (!max) return float(total);
    m0 = m0 > m1 ? m0 : m1;
    const float inside = max_of(m0);
    m = inside > m ? inside : m;
    auto value = [&](int64_t i) { return factor ? get(x + i) * factor[i] : get(x + i); };
    if (total != total) {
        // comparisons pass a NaN by; a sum does not
        for (int64_t i = 0; i < n; ++i)
            if (value(i) != value(i)) { *max = {value(i), int32_t(i), 1}; return float(total); }
    }
    if (!places) { *max = {m, 0, 1}; return float(total); }
    // the row is in the cache
    int32_t first = -1, count = 0;
    const Vec wanted = splat(m);
    int64_t i = 0;
    for (; i + W <= n; i += (i + 4 * W <= n ? 4 * W : W)) {
        Int equal = {};
        const int steps = i + 4 * W <= n ? 4 : 1;
        for (int k = 0; k < steps; ++k) {
            Vec v = load(x + i + k * W);
            if (factor) v *= load(factor + i + k * W);
            equal -= v == wanted;
        }
        if (none(equal)) continue;
        int32_t here = 0;
        for (int k = 0; k < W; ++k) here += equal[k];
        if (here && first < 0)
            for (int64_t j = i; first < 0; ++j) if (value(j) == m) first = int32_t(j);
        count += here;
    }
    for (; i < n; ++i)
        if (value(i) == m) { if (first < 0) first = int32_t(i); ++count; }
    *max = {m, std::max(first, 0), std::max(count, 1)};
    return float(total);
}

// running sum and maximum of many rows, place by place
struct Columns {
    std::vector<float> sum, part, max;
    std::vector<int32_t> first, count;
    int64_t rows = 0;
    explicit Columns(int64_t n, bool with_max, bool with_places)
        : sum(n, 0.f), part(n, 0.f), max(with_max ? n : 0, LOWEST), first(with_places ? n : 0, 0), count(with_places ? n : 0, 0) {}

    // a row of x * scale * factor; few rows are summed before their sum is added, which keeps it exact
    template <class T>
    void add(const T* x, const float* factor, float scale, int32_t place, int64_t n) {
        const bool with_max = !max.empty(), with_places = !first.empty();
        const Vec s = splat(scale);
        const Int here = {place, place, place, place, place, place, place, place};
        const Int one = {1, 1, 1, 1, 1, 1, 1, 1};
        int64_t i = 0;
        for (; i + W <= n; i += W) {
            Vec v = load(x + i) * s;
            if (factor) v *= load(factor + i);
            store(&part[i], load(&part[i]) + v);
            if (!with_max) continue;
            const Vec m = load(&max[i]);
            if (!with_places) { store(&max[i], v > m ? v : m); continue; }
            const Int more = v > m, equal = v == m;
            Int c, f;
            std::memcpy(&c, &count[i], sizeof c); std::memcpy(&f, &first[i], sizeof f);
            c = more ? one : c - equal;
            f = more ? here : f;
            std::memcpy(&count[i], &c, sizeof c); std::memcpy(&first[i], &f, sizeof f);
            store(&max[i], more ? v : m);
        }
        for (; i < n; ++i) {
            float v = get(x + i) * scale;
            if (factor) v *= factor[i];
            part[i] += v;
            if (!with_max) continue;
            if (!with_places) { max[i] = v > max[i] ? v : max[i]; continue; }
            if (v > max[i]) { max[i] = v; first[i] = place; count[i] = 1; }
            else if (v == max[i]) ++count[i];
        }
        if (++rows % 64 == 0) flush(n);
    }
    void flush(int64_t n) {
        for (int64_t i = 0; i < n; ++i) { sum[i] += part[i]; part[i] = 0; }
    }
};

// sum of x * weights
template <class T>
inline float reduce_products(const T* x, const float* weights, int64_t n) {
    return reduce_row(x, weights, n, nullptr);
}

// y = (x * a + b) * c + d, each a row of numbers or a single one
template <class T>
inline void linear_row(const T* x, T* y, const float* as, float a, const float* bs, float b, const float* cs, float c,
                       const float* ds, float d, int64_t n) {
    const Vec va = splat(a), vb = splat(b), vc = splat(c), vd = splat(d);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        Vec v = load(x + i) * (as ? load(as + i) : va) + (bs ? load(bs + i) : vb);
        store(y + i, v * (cs ? load(cs + i) : vc) + (ds ? load(ds + i) : vd));
    }
    for (; i < n; ++i) {
        const float v = get(x + i) * (as ? as[i] : a) + (bs ? bs[i] : b);
        put(y + i, v * (cs ? cs[i] : c) + (ds ? ds[i] : d));
    }
}

// the shape of a map, its order in memory, and the threads that it is worth
struct Map { int64_t b, c, n; bool last; int threads; };

// positions or channels of which the running sums stay in the first cache
constexpr int64_t TILE = 512;
// rows of channels-last maps that one unit of work takes
inline int64_t rows_of_unit(const Map& map) {
    const int64_t wanted = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, map.c));
    const int64_t fair = (map.b * map.n + 4 * map.threads - 1) / (4 * map.threads);
    return std::max<int64_t>(1, std::min({wanted, fair, map.n}));
}
inline int64_t units(int64_t n, int64_t size) { return (n + size - 1) / size; }

// mean and maximum of each channel over its positions
template <class T>
void pool(const Map& map, const T* x, float* mean, float* max, int32_t* first, int32_t* count) {
    const auto [b, c, n, last, threads] = map;
    if (!last) {
        const int64_t rows = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n)), total = b * c;
        parallel(threads, units(total, rows), [&](int64_t unit) {
            for (int64_t row = unit * rows; row < std::min(total, (unit + 1) * rows); ++row) {
                Max m;
                mean[row] = reduce_row(x + row * n, static_cast<const float*>(nullptr), n, max ? &m : nullptr, first != nullptr) / float(n);
                if (max) max[row] = m.value;
                if (first) { first[row] = m.first; count[row] = m.count; }
            }
        });
        return;
    }
    const int64_t rows = rows_of_unit(map), parts = units(n, rows);
    std::vector<Columns> found(size_t(b * parts), Columns(c, max != nullptr, first != nullptr));
    parallel(threads, b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, begin = unit % parts * rows;
        for (int64_t i = begin; i < std::min(n, begin + rows); ++i)
            found[unit].add(x + (sample * n + i) * c, nullptr, 1.f, int32_t(i), c);
        found[unit].flush(c);
    });
    parallel(threads, b, [&](int64_t sample) {
        for (int64_t j = 0; j < c; ++j) {
            double total = 0;
            Max m{LOWEST, 0, 0};
            for (int64_t part = 0; part < parts; ++part) {
                const Columns& one = found[sample * parts + part];
                total += one.sum[j];
                if (!max) continue;
                const int32_t place = first ? one.first[j] : 0, places = first ? one.count[j] : 1;
                if (one.max[j] > m.value || m.count == 0) m = {one.max[j], place, places};
                else if (one.max[j] == m.value) m.count += places;
            }
            if (max && total != total)
                for (int64_t i = 0; i < n; ++i) {
                    const float v = get(x + (sample * n + i) * c + j);
                    if (v != v) { m = {v, int32_t(i), 1}; break; }
                }
            const int64_t at = sample * c + j;
            mean[at] = float(total) / float(n);
            if (max) max[at] = m.value;
            if (first) { first[at] = m.first; count[at] = std::max(m.count, 1); }
        }
    });
}

// mean and maximum of each position over its channels, of x or of x with its channels gated
template <class T>
void summarise(const Map& map, const T* x, const float* gate, float* mean, float* max, int32_t* first, int32_t* count) {
    const auto [b, c, n, last, threads] = map;
    if (last) {
        const int64_t rows = rows_of_unit(map), total = b * n;
        parallel(threads, units(total, rows), [&](int64_t unit) {
            for (int64_t row = unit * rows; row < std::min(total, (unit + 1) * rows); ++row) {
                Max m;
                mean[row] = reduce_row(x + row * c, gate ? gate + row / n * c : nullptr, c, &m, first != nullptr) / float(c);
                max[row] = m.value;
                if (first) { first[row] = m.first; count[row] = m.count; }
            }
        });
        return;
    }
    const int64_t parts = units(n, TILE);
    parallel(threads, b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, begin = unit % parts * TILE, size = std::min(TILE, n - begin);
        Columns found(size, true, first != nullptr);
        for (int64_t j = 0; j < c; ++j)
            found.add(x + (sample * c + j) * n + begin, nullptr, gate ? gate[sample * c + j] : 1.f, int32_t(j), size);
        found.flush(size);
        for (int64_t i = 0; i < size; ++i) {
            const int64_t at = sample * n + begin + i;
            Max m{found.max[i], first ? found.first[i] : 0, first ? std::max(found.count[i], 1) : 1};
            if (found.sum[i] != found.sum[i])
                for (int64_t j = 0; j < c; ++j) {
                    const float v = get(x + (sample * c + j) * n + begin + i) * (gate ? gate[sample * c + j] : 1.f);
                    if (v != v) { m = {v, int32_t(j), 1}; break; }
                }
            mean[at] = found.sum[i] / float(c);
            max[at] = m.value;
            if (first) { first[at] = m.first; count[at] = m.count; }
        }
    });
}

// one row of y = x * by_place[i] * scale, whichever there are, in the order channel, then position
template <class T>
inline void gate_row(const T* x, T* y, const float* places, bool has_scale, float scale, bool scale_first, int64_t n) {
    const Vec s = splat(scale);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        Vec v = load(x + i);
        if (has_scale && scale_first) v *= s;
        if (places) v *= load(places + i);
        if (has_scale && !scale_first) v *= s;
        store(y + i, v);
    }
    for (; i < n; ++i) {
        float v = get(x + i);
        if (has_scale && scale_first) v *= scale;
        if (places) v *= places[i];
        if (has_scale && !scale_first) v *= scale;
        put(y + i, v);
    }
}

// y = x * channel gate * spatial gate
template <class T>
void apply(const Map& map, const T* x, const float* channel, const float* spatial, T* y) {
    const auto [b, c, n, last, threads] = map;
    const int64_t width = last ? c : n, total = last ? b * n : b * c;
    const int64_t rows = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
    parallel(threads, units(total, rows), [&](int64_t unit) {
        for (int64_t row = unit * rows; row < std::min(total, (unit + 1) * rows); ++row) {
            const int64_t sample = row / (last ? n : c);
            const float* places = last ? channel : spatial;
            const float* scales = last ? spatial : channel;
            gate_row(x + row * width, y + row * width, places ? places + sample * width : nullptr, scales != nullptr,
                     scales ? scales[row] : 1.f, !last, width);
        }
    });
}

// one row of t = x * dy: adds t * scale to sums, and returns the sum of t * places
template <class T>
inline float products_row(const T* x, const T* dy, const float* places, float scale, float* sums, int64_t n) {
    Vec s0 = splat(0), s1 = s0;
    const Vec s = splat(scale);
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        const Vec a = load(x + i) * load(dy + i), b = load(x + i + W) * load(dy + i + W);
        if (sums) { store(sums + i, load(sums + i) + a * s); store(sums + i + W, load(sums + i + W) + b * s); }
        s0 += places ? a * load(places + i) : a;
        s1 += places ? b * load(places + i + W) : b;
    }
    float rest = 0;
    for (; i < n; ++i) {
        const float t = get(x + i) * get(dy + i);
        if (sums) sums[i] += t * scale;
        rest += places ? t * places[i] : t;
    }
    return sum_of(s0 + s1) + rest;
}

// gradients of both gates from that of y; either gate may be absent, and then its gradient is as well
template <class T>
void grad_gates(const Map& map, const T* x, const T* dy, const float* channel, const float* spatial, float* dchannel,
                float* dspatial) {
    const auto [b, c, n, last, threads] = map;
    // a row is a channel or a position; its own gate is one number, that across is a row of numbers
    const int64_t width = last ? c : n, height = last ? n : c;
    const float* across = last ? channel : spatial;
    const float* own = last ? spatial : channel;
    float* dacross = last ? dchannel : dspatial;
    float* down = last ? dspatial : dchannel;
    const int64_t tile = last ? width : TILE, tall = last ? rows_of_unit(map) : height;
    const int64_t wide_parts = units(width, tile), tall_parts = units(height, tall);
    std::vector<float> partial_own(down ? size_t(b * height * wide_parts) : 0);
    std::vector<float> partial_across(dacross ? size_t(b * width * tall_parts) : 0);
    parallel(threads, b * wide_parts * tall_parts, [&](int64_t unit) {
        const int64_t sample = unit / (wide_parts * tall_parts), wide = unit / tall_parts % wide_parts, high = unit % tall_parts;
        const int64_t begin = wide * tile, size = std::min(tile, width - begin);
        std::vector<float> part(dacross ? size : 0, 0.f);
        float* sums = dacross ? &partial_across[(sample * tall_parts + high) * width + begin] : nullptr;
        const int64_t end = std::min(height, (high + 1) * tall);
        for (int64_t row = high * tall; row < end; ++row) {
            const int64_t at = sample * height + row, from = at * width + begin;
            const float found = products_row(x + from, dy + from, across ? across + sample * width + begin : nullptr,
                                             own ? own[at] : 1.f, dacross ? part.data() : nullptr, size);
            if (down) partial_own[at * wide_parts + wide] = found;
            if (dacross && ((row + 1) % 64 == 0 || row + 1 == end))
                for (int64_t i = 0; i < size; ++i) { sums[i] += part[i]; part[i] = 0; }
        }
    });
    if (down)
        for (int64_t at = 0; at < b * height; ++at) {
            double total = 0;
            for (int64_t part = 0; part < wide_parts; ++part) total += partial_own[at * wide_parts + part];
            down[at] = float(total);
        }
    if (dacross)
        for (int64_t sample = 0; sample < b; ++sample)
            for (int64_t i = 0; i < width; ++i) {
                double total = 0;
                for (int64_t part = 0; part < tall_parts; ++part)
                    total += partial_across[(sample * tall_parts + part) * width + i];
                dacross[sample * width + i] = float(total);
            }
}

// adds to the gradient of the channel gate what comes to it by the summary: sum of x * (dmean / C + dmax where largest)
template <class T>
void grad_summary(const Map& map, const T* x, const float* channel, const Summary& summary, float* dchannel) {
    const auto [b, c, n, last, threads] = map;
    std::vector<float> weights(size_t(b * n));
    for (int64_t i = 0; i < b * n; ++i) weights[i] = summary.dmean[i] / float(c);
    auto value = [&, c = c, n = n, last = last](int64_t sample, int64_t j, int64_t i) {
        return get(x + (last ? (sample * n + i) * c + j : (sample * c + j) * n + i));
    };
    const int64_t rows = last ? rows_of_unit(map) : std::max<int64_t>(1, 16384 / std::max<int64_t>(1, n));
    if (!last) {
        parallel(threads, units(b * c, rows), [&, b = b, c = c, n = n](int64_t unit) {
            for (int64_t row = unit * rows; row < std::min(b * c, (unit + 1) * rows); ++row)
                dchannel[row] += reduce_products(x + row * n, &weights[row / c * n], n);
        });
    } else {
        const int64_t parts = units(n, rows);
        std::vector<Columns> found(size_t(b * parts), Columns(c, false, false));
        parallel(threads, b * parts, [&, c = c, n = n](int64_t unit) {
            const int64_t sample = unit / parts, begin = unit % parts * rows;
            for (int64_t i = begin; i < std::min(n, begin + rows); ++i)
                found[unit].add(x + (sample * n + i) * c, nullptr, weights[sample * n + i], 0, c);
            found[unit].flush(c);
        });
        for (int64_t unit = 0; unit < b * parts; ++unit)
            for (int64_t j = 0; j < c; ++j) dchannel[unit / parts * c + j] += found[unit].sum[j];
    }
    parallel(threads, b, [&, c = c, n = n](int64_t sample) {
        std::vector<double> total(size_t(c), 0.0);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = sample * n + i;
            const float share = summary.dmax[at] / float(summary.count[at]);
            if (summary.count[at] == 1) { total[summary.first[at]] += double(value(sample, summary.first[at], i)) * share; continue; }
            for (int64_t j = summary.first[at]; j < c; ++j) {
                const float v = value(sample, j, i);
                if (v * channel[sample * c + j] == summary.max[at]) total[j] += double(v) * share;
            }
        }
        for (int64_t j = 0; j < c; ++j) dchannel[sample * c + j] += float(total[j]);
    });
}

// the gradient of x: from y, from the summary of the gated map, and from the poolings
template <class T>
void grad_input(const Map& map, const T* x, const T* dy, const float* channel, const float* spatial,
                const Summary* summary, const Pools* pools, T* dx) {
    const auto [b, c, n, last, threads] = map;
    const int64_t width = last ? c : n, height = last ? n : c;
    std::vector<float> means(summary ? size_t(b * n) : 0), pooled(pools ? size_t(b * c) : 0);
    for (size_t i = 0; i < means.size(); ++i) means[i] = summary->dmean[i] / float(c);
    for (size_t i = 0; i < pooled.size(); ++i) pooled[i] = pools->dmean[i] / float(n);
    const int64_t rows = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), total = b * height;
    parallel(threads, units(total, rows), [&, width = width, height = height, last = last](int64_t unit) {
        for (int64_t row = unit * rows; row < std::min(total, (unit + 1) * rows); ++row) {
            const int64_t sample = row / height;
            const float* across = last ? channel : spatial;
            const float* own = last ? spatial : channel;
            if (last)
                // dx = (dy * spatial + mean) * channel + pooled, the first and second by row
                linear_row(dy + row * width, dx + row * width, static_cast<const float*>(nullptr), own ? own[row] : 1.f,
                           static_cast<const float*>(nullptr), summary ? means[row] : 0.f, across ? across + sample * width : nullptr, 1.f,
                           pools ? &pooled[sample * width] : nullptr, 0.f, width);
            else
                linear_row(dy + row * width, dx + row * width, across ? across + sample * width : nullptr, 1.f,
                           summary ? &means[sample * width] : nullptr, 0.f, static_cast<const float*>(nullptr), own ? own[row] : 1.f,
                           static_cast<const float*>(nullptr), pools ? pooled[row] : 0.f, width);
        }
    });
    auto at = [&, c = c, n = n, last = last](int64_t sample, int64_t j, int64_t i) {
        return last ? (sample * n + i) * c + j : (sample * c + j) * n + i;
    };
    if (summary)
        parallel(threads, b, [&, c = c, n = n](int64_t sample) {
            for (int64_t i = 0; i < n; ++i) {
                const int64_t place = sample * n + i;
                const float share = summary->dmax[place] / float(summary->count[place]);
                const bool many = summary->count[place] > 1;
                for (int64_t j = summary->first[place]; j < (many ? c : summary->first[place] + 1); ++j) {
                    const float gate = channel ? channel[sample * c + j] : 1.f;
                    const int64_t here = at(sample, j, i);
                    if (!many || get(x + here) * gate == summary->max[place]) put(dx + here, get(dx + here) + share * gate);
                }
            }
        });
    if (pools && pools->max)
        parallel(threads, b, [&, c = c, n = n](int64_t sample) {
            for (int64_t j = 0; j < c; ++j) {
                const int64_t place = sample * c + j;
                const float share = pools->dmax[place] / float(pools->count[place]);
                const bool many = pools->count[place] > 1;
                for (int64_t i = pools->first[place]; i < (many ? n : pools->first[place] + 1); ++i) {
                    const int64_t here = at(sample, j, i);
                    if (!many || get(x + here) == pools->max[place]) put(dx + here, get(dx + here) + share);
                }
            }
        });
}

// The convolution between summary and gate: two channels to one, an odd window, zeros around.

struct Plane { int64_t b, h, w, k; int threads; };

// what the windows of some rows of a plane see: zeros around it, and rows of a multiple of W and a window more
struct Padded {
    int64_t stride, top;
    std::vector<float> values;
    Padded(const Plane& p, const float* plane, int64_t begin, int64_t end)
        : stride((p.w + W - 1) / W * W + p.k + W), top(begin), values(size_t((end - begin + p.k - 1) * stride), 0.f) {
        const int64_t around = p.k / 2;
        for (int64_t y = std::max<int64_t>(0, begin - around); y < std::min(p.h, end + around); ++y)
            std::memcpy(&values[(y - begin + around) * stride + around], plane + y * p.w, p.w * sizeof(float));
    }
    // the first row that the window of row y sees
    const float* row(int64_t y) const { return &values[(y - top) * stride]; }
};

inline void store_some(float* p, Vec v, int64_t n) {
    if (n >= W) store(p, v);
    else for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// rows of the sum of planes correlated with windows of k x k, each weight given once or `flipped`
inline void correlate(const Padded* const* planes, int count, const float* weights, bool flipped, int64_t k, int64_t begin,
                      int64_t end, int64_t w, float* out) {
    for (int64_t y = begin; y < end; ++y)
        for (int64_t x = 0; x < w; x += 4 * W) {
            Vec a[4] = {splat(0), splat(0), splat(0), splat(0)};
            for (int plane = 0; plane < count; ++plane)
                for (int64_t ky = 0; ky < k; ++ky) {
                    const float* row = planes[plane]->row(y + ky) + x;
                    const float* line = weights + (plane * k + (flipped ? k - 1 - ky : ky)) * k;
                    const int64_t blocks = std::min<int64_t>(4, (w - x + W - 1) / W);
                    if (blocks == 4)
                        for (int64_t kx = 0; kx < k; ++kx) {
                            const Vec v = splat(line[flipped ? k - 1 - kx : kx]);
                            for (int b = 0; b < 4; ++b) a[b] += v * load(row + kx + b * W);
                        }
                    else
                        for (int64_t kx = 0; kx < k; ++kx) {
                            const Vec v = splat(line[flipped ? k - 1 - kx : kx]);
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
        correlate(planes, 2, weight, false, p.k, begin, end, p.w, out + sample * n);
    });
}

// gradients of the summary, (2, B, H, W), and of the weights, (2, k, k)
inline void grad_conv(const Plane& p, const float* summary, const float* weight, const float* dout, float* dsummary,
                      float* dweight) {
    const int64_t n = p.h * p.w, k = p.k, size = 2 * k * k, parts = parts_of(p);
    std::vector<double> partial(dweight ? size_t(p.b * parts * size) : 0, 0.0);
    parallel(p.threads, p.b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, part = unit % parts, begin = p.h * part / parts, end = p.h * (part + 1) / parts;
        const float* dy = dout + sample * n;
        if (dsummary) {
            const Padded padded(p, dy, begin, end);
            const Padded* planes[1] = {&padded};
            for (int c = 0; c < 2; ++c)
                correlate(planes, 1, weight + c * k * k, true, k, begin, end, p.w, dsummary + (c * p.b + sample) * n);
        }
        if (!dweight) return;
        std::vector<float> line(size_t((p.w + W - 1) / W * W), 0.f);
        for (int c = 0; c < 2; ++c) {
            const Padded padded(p, summary + (c * p.b + sample) * n, begin, end);
            for (int64_t y = begin; y < end; ++y) {
                std::memcpy(line.data(), dy + y * p.w, p.w * sizeof(float));
                for (int64_t ky = 0; ky < k; ++ky) {
                    const float* row = padded.row(y + ky);
                    double* found = &partial[unit * size + (c * k + ky) * k];
                    for (int64_t kx = 0; kx < k; kx += 4) {
                        Vec a[4] = {splat(0), splat(0), splat(0), splat(0)};
                        const int64_t many = std::min<int64_t>(4, k - kx);
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
}  // namespace CONVATTN_PATH
