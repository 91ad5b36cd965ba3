"""docs/images: drawn from the committed CSV files, readable on a phone, on white and on black."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import drawing, pictures
from benchmarks.accuracy import trust
from benchmarks.overlap import timeline
from repository_files import ROOT

IMAGES = ROOT / "docs" / "images"
NAMES = sorted(f"{name}{suffix}.svg" for name in pictures.PICTURES for suffix in ("", "-dark"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
WIDTH = 302.4  # of the pictures in their own unit, which is shown as 390 pixels on a phone


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    pictures.main(folder)
    return folder


def contents(path: Path) -> tuple[list[str], list[float], list[float]]:
    """Elements and words, the numbers of lines, and those of words; without names, all hashes."""
    words: list[str] = []
    lines: list[float] = []
    places: list[float] = []
    for element in ElementTree.fromstring(path.read_text()).iter():
        words += [element.tag, (element.text or "").strip()]
        numbers = places if element.tag.endswith("}text") else lines
        for name, value in sorted(element.attrib.items()):
            if name != "id" and not name.endswith("href") and "url(" not in value:
                numbers += map(float, NUMBER.findall(re.sub(r"#[0-9a-f]{6}", "", value)))
                words += [name, NUMBER.sub("", value)]
    return words, lines, places


def test_the_folder_holds_the_pictures_and_nothing_else() -> None:
    assert sorted(path.name for path in IMAGES.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_picture_is_the_one_that_is_drawn(name: str, drawn: Path) -> None:
    """Lines to a hundredth of a point; matplotlib 3.10 and 3.11 place words differently."""
    committed, now = contents(IMAGES / name), contents(drawn / name)
    assert committed[0] == now[0], "make pictures draws another picture"
    assert committed[1] == pytest.approx(now[1], abs=0.01), "make pictures draws other lines"
    assert committed[2] == pytest.approx(now[2], abs=1.0), "make pictures moves words"


def test_a_picture_is_drawn_twice_with_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    pictures.main(tmp_path)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()


def luminance(colour: str) -> float:
    """WCAG's, of #rrggbb."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_can_be_read_on_a_phone(name: str) -> None:
    text = (IMAGES / name).read_text()
    assert len(text) < 150_000
    root = ElementTree.fromstring(text)
    assert float(root.attrib["viewBox"].split()[2]) == pytest.approx(WIDTH)
    written = [e for e in root.iter() if e.tag.endswith("}text")]
    assert len(written) > 10
    sizes = [float(re.search(r"([\d.]+)px", e.attrib["style"])[1]) for e in written]
    assert min(sizes) * 390 / WIDTH >= 10
    assert "<image" not in text  # pixels would blur
    page = luminance("#131416" if "-dark" in name else "#ffffff")
    for colour in {re.search(r"fill: (#\w{6})", e.attrib["style"])[1] for e in written}:
        low, high = sorted((page, luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{colour} on the page"


def test_pages_show_every_picture_for_light_and_dark() -> None:
    form = (
        r'^<picture><source media="\(prefers-color-scheme: dark\)" srcset="images/(\w+)-dark\.svg">'
        r'<img alt="([A-Z][^"]+\.)" src="images/\1\.svg"></picture>$'
    )
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    found = [match for page in pages for match in re.findall(form, page, re.MULTILINE)]
    assert Counter(name for name, _ in found) == Counter(list(pictures.PICTURES))
    assert sum(len(re.findall(r"[\"(]images/", page)) for page in pages) == 2 * len(found)


def test_names_at_the_ends_of_curves_do_not_touch() -> None:
    _, (axis,) = drawing.panels([2.0])
    ends = [(str(i), 1.0, y, "C0") for i, y in enumerate([5.0, 5.1, 5.2, 0.0, 10.0])]
    axis.plot([0, 1], [0, 10])
    drawing.name_ends(axis, ends)
    heights = {text.get_text(): text.xyann[1] for text in axis.texts}
    assert list(heights) == ["3", "0", "1", "2", "4"]
    placed = list(heights.values())
    least = 0.155 / 2.0 - 1e-6
    assert all(b - a >= least for a, b in pairwise(placed))
    low, high = axis.get_ylim()
    assert heights["1"] == pytest.approx((5.1 - low) / (high - low))


@pytest.mark.parametrize(
    ("value", "text"), [(0.125, "0.125"), (1000, "1000"), (1e4, "10k"), (1e6, "1M"), (1e9, "1G")]
)
def test_numbers_of_an_axis_are_short(value: float, text: str) -> None:
    assert drawing.short(value) == text


def test_the_bars_of_a_trace(tmp_path: Path) -> None:
    """A bucket's step ends its all-reduce; parts of the backward pass that touch are one bar."""
    events = [
        ("forward", 1000, 2000, 1),
        ("autograd::engine::evaluate_function: A", 3000, 500, 1),
        ("gloo:all_reduce", 3200, 1800, 2),
        ("autograd::engine::evaluate_function: B", 3600, 400, 1),
        ("autograd::engine::evaluate_function: C", 4500, 100, 1),
        (timeline.BUCKET, 4700, 200, 2),
        ("aten::add", 4800, 10, 1),
        ("optimizer.step()", 5000, 100, 1),
        ("aten::add", 5200, 10, 1),
    ]
    trace = [{"ph": "X", "name": n, "ts": t, "dur": d, "tid": i} for n, t, d, i in events]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "M"}, *reversed(trace)]}))
    assert timeline.bars(path) == [
        ("forward", 0.0, 2.0),
        ("backward", 2.0, 3.0),
        ("all-reduce", 2.2, 3.7),
        ("backward", 3.5, 3.6),
        (timeline.BUCKET, 3.7, 3.9),
        ("optimizer.step()", 4.0, 4.1),
    ]


def test_trust_ratios_keep_three_digits() -> None:
    row = {"step": "1", "epoch": "0.0909", "conv1.weight": "0.0015444012824445963"}
    assert trust.shortened([row]) == [row | {"conv1.weight": "0.00154"}]
