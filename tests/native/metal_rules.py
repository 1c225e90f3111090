"""Writes ggml-metal's rules as a C++ file: the pinned source's functions that say which nodes a Metal device computes.

They are copied as they stand: plain C, though a part of them lies in an Objective-C file. A function that is no longer
there, or asks for more than `metal-device.cpp` declares, ends the build.

    metal_rules.py FOLDER OUTPUT    the folder is ggml/src/ggml-metal
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FUNCTIONS = {
    "ggml-metal-common.cpp": [
        "ggml_metal_fwht_supported_size",
        "ggml_metal_op_mul_mat_use_fwht",
        "ggml_metal_op_mul_mat_use_mm",
        "ggml_metal_op_mul_mat_id_use_mm",
    ],
    "ggml-metal-device.m": ["ggml_metal_supports_mul_mat_op", "ggml_metal_device_supports_op"],
}


def function(path: Path, name: str) -> str:
    """The text of its definition; SystemExit if there is none."""
    found = re.search(rf"^(?:static )?bool {name}\([^;{{]*\{{\n.*?^\}}\n", path.read_text("utf-8"), re.M | re.S)
    if not found:
        raise SystemExit(
            f"{path} has no function {name}: read anew what decides there, and say so in {Path(__file__).name}."
        )
    return found[0]


def main(folder: str, output: str) -> None:
    rules = [function(Path(folder) / file, name) for file, names in FUNCTIONS.items() for name in names]
    Path(output).write_text("\n".join(rules), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
