"""The golden vectors in `tests/golden` equal those that the published implementation computed."""

from __future__ import annotations

import json

from golden_data import CHECKSUMS, SHIPPED, checksums, yardstick


def test_every_array_is_that_of_the_publication(golden_dir):
    """Here, and in the folder that they were taken from where that is there."""
    recorded = json.loads(CHECKSUMS.read_text())
    for folder in filter(None, (golden_dir, yardstick())):
        assert checksums(folder) == recorded, folder


def test_they_are_small():
    """What every clone carries."""
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8_000_000
