"""Prints what a model's card shows of `deltamem eval recall --json FILE`: the table, in Markdown, and the ratios.

deltamem eval recall --seed 7 --answer-writes off --json recall.json && python recipes/card.py recall.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydeltamem.evals.report import RATIOS, name_of


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    shares: dict[tuple[str, str], dict[str, str]] = {}
    for row in report["rows"]:
        share, low, high = (f"{100 * row[name]:.0f}" for name in ("accuracy", "low", "high"))
        shares.setdefault((row["task"], row["kind"]), {})[row["method"]] = f"{share} ({low}–{high})"
    methods = list(next(iter(shares.values())))
    print(f"| % right | {' | '.join(methods)} |")
    print("| --- " * (len(methods) + 1) + "|")
    for kind, of_kind in shares.items():
        print(f"| {name_of(*kind)} | {' | '.join(of_kind.values())} |")
    for memory, ratios in report["ratios"].items():
        for name, of in ratios.items():
            high = "∞" if of["high"] is None else f"{of['high']:.2f}"
            print(f"- {memory}: {RATIOS[name]}: {of['ratio']:.2f} ({of['low']:.2f}–{high})")


if __name__ == "__main__":
    main()
