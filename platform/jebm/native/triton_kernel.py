"""The Langevin chain of `chain.c` for GPUs, in Triton, and the power iterations of the spectral norm.

`triton_chain.py` and `triton_power.py` import this only with triton. A program of the chain advances a block
of chains over all steps. Chains are independent, so programs never wait for each other. A chain's result
depends neither on its block nor on other chains. Sizes are padded to powers of two; weights, positions and
noise are zero there.
"""

import triton
import triton.language as tl

__all__ = ["chain_kernel", "noise_kernel", "power_kernel"]


@triton.jit
def _logarithm(x):
    """Return log x, x in (0, 1], as in chain.c: the 1e-7 error of a GPU's own log is too large near 1."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    y = m * 7.0376836292e-2 - 1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m - 1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m - 1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m - 2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = y * m - 0.5
    return exponent.to(tl.float32) * 0.693147181 + (y * (m * m) + m)


@triton.jit
def _normals(a, b):
    """Return the two Box-Muller normals of two words, as in `jebm.core.philox` and chain.c."""
    u = ((a >> 8) + 1).to(tl.float32) * 5.9604644775390625e-8  # 2^-24
    radius = tl.sqrt_rn(-2.0 * _logarithm(u))
    quarter = b >> 30
    turn = ((b << 2) >> 9).to(tl.float32) * 1.1920928955078125e-7 + (5.9604644775390625e-8 - 0.5)
    t = turn * 1.57079632679
    t2 = t * t
    sine = ((-1.9515295891e-4 * t2 + 8.3321608736e-3) * t2 - 1.6666654611e-1) * (t2 * t) + t
    cosine = (((2.443315712e-5 * t2 - 1.388731625e-3) * t2 + 4.166664568e-2) * t2 - 0.5) * t2 + 1.0
    odd = (quarter & 1) != 0
    first = radius * tl.where(odd, sine, cosine)
    second = radius * tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -first, first), tl.where((quarter & 2) != 0, -second, second)


@triton.jit
def _drawn(chain_B, step, key0, key1, BLOCK: tl.constexpr, DIMS: tl.constexpr):
    """Return the noise (BLOCK, DIMS) of a step: four per counter (chain, step, dimension / 4, 0)."""
    zero = tl.zeros((BLOCK, DIMS // 4), tl.uint32)
    c0 = zero + chain_B.to(tl.uint32, bitcast=True)[:, None]
    c1 = zero + step.to(tl.uint32, bitcast=True)
    c2 = zero + tl.arange(0, DIMS // 4).to(tl.uint32, bitcast=True)[None, :]
    a, b, c, d = tl.philox_impl(
        c0, c1, c2, zero, key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True)
    )
    first, second = _normals(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(first, second), (BLOCK, DIMS))


@triton.jit(do_not_specialize=["key0", "key1", "chains", "dims", "step"])
def noise_kernel(noise_BD, key0, key1, chains, dims, step, BLOCK: tl.constexpr, DIMS: tl.constexpr):
    """Store the noise of a step for the BLOCK chains of this program."""
    chain_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim_D = tl.arange(0, DIMS)
    inside = (chain_B < chains)[:, None] & (dim_D < dims)[None, :]
    drawn = _drawn(chain_B, step, key0, key1, BLOCK, DIMS)
    tl.store(noise_BD + chain_B.to(tl.int64)[:, None] * dims + dim_D[None, :], drawn, mask=inside)


@triton.jit
def _product(
    x, matrix_KN, scratch_BK, BLOCK: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PIECE: tl.constexpr
):
    """Return x (BLOCK, K) times a matrix in memory, in float32, in pieces of the sum.

    The compiler keeps the factors of a product in registers, and large ones do not fit. Registers cannot be
    cut, so x goes through memory of this program, from whose cache it comes back.
    """
    chain_B = tl.arange(0, BLOCK)[:, None]
    piece_P = tl.arange(0, PIECE)
    unit_N = tl.arange(0, N)[None, :]
    tl.debug_barrier()  # all have read what the last product left there
    tl.store(scratch_BK + chain_B * K + tl.arange(0, K)[None, :], x)
    tl.debug_barrier()
    total = tl.zeros((BLOCK, N), tl.float32)
    for first in range(0, K, PIECE):
        part = tl.load(scratch_BK + chain_B * K + (first + piece_P)[None, :])
        matrix = tl.load(matrix_KN + (first + piece_P)[:, None] * N + unit_N)
        total = tl.dot(part, matrix, total, input_precision="ieee")
    return total


@triton.jit
def _activated(x, bias_W, above, layer, slope):
    """Return LeakyReLU(x + bias), and `above` with the signs in bit `layer`."""
    x += tl.load(bias_W)[None, :]
    return tl.where(x > 0, x, slope * x), above | ((x > 0).to(tl.int32) << layer)


@triton.jit
def _sloped(x, above, layer, slope):
    """Return the gradient in a layer's values times the LeakyReLU's slope there."""
    return tl.where(((above >> layer) & 1) != 0, x, slope * x)


@triton.jit(do_not_specialize=["key0", "key1", "chains", "dims", "steps", "first_step"])
def chain_kernel(
    z_BD,  # in: the start; out: the positions
    gradient_BD,  # out: of log p at the last step
    noise_KBD,  # None: drawn here
    first_WD,
    first_DW,  # transposed: with the weight along the sums, each lane waits for the others
    hidden_LWW,  # of the layers after the first, (out, in)
    transposed_LWW,
    biases_LW,
    last_W,
    scratch_PBM,  # memory for products: (BLOCK, max(DIMS, WIDTH)) for each program
    key0,  # the key's words as int32
    key1,
    chains,
    dims,
    steps,
    first_step,
    step_size,
    half_square,
    slope,
    BLOCK: tl.constexpr,
    DIMS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,  # hidden layers
    PIECE: tl.constexpr,  # of a sum
):
    """Do what `run` in triton_chain.py does, for the BLOCK chains of this program."""
    chain_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim_D = tl.arange(0, DIMS)
    unit_W = tl.arange(0, WIDTH)
    inside = (chain_B < chains)[:, None] & (dim_D < dims)[None, :]
    at_BD = chain_B.to(tl.int64)[:, None] * dims + dim_D[None, :]
    dims_piece: tl.constexpr = min(PIECE, DIMS)
    width_piece: tl.constexpr = min(PIECE, WIDTH)
    scratch = scratch_PBM + tl.program_id(0) * BLOCK * max(DIMS, WIDTH)
    # Positions; weights are read at each use, from the caches.
    z = tl.load(z_BD + at_BD, mask=inside, other=0.0)
    gradient = tl.zeros((BLOCK, DIMS), tl.float32)
    last = tl.load(last_W + unit_W)[None, :]
    step = 0
    while step < steps:  # triton's interpreter would need a range's end in advance
        above = tl.zeros((BLOCK, WIDTH), tl.int32)  # bit j: the value of hidden layer j is above zero
        x = _product(z, first_DW, scratch, BLOCK, DIMS, WIDTH, dims_piece)
        x, above = _activated(x, biases_LW + unit_W, above, 0, slope)
        for layer in range(1, DEPTH):
            weight = transposed_LWW + (layer - 1) * WIDTH * WIDTH
            x = _product(x, weight, scratch, BLOCK, WIDTH, WIDTH, width_piece)
            x, above = _activated(x, biases_LW + layer * WIDTH + unit_W, above, layer, slope)
        # Backward: the gradient of f, layer by layer.
        x = _sloped(last, above, DEPTH - 1, slope)
        for done in range(1, DEPTH):
            layer = DEPTH - done
            weight = hidden_LWW + (layer - 1) * WIDTH * WIDTH
            x = _product(x, weight, scratch, BLOCK, WIDTH, WIDTH, width_piece)
            x = _sloped(x, above, layer - 1, slope)
        gradient = _product(x, first_WD, scratch, BLOCK, WIDTH, DIMS, width_piece) - z
        # The Langevin step.
        if noise_KBD is None:
            noise = tl.where(inside, _drawn(chain_B, first_step + step, key0, key1, BLOCK, DIMS), 0.0)
        else:
            start = step.to(tl.int64) * chains * dims
            noise = tl.load(noise_KBD + start + at_BD, mask=inside, other=0.0)
        z += half_square * gradient + step_size * noise
        step += 1
    tl.store(z_BD + at_BD, z, mask=inside)
    tl.store(gradient_BD + at_BD, gradient, mask=inside)


@triton.jit
def _unit(squares, least):
    """Return the length of a vector from the sum of its squares, or `least` if it is shorter; NaN stays."""
    length = tl.sqrt_rn(squares)
    return tl.where(length < least, least, length)


@triton.jit(do_not_specialize=["times"])
def power_kernel(
    weight_OI,
    u_O,  # in and out: the left singular vector
    v_I,  # out: the right one
    times,
    least,  # no length is taken to be less, as in torch's `normalize`
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,  # columns, to a power of two
    PIECE: tl.constexpr,  # rows read at a time
):
    """Do `times` power iterations, in the one program that there is."""
    column_I = tl.arange(0, PADDED)
    piece_P = tl.arange(0, PIECE)
    v = tl.zeros((PADDED,), tl.float32)
    done = 0
    while done < times:
        v = tl.zeros((PADDED,), tl.float32)
        for first in range(0, ROWS, PIECE):
            row_P = first + piece_P
            inside = (row_P < ROWS)[:, None] & (column_I < COLUMNS)[None, :]
            weight = tl.load(weight_OI + row_P[:, None] * COLUMNS + column_I[None, :], mask=inside, other=0.0)
            u = tl.load(u_O + row_P, mask=row_P < ROWS, other=0.0)
            v += tl.sum(weight * u[:, None], axis=0)
        v /= _unit(tl.sum(v * v, axis=0), least)
        tl.debug_barrier()  # all have read u
        squares = 0.0
        for first in range(0, ROWS, PIECE):
            row_P = first + piece_P
            inside = (row_P < ROWS)[:, None] & (column_I < COLUMNS)[None, :]
            weight = tl.load(weight_OI + row_P[:, None] * COLUMNS + column_I[None, :], mask=inside, other=0.0)
            u = tl.sum(weight * v[None, :], axis=1)
            tl.store(u_O + row_P, u, mask=row_P < ROWS)
            squares += tl.sum(u * u, axis=0)
        length = _unit(squares, least)
        tl.debug_barrier()  # it is written
        for first in range(0, ROWS, PIECE):
            row_P = first + piece_P
            u = tl.load(u_O + row_P, mask=row_P < ROWS, other=0.0)
            tl.store(u_O + row_P, u / length, mask=row_P < ROWS)
        tl.debug_barrier()
        done += 1
    if times > 0:
        tl.store(v_I + column_I, v, mask=column_I < COLUMNS)
