"""benchmarks.results: files that are whole or unchanged, columns that are checked, tables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import results

ROWS = [{"model": "a, b", "ms": 1.5}, {"model": 'c "d"', "ms": None}]


def test_rows_come_back_as_text(tmp_path: Path) -> None:
    path = tmp_path / "made" / "out.csv"
    results.write_csv(path, ROWS)
    assert results.read_csv(path) == [{"model": "a, b", "ms": "1.5"}, {"model": 'c "d"', "ms": ""}]
    assert path.read_bytes().startswith(b'model,ms\n"a, b",1.5\n')
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"model": "a"}, "out.csv: a row lacks ms"), ({"model": "a", "ms": 1, "s": 2}, "'s'")],
)
def test_a_row_with_other_columns_leaves_the_old_file(
    tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        results.write_csv(path, [*ROWS, wrong])
    assert path.read_text() == "old"


def test_columns_that_are_named_may_be_missing(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"b": 2, "a": 3}]
    results.write_csv(tmp_path / "out.csv", rows, results.every_column(rows))
    assert (tmp_path / "out.csv").read_text() == "a,b\n1,\n3,2\n"


def test_a_file_is_replaced_only_when_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")

    def full(_: int) -> None:
        assert path.read_text() == "old"
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.write_csv(path, ROWS)
    assert path.read_text() == "old"


def test_a_table_has_its_sides_and_its_cells() -> None:
    lines = [["a", 1.5, ""], "b | 2 | 3"]
    assert results.markdown("model | | of DDP's", "lr", lines).splitlines() == [
        "| model | | of DDP's |",
        "|---|--:|--:|",
        "| a | 1.5 |  |",
        "| b | 2 | 3 |",
    ]
    assert results.plain_table([{"a": 1}, {"b": 2}]) == "| a | b |\n|---|---|\n| 1 |  |\n|  | 2 |\n"


def test_the_options_that_benchmarks_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = results.parser("What is measured.\n\nDetails.", rounds=7)
    assert parser.description == "What is measured."
    assert vars(parser.parse_args([])) == {"csv": None, "rounds": 7}
    given = parser.parse_args(["--csv", str(tmp_path / "out.csv"), "--rounds", "3"])
    assert given.rounds == 3
    results.publish("a table", ROWS, None)
    assert list(tmp_path.iterdir()) == []
    results.publish("a table", ROWS, given.csv)
    assert capsys.readouterr().out == "a table\na table\n"
    assert len(results.read_csv(given.csv)) == 2
