"""Exact and near duplicates: hashes of texts, and a set of millions of them."""

import hashlib

import numpy as np

# Near duplicates, by MinHash (Broder 1997) over the set of a text's 5-character windows: two texts with a Jaccard
# similarity of s have a minimum in common with probability s. Five bands of ten minima each are hashed, and texts that
# share a band count as duplicates, with probability 1 - (1 - s^10)^5: 0.99 for s = 0.95, 0.88 for 0.9, 0.43 for
# 0.8, 0.03 for 0.6.
WINDOW, BANDS, ROWS = 5, 5, 10


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1  # HashSet needs 0 for itself


def window_hashes(codes: np.ndarray, window: int) -> np.ndarray:
    """A 64-bit hash of every run of `window` characters, of their code points (N,): uint64 (N - window + 1,)."""
    count = max(len(codes) - window + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for i in range(window):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + count]  # modulo 2**64
    return hashes


def band_hashes(texts: list[str]) -> np.ndarray:
    """The bands of each text as 64-bit hashes: uint64 (N, BANDS). Only a text's first 65,536 characters count."""
    import rensa

    codes = [np.frombuffer(text[: 2**16].encode("utf-32-le"), "<u4") for text in texts]
    offsets = np.cumsum([0] + [len(code) for code in codes]).astype(np.uint64)
    padding = np.full(WINDOW - 1, 0x110000, "<u4")  # no character: fills the windows that run over a text's end
    flat = np.concatenate([part for code in codes for part in (code, padding)])
    windows = window_hashes(flat, WINDOW)
    windows = windows[flat[: len(windows)] < 0x110000]  # those that begin with a character
    minima = rensa.RMinHash.digest_matrix_from_flat_token_hashes(windows, offsets, BANDS * ROWS, 0).to_rows()
    minima = np.array(minima, "<u4").reshape(len(texts), BANDS, ROWS)
    hashes = [[hash64(bytes([band]) + rows.tobytes()) for band, rows in enumerate(text)] for text in minima]
    return np.array(hashes, np.uint64)


class HashSet:
    """64-bit hashes in an open-addressing table: 11 to 16 bytes each, where Python's set takes about 75.

    It is queried and filled with whole arrays, because one process does it for all workers. A key is looked up in a
    bucket of BUCKET slots, a cache line, and in the next one where that is full.
    """

    BUCKET = 8

    def __init__(self):
        self._make_room(128)
        self.count = 0

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of the keys (N,) is there: bool (N,)."""
        found = np.zeros(len(keys), bool)
        pending, buckets = np.arange(len(keys)), self._first_buckets(keys)
        while len(pending):
            held = self.table[buckets]  # (P, BUCKET)
            found[pending] = here = (held == keys[pending, None]).any(1)
            further = ~here & (self.used[buckets] == self.BUCKET)
            pending, buckets = pending[further], (buckets[further] + 1) % len(self.table)
        return found

    def add(self, keys: np.ndarray):
        """Adds keys (N,), each another, and none that is there already."""
        self.count += len(keys)
        while self.count > 0.75 * self.table.size:
            old = self.table
            self._make_room(len(old) * 3 // 2)
            for start in range(0, len(old), 2**13):  # in parts, so that little more than both tables is in memory
                part = old[start : start + 2**13]
                self._place(part[part != 0])
        self._place(keys)

    def _make_room(self, buckets: int):
        self.table = np.zeros((buckets, self.BUCKET), np.uint64)  # 0 is an empty slot
        self.used = np.zeros(buckets, np.uint8)  # slots of each bucket, which are filled from the left

    def _first_buckets(self, keys: np.ndarray) -> np.ndarray:
        return ((keys >> np.uint64(32)) * np.uint64(len(self.table)) >> np.uint64(32)).astype(np.int64)

    def _place(self, keys: np.ndarray):
        buckets = self._first_buckets(keys)
        while len(keys):
            order = np.argsort(buckets)
            keys, buckets = keys[order], buckets[order]
            before = np.arange(len(keys)) - np.searchsorted(buckets, buckets)  # so many others want the same bucket
            slots = self.used[buckets] + before
            fits = slots < self.BUCKET
            self.table[buckets[fits], slots[fits]] = keys[fits]
            self.used[buckets[fits]] = slots[fits] + 1  # of several for one bucket, the last and largest stays
            keys, buckets = keys[~fits], (buckets[~fits] + 1) % len(self.table)


class Duplicates:
    """The hashes of all documents that were kept."""

    def __init__(self, exact: bool):
        self.compare_exactly = exact
        self.exact, self.near = HashSet(), HashSet()

    def rules(self, keys: np.ndarray, bands: np.ndarray) -> list[str | None]:
        """For each document of a batch the rule that drops it as a duplicate; None for a new one, which is remembered.

        keys: hashes of contents, uint64 (N,). bands: uint64 (N, BANDS), or (N, 0) where near duplicates may stay.
        """
        rules = np.full(len(keys), None, object)
        rules[self.near.contains(bands.ravel()).reshape(bands.shape).any(1)] = "near_duplicate"
        rules[self.exact.contains(keys)] = "exact_duplicate"
        # The few that are like another of this batch, one by one; the others cannot be.
        seen_keys, seen_bands = set(), set()
        for i in np.flatnonzero(_repeated(keys) | _repeated(bands).any(1)).tolist():
            key, own_bands = int(keys[i]), bands[i].tolist()
            if self.compare_exactly and key in seen_keys:
                rules[i] = "exact_duplicate"
            elif rules[i] is None and not seen_bands.isdisjoint(own_bands):
                rules[i] = "near_duplicate"
            elif rules[i] is None:
                seen_bands.update(own_bands)
            seen_keys.add(key)
        if self.compare_exactly:
            self.exact.add(keys[rules != "exact_duplicate"])
        self.near.add(bands[rules == None].ravel())  # noqa: E711  element by element
        return rules.tolist()

    def __len__(self) -> int:
        """Bytes."""
        return self.exact.table.nbytes + self.near.table.nbytes


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which of the values occur in the array more than once: bool, of the same shape."""
    ordered = np.sort(values, axis=None)
    return np.isin(values, ordered[1:][ordered[1:] == ordered[:-1]])
