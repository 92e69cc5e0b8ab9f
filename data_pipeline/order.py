"""The order of samples as a function of (seed, source, epoch, position): no index arrays, no state.

``permute`` is a shuffle of everything. ``permute_in_blocks`` keeps near to one another in time what is near to one
another in the data, for data that has to be fetched.

A keyed Feistel network permutes the smallest power-of-two domain that holds ``n``; results outside ``[0, n)`` are
permuted again until they land inside ("cycle walking": Black and Rogaway, *Ciphers with Arbitrary Finite Domains*,
2002).
"""

from collections.abc import Callable

import numpy as np
import xxhash

ORDER_VERSION = 1  # a change of anything below changes every training run's order: raise this number with it,
BLOCK_ORDER_VERSION = 2  # or this one, where only `permute_in_blocks` changes
ROUNDS = 6
LANES = 8
RUN_WINDOWS = 16

_MULTIPLIER_1 = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_2 = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)


def order_key(seed: int, source: int, epoch: int, *part: int) -> np.ndarray:
    """The uint64 ``[ROUNDS]`` round keys of one epoch over one source, or of a part of it."""
    text = "/".join(map(str, ("trainyard-order", ORDER_VERSION, seed, source, epoch, *part, "")))
    return np.array([xxhash.xxh3_64_intdigest(f"{text}{i}".encode()) for i in range(ROUNDS)], dtype=np.uint64)


def permute(indices: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Map distinct ``indices`` in ``[0, n)`` to distinct values in ``[0, n)``.

    Args:
        indices: uint64, any shape; every value below ``n``.
        n: size of the set, 1 <= n < 2**63.
        key: what ``order_key`` returns.

    Returns:
        uint64 array of the same shape. Over all of ``[0, n)`` it is a bijection.
    """
    if not 1 <= n < 1 << 63:
        raise ValueError(f"a permutation needs between 1 and 2**63 - 1 elements, not {n}")
    values = np.asarray(indices, dtype=np.uint64)
    flat = values.reshape(-1)
    if flat.size and int(flat.max()) >= n:
        raise ValueError(f"index {int(flat.max())} is outside a permutation of {n} elements")
    bits = (n - 1).bit_length()
    limit = np.uint64(n)
    result = _encrypt(flat, bits, key)
    outside = np.flatnonzero(result >= limit)
    while outside.size:
        walked = _encrypt(result[outside], bits, key)
        result[outside] = walked
        outside = outside[walked >= limit]
    return result.reshape(values.shape)


def permute_in_blocks(indices: np.ndarray, n: int, window: int, key_of: Callable[..., np.ndarray]) -> np.ndarray:
    """Map distinct ``indices`` in ``[0, n)`` to distinct values in ``[0, n)``, as ``permute``, but with locality.

    The values are cut into runs of at least 16 windows (or 8 shorter ones, where there are fewer than 128), and runs
    are dealt in permuted order to 8 lanes, which take turns. A lane goes through its run window by window, forwards or
    backwards, and through each window in permuted order. So at any time the values come from 8 windows, and what lies
    on a window's border is needed again at once; only a run's borders are visited twice. Not even these where there is
    one run a lane: neighbours then go in opposite directions, and are at their common border at the same time. The
    ``n`` % runs last values come last.

    Args:
        window: how many values are mixed with one another; about as many as are fetched together.
        key_of: gives the round keys of a part of the epoch: ``order_key`` of its seed, source and epoch.
    """
    values = np.asarray(indices, dtype=np.uint64).astype(np.int64)
    lanes = min(LANES, max(1, n // window))
    runs = lanes * max(1, n // (lanes * window * RUN_WINDOWS))
    length = n // runs
    result = values.copy()  # what is left over stays where it is
    dealt = np.flatnonzero(values < runs * length)
    turn, lane = values[dealt] // lanes, values[dealt] % lanes
    slot = (turn // length) * lanes + lane
    run_of = permute(slot.astype(np.uint64), runs, key_of()).astype(np.int64)
    within = turn % length
    part = run_of << 32 | within // window
    first_direction = int(key_of()[0])
    for which in set(part.tolist()):
        chosen = np.flatnonzero(part == which)
        run, number = which >> 32, which & 0xFFFFFFFF
        begin = number * window
        mixed = permute((within[chosen] - begin).astype(np.uint64), min(window, length - begin), key_of(run, number))
        place = begin + mixed.astype(np.int64)
        backwards = (first_direction + run if runs == lanes else int(key_of(run)[0])) & 1
        result[dealt[chosen]] = run * length + (length - 1 - place if backwards else place)
    return result.astype(np.uint64)


def _encrypt(values: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    # The halves may differ by a bit, so that the domain is at most twice n. Each round changes one half by a
    # function of the other, which can be undone whatever the widths: the network is a bijection on [0, 2**bits).
    left_bits = bits // 2
    right_bits = np.uint64(bits - left_bits)
    left_mask = np.uint64((1 << left_bits) - 1)
    right_mask = (np.uint64(1) << right_bits) - np.uint64(1)
    left = values >> right_bits
    right = values & right_mask
    for round_number, round_key in enumerate(key):
        if round_number % 2:
            left ^= _mix(right, round_key) & left_mask
        else:
            right ^= _mix(left, round_key) & right_mask
    return (left << right_bits) | right


def _mix(half: np.ndarray, round_key: np.uint64) -> np.ndarray:
    # Two multiplications with a fold between, as in splitmix64's finaliser, wrapping modulo 2**64.
    mixed = (half + round_key) * _MULTIPLIER_1
    mixed ^= mixed >> _SHIFT
    mixed *= _MULTIPLIER_2
    return mixed ^ (mixed >> _SHIFT)
