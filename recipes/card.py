"""Prints what a model's card shows of `deltamem eval recall --json FILE`: the table, in Markdown, and the ratios.

    deltamem eval recall --seed 7 --answer-writes off --json recall.json && python recipes/card.py recall.json

For several files (runs with other seeds) it prints the means.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydeltamem.evals.bootstrap import wilson
from pydeltamem.evals.report import RATIOS, name_of


def main() -> None:
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]
    if not runs:
        sys.exit(__doc__)
    right: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in runs:
        for row in run["rows"]:
            count = right.setdefault((row["task"], row["kind"]), {}).setdefault(row["method"], [0, 0])
            count[0] += row["accuracy"] * row["n"]
            count[1] += row["n"]
    methods = list(next(iter(right.values())))
    print(f"| % right | {' | '.join(methods)} |")
    print("| --- " * (len(methods) + 1) + "|")
    for kind, of_kind in right.items():
        shares = (wilson(round(of_kind[method][0]), of_kind[method][1]) for method in methods)
        cells = (f"{100 * p:.0f} ({100 * low:.0f}–{100 * high:.0f})" for p, low, high in shares)
        print(f"| {name_of(*kind)} | {' | '.join(cells)} |")
    for run in runs:
        for memory, ratios in run["ratios"].items():
            for name, of in ratios.items():
                high = "∞" if of["high"] is None else f"{of['high']:.2f}"
                print(f"- {memory}: {RATIOS[name]}: {of['ratio']:.2f} ({of['low']:.2f}–{high})")


if __name__ == "__main__":
    main()
