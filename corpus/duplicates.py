"""Exact and near duplicates: hashes of texts, and a set that holds millions of them."""

import hashlib
from array import array

import numpy as np

# Near duplicates, by MinHash (Broder 1997) over the set of a text's 5-character windows: two texts with a Jaccard
# similarity of s have a minimum in common with probability s. Five bands of ten minima each are hashed, and texts that
# share a band are taken for duplicates, with probability 1 - (1 - s^10)^5: 0.99 for s = 0.95, 0.88 for 0.9, 0.43 for
# 0.8, 0.03 for 0.6.
WINDOW, BANDS, ROWS = 5, 5, 10


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1  # HashSet needs 0 for itself


def band_hashes(texts: list[str]) -> list[list[int]]:
    """The bands of each text as BANDS 64-bit hashes, a list a text. Only a text's first 65,536 characters count."""
    import rensa

    codes = [np.frombuffer(text[: 2**16].encode("utf-32-le"), "<u4") for text in texts]
    offsets = np.cumsum([0] + [len(code) for code in codes]).astype(np.uint64)
    padding = np.full(WINDOW - 1, 0x110000, "<u4")  # no character: fills the windows that run over a text's end
    flat = np.concatenate([part for code in codes for part in (code, padding)])
    count = len(flat) - WINDOW + 1
    windows = np.zeros(count, np.uint64)
    for i in range(WINDOW):
        windows = windows * np.uint64(0x9E3779B97F4A7C15) + flat[i : i + count]  # modulo 2**64
    windows = windows[flat[:count] < 0x110000]  # those that begin with a character
    minima = rensa.RMinHash.digest_matrix_from_flat_token_hashes(windows, offsets, BANDS * ROWS, 0).to_rows()
    minima = np.array(minima, "<u4").reshape(len(texts), BANDS, ROWS)
    return [[hash64(bytes([band]) + rows.tobytes()) for band, rows in enumerate(text)] for text in minima]


class HashSet:
    """64-bit hashes in an open-addressing table: 11 to 16 bytes each, where Python's set takes about 75."""

    def __init__(self):
        self.table = array("Q", [0]) * 1024
        self.count = 0

    def slot(self, key: int) -> int:
        """Where `key` is, or the empty slot where it belongs."""
        table = self.table
        size = len(table)
        slot = key * size >> 64
        while table[slot] and table[slot] != key:
            slot = (slot + 1) % size
        return slot

    def __contains__(self, key: int) -> bool:
        return self.table[self.slot(key)] == key

    def add(self, key: int):
        slot = self.slot(key)
        self.count += not self.table[slot]
        self.table[slot] = key
        if self.count > 0.75 * len(self.table):
            old, self.table = self.table, array("Q", [0]) * (len(self.table) * 3 // 2)
            for key in filter(None, old):
                self.table[self.slot(key)] = key
