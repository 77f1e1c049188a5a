"""Gating in Triton: one program for a block of channels and positions of a sample, sums in float32.

A map is read through the strides of its channels and positions, which are (N, 1) with channels first and (1, C) with
channels last. What is not there is not read: the constants in capitals say so. Offsets are in 64 bits. A maximum is NaN
where an element is.
"""

import triton
import triton.language as tl

NAN = tl.constexpr(float("nan"))
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _block(
    sample,
    first_c,
    first_n,
    c,
    n,
    stride_c,
    stride_n,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Channels, positions, offsets and what of them is inside, of a block."""
    channels = first_c + tl.arange(0, BLOCK_C)
    places = first_n + tl.arange(0, BLOCK_N)
    offsets = (
        sample.to(tl.int64) * c * n
        + channels[:, None].to(tl.int64) * stride_c
        + places[None, :].to(tl.int64) * stride_n
    )
    return channels, places, offsets, (channels < c)[:, None] & (places < n)[None, :]


@triton.jit
def pool(x, mean, maximum, c, n, stride_c, stride_n, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Means and maxima of channels over positions."""
    sample, first = tl.program_id(1), tl.program_id(0) * BLOCK_C
    total = tl.zeros([BLOCK_C], tl.float32)
    top = tl.full([BLOCK_C], LOWEST, tl.float32)
    bad = tl.zeros([BLOCK_C], tl.int32)
    for begin in range(0, n, BLOCK_N):
        _, _, offsets, inside = _block(sample, first, begin, c, n, stride_c, stride_n, BLOCK_C, BLOCK_N)
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(v, axis=1)
        bad = tl.maximum(bad, tl.max((v != v).to(tl.int32), axis=1))
        top = tl.maximum(top, tl.max(tl.where(inside & (v == v), v, LOWEST), axis=1))
    channels = first + tl.arange(0, BLOCK_C)
    at = sample * c + channels
    tl.store(mean + at, total / n, mask=channels < c)
    tl.store(maximum + at, tl.where(bad > 0, NAN, top), mask=channels < c)


@triton.jit
def summarise(
    x, gate, mean, maximum, c, n, stride_c, stride_n, GATED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Means and maxima of positions over channels, gated or not."""
    sample, first = tl.program_id(1), tl.program_id(0) * BLOCK_N
    total = tl.zeros([BLOCK_N], tl.float32)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    bad = tl.zeros([BLOCK_N], tl.int32)
    for begin in range(0, c, BLOCK_C):
        channels, _, offsets, inside = _block(sample, begin, first, c, n, stride_c, stride_n, BLOCK_C, BLOCK_N)
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            v *= tl.load(gate + sample * c + channels, mask=channels < c, other=0.0)[:, None]
        total += tl.sum(v, axis=0)
        bad = tl.maximum(bad, tl.max((v != v).to(tl.int32), axis=0))
        top = tl.maximum(top, tl.max(tl.where(inside & (v == v), v, LOWEST), axis=0))
    places = first + tl.arange(0, BLOCK_N)
    at = sample.to(tl.int64) * n + places
    tl.store(mean + at, total / c, mask=places < n)
    tl.store(maximum + at, tl.where(bad > 0, NAN, top), mask=places < n)


@triton.jit
def apply(
    x,
    channel,
    spatial,
    shortcut,
    y,
    c,
    n,
    stride_c,
    stride_n,
    CHANNEL: tl.constexpr,
    SPATIAL: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The map times its gates."""
    sample = tl.program_id(2)
    channels, places, offsets, inside = _block(
        sample, tl.program_id(1) * BLOCK_C, tl.program_id(0) * BLOCK_N, c, n, stride_c, stride_n, BLOCK_C, BLOCK_N
    )
    v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if CHANNEL:
        v *= tl.load(channel + sample * c + channels, mask=channels < c, other=0.0)[:, None]
    if SPATIAL:
        v *= tl.load(spatial + sample.to(tl.int64) * n + places, mask=places < n, other=0.0)[None, :]
    if SHORTCUT:
        v += tl.load(shortcut + offsets, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(v < 0, 0.0, v)
    tl.store(y + offsets, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def grad_gates(
    x,
    dy,
    channel,
    spatial,
    maximum,
    by_channel,
    by_place,
    counts,
    c,
    n,
    stride_c,
    stride_n,
    groups,
    blocks_n,
    CHANNEL: tl.constexpr,
    SPATIAL: tl.constexpr,
    GATED: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """This program's part of the gradients of both gates, and how often a maximum over channels is in it.

    A program has a block of positions and every `groups`th block of channels.
    """
    sample, group, block_n = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    places = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    place = sample.to(tl.int64) * n + places
    row = (sample.to(tl.int64) * groups + group) * n + places
    by_position = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    if SPATIAL:
        weight = tl.load(spatial + place, mask=places < n, other=0.0)[None, :]
    if COUNT:
        top = tl.load(maximum + place, mask=places < n, other=0.0)[None, :]
    for begin in range(group * BLOCK_C, c, groups * BLOCK_C):
        channels, _, offsets, inside = _block(
            sample, begin, block_n * BLOCK_N, c, n, stride_c, stride_n, BLOCK_C, BLOCK_N
        )
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        product = v * tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        if CHANNEL:
            gate = tl.load(channel + sample * c + channels, mask=channels < c, other=0.0)[:, None]
            part = product
            if SPATIAL:
                part = product * weight
            at = by_channel + (sample.to(tl.int64) * blocks_n + block_n) * c + channels
            tl.store(at, tl.sum(part, axis=1), mask=channels < c)
            product *= gate
        if SPATIAL:
            by_position += tl.sum(product, axis=0)
        if COUNT:
            if GATED:
                v *= gate
            count += tl.sum((inside & (v == top)).to(tl.float32), axis=0)
    if SPATIAL:
        tl.store(by_place + row, by_position, mask=places < n)
    if COUNT:
        tl.store(counts + row, count, mask=places < n)


@triton.jit
def grad_summary(
    x,
    channel,
    seen,
    mean,
    share,
    maximum,
    dchannel,
    counts,
    c,
    n,
    stride_c,
    stride_n,
    SUMMARY: tl.constexpr,
    GATED: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What comes to the channel gate by the summary, and how often the maximum over positions is there."""
    sample, first = tl.program_id(1), tl.program_id(0) * BLOCK_C
    total = tl.zeros([BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_C], tl.float32)
    channels = first + tl.arange(0, BLOCK_C)
    at = sample * c + channels
    if GATED:
        gate = tl.load(channel + at, mask=channels < c, other=0.0)[:, None]
    if COUNT:
        top = tl.load(maximum + at, mask=channels < c, other=0.0)[:, None]
    for begin in range(0, n, BLOCK_N):
        _, places, offsets, inside = _block(sample, first, begin, c, n, stride_c, stride_n, BLOCK_C, BLOCK_N)
        v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if SUMMARY:
            place = sample.to(tl.int64) * n + places
            gated = v
            if GATED:
                gated = v * gate
            equal = gated == tl.load(seen + place, mask=places < n, other=0.0)[None, :]
            part = tl.load(share + place, mask=places < n, other=0.0)[None, :]
            # a maximum that is nowhere has no share, but NaN
            part = (
                tl.where(equal | (part != part), part, 0.0) + tl.load(mean + place, mask=places < n, other=0.0)[None, :]
            )
            total += tl.sum(tl.where(inside, v * part, 0.0), axis=1)
        if COUNT:
            count += tl.sum((inside & (v == top)).to(tl.float32), axis=1)
    if SUMMARY:
        tl.store(dchannel + at, tl.load(dchannel + at, mask=channels < c, other=0.0) + total, mask=channels < c)
    if COUNT:
        tl.store(counts + at, count, mask=channels < c)


@triton.jit
def grad_input(
    x,
    dy,
    channel,
    spatial,
    seen,
    mean,
    share,
    top,
    pooled,
    pool_share,
    dx,
    c,
    n,
    stride_c,
    stride_n,
    GIVEN: tl.constexpr,
    CHANNEL: tl.constexpr,
    SPATIAL: tl.constexpr,
    SUMMARY: tl.constexpr,
    POOL_MEAN: tl.constexpr,
    POOL_MAX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = (dy * spatial + summary) * channel + poolings."""
    sample = tl.program_id(2)
    channels, places, offsets, inside = _block(
        sample, tl.program_id(1) * BLOCK_C, tl.program_id(0) * BLOCK_N, c, n, stride_c, stride_n, BLOCK_C, BLOCK_N
    )
    v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    at = sample * c + channels
    place = sample.to(tl.int64) * n + places
    found = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    if GIVEN:
        found = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
    if SPATIAL:
        found *= tl.load(spatial + place, mask=places < n, other=0.0)[None, :]
    if CHANNEL:
        gate = tl.load(channel + at, mask=channels < c, other=0.0)[:, None]
    if SUMMARY:
        gated = v
        if CHANNEL:
            gated = v * gate
        equal = gated == tl.load(seen + place, mask=places < n, other=0.0)[None, :]
        part = tl.load(share + place, mask=places < n, other=0.0)[None, :]
        found += (
            tl.where(equal | (part != part), part, 0.0) + tl.load(mean + place, mask=places < n, other=0.0)[None, :]
        )
    if CHANNEL:
        found *= gate
    if POOL_MEAN:
        found += tl.load(pooled + at, mask=channels < c, other=0.0)[:, None]
    if POOL_MAX:
        equal = v == tl.load(top + at, mask=channels < c, other=0.0)[:, None]
        part = tl.load(pool_share + at, mask=channels < c, other=0.0)[:, None]
        found += tl.where(equal | (part != part), part, 0.0)
    tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask=inside)
