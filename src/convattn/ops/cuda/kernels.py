"""Gating in Triton: passes over a map in tiles of channels and positions, and what lies between them; sums in float32.

A map is read through the strides of its channels and positions, which are (N, 1) with channels first and (1, C) with
channels last. Parameters are pointers, then numbers, then constants, which say what is not there and so not read, and
whether a tile can lie partly outside. A maximum is NaN where an element is.

Passes take the samples of a batch in turn from the last to the first and from the first to the last, each beginning
where the one before it has ended, so that it finds some of the map in the cache.

Where a norm rides along, x = weight * hat + bias with hat = inverse * u + offset, and u is what lies in memory. The
gated map is then one product away from u, with factors for each sample and channel: x * gate = u * by + plus. It is
computed in this way everywhere, so that what is equal once is equal always.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(float("-inf"))
HIGHEST = tl.constexpr(float("inf"))
# numbers that a program takes at once of partial results: it waits for each load, however much that brings
PARTS = tl.constexpr(1024)
# of products of matrices: in parts on tensor cores, which is as exact as float32 to a bit or two, where it is faster
EXACT, PARTED = tl.constexpr("ieee"), tl.constexpr("tf32x3")


@triton.jit
def _within(channels, places, c, n, FULL: tl.constexpr):
    """What of a tile is inside of the map."""
    inside = (channels < c)[:, None] & (places < n)[None, :]
    if FULL:
        inside = (channels >= 0)[:, None] & (places >= 0)[None, :]
    return inside


@triton.jit
def _at(channels, places, stride_c, stride_n, LONG: tl.constexpr):
    """Where a tile lies within its sample."""
    if LONG:
        channels, places = channels.to(tl.int64), places.to(tl.int64)
    return channels[:, None] * stride_c + places[None, :] * stride_n


@triton.jit
def _read(at, inside, FULL: tl.constexpr):
    v = tl.load(at) if FULL else tl.load(at, mask=inside, other=0.0)
    return v.to(tl.float32)


@triton.jit
def _only(v, inside, other, FULL: tl.constexpr):
    """Numbers inside, and another one outside."""
    if not FULL:
        v = tl.where(inside, v, other)
    return v


@triton.jit
def _some(at, there, PRESENT: tl.constexpr, other):
    """Small numbers in float32; another one where there are none."""
    v = tl.full(there.shape, other, tl.float32)
    if PRESENT:
        v = tl.load(at, mask=there, other=0.0).to(tl.float32)
    return v


@triton.jit
def _affine(u, by, plus):
    """u * by + plus, rounded once."""
    return tl.math.fma(u, by + tl.zeros_like(u), plus + tl.zeros_like(u))


@triton.jit
def _more(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _less(one, other):
    return tl.minimum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(v, axis: tl.constexpr):
    """Maxima along an axis of numbers that `_more` has found."""
    bad = tl.max((v != v).to(tl.int32), axis=axis) > 0
    return tl.where(bad, float("nan"), tl.max(tl.where(v == v, v, LOWEST), axis=axis))


@triton.jit
def _sigmoid(v):
    small = tl.exp(-tl.abs(v))
    return tl.where(v < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _gate(v, GATE: tl.constexpr):
    if GATE == "hardsigmoid":
        return tl.where(v < -3, 0.0, tl.where(v > 3, 6.0, v + 3)) / 6
    return _sigmoid(v)


@triton.jit
def _grad_of_gate(v, GATE: tl.constexpr):
    if GATE == "hardsigmoid":
        return tl.where((v > -3) & (v < 3), 1.0 / 6, 0.0)
    gate = _sigmoid(v)
    return gate * (1.0 - gate)


@triton.jit
def _activated(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return v * _sigmoid(v)
    if ACTIVATION == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    if ACTIVATION == "hardswish":
        return v * tl.where(v < -3, 0.0, tl.where(v > 3, 6.0, v + 3)) / 6
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def _grad_activated(d, v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        gate = _sigmoid(v)
        return d * gate * (1.0 + v * (1.0 - gate))
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        return d * (0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * density)
    if ACTIVATION == "hardswish":
        return tl.where(v < -3, 0.0, tl.where(v <= 3, d * (v / 3 + 0.5), d))
    return tl.where(v <= 0, 0.0, d)


@triton.jit
def _sum(parts, at, there, count, step):
    """The sum of so many parts that lie a step apart; several are on their way at once."""
    total = tl.zeros(at.shape, tl.float32)
    for part in tl.range(count, loop_unroll_factor=8):
        total += tl.load(parts + part * step + at, mask=there, other=0.0)
    return total


@triton.jit
def _deviation(var, eps):
    return 1.0 / tl.sqrt(var + eps)


@triton.jit
def _follow(at, there, value, momentum):
    """Let a running mean or variance follow that of a batch."""
    old = tl.load(at, mask=there).to(tl.float32)
    tl.store(at, (old + momentum * (value - old)).to(at.dtype.element_ty), mask=there)


@triton.jit
def pool(
    x,
    found,
    c,
    n,
    stride_c,
    stride_n,
    MOMENTS: tl.constexpr,
    FULL: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Means and maxima over positions (parts, 2, B, C), of a part of them.

    With moments (parts, 4, B, C): sums of what is beyond the sample's first value and of its square, maxima, minima.
    """
    part, parts, batch = tl.program_id(1), tl.num_programs(1), tl.num_programs(2)
    sample = batch - 1 - tl.program_id(2)
    x += sample.to(tl.int64) * c * n
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channels < c
    total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    high = tl.full([BLOCK_C, BLOCK_N], LOWEST, tl.float32)
    if MOMENTS:
        squares = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        low = tl.full([BLOCK_C, BLOCK_N], HIGHEST, tl.float32)
        middle = tl.load(x + channels.to(tl.int64) * stride_c, mask=there, other=0.0).to(tl.float32)[:, None]
    for begin in tl.range(part * BLOCK_N, n, parts * BLOCK_N, num_stages=STAGES):
        places = begin + tl.arange(0, BLOCK_N)
        inside = _within(channels, places, c, n, FULL)
        v = _read(x + _at(channels, places, stride_c, stride_n, LONG), inside, FULL)
        high = _more(high, _only(v, inside, LOWEST, FULL))
        if MOMENTS:
            low = _less(low, _only(v, inside, HIGHEST, FULL))
            v = _only(v - middle, inside, 0.0, FULL)
            squares += v * v
        total += v
    step = batch * c
    found += (part * (4 if MOMENTS else 2) * batch + sample) * c + channels
    if MOMENTS:
        tl.store(found, tl.sum(total, axis=1), mask=there)
        tl.store(found + step, tl.sum(squares, axis=1), mask=there)
        tl.store(found + 2 * step, _largest(high, 1), mask=there)
        tl.store(found + 3 * step, -_largest(-low, 1), mask=there)
    else:
        tl.store(found, tl.sum(total, axis=1) / n, mask=there)
        tl.store(found + step, _largest(high, 1), mask=there)


