// What is computed of maps: poolings, statistics, summaries and products with gates; included by body.h.

// sum, and if asked the maximum, of x[i] * factor[i], or of x[i] without factors
template <bool MAX, bool FACTOR, class Norm, class T>
inline float reduce_row(const T* x, const Norm& norm, const float* factor, int64_t n, float* max) {
    constexpr int64_t BLOCK = 4 * SHORT * W;
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
        double s = 0;
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
    }, map.back);
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
        for (const int64_t end = std::min(n, i + 2 * SHORT * W); i + W <= end; i += W, one ^= 1) {
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
    }, map.back);
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

// lets running mean and variance follow those of a batch of n numbers for each channel, of which it is given the biased one
inline void follow(int64_t c, int64_t n, double momentum, const float* moments, float* mean, float* var, int64_t* tracked) {
    ++*tracked;
    const float share = float(momentum < 0 ? 1 / double(*tracked) : momentum), unbiased = float(double(n) / double(n - 1));
    // as torch.lerp, which meets both ends
    auto between = [&](float a, float b) { return share < 0.5f ? a + share * (b - a) : b - (b - a) * (1 - share); };
    for (int64_t j = 0; j < c; ++j) {
        mean[j] = between(mean[j], moments[j]);
        var[j] = between(var[j], moments[c + j] * unbiased);
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
    }, map.back);
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
