"""Triton kernels of q/k norm, rotary positions and the placing of keys; launch.py runs them.

One token a program, or one after the other: rows of heads·D numbers are read and written whole, in the order in which
the products before and the attention behind have them. Nothing is transposed, and nothing is stored in float32.
"""

from __future__ import annotations

from ..launch import hint, jit, tl

# TEXT says where text comes from and where it goes: 0 there is none, 1 padded to padded, 2 packed rows to padded keys,
# 3 packed rows to packed keys. Sample i of packed rows is offsets[i] … offsets[i + 1] - 1.

# --- device functions --------------------------------------------------------------------------------------------


@jit
def _rotated(x, rope_ptr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Neighbouring pairs of x (HEADS, WIDTH) turned by one token's cosines and sines, or back by them."""
    at = tl.arange(0, WIDTH)
    turn = tl.load(rope_ptr + at, mask=at < HEAD_DIM, other=0.0).to(x.dtype)
    cos, sin = tl.split(tl.reshape(turn, (1, WIDTH // 2, 2)))
    if BACK:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, (HEADS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(cos * even - sin * odd, sin * even + cos * odd), (HEADS, WIDTH))


@jit
def _feature_weights(weight_ptr, ACC: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    feature = tl.arange(0, WIDTH)
    return tl.load(weight_ptr + feature, mask=feature < HEAD_DIM, other=0.0).to(ACC)[None, :]


@jit
def _rstd(x, eps, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]


@jit
def _norm_gradient(grad, x, weight, eps, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradients of the norm by x, and by the weight before they are summed."""
    rstd = _rstd(x, eps, HEAD_DIM)
    normed = x * rstd
    scaled = grad * weight
    return rstd * (scaled - normed * (tl.sum(scaled * normed, axis=1) / HEAD_DIM)[:, None]), grad * normed


@jit
def _sample_of(row, offsets_ptr, batch, SAMPLES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sample of a packed row: how many samples end at or before it; `batch` for a row behind all."""
    at = tl.arange(0, SAMPLES)
    ends = tl.load(offsets_ptr + 1 + at, mask=at < batch, other=2147483647)
    return tl.sum((ends <= row).to(tl.int32), axis=0)


# --- forward -----------------------------------------------------------------------------------------------------


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, img_ptr, txt_ptr, q_weight_ptr, k_weight_ptr, txt_weight_ptr, rope_ptr, offsets_ptr,
    batch, tokens, length, text_programs, text_rows, heads, img_batch, img_token, txt_batch, txt_token, rope_batch, eps,
    TEXT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, SAMPLES: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token a program and HEADS of its heads: first the places (or rows) of text, then image tokens."""
    program = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    feature = tl.arange(0, WIDTH)
    mask = (head < heads)[:, None] & (feature < HEAD_DIM)[None, :]
    at = head[:, None] * HEAD_DIM + feature[None, :]
    if program < text_programs:
        _place_text(
            k_ptr, v_ptr, txt_ptr, txt_weight_ptr, offsets_ptr, program, head, mask, at,
            batch, tokens, length, text_rows, heads, hint(txt_batch, ALIGN), hint(txt_token, ALIGN), eps,
            TEXT, ACC, SAMPLES, HEAD_DIM, WIDTH,
        )  # fmt: skip
    else:
        _place_image(
            q_ptr, k_ptr, v_ptr, img_ptr, q_weight_ptr, k_weight_ptr, rope_ptr, offsets_ptr, program - text_programs,
            mask, at, tokens, length, heads, hint(img_batch, ALIGN), hint(img_token, ALIGN), rope_batch, eps,
            TEXT, ACC, HEAD_DIM, WIDTH, HEADS,
        )  # fmt: skip


@jit
def _place_text(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, txt_ptr, weight_ptr, offsets_ptr, program, head, mask, at, batch, tokens, length, text_rows, heads,
    txt_batch, txt_token, eps,
    TEXT: tl.constexpr, ACC: tl.constexpr, SAMPLES: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token of text: its key normed, its value copied, zeros where there is none."""
    if TEXT == 3:
        row = program.to(tl.int64)
        sample = _sample_of(row, offsets_ptr, batch, SAMPLES).to(tl.int64)
        out = sample * tokens + row
        real = sample < batch
        source = txt_ptr + row * txt_token
    else:
        sample = (program // length).to(tl.int64)
        number = program % length
        out = sample * (length + tokens) + number
        if TEXT == 2:
            row = tl.load(offsets_ptr + sample) + number
            real = row < tl.minimum(tl.load(offsets_ptr + sample + 1), text_rows)
            source = txt_ptr + row.to(tl.int64) * txt_token
        else:
            real = sample < batch
            source = txt_ptr + sample * txt_batch + number.to(tl.int64) * txt_token
    inside = mask & (head < tl.where(real, heads, 0))[:, None]
    part = heads * HEAD_DIM
    weight = _feature_weights(weight_ptr, ACC, HEAD_DIM, WIDTH)
    k = tl.load(source + at, mask=inside, other=0.0).to(ACC)
    v = tl.load(source + part + at, mask=inside, other=0.0)
    place = out * part + at
    tl.store(k_ptr + place, (k * _rstd(k, eps, HEAD_DIM) * weight).to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + place, v, mask=mask)


@jit
def _place_image(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, img_ptr, q_weight_ptr, k_weight_ptr, rope_ptr, offsets_ptr, number, mask, at, tokens, length,
    heads, img_batch, img_token, rope_batch, eps,
    TEXT: tl.constexpr, ACC: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token of the image: query and key normed and turned, value copied."""
    token = number.to(tl.int64)
    sample = token // tokens
    out = tl.load(offsets_ptr + sample + 1) + token if TEXT == 3 else (sample + 1) * length + token
    part = heads * HEAD_DIM
    source = img_ptr + sample * img_batch + token % tokens * img_token + at
    turn_ptr = rope_ptr + (sample * rope_batch + token % tokens) * HEAD_DIM
    q = tl.load(source, mask=mask, other=0.0).to(ACC)
    k = tl.load(source + part, mask=mask, other=0.0).to(ACC)
    v = tl.load(source + 2 * part, mask=mask, other=0.0)
    q *= _rstd(q, eps, HEAD_DIM) * _feature_weights(q_weight_ptr, ACC, HEAD_DIM, WIDTH)
    q = _rotated(q, turn_ptr, HEAD_DIM, WIDTH, HEADS, False)
    tl.store(q_ptr + token * part + at, q.to(q_ptr.dtype.element_ty), mask=mask)
    k *= _rstd(k, eps, HEAD_DIM) * _feature_weights(k_weight_ptr, ACC, HEAD_DIM, WIDTH)
    k = _rotated(k, turn_ptr, HEAD_DIM, WIDTH, HEADS, False)
    place = out * part + at
    tl.store(k_ptr + place, k.to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + place, v, mask=mask)


# --- backward ----------------------------------------------------------------------------------------------------


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_img_ptr, grad_txt_ptr, sums_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, img_ptr, txt_ptr, q_weight_ptr,
    k_weight_ptr, txt_weight_ptr, rope_ptr, offsets_ptr,
    batch, tokens, length, image_programs, chunk, image_tokens, text_rows, heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    img_batch, img_token, txt_batch, txt_token, rope_batch, eps,
    TEXT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, SAMPLES: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """`chunk` tokens a program, one after the other: image tokens first, then rows of text.

    Row p of the sums holds program p's part of the query weight's gradient (image) or of the text key weight's; the
    parts of the key weight's gradient follow behind those of all programs.
    """
    program = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    feature = tl.arange(0, WIDTH)
    mask = (head < heads)[:, None] & (feature < HEAD_DIM)[None, :]
    at = head[:, None] * HEAD_DIM + feature[None, :]
    k_batch, k_token, v_batch, v_token = (
        hint(k_batch, ALIGN),
        hint(k_token, ALIGN),
        hint(v_batch, ALIGN),
        hint(v_token, ALIGN),
    )
    wide = head.to(tl.int64)[:, None]
    k_at = wide * hint(k_head, ALIGN) + feature[None, :]
    v_at = wide * hint(v_head, ALIGN) + feature[None, :]
    sum_at = (program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * HEAD_DIM + feature
    if program < image_programs:
        q_at = wide * hint(q_head, ALIGN) + feature[None, :]
        behind = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * HEAD_DIM
        q_sum, k_sum = _image_gradients(
            grad_img_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, img_ptr, q_weight_ptr, k_weight_ptr, rope_ptr,
            offsets_ptr, program, mask, at, q_at, k_at, v_at, tokens, length, chunk, image_tokens, heads,
            hint(q_batch, ALIGN), hint(q_token, ALIGN), k_batch, k_token, v_batch, v_token,
            hint(img_batch, ALIGN), hint(img_token, ALIGN), rope_batch, eps,
            TEXT, ACC, HEAD_DIM, WIDTH, HEADS,
        )  # fmt: skip
        tl.store(sums_ptr + sum_at, q_sum, mask=feature < HEAD_DIM)
        tl.store(sums_ptr + behind + sum_at, k_sum, mask=feature < HEAD_DIM)
    elif TEXT != 0:
        k_sum = _text_gradients(
            grad_txt_ptr, grad_k_ptr, grad_v_ptr, txt_ptr, txt_weight_ptr, offsets_ptr, program - image_programs,
            head, mask, at, k_at, v_at, batch, tokens, length, chunk, text_rows, heads,
            k_batch, k_token, v_batch, v_token, hint(txt_batch, ALIGN), hint(txt_token, ALIGN), eps,
            TEXT, ACC, SAMPLES, HEAD_DIM, WIDTH, HEADS,
        )  # fmt: skip
        tl.store(sums_ptr + sum_at, k_sum, mask=feature < HEAD_DIM)


@jit
def _image_gradients(  # type: ignore[no-untyped-def]
    out_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, img_ptr, q_weight_ptr, k_weight_ptr, rope_ptr, offsets_ptr,
    program, mask, at, q_at, k_at, v_at, tokens, length, chunk, image_tokens, heads,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, img_batch, img_token, rope_batch, eps,
    TEXT: tl.constexpr, ACC: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of a program's image tokens are written; those of both weights, summed over them, are returned."""
    q_sum = tl.zeros((HEADS, WIDTH), ACC)
    k_sum = tl.zeros((HEADS, WIDTH), ACC)
    q_weight = _feature_weights(q_weight_ptr, ACC, HEAD_DIM, WIDTH)
    k_weight = _feature_weights(k_weight_ptr, ACC, HEAD_DIM, WIDTH)
    part = heads * HEAD_DIM
    begin = program.to(tl.int64) * chunk
    for token in range(begin, tl.minimum(begin + chunk, image_tokens)):
        sample = token // tokens
        number = token % tokens
        if TEXT == 3:
            key = tl.load(offsets_ptr + sample + 1) + token
            k_row, v_row = grad_k_ptr + key * k_token, grad_v_ptr + key * v_token
        else:
            k_row = grad_k_ptr + sample * k_batch + (length + number) * k_token
            v_row = grad_v_ptr + sample * v_batch + (length + number) * v_token
        source = img_ptr + sample * img_batch + number * img_token + at
        turn_ptr = rope_ptr + (sample * rope_batch + number) * HEAD_DIM
        out = out_ptr + token * 3 * part + at
        q_grad = tl.load(grad_q_ptr + sample * q_batch + number * q_token + q_at, mask=mask, other=0.0).to(ACC)
        q = tl.load(source, mask=mask, other=0.0).to(ACC)
        k_grad = tl.load(k_row + k_at, mask=mask, other=0.0).to(ACC)
        k = tl.load(source + part, mask=mask, other=0.0).to(ACC)
        v_grad = tl.load(v_row + v_at, mask=mask, other=0.0)
        q_grad = _rotated(q_grad, turn_ptr, HEAD_DIM, WIDTH, HEADS, True)
        rows, product = _norm_gradient(q_grad, q, q_weight, eps, HEAD_DIM)
        q_sum += product
        tl.store(out, rows.to(out_ptr.dtype.element_ty), mask=mask)
        k_grad = _rotated(k_grad, turn_ptr, HEAD_DIM, WIDTH, HEADS, True)
        rows, product = _norm_gradient(k_grad, k, k_weight, eps, HEAD_DIM)
        k_sum += product
        tl.store(out + part, rows.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + 2 * part, v_grad.to(out_ptr.dtype.element_ty), mask=mask)
    return tl.sum(q_sum, axis=0), tl.sum(k_sum, axis=0)


@jit
def _text_gradients(  # type: ignore[no-untyped-def]
    out_ptr, grad_k_ptr, grad_v_ptr, txt_ptr, weight_ptr, offsets_ptr, program, head, mask, at, k_at, v_at,
    batch, tokens, length, chunk, text_rows, heads, k_batch, k_token, v_batch, v_token, txt_batch, txt_token, eps,
    TEXT: tl.constexpr, ACC: tl.constexpr, SAMPLES: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of a program's rows of text are written, zero for rows of no place; that of the weight is returned."""
    total = tl.zeros((HEADS, WIDTH), ACC)
    weight = _feature_weights(weight_ptr, ACC, HEAD_DIM, WIDTH)
    part = heads * HEAD_DIM
    begin = program.to(tl.int64) * chunk
    for row in range(begin, tl.minimum(begin + chunk, text_rows)):
        if TEXT == 1:
            sample = row // length
            number = row % length
            real = sample < batch
            source = txt_ptr + sample * txt_batch + number * txt_token + at
        else:
            sample = _sample_of(row, offsets_ptr, batch, SAMPLES).to(tl.int64)
            number = row - tl.load(offsets_ptr + sample)
            real = sample < batch
            source = txt_ptr + row * txt_token + at
        if TEXT == 3:
            key = sample * tokens + row
            k_row, v_row = grad_k_ptr + key * k_token, grad_v_ptr + key * v_token
        else:
            real = real & (number < length)
            k_row = grad_k_ptr + sample * k_batch + number * k_token
            v_row = grad_v_ptr + sample * v_batch + number * v_token
        inside = mask & (head < tl.where(real, heads, 0))[:, None]
        out = out_ptr + row * 2 * part + at
        grad = tl.load(k_row + k_at, mask=inside, other=0.0).to(ACC)
        k = tl.load(source, mask=inside, other=0.0).to(ACC)
        v_grad = tl.load(v_row + v_at, mask=inside, other=0.0)
        rows, product = _norm_gradient(grad, k, weight, eps, HEAD_DIM)
        total += product
        tl.store(out, rows.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + part, v_grad.to(out_ptr.dtype.element_ty), mask=mask)
    return tl.sum(total, axis=0)


@jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    out_ptr, sums_ptr, image_rows, text_rows, ACC: tl.constexpr, HEAD_DIM: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Program (w, c): COLS features of one weight's gradient, its parts added in the order of their rows."""
    which = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin = tl.where(which == 0, 0, tl.where(which == 1, image_rows + text_rows, image_rows))
    count = tl.where(which == 2, text_rows, image_rows)
    total = tl.zeros((ROWS, COLS), ACC)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & (cols < HEAD_DIM)[None, :]
        total += tl.load(sums_ptr + (begin + rows)[:, None] * HEAD_DIM + cols[None, :], mask=mask, other=0.0)
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + which * HEAD_DIM + cols, out, mask=cols < HEAD_DIM)
