"""Files that were sound, damaged."""

from __future__ import annotations

from hypothesis import strategies as st

# what tends to break readers, beside random bytes: extreme lengths, counts and numbers
EXTREMES = [
    n.to_bytes(size, "little") for size in (1, 4, 8) for n in (0, 1, 2**7, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
]


@st.composite
def damaged(draw: st.DrawFn, data: bytes, front: int | None = None) -> bytes:
    """`data` with some of it overwritten, cut out, repeated or added to, mostly within its first `front` bytes."""
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([min(front or len(data), len(data)), len(data)]))
        at = draw(st.integers(0, end))
        n = draw(st.integers(0, 16) | st.integers(0, len(data)))
        new = draw(st.binary(max_size=16) | st.sampled_from(EXTREMES))
        how = draw(st.sampled_from(["overwrite", "insert", "cut out", "repeat", "end"]))
        if how == "overwrite":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        elif how == "cut out":
            data = data[:at] + data[at + n :]
        elif how == "repeat":
            data = data[: at + n] + data[at:]
        else:
            data = data[:at]
    return data
