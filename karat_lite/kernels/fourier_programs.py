"""What one program of Fourier-KArAt's fused kernels does: formulas and arrangement stand in `fourier_triton`."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# ---- in a program ---------------------------------------------------------------------------------------------------


@triton.jit
def _tile(base, rows, columns, row_end, column_end, row_stride, column_stride):
    """base[rows, columns], zeros beyond row_end and column_end."""
    inside = (rows[:, None] < row_end) & (columns[None, :] < column_end)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def _cos_sin(x, FAST: tl.constexpr):
    """cos x and sin x; FAST: by the GPU's own approximation once x is in [-pi, pi], to 1e-6 for |x| <= 20,000.

    A unit computes it that stands idle otherwise. Beside inputs in half precision that is exact enough. tl.floor would
    take that unit as long as a sine; adding 1.5 * 2^23, where float32 has whole numbers alone, rounds as well.
    """
    if FAST:
        n = (x * 0.15915494309 + 12582912.0) - 12582912.0
        t = (x - n * 6.28125) - n * 1.9353071795864769e-3  # x - n 2 pi, the first product exact
        return libdevice.fast_cosf(t), libdevice.fast_sinf(t)
    else:
        return _cos_sin_exact(x)


@triton.jit
def _cos_sin_exact(x):
    """cos x = 1 - 2 sin^2 t and sin x = 2 sin t cos t with t = x/2 - n pi in [-pi/2, pi/2]; to 5e-7 for |x| <= 20,000.

    tl.cos and tl.sin each become two branches, for small and for huge arguments, anew for every element of a tile. This
    is 21 operations for both and no branch. n pi is subtracted in three parts, the first two short enough for exact
    products (Cody and Waite); the polynomials are minimax fits, to 5e-9 and 4e-10.
    """
    n = tl.floor(x * 0.15915494309 + 0.5)
    t = ((0.5 * x - n * 3.140625) - n * 9.67502593994140625e-4) - n * 1.509957990978376e-7
    z = t * t
    sin_t = (((2.6000395791925257e-6 * z - 1.9806608906947e-4) * z + 8.333017118275e-3) * z - 0.16666656732559) * z
    sin_t = t + t * sin_t
    cos_t = ((-2.619368046907766e-7 * z + 2.4769296942395e-5) * z - 1.3888569083065e-3) * z + 4.1666656732559e-2
    cos_t = (cos_t * z - 0.5) * z + 1.0
    return 1.0 - 2.0 * sin_t * sin_t, 2.0 * sin_t * cos_t


@triton.jit
def _next(cos_m, sin_m, cos_1, sin_1):
    """cos and sin of (m + 1) x by angle addition."""
    return cos_m * cos_1 - sin_m * sin_1, sin_m * cos_1 + cos_m * sin_1


@triton.jit
def _edges(
    right, columns, grad_rows, e, N,
    KEYS: tl.constexpr, E: tl.constexpr, G: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E_f = dOut R_f^T, (M, N) blocks, of the cosine that `right` points at and of its sine; with KEYS transposed."""
    right_cos = _tile(right, columns, e, N, E, E, 1).to(GRAD)
    right_sin = _tile(right + G * N * E, columns, e, N, E, E, 1).to(GRAD)
    if KEYS:
        edge_cos = tl.dot(right_cos, tl.trans(grad_rows), input_precision=PRECISION)
        edge_sin = tl.dot(right_sin, tl.trans(grad_rows), input_precision=PRECISION)
    else:
        edge_cos = tl.dot(grad_rows, tl.trans(right_cos), input_precision=PRECISION)
        edge_sin = tl.dot(grad_rows, tl.trans(right_sin), input_precision=PRECISION)
    return edge_cos, edge_sin


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def mix(
    q, k, right, out, scale, heads, M, N,
    q_image, q_head, q_row, q_channel, k_image, k_head, k_row, k_channel, right_image,
    D: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TYPE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Out (M, e) of one image and head: a block of rows and of e."""
    blocks = tl.cdiv(M, BLOCK_OWN)
    image_head = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    rows = tl.program_id(0) % blocks * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    d, e = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    k += image * k_image + head * k_head
    right += image * right_image + head * (2 * G * E) * N

    queries = _tile(q + image * q_image + head * q_head, rows, d, M, D, q_row, q_channel).to(TYPE)
    total = tl.zeros([BLOCK_OWN, BLOCK_E], tl.float32)
    for start in range(0, N, BLOCK_OTHER):
        columns = start + tl.arange(0, BLOCK_OTHER)
        keys = _tile(k, columns, d, N, D, k_row, k_channel).to(TYPE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale  # (M, N) blocks
        cos_1, sin_1 = _cos_sin(scores, FAST)
        cos_m, sin_m = cos_1, sin_1
        for m in tl.range(0, G, loop_unroll_factor=G if UNROLL else 1):
            # Columns beyond N count as cos 0 = 1: it is R that is 0 there.
            right_cos = _tile(right + m * N * E, columns, e, N, E, E, 1).to(TYPE)
            right_sin = _tile(right + (G + m) * N * E, columns, e, N, E, E, 1).to(TYPE)
            total = tl.dot(cos_m.to(TYPE), right_cos, total, input_precision=PRECISION)
            total = tl.dot(sin_m.to(TYPE), right_sin, total, input_precision=PRECISION)
            cos_m, sin_m = _next(cos_m, sin_m, cos_1, sin_1)
    inside = (rows[:, None] < M) & (e[None, :] < E)
    tl.store(out + image_head * M * E + rows[:, None] * E + e[None, :], total, mask=inside)


@triton.jit
def score_gradient(
    grad, own, other, right, result, scale, heads, OWN, OTHER,
    own_image, own_head, own_row, own_channel, other_image, other_head, other_row, other_channel, right_image,
    KEYS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TYPE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K, own rows queries; with KEYS dK = scale dS^T Q, own rows keys and every tile transposed.

    `right` holds m R_f, so that dS = Re(z (F_1 + z (F_2 + ... z F_G))), z = exp(i S), F_m = E_(sin m) + i E_(cos m).
    """
    blocks = tl.cdiv(OWN, BLOCK_OWN)
    image_head = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    mine = tl.program_id(0) % blocks * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    d = tl.arange(0, BLOCK_D)
    if KEYS:
        M, N = OTHER, OWN
    else:
        M, N = OWN, OTHER
    other += image * other_image + head * other_head
    right += image * right_image + head * (2 * G * E) * N
    grad += image_head * M * E

    own_rows = _tile(own + image * own_image + head * own_head, mine, d, OWN, D, own_row, own_channel).to(TYPE)
    total = tl.zeros([BLOCK_OWN, BLOCK_D], tl.float32)
    for start in range(0, OTHER, BLOCK_OTHER):
        theirs = start + tl.arange(0, BLOCK_OTHER)
        other_rows = _tile(other, theirs, d, OTHER, D, other_row, other_channel).to(TYPE)
        cos_1, sin_1 = _cos_sin(tl.dot(own_rows, tl.trans(other_rows), input_precision=PRECISION) * scale, FAST)
        grad_score = tl.zeros([BLOCK_OWN, BLOCK_OTHER], tl.float32)
        columns = mine if KEYS else theirs
        for first in range(0, E, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            grad_rows = _tile(grad, theirs if KEYS else mine, e, M, E, E, 1).to(GRAD)
            harmonic = right + (G - 1) * N * E
            im, re = _edges(harmonic, columns, grad_rows, e, N, KEYS, E, G, GRAD, PRECISION)
            for _ in tl.range(1, G, loop_unroll_factor=G - 1 if UNROLL else 1):
                harmonic -= N * E
                edge_cos, edge_sin = _edges(harmonic, columns, grad_rows, e, N, KEYS, E, G, GRAD, PRECISION)
                re, im = edge_sin + re * cos_1 - im * sin_1, edge_cos + im * cos_1 + re * sin_1
            grad_score += re * cos_1 - im * sin_1
        # Beyond OTHER grad_score is 0, because R is, or with KEYS dOut.
        total = tl.dot(grad_score.to(GRAD), other_rows.to(GRAD), total, input_precision=PRECISION)
    inside = (mine[:, None] < OWN) & (d[None, :] < D)
    result += image_head * OWN * D + mine[:, None] * D + d[None, :]
    tl.store(result, (total * scale).to(result.dtype.element_ty), mask=inside)


@triton.jit
def right_gradient(
    grad, q, k, partial, scale, images, share, heads, M, N,
    q_image, q_head, q_row, q_channel, k_image, k_head, k_row, k_channel,
    FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TYPE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dR_f = psi_f(S)^T dOut over `share` images, COUNT harmonics from FIRST + 1 on: a block of columns q and of e."""
    blocks = tl.cdiv(N, BLOCK_OWN)
    group_head = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = group_head // heads * share, group_head % heads
    columns = tl.program_id(0) % blocks * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    d, e = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    grad += (image * heads + head) * M * E

    cos_a = tl.zeros([BLOCK_OWN, BLOCK_E], tl.float32)
    sin_a, cos_b, sin_b, cos_c, sin_c = cos_a, cos_a, cos_a, cos_a, cos_a
    for _ in range(tl.minimum(share, images - image)):
        keys = _tile(k, columns, d, N, D, k_row, k_channel).to(TYPE)
        for start in range(0, M, BLOCK_OTHER):
            rows = start + tl.arange(0, BLOCK_OTHER)
            queries = _tile(q, rows, d, M, D, q_row, q_channel).to(TYPE)
            grad_rows = _tile(grad, rows, e, M, E, E, 1).to(GRAD)  # 0 beyond M
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale  # (N, M) blocks
            cos_1, sin_1 = _cos_sin(scores, FAST)
            cos_m, sin_m = cos_1, sin_1
            for _skip in tl.static_range(FIRST):
                cos_m, sin_m = _next(cos_m, sin_m, cos_1, sin_1)
            cos_a = tl.dot(cos_m.to(GRAD), grad_rows, cos_a, input_precision=PRECISION)
            sin_a = tl.dot(sin_m.to(GRAD), grad_rows, sin_a, input_precision=PRECISION)
            if COUNT > 1:
                cos_m, sin_m = _next(cos_m, sin_m, cos_1, sin_1)
                cos_b = tl.dot(cos_m.to(GRAD), grad_rows, cos_b, input_precision=PRECISION)
                sin_b = tl.dot(sin_m.to(GRAD), grad_rows, sin_b, input_precision=PRECISION)
            if COUNT > 2:
                cos_m, sin_m = _next(cos_m, sin_m, cos_1, sin_1)
                cos_c = tl.dot(cos_m.to(GRAD), grad_rows, cos_c, input_precision=PRECISION)
                sin_c = tl.dot(sin_m.to(GRAD), grad_rows, sin_c, input_precision=PRECISION)
        q += q_image
        k += k_image
        grad += heads * M * E
    inside = (columns[:, None] < N) & (e[None, :] < E)
    partial += group_head * (2 * G * E) * N + FIRST * N * E + columns[:, None] * E + e[None, :]
    tl.store(partial, cos_a, mask=inside)
    tl.store(partial + G * N * E, sin_a, mask=inside)
    if COUNT > 1:
        tl.store(partial + N * E, cos_b, mask=inside)
        tl.store(partial + (G + 1) * N * E, sin_b, mask=inside)
    if COUNT > 2:
        tl.store(partial + 2 * N * E, cos_c, mask=inside)
        tl.store(partial + (G + 2) * N * E, sin_c, mask=inside)


@triton.jit
def key_and_right_gradient(
    grad, q, k, right, result, partial, scale, images, share, heads, M, N,
    q_image, q_head, q_row, q_channel, k_image, k_head, k_row, k_channel,
    D: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    TYPE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dR_f = psi_f(S)^T dOut at once, for G <= 3, one block of e and an R that images share.

    `right` holds m R_f, so that dS = sum_m cos(m S) E_(sin m) - sin(m S) E_(cos m): the harmonics are here for dR.
    """
    blocks = tl.cdiv(N, BLOCK_OWN)
    group_head = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = group_head // heads * share, group_head % heads
    columns = tl.program_id(0) % blocks * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    grad += (image * heads + head) * M * E
    result += (image * heads + head) * N * D + columns[:, None] * D + d[None, :]
    right += head * (2 * G * E) * N
    of_keys = (columns[:, None] < N) & (d[None, :] < D)

    cos_a = tl.zeros([BLOCK_OWN, BLOCK_E], tl.float32)
    sin_a, cos_b, sin_b, cos_c, sin_c = cos_a, cos_a, cos_a, cos_a, cos_a
    right_cos_a = _tile(right, columns, e, N, E, E, 1).to(GRAD)
    right_sin_a = _tile(right + G * N * E, columns, e, N, E, E, 1).to(GRAD)
    if G > 1:
        right_cos_b = _tile(right + N * E, columns, e, N, E, E, 1).to(GRAD)
        right_sin_b = _tile(right + (G + 1) * N * E, columns, e, N, E, E, 1).to(GRAD)
    if G > 2:
        right_cos_c = _tile(right + 2 * N * E, columns, e, N, E, E, 1).to(GRAD)
        right_sin_c = _tile(right + (G + 2) * N * E, columns, e, N, E, E, 1).to(GRAD)
    for _ in range(tl.minimum(share, images - image)):
        keys = _tile(k, columns, d, N, D, k_row, k_channel).to(TYPE)
        total = tl.zeros([BLOCK_OWN, BLOCK_D], tl.float32)
        for start in range(0, M, BLOCK_OTHER):
            rows = start + tl.arange(0, BLOCK_OTHER)
            queries = _tile(q, rows, d, M, D, q_row, q_channel).to(TYPE)
            grad_rows = _tile(grad, rows, e, M, E, E, 1).to(GRAD)  # 0 beyond M
            across = tl.trans(grad_rows)
            cos_1, sin_1 = _cos_sin(tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale, FAST)
            grad_score = cos_1 * tl.dot(right_sin_a, across, input_precision=PRECISION)
            grad_score -= sin_1 * tl.dot(right_cos_a, across, input_precision=PRECISION)
            cos_a = tl.dot(cos_1.to(GRAD), grad_rows, cos_a, input_precision=PRECISION)
            sin_a = tl.dot(sin_1.to(GRAD), grad_rows, sin_a, input_precision=PRECISION)
            if G > 1:
                cos_m, sin_m = _next(cos_1, sin_1, cos_1, sin_1)
                grad_score += cos_m * tl.dot(right_sin_b, across, input_precision=PRECISION)
                grad_score -= sin_m * tl.dot(right_cos_b, across, input_precision=PRECISION)
                cos_b = tl.dot(cos_m.to(GRAD), grad_rows, cos_b, input_precision=PRECISION)
                sin_b = tl.dot(sin_m.to(GRAD), grad_rows, sin_b, input_precision=PRECISION)
            if G > 2:
                cos_m, sin_m = _next(cos_m, sin_m, cos_1, sin_1)
                grad_score += cos_m * tl.dot(right_sin_c, across, input_precision=PRECISION)
                grad_score -= sin_m * tl.dot(right_cos_c, across, input_precision=PRECISION)
                cos_c = tl.dot(cos_m.to(GRAD), grad_rows, cos_c, input_precision=PRECISION)
                sin_c = tl.dot(sin_m.to(GRAD), grad_rows, sin_c, input_precision=PRECISION)
            total = tl.dot(grad_score.to(GRAD), queries.to(GRAD), total, input_precision=PRECISION)
        tl.store(result, (total * scale).to(result.dtype.element_ty), mask=of_keys)
        q += q_image
        k += k_image
        grad += heads * M * E
        result += heads * N * D
    inside = (columns[:, None] < N) & (e[None, :] < E)
    partial += group_head * (2 * G * E) * N + columns[:, None] * E + e[None, :]
    tl.store(partial, cos_a, mask=inside)
    tl.store(partial + G * N * E, sin_a, mask=inside)
    if G > 1:
        tl.store(partial + N * E, cos_b, mask=inside)
        tl.store(partial + (G + 1) * N * E, sin_b, mask=inside)
    if G > 2:
        tl.store(partial + 2 * N * E, cos_c, mask=inside)
        tl.store(partial + (G + 2) * N * E, sin_c, mask=inside)


INTERPRETED = not isinstance(mix, triton.JITFunction)  # TRITON_INTERPRET=1 was set when the kernels were made
