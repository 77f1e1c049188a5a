// What lies between the passes over a map: a convolution, norms and gates, and a small MLP; included by body.h.

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

// calls work(number) with a number from 1 to MOST that the compiler knows
template <int MOST, class Work>
inline void known(int64_t number, const Work& work) {
    if constexpr (MOST > 1)
        if (number < MOST) return known<MOST - 1>(number, work);
    work(std::integral_constant<int, MOST>{});
}

// R rows of B vectors from (y, x) on of the sum of planes correlated with windows of kh x kw
template <int R, int B>
inline void correlate_some(const Padded* const* planes, int count, const float* weights, const Plane& p, int64_t y, int64_t x, float* out) {
    const int64_t kh = p.kh, kw = p.kw;
    Vec a[R][B];
    for (int r = 0; r < R; ++r) for (int b = 0; b < B; ++b) a[r][b] = splat(0.f);
    for (int plane = 0; plane < count; ++plane) {
        // what a row of the plane adds to the rows from FIRST to LAST
        auto add = [&](int64_t row, auto first, auto last) {
            const float *seen = planes[plane]->row(y + row) + x, *line = weights + (plane * kh + row) * kw;
            // on its own first: one long sum would lose digits
            Vec s[R][B];
            for (int r = first; r < last; ++r) for (int b = 0; b < B; ++b) s[r][b] = splat(0.f);
            for (int64_t kx = 0; kx < kw; ++kx) {
                Vec v[B];
                for (int b = 0; b < B; ++b) v[b] = load(seen + kx + b * W);
                for (int r = first; r < last; ++r) {
                    const Vec weight = splat(line[kx - r * kw]);
                    for (int b = 0; b < B; ++b) s[r][b] += v[b] * weight;
                }
            }
            for (int r = first; r < last; ++r) for (int b = 0; b < B; ++b) a[r][b] += s[r][b];
        };
        const std::integral_constant<int, 0> none{};
        const std::integral_constant<int, 1> one{};
        add(0, none, one);
        for (int64_t row = 1; row < kh; ++row) add(row, none, std::integral_constant<int, R>{});
        if constexpr (R == 2) add(kh, one, std::integral_constant<int, 2>{});
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) store_some(out + (y + r) * p.w + x + b * W, a[r][b], p.w - x - b * W);
}
// rows of that sum
inline void correlate(const Padded* const* planes, int count, const float* weights, const Plane& p, int64_t begin, int64_t end, float* out) {
    for (int64_t y = begin; y < end; y += 2)
        for (int64_t x = 0; x < p.w; x += 4 * W)
            known<4>(units(p.w - x, W), [&](auto blocks) {
                if (y + 1 < end) correlate_some<2, blocks>(planes, count, weights, p, y, x, out);
                else correlate_some<1, blocks>(planes, count, weights, p, y, x, out);
            });
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
        correlate(planes, 2, weight, p, begin, end, out + sample * n);
    });
}

// adds, for K places in a line of the window, the products of rows of a gradient with what those places have seen
template <int K>
inline void grad_line(const Padded& seen, const Padded& dy, const Plane& p, int64_t begin, int64_t end, int64_t ky, int64_t kx, double* found) {
    // so many rows that a sum in float32 stays short
    const int64_t some = std::max<int64_t>(1, 2 * SHORT * W / p.w);
    for (int64_t first = begin; first < end; first += some) {
        Vec a[K];
        for (int i = 0; i < K; ++i) a[i] = splat(0.f);
        for (int64_t y = first; y < std::min(end, first + some); ++y) {
            const float *row = seen.row(y + ky) + kx, *line = dy.row(y + p.kh / 2) + p.kw / 2;
            for (int64_t x = 0; x < p.w; x += W) {
                const Vec d = load(line + x);
                for (int i = 0; i < K; ++i) a[i] += d * load(row + x + i);
            }
        }
        for (int i = 0; i < K; ++i) found[i] += sum_of(a[i]);
    }
}

