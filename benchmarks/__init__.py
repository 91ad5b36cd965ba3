"""What fastlars costs, and what it is worth: one folder for each question, and what they share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