@triton.jit
def pooled(
    found,
    pools,
    c,
    batch,
    shares,
    FIRST: tl.constexpr,
    POOLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Means and maxima (pools, B, C) from those of parts: both, or the one that is first."""
    at = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    step = batch * c
    there = at < step
    total = _sum(found, at, there, shares, 2 * step)
    top = tl.full([BLOCK_C], LOWEST, tl.float32)
    for share in tl.range(shares, loop_unroll_factor=8):
        top = _more(top, tl.load(found + (2 * share + 1) * step + at, mask=there, other=0.0))
    if FIRST == 0:
        tl.store(pools + at, total, mask=there)
    if FIRST + POOLS == 2:
        tl.store(pools + (POOLS - 1) * step + at, top, mask=there)


@triton.jit
def _samples(begin, channels, batch, c, BLOCK_B: tl.constexpr):
    """Some samples, where they lie in a small map (B, C), and what of that is inside."""
    samples = begin + tl.arange(0, BLOCK_B)
    return samples, samples[:, None] * c + channels[None, :], (samples < batch)[:, None] & (channels < c)[None, :]


@triton.jit
def _first_values(x, samples, channels, there, c, n, stride_c):
    """The first value of each channel of samples, about which `pool` has summed up."""
    at = samples.to(tl.int64)[:, None] * c * n + channels[None, :].to(tl.int64) * stride_c
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit
def normalise(
    x,
    found,
    mean,
    var,
    tracked,
    weight,
    bias,
    affine,
    moments,
    hat,
    pools,
    top,
    c,
    n,
    stride_c,
    batch,
    shares,
    eps,
    momentum,
    FIRST: tl.constexpr,
    POOLS: tl.constexpr,
    TRAINING: tl.constexpr,
    FOLLOW: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A norm's affine (4, C) and moments (2, C) from the moments of `pool`, and what is pooled behind it.

    Means of hat (B, C), the pools (pools, B, C), and in `top` (B, C) what of u the maxima over positions come from.
    Running mean and variance (C) follow if asked.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < c
    step = batch * c
    if TRAINING:
        count = n * 1.0
        sums = tl.zeros([BLOCK_B, BLOCK_C], tl.float64)
        for begin in range(0, batch, BLOCK_B):
            samples, at, there = _samples(begin, channels, batch, c, BLOCK_B)
            middle = _first_values(x, samples, channels, there, c, n, stride_c).to(tl.float64)
            total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
            for share in range(shares):
                total += tl.load(found + share * 4 * step + at, mask=there, other=0.0)
            sums += tl.where(there, middle + total / count, 0.0)
        of_mean = tl.sum(sums, axis=0) / batch
        rest = tl.zeros([BLOCK_B, BLOCK_C], tl.float64)
        for begin in range(0, batch, BLOCK_B):
            samples, at, there = _samples(begin, channels, batch, c, BLOCK_B)
            middle = _first_values(x, samples, channels, there, c, n, stride_c).to(tl.float64)
            total = tl.zeros([BLOCK_B, BLOCK_C], tl.float64)
            squares = tl.zeros([BLOCK_B, BLOCK_C], tl.float64)
            for share in range(shares):
                total += tl.load(found + share * 4 * step + at, mask=there, other=0.0)
                squares += tl.load(found + (share * 4 + 1) * step + at, mask=there, other=0.0)
            # about the mean of all: so far it is about each sample's first value
            beyond = middle - of_mean[None, :]
            rest += tl.where(there, squares + 2 * beyond * total + beyond * beyond * count, 0.0)
        of_var = (_more(tl.sum(rest, axis=0), 0.0) / batch / count).to(tl.float32)
        of_mean = of_mean.to(tl.float32)
        if FOLLOW:
            _follow(mean + channels, inside, of_mean, momentum)
            _follow(var + channels, inside, of_var * (count * batch / (count * batch - 1)), momentum)
            if tl.program_id(0) == 0:
                tl.store(tracked, tl.load(tracked) + 1)
    else:
        of_mean = tl.load(mean + channels, mask=inside, other=0.0).to(tl.float32)
        of_var = tl.load(var + channels, mask=inside, other=0.0).to(tl.float32)
    inverse = _deviation(of_var, eps)
    offset = -of_mean * inverse
    by = _some(weight + channels, inside, WEIGHT, 1.0)
    plus = _some(bias + channels, inside, BIAS, 0.0)
    tl.store(affine + channels, inverse, mask=inside)
    tl.store(affine + c + channels, offset, mask=inside)
    tl.store(affine + 2 * c + channels, by, mask=inside)
    tl.store(affine + 3 * c + channels, plus, mask=inside)
    tl.store(moments + channels, of_mean, mask=inside)
    tl.store(moments + c + channels, of_var, mask=inside)
    for begin in range(0, batch, BLOCK_B):
        samples, at, there = _samples(begin, channels, batch, c, BLOCK_B)
        middle = _first_values(x, samples, channels, there, c, n, stride_c).to(tl.float32)
        total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        high = tl.full([BLOCK_B, BLOCK_C], LOWEST, tl.float32)
        low = tl.full([BLOCK_B, BLOCK_C], HIGHEST, tl.float32)
        for share in range(shares):
            total += tl.load(found + share * 4 * step + at, mask=there, other=0.0)
            high = _more(high, tl.load(found + (share * 4 + 2) * step + at, mask=there, other=0.0))
            low = _less(low, tl.load(found + (share * 4 + 3) * step + at, mask=there, other=0.0))
        of_hat = _affine(middle + total / n, inverse[None, :], offset[None, :])
        high = tl.where((by >= 0)[None, :], high, low)
        tl.store(hat + at, of_hat, mask=there)
        tl.store(top + at, high, mask=there)
        if FIRST == 0:
            tl.store(pools + at, _affine(of_hat, by[None, :], plus[None, :]), mask=there)
        if FIRST + POOLS == 2:
            high = _affine(_affine(high, inverse[None, :], offset[None, :]), by[None, :], plus[None, :])
            tl.store(pools + (POOLS - 1) * step + at, high, mask=there)


@triton.jit
def _matrix(at, rows, cols, height, width, stride_r, stride_c):
    """A tile of a matrix (height, width) in float32, with zeros outside."""
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    return tl.load(at + rows[:, None] * stride_r + cols[None, :] * stride_c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def mlp_first(
    pools,
    first,
    bias,
    found,
    c,
    width,
    height,
    BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The first layer of poolings (pools * B, C), before its activation (pools * B, H)."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for begin in range(0, c, BLOCK_C):
        channels = begin + tl.arange(0, BLOCK_C)
        left = _matrix(pools, rows, channels, height, c, c, 1)
        right = _matrix(first, channels, units, c, width, 1, c)
        total += tl.dot(left, right, input_precision=PARTED)
    total += _some(bias + units, units < width, BIAS, 0.0)[None, :]
    inside = (rows < height)[:, None] & (units < width)[None, :]
    tl.store(found + rows[:, None] * width + units[None, :], total, mask=inside)


@triton.jit
def mlp_second(
    first,
    second,
    bias,
    strength,
    affine,
    hidden,
    logits,
    gate,
    factors,
    c,
    width,
    batch,
    POOLS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    STRENGTH: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over pools behind the activation (B, H), logits and gate (B, C), and with a norm the factors (2, B, C)."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    samples = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for begin in range(0, width, BLOCK_H):
        units = begin + tl.arange(0, BLOCK_H)
        value = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
        for pool in tl.static_range(POOLS):
            one = _matrix(first + pool * batch * width, samples, units, batch, width, width, 1)
            value += _activated(one, ACTIVATION)
        inside = (samples < batch)[:, None] & (units < width)[None, :]
        tl.store(hidden + samples[:, None] * width + units[None, :], value, mask=inside & (tl.program_id(0) == 0))
        total += tl.dot(value, _matrix(second, units, channels, width, c, 1, width), input_precision=PARTED)
    total += POOLS * _some(bias + channels, channels < c, BIAS, 0.0)[None, :]
    at = samples[:, None] * c + channels[None, :]
    there = (samples < batch)[:, None] & (channels < c)[None, :]
    tl.store(logits + at, total, mask=there)
    found = _gate(total, GATE)
    if STRENGTH:
        # a gate that is no number counts as 1
        found = 1.0 + tl.load(strength).to(tl.float32) * tl.where(found == found, found - 1.0, 0.0)
    tl.store(gate + at, found, mask=there)
    if NORM:
        inside = channels < c
        inverse = tl.load(affine + channels, mask=inside, other=0.0)
        offset = tl.load(affine + c + channels, mask=inside, other=0.0)
        by = tl.load(affine + 2 * c + channels, mask=inside, other=0.0)
        plus = tl.load(affine + 3 * c + channels, mask=inside, other=0.0)
        tl.store(factors + at, (inverse * by)[None, :] * found, mask=there)
        tl.store(factors + batch * c + at, _affine(offset, by, plus)[None, :] * found, mask=there)


@triton.jit
def summarise(
    x,
    gate,
    factors,
    found,
    c,
    n,
    stride_c,
    stride_n,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    FULL: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Means and maxima of positions over channels (2, B, N), gated or not."""
    sample, batch = tl.program_id(1), tl.num_programs(1)
    x += sample.to(tl.int64) * c * n
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    top = tl.full([BLOCK_C, BLOCK_N], LOWEST, tl.float32)
    for begin in tl.range(0, c, BLOCK_C, num_stages=STAGES):
        channels = begin + tl.arange(0, BLOCK_C)
        inside = _within(channels, places, c, n, FULL)
        v = _read(x + _at(channels, places, stride_c, stride_n, LONG), inside, FULL)
        v = _gated(v, gate, factors, sample * c + channels, channels < c, batch * c, NORM, GATED)
        total += v
        top = _more(top, _only(v, inside, LOWEST, FULL))
    at = sample.to(tl.int64) * n + places
    tl.store(found + at, tl.sum(total, axis=0) / c, mask=places < n)
    tl.store(found + batch.to(tl.int64) * n + at, _largest(top, 0), mask=places < n)


@triton.jit
def _gated(v, gate, factors, at, there, step, NORM: tl.constexpr, GATED: tl.constexpr):
    """A tile with its channels gated."""
    if NORM:
        by = tl.load(factors + at, mask=there, other=0.0)
        plus = tl.load(factors + step + at, mask=there, other=0.0)
        v = _affine(v, by[:, None], plus[:, None])
    elif GATED:
        v *= tl.load(gate + at, mask=there, other=0.0)[:, None]
    return v


@triton.jit
def _tile_of_plane(block, width, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, those of all depths one after the other, and columns of the places of a tile."""
    each, across = tl.arange(0, BLOCK), tl.cdiv(width, COLS)
    return block // across * (BLOCK // COLS) + each // COLS, block % across * COLS + each % COLS


@triton.jit
def _line(line, rows, deep, height, DEEP: tl.constexpr, HIGH: tl.constexpr):
    """How many rows away what a line of a window covers lies, and of which rows that is inside of the plane."""
    under, near = line // HIGH - DEEP // 2, line % HIGH - HIGH // 2
    there = (rows < deep * height) & (rows % height + near >= 0) & (rows % height + near < height)
    if DEEP > 1:
        there &= (rows // height + under >= 0) & (rows // height + under < deep)
    return under * height + near, there


@triton.jit
def convolve(
    planes,
    weight,
    logits,
    parts,
    deep,
    height,
    width,
    stride_p,
    stride_t,
    DEEP: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    MOMENTS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A window over two planes (2, B, N) to logits (B, N), and of each tile of them mean, summed squares and number."""
    block, sample, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = deep * height * width
    rows, cols = _tile_of_plane(block, width, COLS, BLOCK)
    inside = (rows < deep * height) & (cols < width)
    plane = sample.to(tl.int64) * n
    here = planes + plane + rows * width + cols
    total = tl.zeros([BLOCK], tl.float32)
    for line in range(DEEP * HIGH):
        away, in_rows = _line(line, rows, deep, height, DEEP, HIGH)
        means = here + away * width
        maxima = means + batch.to(tl.int64) * n
        for tap in tl.static_range(WIDE):
            beside = tap - WIDE // 2
            there = in_rows & (cols + beside >= 0) & (cols + beside < width)
            at = weight + (line * WIDE + tap) * stride_t
            total += tl.load(means + beside, mask=there, other=0.0) * tl.load(at).to(tl.float32)
            total += tl.load(maxima + beside, mask=there, other=0.0) * tl.load(at + stride_p).to(tl.float32)
    tl.store(logits + plane + rows * width + cols, total, mask=inside)
    if MOMENTS:
        number = tl.sum(inside.to(tl.float32), axis=0)
        mean = tl.sum(tl.where(inside, total, 0.0), axis=0) / number
        beyond = tl.where(inside, total - mean, 0.0)
        at = parts + 3 * (sample * tl.num_programs(0) + block)
        tl.store(at, mean)
        tl.store(at + 1, tl.sum(beyond * beyond, axis=0))
        tl.store(at + 2, number)


@triton.jit
def gate(
    logits,
    parts,
    mean,
    var,
    tracked,
    weight,
    bias,
    strength,
    found,
    used,
    moments,
    batch,
    n,
    count,
    eps,
    momentum,
    NORM: tl.constexpr,
    TRAINING: tl.constexpr,
    FOLLOW: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    STRENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gate (B, N) of logits behind their norm; mean and variance (2) that it has used, those of all in training.

    Running mean and variance follow those if asked.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tl.cast(batch, tl.int64) * n
    v = tl.load(logits + places, mask=inside, other=0.0)
    if NORM:
        if TRAINING:
            total, squares = tl.zeros([PARTS], tl.float64), tl.zeros([PARTS], tl.float64)
            for begin in range(0, count, PARTS):
                each = begin + tl.arange(0, PARTS)
                at, there = parts + 3 * each, each < count
                of_tile = tl.load(at, mask=there, other=0.0).to(tl.float64)
                number = tl.load(at + 2, mask=there, other=0.0)
                total += number * of_tile
                squares += tl.load(at + 1, mask=there, other=0.0) + number * of_tile * of_tile
            of_mean = tl.sum(total, axis=0) / batch / n
            # in float64 the difference of what are float32 is exact enough
            of_var = _more(tl.sum(squares, axis=0) / batch / n - of_mean * of_mean, 0.0).to(tl.float32)
            of_mean = of_mean.to(tl.float32)
            if tl.program_id(0) == 0:
                tl.store(moments, of_mean)
                tl.store(moments + 1, of_var)
                if FOLLOW:
                    number = batch * 1.0 * n
                    _follow(mean, True, of_mean, momentum)
                    _follow(var, True, of_var * (number / (number - 1)), momentum)
                    tl.store(tracked, tl.load(tracked) + 1)
        else:
            of_mean, of_var = tl.load(mean).to(tl.float32), tl.load(var).to(tl.float32)
        if tl.program_id(0) == 0:
            tl.store(used, of_mean)
            tl.store(used + 1, of_var)
        v = (v - of_mean) * _deviation(of_var, eps)
        if WEIGHT:
            v *= tl.load(weight).to(tl.float32)
        if BIAS:
            v += tl.load(bias).to(tl.float32)
    v = _sigmoid(v)
    if STRENGTH:
        # a gate that is no number counts as 1
        v = 1.0 + tl.load(strength).to(tl.float32) * tl.where(v == v, v - 1.0, 0.0)
    tl.store(found + places, v, mask=inside)


@triton.jit
def apply(
    x,
    gate,
    factors,
    spatial,
    shortcut,
    y,
    c,
    n,
    stride_c,
    stride_n,
    NORM: tl.constexpr,
    CHANNEL: tl.constexpr,
    SPATIAL: tl.constexpr,
    SHORTCUT: tl.constexpr,
    FULL: tl.constexpr,
    LONG: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The map times its gates; with a shortcut relu(that + shortcut)."""
    batch = tl.num_programs(2)
    sample = batch - 1 - tl.program_id(2)
    start = sample.to(tl.int64) * c * n
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for step in range(STEPS):
        places = (tl.program_id(0) * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = _within(channels, places, c, n, FULL)
        at = _at(channels, places, stride_c, stride_n, LONG)
        v = _read(x + start + at, inside, FULL)
        v = _gated(v, gate, factors, sample * c + channels, channels < c, batch * c, NORM, CHANNEL)
        if SPATIAL:
            v *= tl.load(spatial + sample.to(tl.int64) * n + places, mask=places < n, other=0.0)[None, :]
        if SHORTCUT:
            v += _read(shortcut + start + at, inside, FULL)
            v = tl.where(v < 0, 0.0, v)
        tl.store(y + start + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    v,
    d,
    by,
    plus,
    inverse,
    offset,
    weight,
    top,
    inside,
    NORM: tl.constexpr,
    CHANNEL: tl.constexpr,
    SPATIAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """Of a tile: what it adds to the sums for its channels, the second with a norm only, for its places, and maxima."""
    gated = v
    if NORM:
        gated = _affine(v, by, plus)
    elif CHANNEL:
        gated = v * by
    for_place = d * gated
    if SPATIAL:
        d *= weight
    for_channel = d * _affine(v, inverse, offset) if NORM else d * v
    seen = v
    if GATED:
        seen = gated
    return for_channel, d, for_place, (inside & (seen == top)).to(tl.float32)


@triton.jit
def _of_channels(gate, factors, affine, at, channels, c, step, NORM: tl.constexpr, CHANNEL: tl.constexpr):
    """What channels of a sample are gated with, `by` and with a norm `plus`, and the norm's inverse and offset."""
    there = channels < c
    by, plus = tl.full(channels.shape, 1.0, tl.float32), tl.zeros(channels.shape, tl.float32)
    inverse, offset = plus, plus
    if NORM:
        by = tl.load(factors + at, mask=there, other=0.0)
        plus = tl.load(factors + step + at, mask=there, other=0.0)
        inverse = tl.load(affine + channels, mask=there, other=0.0)
        offset = tl.load(affine + c + channels, mask=there, other=0.0)
    elif CHANNEL:
        by = tl.load(gate + at, mask=there, other=0.0)
    return by[:, None], plus[:, None], inverse[:, None], offset[:, None]


@triton.jit
def grad_gates(
    x,
    dy,
    gate,
    factors,
    affine,
    spatial,
    maximum,
    by_channel,
    by_place,
    counts,
    c,
    n,
    stride_c,
    stride_n,
    LAST: tl.constexpr,
    NORM: tl.constexpr,
    CHANNEL: tl.constexpr,
    SPATIAL: tl.constexpr,
    GATED: tl.constexpr,
    COUNT: tl.constexpr,
    FULL: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program's part of the gradients of both gates, and how often a maximum over channels is in it.

    With channels last it has a block of channels and every so-many-th block of positions, else a block of positions
    and every so-many-th block of channels: sums along what lies together in memory are taken in each tile, sums along
    the other side at the end. By channels (parts, B, C), and behind a norm (parts, 2, B, C), where the first are sums
    of the gated map's gradient times hat, the second of it alone; by places (groups, B, N).
    """
    one, another, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(2)
    sample = batch - 1 - tl.program_id(2)
    start = sample.to(tl.int64) * c * n
    x += start
    dy += start
    plane = sample.to(tl.int64) * n
    step = batch * c
    by_channel += (one * (2 if NORM else 1) * batch + sample) * c
    by_place += (another * batch.to(tl.int64) + sample) * n
    counts += (another * batch.to(tl.int64) + sample) * n
    sums = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    others = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    if LAST:
        channels = another * BLOCK_C + tl.arange(0, BLOCK_C)
        at = sample * c + channels
        by, plus, inverse, offset = _of_channels(gate, factors, affine, at, channels, c, step, NORM, CHANNEL)
        parts = tl.num_programs(0)
        for begin in tl.range(one * BLOCK_N, n, parts * BLOCK_N, num_stages=STAGES):
            places = begin + tl.arange(0, BLOCK_N)
            there = places < n
            inside = _within(channels, places, c, n, FULL)
            within = _at(channels, places, stride_c, stride_n, LONG)
            v, d = _read(x + within, inside, FULL), _read(dy + within, inside, FULL)
            weight = _some(spatial + plane + places, there, SPATIAL, 1.0)[None, :]
            top = _some(maximum + plane + places, there, COUNT, 0.0)[None, :]
            for_channel, alone, for_place, equal = _products(
                v, d, by, plus, inverse, offset, weight, top, inside, NORM, CHANNEL, SPATIAL, GATED
            )
            if CHANNEL:
                sums += for_channel
            if NORM:
                others += alone
            if SPATIAL:
                tl.store(by_place + places, tl.sum(for_place, axis=0), mask=there)
            if COUNT:
                tl.store(counts + places, tl.sum(equal, axis=0), mask=there)
        if CHANNEL:
            tl.store(by_channel + channels, tl.sum(sums, axis=1), mask=channels < c)
        if NORM:
            tl.store(by_channel + step + channels, tl.sum(others, axis=1), mask=channels < c)
    else:
        places = one * BLOCK_N + tl.arange(0, BLOCK_N)
        there = places < n
        weight = _some(spatial + plane + places, there, SPATIAL, 1.0)[None, :]
        top = _some(maximum + plane + places, there, COUNT, 0.0)[None, :]
        groups = tl.num_programs(1)
        for begin in tl.range(another * BLOCK_C, c, groups * BLOCK_C, num_stages=STAGES):
            channels = begin + tl.arange(0, BLOCK_C)
            at = sample * c + channels
            by, plus, inverse, offset = _of_channels(gate, factors, affine, at, channels, c, step, NORM, CHANNEL)
            inside = _within(channels, places, c, n, FULL)
            within = _at(channels, places, stride_c, stride_n, LONG)
            v, d = _read(x + within, inside, FULL), _read(dy + within, inside, FULL)
            for_channel, alone, for_place, equal = _products(
                v, d, by, plus, inverse, offset, weight, top, inside, NORM, CHANNEL, SPATIAL, GATED
            )
            if CHANNEL:
                tl.store(by_channel + channels, tl.sum(for_channel, axis=1), mask=channels < c)
            if NORM:
                tl.store(by_channel + step + channels, tl.sum(alone, axis=1), mask=channels < c)
            if SPATIAL:
                sums += for_place
            if COUNT:
                others += equal
        if SPATIAL:
            tl.store(by_place + places, tl.sum(sums, axis=0), mask=there)
        if COUNT:
            tl.store(counts + places, tl.sum(others, axis=0), mask=there)


@triton.jit
def grad_gate(
    logits,
    by_place,
    counts,
    used,
    weight,
    bias,
    strength,
    found,
    parts,
    batch,
    n,
    groups,
    eps,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    STRENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient behind the norm (B, N), and parts of three sums: of it times hat, of it, and for the strength.

    What `grad_gates` has found in groups is summed up, for `counts` in place.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    every = tl.cast(batch, tl.int64) * n
    inside = places < every
    d = _sum(by_place, places, inside, groups, every)
    tl.store(counts + places, _sum(counts, places, inside, groups, every), mask=inside)
    v = tl.load(logits + places, mask=inside, other=0.0)
    hat = v
    if NORM:
        hat = (v - tl.load(used)) * _deviation(tl.load(used + 1), eps)
        v = hat
        if WEIGHT:
            v *= tl.load(weight).to(tl.float32)
        if BIAS:
            v += tl.load(bias).to(tl.float32)
    v = _sigmoid(v)
    at = parts + 3 * tl.program_id(0)
    if STRENGTH:
        by_strength = tl.where(inside, d * tl.where(v == v, v - 1.0, 0.0), 0.0)
        tl.store(at + 2, tl.sum(by_strength.to(tl.float64), axis=0))
        d = tl.where(v == v, d * tl.load(strength).to(tl.float32), 0.0)
    d = tl.where(inside, d * v * (1.0 - v), 0.0)
    if NORM:
        tl.store(at, tl.sum(tl.where(inside, d * hat, 0.0).to(tl.float64), axis=0))
        tl.store(at + 1, tl.sum(d.to(tl.float64), axis=0))
    tl.store(found + places, d, mask=inside)


@triton.jit
def _sum_of_parts(parts, count):
    """The sum of every third number."""
    total = tl.zeros([PARTS], tl.float64)
    for begin in range(0, count, PARTS):
        each = begin + tl.arange(0, PARTS)
        total += tl.load(parts + 3 * each, mask=each < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _shared(to_all, to_maxima, number):
    """A gradient shared out among so many maxima; one that is nowhere makes all NaN."""
    return to_all + tl.where(number > 0, 0.0, float("nan")), to_maxima / tl.maximum(number, 1.0)


@triton.jit
def grad_planes(
    logits,
    d,
    parts,
    used,
    norm_weight,
    weight,
    counts,
    dnorm_weight,
    dnorm_bias,
    dstrength,
    dlogits,
    planes,
    deep,
    height,
    width,
    stride_p,
    stride_t,
    c,
    count,
    eps,
    NORM: tl.constexpr,
    TRAINING: tl.constexpr,
    WEIGHT: tl.constexpr,
    STRENGTH: tl.constexpr,
    DEEP: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the logits (B, N), and what comes by the summary to each place: to all channels, to the maxima.

    The latter two (2, B, N) are the gradients of the planes, shared out. A maximum that is nowhere makes all NaN.
    """
    sample, batch = tl.program_id(1), tl.num_programs(1)
    n = deep * height * width
    rows, cols = _tile_of_plane(tl.program_id(0), width, COLS, BLOCK)
    inside = (rows < deep * height) & (cols < width)
    places = sample.to(tl.int64) * n + rows * width + cols
    first = (sample == 0) & (tl.program_id(0) == 0)
    by, by_hat, by_one, of_mean, deviation = 1.0, 0.0, 0.0, 0.0, 0.0
    if NORM:
        total_hat, total = _sum_of_parts(parts, count), _sum_of_parts(parts + 1, count)
        if first:
            tl.store(dnorm_weight, total_hat.to(tl.float32))
            tl.store(dnorm_bias, total.to(tl.float32))
        of_mean = tl.load(used)
        deviation = _deviation(tl.load(used + 1), eps)
        by = deviation
        if WEIGHT:
            by *= tl.load(norm_weight).to(tl.float32)
        if TRAINING:
            by_hat = (total_hat / batch / n).to(tl.float32)
            by_one = (total / batch / n).to(tl.float32)
    if STRENGTH:  # noqa: SIM102  a constant decides at compile time, a number does not
        if first:
            tl.store(dstrength, _sum_of_parts(parts + 2, count).to(tl.float32))
    v = _through(logits + places, d + places, inside, by, by_hat, by_one, of_mean, deviation, NORM, TRAINING)
    tl.store(dlogits + places, v, mask=inside)
    to_all = tl.zeros([BLOCK], tl.float32)
    to_maxima = tl.zeros([BLOCK], tl.float32)
    for line in range(DEEP * HIGH):
        # whoever has these places in this line of its window
        away, in_rows = _line(DEEP * HIGH - 1 - line, rows, deep, height, DEEP, HIGH)
        of_logits, of_d = logits + places + away * width, d + places + away * width
        for tap in tl.static_range(WIDE):
            beside = WIDE // 2 - tap
            there = in_rows & (cols + beside >= 0) & (cols + beside < width)
            v = _through(
                of_logits + beside, of_d + beside, there, by, by_hat, by_one, of_mean, deviation, NORM, TRAINING
            )
            at = weight + (line * WIDE + tap) * stride_t
            to_all += v * tl.load(at).to(tl.float32)
            to_maxima += v * tl.load(at + stride_p).to(tl.float32)
    number = tl.load(counts + places, mask=inside, other=1.0)
    to_all, to_maxima = _shared(to_all / c, to_maxima, number)
    tl.store(planes + places, to_all, mask=inside)
    tl.store(planes + batch.to(tl.int64) * n + places, to_maxima, mask=inside)


@triton.jit
def _through(logits, d, there, by, by_hat, by_one, of_mean, deviation, NORM: tl.constexpr, TRAINING: tl.constexpr):
    """The gradient before the norm of the logits; 0 where there is none."""
    v = tl.load(d, mask=there, other=0.0)
    if NORM:
        if TRAINING:
            hat = (tl.load(logits, mask=there, other=0.0) - of_mean) * deviation
            v = tl.where(there, v - by_one - hat * by_hat, 0.0)
        v *= by
    return v


@triton.jit
def grad_weight(
    planes,
    dlogits,
    found,
    batch,
    deep,
    height,
    width,
    DEEP: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    ACROSS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of a window's weight (2, DEEP * HIGH, parts, ACROSS), of some tiles: a program for each of its lines."""
    line, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = deep * height * width
    blocks = tl.cdiv(deep * height, BLOCK // COLS) * tl.cdiv(width, COLS)
    taps = tl.arange(0, ACROSS)
    beside = taps[:, None] - WIDE // 2
    of_means = tl.zeros([ACROSS, BLOCK], tl.float32)
    of_maxima = tl.zeros([ACROSS, BLOCK], tl.float32)
    for tile in range(part, batch * blocks, parts):
        rows, cols = _tile_of_plane(tile % blocks, width, COLS, BLOCK)
        away, in_rows = _line(line, rows, deep, height, DEEP, HIGH)
        places = tl.cast(n, tl.int64) * (tile // blocks) + rows * width + cols
        d = tl.load(dlogits + places, mask=in_rows & (cols < width), other=0.0)[None, :]
        there = (in_rows & (cols < width))[None, :] & (taps < WIDE)[:, None]
        there &= (cols[None, :] + beside >= 0) & (cols[None, :] + beside < width)
        means = planes + (places + away * width)[None, :] + beside
        maxima = means + tl.cast(n, tl.int64) * batch
        of_means += tl.load(means, mask=there, other=0.0) * d
        of_maxima += tl.load(maxima, mask=there, other=0.0) * d
    at = (line * parts + part) * ACROSS + taps
    tl.store(found + at, tl.sum(of_means, axis=1))
    tl.store(found + DEEP * HIGH * parts * ACROSS + at, tl.sum(of_maxima, axis=1))


@triton.jit
def grad_summary(
    x,
    gate,
    factors,
    affine,
    seen,
    planes,
    top,
    found,
    counts,
    c,
    n,
    stride_c,
    stride_n,
    NORM: tl.constexpr,
    SUMMARY: tl.constexpr,
    COUNT: tl.constexpr,
    FULL: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What comes to the channel gate by the summary, and how often the maximum over positions is there, of a part.

    The first is (parts, B, C), and behind a norm (parts, 2, B, C) as in `grad_gates`; the second (parts, B, C).
    """
    part, parts, batch = tl.program_id(1), tl.num_programs(1), tl.num_programs(2)
    sample = tl.program_id(2)
    x += sample.to(tl.int64) * c * n
    plane = sample.to(tl.int64) * n
    shares = planes + batch.to(tl.int64) * n + plane
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channels < c
    at = sample * c + channels
    by, plus, inverse, offset = _of_channels(gate, factors, affine, at, channels, c, batch * c, NORM, SUMMARY)
    highest = _some(top + at, there, COUNT, 0.0)[:, None]
    total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    alone = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for begin in tl.range(part * BLOCK_N, n, parts * BLOCK_N, num_stages=STAGES):
        places = begin + tl.arange(0, BLOCK_N)
        inside = _within(channels, places, c, n, FULL)
        v = _read(x + _at(channels, places, stride_c, stride_n, LONG), inside, FULL)
        if COUNT:
            count += (inside & (v == highest)).to(tl.float32)
        if SUMMARY:
            gated = v * by
            if NORM:
                gated = _affine(v, by, plus)
            maximum = tl.load(seen + plane + places, mask=places < n, other=0.0)[None, :]
            share = tl.load(shares + places, mask=places < n, other=0.0)[None, :]
            one = tl.load(planes + plane + places, mask=places < n, other=0.0)[None, :]
            one = one + tl.where(gated == maximum, share, 0.0)
            if NORM:
                total += one * _affine(v, inverse, offset)
                alone += one
            else:
                total += one * v
    found += (part * (2 if NORM else 1) * batch + sample) * c + channels
    if SUMMARY:
        tl.store(found, tl.sum(total, axis=1), mask=there)
        if NORM:
            tl.store(found + batch * c, tl.sum(alone, axis=1), mask=there)
    if COUNT:
        tl.store(counts + (part * batch + sample) * c + channels, tl.sum(count, axis=1), mask=there)


@triton.jit
def grad_logits(
    by_channel,
    by_summary,
    of_counts,
    logits,
    strength,
    affine,
    sums,
    counts,
    dlogits,
    strengths,
    c,
    n,
    batch,
    shares,
    others,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    SUMMARY: tl.constexpr,
    COUNT: tl.constexpr,
    STRENGTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the logits (B, C), with a norm the sums (2, B, C), counts (B, C), and a part of the strength's."""
    at = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    step = batch * c
    there = at < step
    channels = at % c
    d = _of_both(by_channel, by_summary, at, there, step, shares, others, NORM, SUMMARY)
    number = tl.zeros([BLOCK_C], tl.float32)
    if COUNT:
        number = _sum(of_counts, at, there, others, step)
    if NORM:
        one = _of_both(by_channel + step, by_summary + step, at, there, step, shares, others, NORM, SUMMARY)
        tl.store(sums + at, d, mask=there)
        tl.store(sums + step + at, one, mask=there)
        by = tl.load(affine + 2 * c + channels, mask=there, other=0.0)
        d = d * by + one * tl.load(affine + 3 * c + channels, mask=there, other=0.0)
        # a weight of 0 makes every place a maximum
        number = tl.where(by == 0, n, number)
    if COUNT:
        tl.store(counts + at, number, mask=there)
    v = tl.load(logits + at, mask=there, other=0.0)
    if STRENGTH:
        gate = _gate(v, GATE)
        by_strength = tl.where(there, d * tl.where(gate == gate, gate - 1.0, 0.0), 0.0)
        tl.store(strengths + tl.program_id(0), tl.sum(by_strength.to(tl.float64), axis=0))
        d *= tl.load(strength).to(tl.float32)
    tl.store(dlogits + at, d * _grad_of_gate(v, GATE), mask=there)


@triton.jit
def _of_both(one, other, at, there, step, shares, others, NORM: tl.constexpr, SUMMARY: tl.constexpr):
    """Sums over the parts of `grad_gates` and of `grad_summary`."""
    apart = step * (2 if NORM else 1)
    d = _sum(one, at, there, shares, apart)
    if SUMMARY:
        d += _sum(other, at, there, others, apart)
    return d


@triton.jit
def grad_mlp_second(
    dlogits,
    second,
    first,
    dfirst,
    c,
    width,
    batch,
    POOLS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the first layer's output (pools, B, H)."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    samples = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for begin in range(0, c, BLOCK_C):
        channels = begin + tl.arange(0, BLOCK_C)
        left = _matrix(dlogits, samples, channels, batch, c, c, 1)
        total += tl.dot(left, _matrix(second, channels, units, c, width, width, 1), input_precision=EXACT)
    inside = (samples < batch)[:, None] & (units < width)[None, :]
    for pool in tl.static_range(POOLS):
        at = (pool * batch + samples)[:, None] * width + units[None, :]
        one = tl.load(first + at, mask=inside, other=0.0)
        tl.store(dfirst + at, _grad_activated(total, one, ACTIVATION), mask=inside)


@triton.jit
def grad_mlp_first(
    dfirst,
    first,
    counts,
    plus,
    c,
    n,
    width,
    batch,
    FIRST: tl.constexpr,
    POOLS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What comes by the poolings (2, B, C): to every place and to the maxima, whole or shared out among them."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    samples = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    to_all = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    to_maxima = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for begin in range(0, width, BLOCK_H):
        units = begin + tl.arange(0, BLOCK_H)
        weights = _matrix(first, units, channels, width, c, c, 1)
        if FIRST == 0:
            left = _matrix(dfirst, samples, units, batch, width, width, 1)
            to_all += tl.dot(left, weights, input_precision=PARTED)
        if FIRST + POOLS == 2:
            left = _matrix(dfirst + (POOLS - 1) * batch * width, samples, units, batch, width, width, 1)
            to_maxima += tl.dot(left, weights, input_precision=PARTED)
    at = samples[:, None] * c + channels[None, :]
    there = (samples < batch)[:, None] & (channels < c)[None, :]
    if SHARED:
        to_all = to_all / n
        if FIRST + POOLS == 2:
            to_all, to_maxima = _shared(to_all, to_maxima, tl.load(counts + at, mask=there, other=1.0))
    tl.store(plus + at, to_all, mask=there)
    tl.store(plus + batch * c + at, to_maxima, mask=there)


@triton.jit
def grad_mlp_weights(
    dfirst,
    pools,
    dlogits,
    hidden,
    dweight_first,
    dbias_first,
    dweight_second,
    dbias_second,
    c,
    width,
    batch,
    POOLS: tl.constexpr,
    BIAS_FIRST: tl.constexpr,
    BIAS_SECOND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Gradients of both layers' weights, (H, C) and (C, H), and biases."""
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_first = (units < width)[:, None] & (channels < c)[None, :]
    in_second = (channels < c)[:, None] & (units < width)[None, :]
    of_first = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    of_second = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    of_units, of_channels = tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, POOLS * batch, BLOCK_B):
        rows = begin + tl.arange(0, BLOCK_B)
        there = rows < POOLS * batch
        at = units[:, None] + rows[None, :] * width
        left = tl.load(dfirst + at, mask=(units < width)[:, None] & there[None, :], other=0.0)
        right = tl.load(
            pools + rows[:, None] * c + channels[None, :], mask=there[:, None] & (channels < c)[None, :], other=0.0
        )
        of_first += tl.dot(left, right, input_precision=EXACT)
        of_units += tl.sum(left, axis=1)
        there = rows < batch
        at = channels[:, None] + rows[None, :] * c
        left = tl.load(dlogits + at, mask=(channels < c)[:, None] & there[None, :], other=0.0)
        right = tl.load(
            hidden + rows[:, None] * width + units[None, :], mask=there[:, None] & (units < width)[None, :], other=0.0
        )
        of_second += tl.dot(left, right, input_precision=EXACT)
        of_channels += tl.sum(left, axis=1)
    kind = dweight_first.dtype.element_ty
    tl.store(dweight_first + units[:, None] * c + channels[None, :], of_first.to(kind), mask=in_first)
    tl.store(dweight_second + channels[:, None] * width + units[None, :], of_second.to(kind), mask=in_second)
    if BIAS_FIRST:
        tl.store(dbias_first + units, of_units.to(kind), mask=(units < width) & (tl.program_id(1) == 0))
    if BIAS_SECOND:
        alone = (channels < c) & (tl.program_id(0) == 0)
        tl.store(dbias_second + channels, (POOLS * of_channels).to(kind), mask=alone)


@triton.jit
def grad_norm(
    gate,
    affine,
    hat,
    top,
    sums,
    counts,
    plus,
    times,
    by_hat,
    dweight,
    dbias,
    c,
    n,
    batch,
    TRAINING: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of a norm's weight and bias (C), and what `grad_input` takes to go through it.

    du is what comes to the gated map times `times` (B, C), with `plus` (2, B, C) to every place and to the maxima, less
    hat times `by_hat` (C).
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < c
    step = batch * c
    inverse = tl.load(affine + channels, mask=inside, other=0.0)
    offset = tl.load(affine + c + channels, mask=inside, other=0.0)
    weight = tl.load(affine + 2 * c + channels, mask=inside, other=0.0)
    with_hat = tl.zeros([BLOCK_B, BLOCK_C], tl.float64)
    alone = tl.zeros([BLOCK_B, BLOCK_C], tl.float64)
    for begin in range(0, batch, BLOCK_B):
        _, at, there = _samples(begin, channels, batch, c, BLOCK_B)
        by = tl.load(gate + at, mask=there, other=0.0)
        of_hat = tl.load(hat + at, mask=there, other=0.0)
        d = tl.load(plus + at, mask=there, other=0.0)
        one = by * tl.load(sums + step + at, mask=there, other=0.0) + d
        many = by * tl.load(sums + at, mask=there, other=0.0) + d * of_hat
        if MAX:
            d = tl.load(plus + step + at, mask=there, other=0.0)
            of_top = _affine(tl.load(top + at, mask=there, other=0.0), inverse[None, :], offset[None, :])
            one += d
            many += d * tl.where((weight == 0)[None, :], of_hat, of_top)
        with_hat += tl.where(there, many, 0.0)
        alone += tl.where(there, one, 0.0)
    of_weight, of_bias = tl.sum(with_hat, axis=0), tl.sum(alone, axis=0)
    if WEIGHT:
        tl.store(dweight + channels, of_weight.to(dweight.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(dbias + channels, of_bias.to(dbias.dtype.element_ty), mask=inside)
    scale = inverse * weight
    mean_one, mean_hat = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    if TRAINING:
        mean_one, mean_hat = (of_bias / batch / n).to(tl.float32), (of_weight / batch / n).to(tl.float32)
    tl.store(by_hat + channels, scale * mean_hat, mask=inside)
    for begin in range(0, batch, BLOCK_B):
        _, at, there = _samples(begin, channels, batch, c, BLOCK_B)
        to_all = tl.load(plus + at, mask=there, other=0.0) / n - mean_one[None, :]
        if MAX:
            to_maxima = tl.load(plus + step + at, mask=there, other=0.0)
            to_all, to_maxima = _shared(to_all, to_maxima, tl.load(counts + at, mask=there, other=1.0))
            tl.store(plus + step + at, scale[None, :] * to_maxima, mask=there)
        tl.store(plus + at, scale[None, :] * to_all, mask=there)
        tl.store(times + at, scale[None, :] * tl.load(gate + at, mask=there, other=0.0), mask=there)


@triton.jit
def grad_input(
    x,
    dy,
    gate,
    factors,
    affine,
    times,
    by_hat,
    spatial,
    seen,
    planes,
    top,
    plus,
    dx,
    c,
    n,
    stride_c,
    stride_n,
    GIVEN: tl.constexpr,
    NORM: tl.constexpr,
    THROUGH: tl.constexpr,
    CHANNEL: tl.constexpr,
    SPATIAL: tl.constexpr,
    GATED: tl.constexpr,
    POOLED: tl.constexpr,
    MAX: tl.constexpr,
    FULL: tl.constexpr,
    LONG: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = (dy * spatial + summary) * channel + poolings, the summary perhaps beside the channel gate."""
    batch = tl.num_programs(2)
    sample = batch - 1 - tl.program_id(2)
    start = sample.to(tl.int64) * c * n
    plane = sample.to(tl.int64) * n
    step = batch * c
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = channels < c
    at = sample * c + channels
    by, by_plus, inverse, offset = _of_channels(gate, factors, affine, at, channels, c, step, NORM, CHANNEL)
    factor = by
    if NORM:
        factor = tl.load(times + at, mask=within, other=0.0)[:, None]
    to_all = _some(plus + at, within, POOLED, 0.0)[:, None]
    to_maxima = _some(plus + step + at, within, MAX, 0.0)[:, None]
    highest = _some(top + at, within, MAX, 0.0)[:, None]
    less = _some(by_hat + channels, within, THROUGH, 0.0)[:, None]
    for turn in range(STEPS):
        places = (tl.program_id(0) * STEPS + turn) * BLOCK_N + tl.arange(0, BLOCK_N)
        there = places < n
        inside = _within(channels, places, c, n, FULL)
        to = _at(channels, places, stride_c, stride_n, LONG)
        v = _read(x + start + to, inside, FULL)
        found = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        if GIVEN:
            found = _read(dy + start + to, inside, FULL)
        summary = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        if SPATIAL:
            found *= tl.load(spatial + plane + places, mask=there, other=0.0)[None, :]
            maximum = tl.load(seen + plane + places, mask=there, other=0.0)[None, :]
            share = tl.load(planes + batch.to(tl.int64) * n + plane + places, mask=there, other=0.0)[None, :]
            summary = tl.load(planes + plane + places, mask=there, other=0.0)[None, :]
            gated = v
            if GATED:
                gated = v * by
                if NORM:
                    gated = _affine(v, by, by_plus)
            summary = summary + tl.where(gated == maximum, share, 0.0)
            if GATED:
                found += summary
        if CHANNEL:
            found *= factor
        if SPATIAL and not GATED:
            found += summary
        if POOLED:
            found += to_all
        if MAX:
            found += tl.where(v == highest, to_maxima, 0.0)
        if THROUGH:
            found -= less * _affine(v, inverse, offset)
        tl.store(dx + start + to, found.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    parts,
    strengths,
    of_window,
    dweight,
    dstrength,
    shares,
    count,
    WINDOW: tl.constexpr,
    STRENGTH: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    ACROSS: tl.constexpr,
    OF_PARTS: tl.constexpr,
):
    """A row of the gradient of a window's weight from its parts, and the gradient of the strength."""
    row = tl.program_id(0)
    if WINDOW:
        each, across = tl.arange(0, OF_PARTS), tl.arange(0, ACROSS)
        at = (row * shares + each)[:, None] * ACROSS + across[None, :]
        found = tl.sum(tl.load(parts + at, mask=(each < shares)[:, None], other=0.0), axis=0)
        tl.store(dweight + row * WIDE + across, found.to(dweight.dtype.element_ty), mask=across < WIDE)
    if STRENGTH:  # noqa: SIM102
        if row == 0:
            total = tl.zeros([PARTS], tl.float64)
            if BY_CHANNEL:
                for begin in range(0, count, PARTS):
                    some = begin + tl.arange(0, PARTS)
                    total += tl.load(strengths + some, mask=some < count, other=0.0)
            by_strength = tl.sum(total, axis=0).to(tl.float32)
            if WINDOW:
                by_strength += tl.load(of_window)
            tl.store(dstrength, by_strength.to(dstrength.dtype.element_ty))


@triton.jit
def share(given, counts, found, step, n, shares, BLOCK: tl.constexpr):
    """Gradients of means and maxima (2, B * C), shared out among all places and among those of the maxima."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < step
    number = _sum(counts, at, there, shares, step)
    to_all, to_maxima = tl.load(given + at, mask=there, other=0.0), tl.load(given + step + at, mask=there, other=0.0)
    to_all, to_maxima = _shared(to_all / n, to_maxima, number)
    tl.store(found + at, to_all, mask=there)
    tl.store(found + step + at, to_maxima, mask=there)
