"""python benchmarks/report.py: docs/performance.md from benchmarks/results/."""

from pathlib import Path

from doratune.bench.pages import write_report

if __name__ == "__main__":
    write_report(Path(__file__).resolve().parents[1])
