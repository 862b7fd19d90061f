"""Charts and tables from the figures under bench/results.

    python bench/report.py

Draws operations.png and .svg (every peer, logarithmic), scaling.png and .svg, and puts the table of operations between the marks
`<!-- bench: begin -->` and `<!-- bench: end -->` of the README. A file of figures that is not there is said and passed over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
COLUMNS = {
    "get/klen=22/vlen=100": "get",
    "get/one hot key/vlen=100": "get, one hot key",
    "miss/klen=22": "miss",
    "set/klen=22/vlen=100": "set",
    "insert/klen=22/vlen=100": "insert",
    "delete/klen=22/vlen=100": "delete",
    "incr/klen=23": "incr",
    "get_many/many=100/klen=22/vlen=100": "get_many, a key",
    "set_many/many=100/klen=22/vlen=100": "set_many, a key",
}


def figures(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        print(f"no {path.name}: passed over")
        return None
    return dict(json.loads(path.read_text()))


def table(ops: dict[str, Any]) -> str:
    cases = {case: ops["cases"][case] for case in COLUMNS if case in ops["cases"]}
    peers = list(dict.fromkeys(peer for of in cases.values() for peer in of))
    peers.sort(key=lambda p: p != "shmcache")
    lines = ["| ns per call | " + " | ".join(COLUMNS[c] for c in cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for peer in peers:
        cells = [f"{of[peer]['median_ns']:,.0f}" if peer in of else "-" for of in cases.values()]
        lines.append(f"| {peer} | " + " | ".join(f"**{c}**" if peer == "shmcache" else c for c in cells) + " |")
    e = ops["environment"]
    where = f"{e['cores']} cores of an {e['cpu']}, Linux {e['kernel']}, CPython {e['python']}, {e['date'][:10]}"
    return "\n".join(lines) + f"\n\n{where}; `./tools/bench ops`. A dash: the peer has no such call.\n"


def into_readme(text: str) -> None:
    readme = README.read_text()
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        README.write_text(before + begin + text + end + after)
    else:
        print("the README has no marks for the table")


def save(figure: Any, name: str) -> None:
    for ending in ("png", "svg"):
        figure.savefig(RESULTS / f"{name}.{ending}", dpi=120, bbox_inches="tight", metadata={"Date": None} if ending == "svg" else None)
    print("drew", name)


def draw_operations(plt: Any, ops: dict[str, Any]) -> None:
    shown = [c for c in list(COLUMNS)[:4] if c in ops["cases"]]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4), sharey=True, squeeze=False)
    peers = list(dict.fromkeys(peer for c in shown for peer in ops["cases"][c]))
    for axis, case in zip(axes[0], shown, strict=True):
        of = ops["cases"][case]
        ns = [of[p]["median_ns"] if p in of else 0 for p in peers]
        bars = axis.barh(peers, ns, color=["#c0392b" if p == "shmcache" else "#7f8c8d" for p in peers])
        axis.bar_label(bars, [f"{x:,.0f}" if x else "" for x in ns], padding=2, fontsize=8)
        axis.set(xscale="log", xlim=(10, 1e6), title=f"{COLUMNS[case]}, ns")
        axis.invert_yaxis()
    save(figure, "operations")


def draw_scaling(plt: Any, scaling: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(8, 4))
    names = list(scaling["cases"])
    for i, name in enumerate(names):
        procs = scaling["cases"][name]
        for j, (label, of) in enumerate(procs.items()):
            axis.bar(i + (j - len(procs) / 2) * 0.35, of["shmcache, ops/s"] / 1e6, 0.33, color=f"C{j}", label=label if i == 0 else None)
    axis.set(ylabel="million operations/s, together", title="100-byte values; gets/sets")
    axis.set_xticks(range(len(names)), [n.replace("/", "\n") for n in names], fontsize=8)
    axis.legend()
    save(figure, "scaling")


def main() -> int:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "shmcache"
    from matplotlib import pyplot as plt

    if ops := figures("ops"):
        draw_operations(plt, ops)
        into_readme(table(ops))
    if scaling := figures("scaling"):
        draw_scaling(plt, scaling)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
