"""One RULER result of several that `fallow evaluate --output` wrote for single tasks, which run side by side.

    python benchmarks/merge_ruler.py WHOLE.json PART.json PART.json …

All parts must be of one model and seed; the figures are those that one command would have printed. Exit codes: 0 done,
1 the parts do not belong together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fallow.evaluation.documents import TASKS
from fallow.evaluation.ruler import Scores, as_dict

SAME = ("model", "modes", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("whole", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    options = parser.parse_args(argv)
    try:
        result = merged([json.loads(part.read_text()) for part in options.parts])
    except (OSError, ValueError, KeyError) as error:
        print(f"merge_ruler: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    options.whole.write_text(json.dumps(result, indent=1) + "\n")
    means = {mode: round(100 * scores["mean"]["mean"], 1) for mode, scores in result["ruler"].items()}
    print(f"wrote {options.whole}: {len(options.parts)} parts, means {means}")
    return 0


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Raises ValueError: other models, modes or seeds, or a task that is in two parts."""
    first = parts[0]
    for key in SAME:
        if any(part[key] != first[key] for part in parts):
            raise ValueError(f"the parts differ in {key!r}")
    whole: dict[str, Any] = {}
    for mode in first["modes"]:
        cells: dict[tuple[str, int], list[float]] = {}
        for cell in (c for part in parts for c in part["ruler"][mode]["cells"]):
            place = cell["task"], cell["length"]
            if place in cells:
                raise ValueError(f"{place[0]} at {place[1]} tokens is there twice")
            cells[place] = cell["scores"]
        order = sorted(cells, key=lambda c: (TASKS.index(c[0]), c[1]))
        whole[mode] = as_dict(Scores(mode=mode, cells={c: cells[c] for c in order}))
    seconds = sum(part["seconds"] for part in parts)
    return {key: first[key] for key in SAME} | {"ruler": whole, "seconds": seconds, "machine": first["machine"]}


if __name__ == "__main__":
    sys.exit(main())
