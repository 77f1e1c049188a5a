// Eight numbers at a time, and what is done with them; included by body.h.

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
// so many numbers are summed in float32, and those sums in double: what is left of a long sum may be small beside it
constexpr int64_t SHORT = 8;
// adds numbers in float32 to sums in double
typedef double Wide __attribute__((vector_size(8 * W)));
inline void add_to(double* sum, Vec v) {
    Wide s; std::memcpy(&s, sum, sizeof s);
    s += __builtin_convertvector(v, Wide);
    std::memcpy(sum, &s, sizeof s);
}

inline Wide widened(Vec v) { return __builtin_convertvector(v, Wide); }
inline Vec narrowed(Wide v) { return __builtin_convertvector(v, Vec); }
inline Wide splat(double v) { return Wide{v, v, v, v, v, v, v, v}; }
inline void add_to(double* sum, Wide v) {
    Wide s; std::memcpy(&s, sum, sizeof s);
    s += v;
    std::memcpy(sum, &s, sizeof s);
}

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

inline void store_some(float* p, Vec v, int64_t n) {
    if (n >= W) store(p, v);
    else for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// W numbers from a row that may end before
inline Vec load_some(const float* p, int64_t n) {
    if (n >= W) return load(p);
    float some[W] = {};
    std::memcpy(some, p, n * sizeof(float));
    return load(some);
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
