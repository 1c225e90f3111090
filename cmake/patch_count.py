#!/usr/bin/env python3
"""Counts the lines and files of llama.cpp that native/patches change. Exits with 1 above the limits.

The logic is in our own files; a patch only declares and dispatches. The limits keep it that way.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PATCHES = Path(__file__).resolve().parent.parent / "native" / "patches"
MAX_LINES = 150
MAX_FILES = 12


def count(text: str) -> tuple[int, set[str]]:
    """Changed lines and changed files of a unified diff."""
    lines, files = 0, set()
    name = ""
    old = new = 0  # lines that the hunk still has
    for line in text.splitlines():
        if old > 0 or new > 0:
            lines += line[:1] in ("+", "-")
            old -= line[:1] != "+" and line[:1] != "\\"
            new -= line[:1] != "-" and line[:1] != "\\"
        elif match := re.match(r"--- (?:a/)?([^\t]+)", line):
            name = match[1]
        elif match := re.match(r"\+\+\+ (?:b/)?([^\t]+)", line):
            files.add(name if match[1] == "/dev/null" else match[1])
        elif match := re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            old, new = (int(size or 1) for size in match.groups())
    return lines, files


def main(folder: Path = PATCHES) -> int:
    lines, files = 0, set()
    for patch in sorted(folder.glob("*.patch")):
        changed, touched = count(patch.read_text(encoding="utf-8"))
        print(f"{patch.name}: {changed} lines in {len(touched)} files")
        lines, files = lines + changed, files | touched
    print(f"patches: {lines} changed lines of at most {MAX_LINES}, in {len(files)} files of at most {MAX_FILES}")
    return 0 if lines <= MAX_LINES and len(files) <= MAX_FILES else 1


if __name__ == "__main__":
    sys.exit(main())
