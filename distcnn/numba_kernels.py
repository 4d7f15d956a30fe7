# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""What `distcnn.compiled` compiles. Nothing else imports this file: it needs Numba.

An RGB pixel is three bytes, and processors compute on four: where a loop takes two pixels together it computes four
values, the last of which belongs to the next pixel and is written over by it. All are read before any is written.
Indices are unsigned and every sum is cast to 32 bit, since otherwise Numba checks each index for being negative,
computes in 64 bit, and LLVM finds nothing to vectorise.
"""

from typing import Any

import numpy as np
from numba import njit, types

i4, f4, u8 = np.int32, np.float32, np.uint64
ONE, TWO, THREE = u8(1), u8(2), u8(3)

UPSCALE = "(uint8[::1], int64[:, ::1], uint8[:, :, :, ::1])"
FINISH = (
    "(uint8[:, :, :, ::1], int64[::1], int64[::1], boolean, boolean[::1], float32[::1], float32[::1],"
    " float32[:, :, :, ::1])"
)
READ_FILES = "(int64[:, ::1], uint8[::1])"
FILL_SLOTS = "(intp, int64[:, ::1], uint8[::1], uint8[::1], uint8[:, :, :, ::1], boolean[::1])"

# Functions in C, by name; `distcnn.data.turbojpeg` says where libturbojpeg's is. Pointers are passed as numbers.
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.intp, types.uint64, types.int64))
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_decompress: Any = types.ExternalFunction(
    "tjDecompress2", types.int32(types.intp, types.intp, types.uint64, types.intp, *[types.int32] * 5)
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
        for x in range(u8(high - low)):
            p, q = u8(o + x * THREE), u8(i - x * THREE)
            row[p] = source[q]
            row[p + ONE] = source[q + ONE]
            row[p + TWO] = source[q + TWO]
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
    row = np.empty(side * 3, np.uint8)
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


FILE, OFFSET, SIZE, AT, HEIGHT, WIDTH = range(6)  # columns of what `read_files` and `fill_slots` take
SLOT, TOP, LEFT, HIGH, WIDE = range(6, 11)  # those that only `fill_slots` takes


@njit(nogil=True, error_model="numpy", cache=True)
def read_files(rows, encoded):
    """Read files into `encoded` (bytes,), and the sizes of the images in those that are plain JPEG.

    rows (n, 11): FILE descriptor, OFFSET and SIZE in bytes, AT which place of `encoded`; HEIGHT and WIDTH in pixels are
    written, 0 for all other files and those that cannot be read whole.
    """
    for k in range(len(rows)):
        row = rows[k]
        row[HEIGHT] = row[WIDTH] = 0
        at, size = row[AT], row[SIZE]
        if at < 0 or size < 1 or at + size > len(encoded):
            continue
        if _pread(row[FILE], encoded.ctypes.data + at, size, row[OFFSET]) == size:
            row[HEIGHT], row[WIDTH] = _plain_size(encoded[at : at + size])


@njit(nogil=True, error_model="numpy", cache=True)
def _plain_size(data):
    """(height, width) in a baseline JPEG's frame header (ITU-T T.81, B.2.2) of three components of 8 bit, else zeros.

    The first component (brightness) has the full resolution, the others that, or half of it across or both ways.
    """
    if len(data) < 2 or data[0] != 0xFF or data[1] != 0xD8:
        return 0, 0
    at = 2
    while at + 19 <= len(data):  # so long is the header, and there are no pixels before it
        marker, length = data[at + 1], (data[at + 2] << 8) | data[at + 3]
        if data[at] != 0xFF:
            return 0, 0
        if marker == 0xC0:
            sampling = data[at + 11]
            plain = length == 17 and data[at + 4] == 8 and data[at + 9] == 3
            plain &= sampling == 0x11 or sampling == 0x21 or sampling == 0x22
            if plain and data[at + 14] == 0x11 and data[at + 17] == 0x11:
                return (data[at + 5] << 8) | data[at + 6], (data[at + 7] << 8) | data[at + 8]
            return 0, 0
        # tables, restart interval, application segments and comments come before it
        if not (marker == 0xC4 or marker == 0xDB or marker == 0xDD or 0xE0 <= marker <= 0xEF or marker == 0xFE):
            return 0, 0
        at += 2 + length
    return 0, 0


@njit(nogil=True, error_model="numpy", cache=True)
def fill_slots(decoder, rows, encoded, pixels, slots, done):
    """Decode images that `read_files` has read, and scale a box of each up into its SLOT of `slots` (n, S, S, 3).

    decoder: a handle of TurboJPEG's. rows (m, 11): of the box TOP, LEFT, and height and width, HIGH and WIDE, 1 .. S.
    pixels (bytes,): room for the largest image and four bytes more. done (m,): set to whether the slot was filled, and
    the library has not complained. Returns the nanoseconds that scaling took.
    """
    monotonic, clock = 1, np.empty((2, 2), np.int64)  # before and after, in seconds and nanoseconds
    scaling = 0
    side = slots.shape[1]
    for k in range(len(rows)):
        row = rows[k]
        done[k] = False
        at, size, height, width, top, left = row[AT], row[SIZE], row[HEIGHT], row[WIDTH], row[TOP], row[LEFT]
        high, wide, values = row[HIGH], row[WIDE], height * width * 3
        if at < 0 or size < 1 or at + size > len(encoded) or not 0 <= row[SLOT] < len(slots):
            continue
        if top < 0 or high < 1 or high > side or top + high > height or values + 4 > len(pixels):
            continue
        if left < 0 or wide < 1 or wide > side or left + wide > width:
            continue
        slot = slots[row[SLOT]]
        straight = high == height and wide == width and high == side and wide == side
        target = slot.ctypes.data if straight else pixels.ctypes.data
        if _decompress(decoder, encoded.ctypes.data + at, size, target, width, 0, height, 0, 0) != 0:
            continue
        if not straight:
            _clock_gettime(monotonic, clock[0].ctypes.data)
            _upscale(pixels, (top * width + left) * 3, width * 3, high, wide, slot)
            _clock_gettime(monotonic, clock[1].ctypes.data)
            scaling += (clock[1, 0] - clock[0, 0]) * 1_000_000_000 + clock[1, 1] - clock[0, 1]
        done[k] = True
    return scaling
