// Gradients of gates and of maps, and where maxima are; included by body.h.

// Where maxima are: the place of each, or -1 where it is in several places or is NaN and nowhere, and the number of places.
struct Places { int32_t *where, *count; };
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
    double plain_rest[R];
    for (int r = 0; r < R; ++r) { norm[r] = Norm(rows.affine, row + r); plain_rest[r] = 0; }
    Vec own[R], top[R];
    Int where[R], count[R];
    double rest[R];
    for (int r = 0; r < R; ++r) {
        rest[r] = 0; where[r] = count[r] = splat(0);
        own[r] = splat(rows.own ? rows.own[row + r] : 1.f);
        top[r] = splat(FIND == IN_ROWS ? rows.max[row + r] : 0.f);
    }
    int64_t i = 0;
    while (i + W <= n) {
        Vec s[R], plain[R];
        for (int r = 0; r < R; ++r) s[r] = plain[r] = splat(0.f);
        for (const int64_t end = std::min(n, i + SHORT * W); i + W <= end; i += W) {
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
        for (int r = 0; r < R && DOWN; ++r) { rest[r] += sum_of(s[r]); if (DOWN_HATS) plain_rest[r] += sum_of(plain[r]); }
    }
    for (int r = 0; r < R && FIND == IN_ROWS; ++r) {
        rows.places.where[row + r] = max_of(where[r]);
        rows.places.count[row + r] = sum_of(count[r]);
    }
    for (; i < n; ++i)
        for (int r = 0; r < R; ++r) {
            const float d = get(dy + r * rows.stride + i), hat = norm[r].hat(get(x + r * rows.stride + i), i);
            const float v = norm[r].full(hat, i), a = rows.across ? rows.across[i] : 1.f;
            const double t = double(v) * d;
            if (ACROSS_HATS && ACROSS) { sums[i] += double(hat) * (d * own[r][0]); more_sums[i] += d * own[r][0]; }
            else if (ACROSS) sums[i] += t * own[r][0];
            if (DOWN_HATS && DOWN) { rest[r] += double(hat) * (d * a); plain_rest[r] += d * a; }
            else if (DOWN) rest[r] += t * a;
            if (FIND == ACROSS_ROWS && (rows.gated ? v * own[r][0] : v) == rows.max[i]) note_one(rows.places, i, row + r);
            if (FIND == IN_ROWS && (rows.gated ? v * a : v) == rows.max[row + r]) note_one(rows.places, row + r, i);
        }
    for (int r = 0; r < R && DOWN; ++r) { found[r] = float(rest[r]); found[R + r] = float(plain_rest[r]); }
}

// of a row the sum of x * dy, with a norm of hat * dy, and then the sum of dy
template <class Norm, class T>
inline void product_row(const T* x, const T* dy, const Norm& norm, int64_t n, float* found, float* plain) {
    constexpr int64_t BLOCK = 4 * SHORT * W;
    double total = 0, alone = 0;
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int64_t last = std::min(n, first + BLOCK);
        Vec s[4], p[4];
        for (int k = 0; k < 4; ++k) s[k] = p[k] = splat(0.f);
        int64_t i = first;
        for (; i + 4 * W <= last; i += 4 * W)
            for (int k = 0; k < 4; ++k) {
                const Vec d = load(dy + i + k * W);
                s[k] += norm.hat(load(x + i + k * W), i) * d;
                if (Norm::NORM) p[k] += d;
            }
        for (; i + W <= last; i += W) {
            const Vec d = load(dy + i);
            s[0] += norm.hat(load(x + i), i) * d;
            if (Norm::NORM) p[0] += d;
        }
        for (; i < last; ++i) {
            const float d = get(dy + i);
            total += double(norm.hat(get(x + i), i)) * d;
            if (Norm::NORM) alone += d;
        }
        total += sum_of((s[0] + s[1]) + (s[2] + s[3]));
        if (Norm::NORM) alone += sum_of((p[0] + p[1]) + (p[2] + p[3]));
    }
    *found = float(total);
    if (Norm::NORM) *plain = float(alone);
}

// Gradients of both gates from that of y; either gate may be absent, and then its gradient is as well. With maxima over
// the channels, of the map whose channels are gated or of the map, also where they are. With a norm there is a channel
// gate, and in place of its gradient are the sums of dy * spatial times hat, and those of dy * spatial (2, B, C).
template <class T>
void grad_gates(const Map& map, const T* x, const T* dy, const Affine* affine, const float* channel, const float* spatial,
                const float* max, bool gated, float* dchannel, float* dspatial, int32_t* places) {
    const int64_t b = map.b, c = map.c, n = map.n;
    const bool last = map.last;
    if (!last && !spatial && !max)
        // nothing is asked of places
        return each_row(map, b * c, n, [&](int64_t row) {
            const T *of_x = x + row * n, *of_dy = dy + row * n;
            if (affine) product_row(of_x, of_dy, OfRow(affine, row % c), n, dchannel + row, dchannel + b * c + row);
            else product_row(of_x, of_dy, Bare(), n, dchannel + row, nullptr);
        });
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
        }, map.back);
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
        all(yes, yes, Finding<ACROSS_ROWS>{}, OfRow());
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
        for (const int64_t end = std::min(n, i + SHORT * W); i + W <= end; i += W, here += W) {
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
            if (SUM) total[r] += double(hat) * weights[k];
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
        for (const int64_t end = std::min(n, i + SHORT * W); i + W <= end; i += W) {
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
        total += double(hat) * part;
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
                found.sum[i] += double(hat) * part;
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
            }, map.back);
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
            }, map.back);
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
