"""The results of `python -m benchmarks gpu` as tables (gpu.md) and pictures, from what is in gpu.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import table

Row = dict[str, Any]
COLUMNS = {  # part -> its columns, of rows that have the first one
    "correctness": ["group", "checks", "share_of_allowed_error", "same_bits", "ok", "error"],
    "pretraining": [
        "system", "attention", "context", "tokens_per_second", "mfu", "micro_batch_seconds", "optimizer_seconds",
        "peak_memory_gib", "first_step_seconds", "error",
    ],
    "generation": ["engine", "batch", "prompt", "tokens/s", "TTFT ms", "MBU", "MB", "heed/engine", "same", "fault"],
    "shakespeare": ["system", "seed", "seconds", "loss", "seconds_to_target", "error"],
    "tiles": ["kernel", "width", "tile", "microseconds", "current", "error"],
}  # fmt: skip


def faults(results: dict[str, Any]) -> list[str]:
    """What is wrong with heed: a check that failed, an implementation of heed's that could not be timed."""
    found = []
    for name, part in results["parts"].items():
        for row in part["rows"]:
            reason = row.get("error") or row.get("fault")
            names = [str(row.get(key, "")) for key in ("implementation", "system", "engine")]
            ours = any(name.split(" ")[0] == "heed" for name in names)
            if row.get("ok") is False:
                found.append(f"{name}: {row['group']}, {row.get('what', reason)}: WRONG")
            elif reason and ours and not reason.startswith("skipped"):
                found.append(f"{name}: {row.get('check', '')} {reason}")
    return found


def summary(results: dict[str, Any]) -> str:
    """A line for each part, then what is wrong."""
    rows = [
        [name, f"{part['seconds']:.0f}", len(part["rows"]), part["status"]] for name, part in results["parts"].items()
    ]
    return "\n".join([table(["part", "seconds", "results", "status"], rows), *faults(results)])


def write(out: Path, results: dict[str, Any]) -> None:
    """Write gpu.md and the pictures into the folder `out`."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [f"# {'DRY RUN: not a measurement' if results['dry'] else 'Measured'}", "", f"{results['date']}, commit "
             f"{results['commit']}, {machine}", "", "```text", summary(results), "```"]  # fmt: skip
    for name, part in results["parts"].items():
        if part["rows"]:
            lines += ["", f"## {part['title']}", "", "```text", tables(name, part["rows"]), "```"]
    (out / "gpu.md").write_text("\n".join(lines) + "\n")
    pictures(out, results)


def tables(name: str, rows: list[Row]) -> str:
    """The rows of one part as text."""
    if name == "attention":
        from benchmarks.kernels import rates_table

        timed = [row for row in rows if "rate" in row]
        others = [row for row in rows if "rate" not in row]
        rounds = [[row for row in timed if row["round"] == number] for number in (1, 2)]
        return "\n\n".join([*(rates_table(each) for each in rounds if each), *(_line(row) for row in others)])
    if name == "correctness":
        rows = by_group(rows)
    columns = [column for column in COLUMNS[name] if any(row.get(column) is not None for row in rows)]
    return table(columns, [[row.get(column) for column in columns] for row in rows])


def by_group(rows: list[Row]) -> list[Row]:
    """One row per group: the number of its checks and the worst of each figure."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    found = []
    for group, each in groups.items():
        shares = [row["share_of_allowed_error"] for row in each if "share_of_allowed_error" in row]
        bits = [row["same_bits"] for row in each if "same_bits" in row]
        worst = max(shares, key=lambda share: (share != share, share), default=None)  # NaN is the worst
        row = {"group": group, "checks": len(each), "share_of_allowed_error": worst}
        row |= {"same_bits": all(bits) if bits else None, "ok": all(row["ok"] for row in each)}
        found.append(row | {"error": next((row["error"] for row in each if "error" in row), None)})
    return found


def _line(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items())


def pictures(out: Path, results: dict[str, Any]) -> None:
    """gpu-attention.png: rates against length, with the bound. gpu-training.png: loss against seconds."""
    parts = results["parts"]
    title = results["machine"].get("gpu", "") if not results["dry"] else "DRY RUN"
    if timed := [row for row in parts.get("attention", {"rows": []})["rows"] if row.get("round") == 1]:
        from benchmarks.report import picture

        picture(out / "gpu-attention.png", timed, title)
    runs: Sequence[Row] = [row for row in parts.get("shakespeare", {"rows": []})["rows"] if "curve" in row]
    if runs:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for row in runs:
            colour = "tab:red" if row["system"] == "heed" else "tab:grey"
            axis.plot(*zip(*row["curve"], strict=True), "o-", color=colour, markersize=4, label=row["system"])
        axis.axhline(runs[0]["target"], color="black", linestyle=":", label=str(runs[0]["target"]))
        axis.set(
            xscale="log", xlabel="seconds of training, log scale", ylabel="validation loss, nats/character", title=title
        )
        axis.legend()
        figure.savefig(out / "gpu-training.png", dpi=80)
        plt.close(figure)