// gradients of the summary, (2, B, H, W), and of the weights, (2, kh, kw)
inline void grad_conv(const Plane& p, const float* summary, const float* weight, const float* dout, float* dsummary,
                      float* dweight) {
    const int64_t n = p.h * p.w, area = p.kh * p.kw, size = 2 * area, parts = parts_of(p);
    std::vector<double> partial(size_t(p.b * parts * size), 0.0);
    // the windows turned by half
    std::vector<float> turned(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) turned[i] = weight[i / area * area + area - 1 - i % area];
    parallel(p.threads, p.b * parts, [&](int64_t unit) {
        const int64_t sample = unit / parts, part = unit % parts, begin = p.h * part / parts, end = p.h * (part + 1) / parts;
        const Padded dy(p, dout + sample * n, begin, end);
        const Padded* planes[1] = {&dy};
        for (int c = 0; c < 2; ++c) {
            correlate(planes, 1, &turned[c * area], p, begin, end, dsummary + (c * p.b + sample) * n);
            const Padded seen(p, summary + (c * p.b + sample) * n, begin, end);
            for (int64_t ky = 0; ky < p.kh; ++ky)
                for (int64_t kx = 0; kx < p.kw; kx += 8)
                    known<8>(p.kw - kx, [&](auto places) {
                        grad_line<places>(seen, dy, p, begin, end, ky, kx, &partial[unit * size + (c * p.kh + ky) * p.kw + kx]);
                    });
        }
    });
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

// the sigmoid g and 1 - g in double, to 10 digits each: the difference of 1 and a g near it would have lost most of them
struct WideSigmoid { Wide gate, rest; };
inline WideSigmoid wide_sigmoid_of(Wide given) {
    given = given < splat(-700.0) ? splat(-700.0) : given;
    given = given > splat(700.0) ? splat(700.0) : given;
    // x = k ln 2 + r: the sum with this number is rounded to an integer, which is in its last bits
    const Wide magic = splat(6755399441055744.0), sum = given * splat(1.4426950408889634) + magic, k = sum - magic;
    const Wide r = (given - k * splat(0.693145751953125)) - k * splat(1.42860682030941723212e-6);
    Wide p = splat(1 / 40320.);
    for (const double c : {1 / 5040., 1 / 720., 1 / 120., 1 / 24., 1 / 6., 0.5, 1., 1.}) p = p * r + splat(c);
    typedef uint64_t Bits __attribute__((vector_size(8 * W)));
    Bits bits; std::memcpy(&bits, &sum, sizeof bits);
    bits = (bits + 1023) << 52;
    Wide power; std::memcpy(&power, &bits, sizeof power);
    const Wide rest = splat(1.0) / (splat(1.0) + p * power);
    return {rest * (p * power), rest};
}

// a norm over all positions of a batch: absent where mean is null
struct Norm {
    const float *weight, *bias, *mean, *var;
    float eps;
    // (logit - middle) * scale + shift: the difference first, for what is large in both would take digits along
    float middle() const { return mean ? *mean : 0.f; }
    double inverse() const { return mean ? 1 / std::sqrt(double(*var) + eps) : 1; }
    double scale() const { return (mean && weight ? *weight : 1) * inverse(); }
    float shift() const { return mean && bias ? *bias : 0.f; }
};

// work(begin, end) for parts of n numbers; the parts are the same for any number of threads
constexpr int64_t PART = 8192;
template <class Work>
inline void each_part(int threads, int64_t n, const Work& work) {
    parallel(threads, units(n, PART), [&](int64_t part) { work(part, part * PART, std::min(n, (part + 1) * PART)); });
}
// mean and variance of logits, over all of them
inline void moments(int threads, int64_t n, const float* logits, float* mean, float* var) {
    std::vector<double> partial(size_t(units(n, PART)), 0.0);
    auto total = [&](double around, auto squares) {
        each_part(threads, n, [&](int64_t part, int64_t begin, int64_t end) {
            double sum[W] = {}, rest = 0;
            int64_t i = begin;
            for (; i + W <= end; i += W)
                for (int k = 0; k < W; ++k) { const double d = logits[i + k] - around; sum[k] += squares ? d * d : d; }
            for (; i < end; ++i) { const double d = logits[i] - around; rest += squares ? d * d : d; }
            for (const double one : sum) rest += one;
            partial[part] = rest;
        });
        double sum = 0;
        for (const double one : partial) sum += one;
        return sum / double(n);
    };
    const double middle = total(0, std::false_type{});
    *mean = float(middle);
    *var = float(total(middle, std::true_type{}));
}

// 1 + strength * (gate - 1), where the gate is a number, and 1 elsewhere; without strength the gate itself
inline Vec blended(Vec gate, const float* strength) {
    if (!strength) return gate;
    const Vec less = gate == gate ? gate - splat(1.f) : splat(0.f);
    return splat(1.f) + splat(*strength) * less;
}
inline void blend(int64_t n, float* gate, const float* strength) {
    if (strength)
        for (int64_t i = 0; i < n; i += W) store_some(gate + i, blended(load_some(gate + i, n - i), strength), n - i);
}
// the gate is the sigmoid of normed logits
inline void gate_of(int threads, int64_t n, const float* logits, const Norm& norm, const float* strength, float* gate) {
    const Vec middle = splat(norm.middle()), scale = splat(float(norm.scale())), shift = splat(norm.shift());
    each_part(threads, n, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += W) {
            const Vec normed = (load_some(logits + i, end - i) - middle) * scale + shift;
            store_some(gate + i, blended(sigmoid_of(normed), strength), end - i);
        }
    });
}

