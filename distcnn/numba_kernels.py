# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""What `distcnn.compiled` compiles. Nothing else imports this file: it needs Numba.

An RGB pixel is three bytes, and processors compute on four: where a loop goes from pixel to pixel it computes four
values, the last of which belongs to the next pixel and is written over by it. All are read before any is written.
Indices are unsigned and every sum is cast to 32 bit, since otherwise Numba checks each index for being negative,
computes in 64 bit, and LLVM finds nothing to vectorise.
"""

import numpy as np
from numba import njit

i4, f4, u8 = np.int32, np.float32, np.uint64
ONE, TWO, THREE = u8(1), u8(2), u8(3)

UPSCALE = "(uint8[::1], int64[:, ::1], uint8[:, :, :, ::1])"
FINISH = (
    "(uint8[:, :, :, ::1], int64[::1], int64[::1], boolean, boolean[::1], float32[::1], float32[::1],"
    " float32[:, :, :, ::1])"
)


@njit(nogil=True, error_model="numpy", inline="always")
def _add(total, weight, value):
    return i4(total + i4(weight * i4(value)))


@njit(nogil=True, error_model="numpy", cache=True)
def _two_taps(inputs, outputs, first, weights):
    """For each output of a row or column, from which input on (outputs,) it is made, and the weights (outputs, 2).

    Weights are integers of so many bits after the point as fit an int16; returned is how many. All as in
    aten/src/ATen/native/cpu/UpSampleKernel.cpp of torch 2.13, for inputs <= outputs.
    """
    scale = inputs / outputs
    exact = np.empty((outputs, 2))
    largest = 0.0
    for place in range(outputs):
        centre = scale * (place + 0.5)
        start = max(int(centre - 0.5), 0)
        a = max(1.0 - abs(start - centre + 0.5), 0.0)
        b = max(1.0 - abs(1 + start - centre + 0.5), 0.0) if min(int(centre + 1.5), inputs) - start > 1 else 0.0
        exact[place, 0], exact[place, 1] = a / (a + b), b / (a + b)
        largest = max(largest, exact[place, 0], exact[place, 1])
        first[place] = start
    bits = 0
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    for place in range(outputs):
        for tap in range(2):
            weights[place, tap] = int(exact[place, tap] * float(1 << bits) + 0.5)
    return bits


@njit(nogil=True, error_model="numpy", cache=True)
def upscale(memory, rows, slots):
    """Scale boxes of images in `memory` (bytes,) up into slots (n, S, S, 3), as torch's bilinear kernel for uint8 does.

    rows (m, 8): slot, start of the image (H, W, 3) in memory, H, W, and the box: top, left, height, width, the last two
    1 .. S. Four bytes after each image must belong to `memory`, too.
    """
    for k in range(len(rows)):
        slot, start, _, width = rows[k, 0], rows[k, 1], rows[k, 2], rows[k, 3]
        begin = start + (rows[k, 4] * width + rows[k, 5]) * 3
        _upscale(memory, begin, width * 3, rows[k, 6], rows[k, 7], slots[slot])


@njit(nogil=True, error_model="numpy", cache=True)
def _upscale(source, begin, stride, height, width, slot):
    side = slot.shape[0]
    out = slot.reshape(-1)
    wide = np.empty(height * side * 3 + 1, np.uint8)  # (height, side, 3), and a byte that the last pixel spills
    row = u8(side * 3)
    first, weights = np.empty(side, np.int32), np.empty((side, 2), np.int32)

    bits = _two_taps(width, side, first, weights)
    half, shift = i4(1 << (bits - 1)), i4(bits & 31)
    for y in range(u8(height)):
        line = u8(u8(begin) + y * u8(stride))
        o = u8(y * row)
        for x in range(u8(side)):
            i = u8(line + u8(first[x]) * THREE)
            a, b = weights[x, u8(0)], weights[x, ONE]
            r = _add(_add(half, a, source[i]), b, source[i + THREE])
            g = _add(_add(half, a, source[i + ONE]), b, source[i + THREE + ONE])
            u = _add(_add(half, a, source[i + TWO]), b, source[i + THREE + TWO])
            v = _add(_add(half, a, source[i + THREE]), b, source[i + THREE + THREE])
            wide[o], wide[o + ONE], wide[o + TWO], wide[o + THREE] = r >> shift, g >> shift, u >> shift, v >> shift
            o += THREE

    bits = _two_taps(height, side, first, weights)
    half, shift = i4(1 << (bits - 1)), i4(bits & 31)
    for y in range(u8(side)):
        i, o = u8(u8(first[y]) * row), u8(y * row)
        below = row if weights[y, ONE] else u8(0)  # the last row has none below it
        a, b = weights[y, u8(0)], weights[y, ONE]
        for j in range(row):
            out[o + j] = _add(_add(half, a, wide[i + j]), b, wide[i + below + j]) >> shift


@njit(nogil=True, error_model="numpy", cache=True)
def _lay(source, begin, side, by, flipped, reflect, row):
    """Fill `row` with the columns by .. by + side of the image row at `begin`, mirrored where flipped."""
    low = min(max(0, -by), side)  # of the crop's columns the image has low .. high
    high = max(min(side, side - by), low)
    if flipped and low < high:
        o, i = u8((side - high) * 3), u8(begin + u8((high - 1 + by) * 3))
        row[o], row[o + ONE], row[o + TWO] = source[i], source[i + ONE], source[i + TWO]
        for _ in range(u8(high - low - 1)):
            o += THREE
            i -= THREE
            r, g, u, v = source[i], source[i + ONE], source[i + TWO], source[i + THREE]
            row[o], row[o + ONE], row[o + TWO], row[o + THREE] = r, g, u, v
    elif low < high:
        o, i = u8(low * 3), u8(begin + u8((low + by) * 3))
        for j in range(u8((high - low) * 3)):
            row[o + j] = source[i + j]
    for border in range(low + side - high):
        x = border if border < low else border - low + high
        column = abs(x + by)
        if column >= side:
            column = 2 * (side - 1) - column
        o = u8((side - 1 - x if flipped else x) * 3)
        i = u8(begin + u8(column * 3)) if reflect else u8(0)
        for channel in range(u8(3)):
            row[o + channel] = source[i + channel] if reflect else np.uint8(0)


@njit(nogil=True, error_model="numpy", cache=True)
def finish(images, top, left, reflect, flipped, shift, scale, out):
    """Crop, mirror and normalise images (n, S, S, 3) into `out` (n, S, S, 3): (value - shift) * scale.

    top, left (n,), -S < value < S: the image's row and column that become the crop's first. Around the image all is
    black, or (`reflect`) its mirror image. flipped (n,): mirrored left-right after that. shift, scale: of a row's 3 S
    values.
    """
    side = images.shape[1]
    source, target = images.reshape(-1), out.reshape(-1)
    values = u8(side * 3)
    row = np.empty(side * 3 + 1, np.uint8)  # and a byte that the last pixel spills
    o = u8(0)
    for n in range(len(images)):
        for y in range(side):
            line = y + top[n]
            if 0 <= line < side or reflect:
                line = abs(line)
                line = 2 * (side - 1) - line if line >= side else line
                _lay(source, u8(u8(n * side + line) * values), side, left[n], flipped[n], reflect, row)
            else:
                row[:] = 0
            for j in range(values):
                target[o + j] = (f4(row[j]) - shift[j]) * scale[j]
            o += values
