// The shape of a map, how work on it is shared among threads, and the norm that may stand before it; included by body.h.

// the shape of a map, its order in memory, the threads that it is worth, and whether they go through it from its end
struct Map { int64_t b, c, n; bool last; int threads; bool back; };
// the next pass goes the other way: what the one before has read last may still be in a cache
inline const Map& turn(Map& map) { map.back = !map.back; return map; }

// memory for so many numbers, not yet set; null for none
template <class T>
struct Piece {
    std::unique_ptr<T[]> own;
    explicit Piece(int64_t n) : own(n ? new T[size_t(n)] : nullptr) {}
    operator T*() const { return own.get(); }
    T* from(int64_t i) const { return own ? own.get() + i : nullptr; }
};

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
    }, map.back);
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
    }, map.back);
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
