"""A permutation of range(n) that computes any element in O(1) time and memory.

A balanced Feistel network over the smallest even number of bits that holds n, with cycle walking
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). The round function is the
finaliser of SplitMix64 (Steele et al. 2014).
"""

from diffsynth_dagster.facts import digest_text

_MASK = (1 << 64) - 1
_ROUNDS = 6


def _mix(value: int) -> int:
    # The finaliser of SplitMix64, with its published constants.
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A permutation of range(size). Different keys give independent permutations."""

    def __init__(self, size: int, *key: str | int) -> None:
        self.size = size
        # Bits of each half of the network; together the smallest even number that holds size - 1.
        half = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
        self._half = half
        self._mask = (1 << half) - 1
        text = "\x1f".join(str(word) for word in key)
        # One subkey for each round; 16 hexadecimal digits are 64 bits.
        self._keys = [int(digest_text(f"{text}\x1f{r}")[:16], 16) for r in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """The element at `index`, which is in range(size)."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        value = index
        # Cycle walking: the network permutes a power of four, which is less than 4 * size for
        # size > 1. Values outside range(size) are encrypted again until one falls inside.
        while True:
            left, right = value >> self._half, value & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
            value = (left << self._half) | right
            if value < self.size:
                return value

    def __len__(self) -> int:
        return self.size