// sums of products of Q rows of x with each of R others: found[q * width + r]
template <int Q, int R>
inline void dots(const float* x, const float* rows, int64_t n, int64_t width, float* found) {
    Vec s[Q][R];
    for (int q = 0; q < Q; ++q) for (int r = 0; r < R; ++r) s[q][r] = splat(0.f);
    auto add = [&](auto at) {
        Vec v[Q];
        for (int q = 0; q < Q; ++q) v[q] = at(x + q * n);
        for (int r = 0; r < R; ++r) {
            const Vec w = at(rows + r * n);
            for (int q = 0; q < Q; ++q) s[q][r] += v[q] * w;
        }
    };
    int64_t i = 0;
    double total[Q][R] = {};
    auto end = [&] {
        for (int q = 0; q < Q; ++q) for (int r = 0; r < R; ++r) { total[q][r] += sum_of(s[q][r]); s[q][r] = splat(0.f); }
    };
    while (i + W <= n) {
        for (const int64_t last = std::min(n, i + SHORT * W); i + W <= last; i += W) add([&](const float* p) { return load(p + i); });
        end();
    }
    if (i < n) { add([&](const float* p) { return load_some(p + i, n - i); }); end(); }
    for (int q = 0; q < Q; ++q) for (int r = 0; r < R; ++r) found[q * width + r] = float(total[q][r]);
}
// out (count, width) = x (count, n) times the transposed of `rows` (width, n): the products of some rows in each unit of work
inline void times_transposed(int threads, const float* x, int64_t count, const float* rows, int64_t width, int64_t n, float* out) {
    constexpr int64_t SOME = 16;
    parallel(threads, units(width, SOME), [&](int64_t unit) {
        const int64_t end = std::min(width, (unit + 1) * SOME);
        for (int64_t r = unit * SOME; r < end;) {
            const bool four = r + 4 <= end;
            int64_t q = 0;
            for (; q + 2 <= count; q += 2) {
                if (four) dots<2, 4>(x + q * n, rows + r * n, n, width, out + q * width + r);
                else dots<2, 1>(x + q * n, rows + r * n, n, width, out + q * width + r);
            }
            if (q < count) {
                if (four) dots<1, 4>(x + q * n, rows + r * n, n, width, out + q * width + r);
                else dots<1, 1>(x + q * n, rows + r * n, n, width, out + q * width + r);
            }
            r += four ? 4 : 1;
        }
    });
}
// A matrix of which the element in row q and column k is at[q * row + k * column].
struct Strided { const float* at; int64_t row, column; };
// Q rows of the product of `a` with a matrix of some rows of n
template <int Q>
inline void rows_times(const Strided& a, int64_t first, const float* matrix, int64_t rows, int64_t n, float* out) {
    const float* from[Q];
    for (int q = 0; q < Q; ++q) from[q] = a.at + (first + q) * a.row;
    auto block = [&](int64_t i, auto at, auto to) {
        Vec s[Q][2], all[Q][2];
        for (int q = 0; q < Q; ++q) s[q][0] = s[q][1] = all[q][0] = all[q][1] = splat(0.f);
        for (int64_t k = 0; k < rows; ++k) {
            if (k % SHORT == 0)
                for (int q = 0; q < Q; ++q)
                    for (int j = 0; j < 2; ++j) { all[q][j] += s[q][j]; s[q][j] = splat(0.f); }
            const Vec v = at(matrix + k * n + i, n - i), w = at(matrix + k * n + i + W, n - i - W);
            for (int q = 0; q < Q; ++q) {
                const Vec f = splat(from[q][k * a.column]);
                s[q][0] += f * v; s[q][1] += f * w;
            }
        }
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < 2; ++j) to(out + (first + q) * n + i + j * W, all[q][j] + s[q][j], n - i - j * W);
    };
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W)
        block(i, [](const float* p, int64_t) { return load(p); }, [](float* p, Vec v, int64_t) { store(p, v); });
    if (i < n)
        block(i, [](const float* p, int64_t left) { return left > 0 ? load_some(p, left) : splat(0.f); },
              [](float* p, Vec v, int64_t left) { store_some(p, v, left); });
}
// out (count, n) = a (count, rows) times a matrix (rows, n)
inline void times(int threads, const Strided& a, int64_t count, const float* matrix, int64_t rows, int64_t n, float* out) {
    parallel(threads, units(count, 4), [&](int64_t unit) {
        int64_t q = 4 * unit;
        if (q + 4 <= count) rows_times<4>(a, q, matrix, rows, n, out);
        else for (; q < count; ++q) rows_times<1>(a, q, matrix, rows, n, out);
    });
}

