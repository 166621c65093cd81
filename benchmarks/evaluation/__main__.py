"""`python -m benchmarks.evaluation`: seconds for tasks of lm-evaluation-harness, ours and its `hf` model.

Rounds are interleaved: each runs every model once, in a process of its own, on the same files. Prints a page;
`--output` writes the numbers as JSON, `--page` the page. Needs `modernbert-decoder[torch,eval]`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.evaluation.models import ensure_model, write_tasks
from benchmarks.machine import describe_machine, harness_versions
from benchmarks.peers import CACHE
from benchmarks.quality import shared_folder
from modernbert_decoder.machine import usable_threads

HF = "hf, transformers float32"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sizes", nargs="+", default=["17m", "150m"])
    parser.add_argument("--limit", type=int, default=200, help="documents of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="of hf; each is a peer")
    parser.add_argument("--quick", action="store_true", help="17m, 24 documents, 1 round: does it work")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--page", type=Path, metavar="MARKDOWN")
    return parser.parse_args(arguments)


def models(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> how a worker makes it."""
    ours = {f"engine, {dtype}": {"kind": "engine", "dtype": dtype} for dtype in ("float32", "int8", "w8a8")}
    theirs = {f"{HF}, batches of {size}": {"kind": "hf", "batch_size": size} for size in options.batch_size}
    return {**ours, **theirs}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every size, model and task: seconds of each round, metrics, peak memory."""
    shared = shared_folder()
    if shared is None:
        raise SystemExit("the external data is not there; set MBD_SHARED to its folder")
    folder = CACHE / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    files = write_tasks(folder, shared, limit=options.limit)
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for size in options.sizes:
        model = ensure_model(size, folder, shared)
        for turn in range(options.rounds):
            for name, kind in models(options).items():
                job = {**kind, "model": str(model), "threads": options.threads, "files": files}
                print(f"{size}, round {turn + 1} of {options.rounds}: {name}", file=sys.stderr)
                answer = run(job)
                for task, seconds in answer["seconds"].items():
                    empty = {"size": size, "model": name, "task": task, "seconds": [], "peak_bytes": []}
                    row = rows.setdefault((size, name, task), empty)
                    row["seconds"].append(seconds)
                    row["peak_bytes"].append(answer["peak_bytes"])
                    row["metrics"] = answer["metrics"][task]
    return list(rows.values())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker says."""
    command = [sys.executable, "-m", "benchmarks.evaluation.worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a worker failed:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def page(results: dict[str, Any]) -> str:
    """The rows as Markdown; ratios are against the fastest `hf` of the same row."""
    lines = [
        "# Evaluation: the engine against the harness's `hf` model",
        "",
        f"lm-evaluation-harness, {results['limit']} documents a task (LAMBADA's last words; four endings to "
        f"choose from; whole passages), random weights, {results['threads']} threads, "
        f"{results['machine']['cpu']}, {results['date']}. Median of {results['rounds']} interleaved rounds, "
        "each model in a process of its own; loading is not counted.",
        "",
        "| size | task | model | seconds | spread | times hf | peak memory | metrics |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    rows = results["rows"]
    for row in rows:
        peers = [r for r in rows if (r["size"], r["task"]) == (row["size"], row["task"])]
        best = min(statistics.median(r["seconds"]) for r in peers if r["model"].startswith(HF))
        median = statistics.median(row["seconds"])
        spread = (max(row["seconds"]) - min(row["seconds"])) / median
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
        lines.append(
            f"| {row['size']} | {row['task']} | {row['model']} | {median:.2f} | {spread:.0%} | "
            f"{best / median:.2f}x | {max(row['peak_bytes']) / 1e9:.2f} GB | {metrics} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and prints."""
    options = parse()
    if options.quick:
        options.sizes, options.limit, options.rounds, options.batch_size = ["17m"], 24, 1, [8]
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "versions": harness_versions(),
        "threads": options.threads,
        "limit": options.limit,
        "rounds": options.rounds,
        "rows": measure(options),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    text = page(results)
    if options.page is not None:
        options.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
