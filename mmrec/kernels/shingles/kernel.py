"""Hashes of the shingles of texts: of every run of a few words, joined by single spaces.

Words are what ``str.split`` makes of a text. The hash of a shingle is FxHash in its version 2, that
of the Rust package rustc-hash, which ``rensa`` computes of a string. So the signatures are those
that ``rensa`` makes of the shingles as strings, and no string is made.

Source of the hash: https://github.com/rust-lang/rustc-hash
"""

import numpy as np

from mmrec.kernels._jit import compiled_kernel, inline_jit

_MULTIPLIER = np.uint64(0xF1357AEA2E62A9C5)
_SEED_0, _SEED_1 = np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344)
_PREVENT_ZERO = np.uint64(0xA4093822299F31D0)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_8, _26, _32, _38 = np.uint64(8), np.uint64(26), np.uint64(32), np.uint64(38)
_SPACE = np.uint8(32)


@inline_jit
def _load(data, begin, size):
    """``size`` bytes, at most eight, as a little-endian integer."""
    value = np.uint64(0)
    for i in range(begin + size - 1, begin - 1, -1):
        value = (value << _8) | np.uint64(data[i])
    return value


@inline_jit
def _multiply_mix(x, y):
    """Both halves of the product of two uint64, 128 bits long, joined by exclusive or."""
    x_low, x_high, y_low, y_high = x & _LOW_HALF, x >> _32, y & _LOW_HALF, y >> _32
    low, middle = x_low * y_low, x_high * y_low
    middle += low >> _32
    other = x_low * y_high + (middle & _LOW_HALF)
    return (x * y) ^ (x_high * y_high + (middle >> _32) + (other >> _32))


@inline_jit
def _fx_hash(data, begin, end):
    """The hash of ``data[begin:end]``."""
    size = end - begin
    s0, s1 = _SEED_0, _SEED_1
    if size > 16:
        while begin < end - 16:
            mixed = _multiply_mix(
                s0 ^ _load(data, begin, 8), _PREVENT_ZERO ^ _load(data, begin + 8, 8)
            )
            s0, s1 = s1, mixed
            begin += 16
        s0 ^= _load(data, end - 16, 8)
        s1 ^= _load(data, end - 8, 8)
    elif size >= 8:
        s0 ^= _load(data, begin, 8)
        s1 ^= _load(data, end - 8, 8)
    elif size >= 4:
        s0 ^= _load(data, begin, 4)
        s1 ^= _load(data, end - 4, 4)
    elif size > 0:
        s0 ^= np.uint64(data[begin])
        s1 ^= (np.uint64(data[end - 1]) << _8) | np.uint64(data[begin + size // 2])
    state = (_multiply_mix(s0, s1) ^ np.uint64(size)) * _MULTIPLIER
    return (state << _26) | (state >> _38)


@inline_jit
def _space_bytes(data, i, end):
    """Bytes of the white space of ``str.split`` that begins at ``data[i]``, in UTF-8; 0 if none."""
    byte = data[i]
    if byte < 128:
        return 1 if byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31 else 0
    if byte == 0xC2:
        return 2 if i + 1 < end and (data[i + 1] == 0x85 or data[i + 1] == 0xA0) else 0
    if i + 2 >= end or not 0xE1 <= byte <= 0xE3:
        return 0
    second, third = data[i + 1], data[i + 2]
    if byte == 0xE1:
        return 3 if second == 0x9A and third == 0x80 else 0
    if byte == 0xE3:
        return 3 if second == 0x80 and third == 0x80 else 0
    if second == 0x81:
        return 3 if third == 0x9F else 0
    is_space = 0x80 <= third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF
    return 3 if second == 0x80 and is_space else 0


@compiled_kernel
def shingle_hashes(data, text_ends, words, hashes, hash_ends):
    """Hash the shingles of texts.

    Args:
        data: (n,) uint8, the texts in UTF-8, one behind the other.
        text_ends: (texts,) int64, where each of them ends.
        words: words of a shingle. A text of fewer words is a single shingle, unchanged.
        hashes: (n + texts,) uint64, overwritten by the hashes of all texts.
        hash_ends: (texts,) int64, overwritten by the place in ``hashes`` where those of each end.
    """
    joined = np.empty(len(data) + 1, np.uint8)  # the words of a text and one space behind each
    begins = np.empty(words, np.int64)  # of the newest words
    count = begin = 0
    for text in range(len(text_ends)):
        end, size, n_words, i = text_ends[text], 0, 0, begin
        while i < end:
            space = _space_bytes(data, i, end)
            if space:
                i += space
                continue
            begins[n_words % words] = size
            while i < end and _space_bytes(data, i, end) == 0:
                joined[size] = data[i]
                size, i = size + 1, i + 1
            n_words += 1
            if n_words >= words:
                hashes[count] = _fx_hash(joined, begins[n_words % words], size)
                count += 1
            joined[size] = _SPACE
            size += 1
        if n_words < words:
            hashes[count] = _fx_hash(data, begin, end)
            count += 1
        hash_ends[text] = count
        begin = end