// A small MLP on its own, where calling for matrix products would take longer than they do: of poolings (pools, B, C) to
// first = weight * pooled + bias (pools, B, hidden), hidden = sum of relu(first) (B, hidden), logits and their sigmoid
struct Layer { const float *weight, *bias; };
struct Sizes { int64_t pools, b, c, width; int threads; };
inline void mlp(const Sizes& z, const float* pooled, const Layer& one, const Layer& two, float* first, float* hidden, float* logits,
                float* gate) {
    times_transposed(z.threads, pooled, z.pools * z.b, one.weight, z.width, z.c, first);
    for (int64_t sample = 0; sample < z.b; ++sample) {
        float* sum = hidden + sample * z.width;
        std::fill(sum, sum + z.width, 0.f);
        for (int64_t row = sample; row < z.pools * z.b; row += z.b)
            for (int64_t h = 0; h < z.width; ++h) {
                float& v = first[row * z.width + h];
                if (one.bias) v += one.bias[h];
                sum[h] += v < 0 ? 0 : v;
            }
    }
    times_transposed(z.threads, hidden, z.b, two.weight, z.c, z.width, logits);
    parallel(z.threads, z.b, [&](int64_t sample) {
        float *out = logits + sample * z.c, *g = gate + sample * z.c;
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
    std::vector<float> dlogits(size_t(z.b * z.c)), dhidden(size_t(z.b * z.width)), dfirst(size_t(rows * z.width));
    parallel(z.threads, z.b, [&](int64_t sample) {
        float* d = &dlogits[sample * z.c];
        for (int64_t i = 0; i < z.c; i += W) {
            const WideSigmoid of = wide_sigmoid_of(widened(load_some(logits + sample * z.c + i, z.c - i)));
            store_some(d + i, narrowed(widened(load_some(dgate + sample * z.c + i, z.c - i)) * of.rest * of.gate), z.c - i);
        }
    });
    times(z.threads, Strided{dlogits.data(), z.c, 1}, z.b, second, z.c, z.width, dhidden.data());
    for (int64_t at = 0; at < rows * z.width; ++at)
        // as torch: nothing passes what is not above zero, but NaN is passed
        dfirst[at] = first[at] <= 0 ? 0.f : dhidden[at % (z.b * z.width)];
    times(z.threads, Strided{dfirst.data(), z.width, 1}, rows, weight, z.width, z.c, dpooled);
    times(z.threads, Strided{dfirst.data(), 1, z.width}, z.width, pooled, rows, z.c, one.weight);
    times(z.threads, Strided{dlogits.data(), 1, z.c}, z.c, hidden, z.b, z.width, two.weight);
    auto add = [](const std::vector<float>& d, int64_t rows, int64_t n, float factor, float* to) {
        std::vector<double> total(size_t(n), 0.0);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < n; ++i) total[size_t(i)] += d[size_t(row * n + i)];
        for (int64_t i = 0; i < n; ++i) to[i] = float(factor * total[size_t(i)]);
    };
    if (one.bias) add(dfirst, rows, z.width, 1.f, one.bias);
    if (two.bias) add(dlogits, z.b, z.c, float(z.pools), two.bias);
}

// gradients of logits, and of norm and strength into sums: weight, bias, strength
inline void grad_gate_of(int threads, int64_t n, const float* logits, const Norm& norm, bool training, const float* strength,
                         const float* dgate, float* dlogits, float* sums) {
    const Wide middle = splat(double(norm.middle())), scale = splat(norm.scale()), shift = splat(double(norm.shift())), inverse = splat(norm.inverse());
    const Wide nothing = splat(0.0);
    struct Sums { double weight, bias, strength; };
    std::vector<Sums> partial(size_t(units(n, PART)), Sums{0, 0, 0});
    each_part(threads, n, [&](int64_t part, int64_t begin, int64_t end) {
        double weight[W] = {}, bias[W] = {}, strengths[W] = {};
        for (int64_t i = begin; i < end; i += W) {
            const Vec z = load_some(logits + i, end - i);
            const Wide central = widened(z) - middle;
            Wide normed = central * scale + shift, d = widened(load_some(dgate + i, end - i));
            if (strength) {
                // what is no number was blended to 1
                d = normed == normed ? d : nothing; normed = normed == normed ? normed : nothing;
            }
            const WideSigmoid of = wide_sigmoid_of(normed);
            if (strength) {
                add_to(strengths, -d * of.rest);
                d *= splat(double(*strength));
            }
            d *= of.rest * of.gate;
            add_to(bias, d);
            add_to(weight, d * (central * inverse));
            store_some(dlogits + i, narrowed(d), end - i);
        }
        for (int i = 0; i < W; ++i) { partial[part].weight += weight[i]; partial[part].bias += bias[i]; partial[part].strength += strengths[i]; }
    });
    Sums total{0, 0, 0};
    for (const Sums& one : partial) { total.weight += one.weight; total.bias += one.bias; total.strength += one.strength; }
    sums[0] = float(total.weight); sums[1] = float(total.bias); sums[2] = float(total.strength);
    if (!norm.mean) return;
    const Wide slope = splat(training ? total.weight / double(n) * norm.inverse() : 0.0), level = splat(training ? total.bias / double(n) : 0.0);
    each_part(threads, n, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += W) {
            const Wide z = widened(load_some(logits + i, end - i)), d = widened(load_some(dlogits + i, end - i));
            store_some(dlogits + i, narrowed((d - level - (z - middle) * slope) * scale), end - i);
        }
    });
}
// from the gradient of the gate behind the convolution those of its summary and weights, and of norm and strength into sums
inline void grad_window(const Plane& p, const Norm& norm, bool training, const float* weight, const float* strength,
                        const float* summary, const float* logits, const float* dgate, float* sums, float* dsummary,
                        float* dweight) {
    const Piece<float> dlogits(p.b * p.h * p.w);
    grad_gate_of(p.threads, p.b * p.h * p.w, logits, norm, training, strength, dgate, dlogits, sums);
    grad_conv(p, summary, weight, dlogits, dsummary, dweight);
}
// from the gradient of a blended gate that of the gate, in its place; and the gradient of strength
inline float grad_blend(int64_t n, const float* logits, const float* strength, float* dgate) {
    if (!strength) return 0;
    double found[W] = {}, total = 0;
    for (int64_t i = 0; i < n; i += W) {
        const Vec rest = narrowed(wide_sigmoid_of(widened(load_some(logits + i, n - i))).rest), d = load_some(dgate + i, n - i);
        add_to(found, rest == rest ? -d * rest : splat(0.f));
        store_some(dgate + i, d * splat(*strength), n - i);
    }
    for (const double one : found) total += one;
    return float(total);
}
