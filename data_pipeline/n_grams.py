"""Texts as hashed n-grams of their words, whatever the case and ASCII punctuation; MinHash of them.

A script without spaces between words has characters instead, two of them for a word.
"""

import string

import numpy as np
import xxhash

MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, with its bits spread evenly: 2**64 divided by the golden ratio
UNSPACED_SHARE = 0.05  # of the characters; from here on a text does not put spaces between its words
CHARACTERS_A_WORD = 2  # of a script without spaces
WORDS_KEPT = 2**20  # with their hashes

SHINGLE_WORDS = 5
BANDS = 14  # two texts that share s of their shingles have an equal band with the probability 1 - (1 - s**8)**14:
BAND_ROWS = 8  # 0.05 at s = 0.5, 0.56 at 0.7, 0.92 at 0.8, 1.00 at 0.9
CHUNK_SHINGLES = 4096  # hashed at a time: 2 MB, which stay in a core's cache

# first and last: Thai and Lao, Tibetan, Burmese, Khmer, Hiragana and Katakana, Han
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x0F00, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0x20000, 0x3FFFF),
)
_PLAIN = bytes.maketrans(string.punctuation.encode(), b" " * len(string.punctuation))
# each row is a permutation of the 32-bit numbers
_ROWS = np.array([[xxhash.xxh32_intdigest(bytes([row])) | 1] for row in range(BANDS * BAND_ROWS)], dtype=np.uint32)


def has_spaces(text: str) -> bool:
    """Whether the script puts spaces between words."""
    if text.isascii():
        return True
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    codes = codes[codes >= _UNSPACED[0][0]]
    unspaced = sum(int(((codes >= first) & (codes <= last)).sum()) for first, last in _UNSPACED)
    return unspaced < UNSPACED_SHARE * len(text)


class _WordHashes(dict[bytes, int]):
    def __missing__(self, word: bytes) -> int:
        if len(self) >= WORDS_KEPT:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word)
        return value


_word_hashes = _WordHashes()


def n_grams(text: str, n: int) -> np.ndarray:
    """uint64 hashes of all runs of n words in order; of a shorter text one, of all its words; of no words none."""
    text = text.lower()
    if has_spaces(text):
        words = text.encode().translate(_PLAIN).split()
        hashes = np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))
    else:
        n *= CHARACTERS_A_WORD
        codes = np.frombuffer("".join(filter(str.isalnum, text)).encode("utf-32-le"), "<u4")
        hashes = codes * MIX
        hashes ^= hashes >> np.uint64(29)
    n = min(n, hashes.size)
    count = hashes.size - n + 1 if n else 0
    grams = np.full(count, n, dtype=np.uint64)
    for first in range(n):
        grams *= MIX
        grams += hashes[first : first + count]
    return (grams ^ (grams >> np.uint64(32))) * MIX


def band_hashes(text: str) -> list[int]:
    """64-bit hashes, one of each band: near duplicates have an equal one. None of a text without words."""
    shingles = (n_grams(text, SHINGLE_WORDS) >> np.uint64(32)).astype(np.uint32)
    if not shingles.size:
        return []
    smallest = np.full(len(_ROWS), 2**32 - 1, dtype="<u4")
    for begin in range(0, shingles.size, CHUNK_SHINGLES):
        permuted = shingles[begin : begin + CHUNK_SHINGLES] * _ROWS
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return [xxhash.xxh3_64_intdigest(rows.tobytes(), seed=band) for band, rows in enumerate(np.split(smallest, BANDS))]
