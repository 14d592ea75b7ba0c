"""What the report room makes of numbers: figures, tables, pages and where they come from."""

import csv
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from jaxreason import origin
from jaxreason.report import charts, explain, page, plots
from jaxreason.report.figures import Bars, Chart, Dots, Heat, Line
from jaxreason.report.tables import Table, csv_of

EVIL = '<script>alert("x")</script>\'&'
LINES = Chart("c", f"title {EVIL}", "", [Line.plain(0, f"a {EVIL}", [0, 1, 2], [1.0, None, 3.0])], axis="log-ratio")
DOTS = Chart("d", "dots", "", dots=[Dots(9, "tenth", [(0.0, 1.0), (1.0, -1.0)])], axis="log-ratio")
BARS = Bars("b", "bars", "", [0, 1, 9], ["one", f"two {EVIL}", "none"], [2.0, 0.5, None])
HEAT = Heat("h", "heat", "", ["one", f"two {EVIL}"], [[1.0, -0.5], [-0.5, None]])
SVG = "{http://www.w3.org/2000/svg}"


def parsed(figure) -> ElementTree.Element:
    return ElementTree.fromstring(charts.standalone(figure))


@pytest.mark.parametrize("figure", [LINES, DOTS, BARS, HEAT], ids=lambda f: f.name)
def test_an_svg_file_is_whole_and_needs_no_variables(figure):
    """It parses as XML, whatever the labels hold, and its colours are colours: few readers of SVG know var()."""
    root = parsed(figure)
    assert not list(root.iter(f"{SVG}script"))
    style = next(root.iter(f"{SVG}style")).text
    assert "var(" not in style and ".c1 circle, .c1 .bar {" in style and "#d9570f" in style
    assert "svg text { fill: #626a75;" in style


def test_bars_are_as_long_as_their_values():
    widths = [float(r.get("width")) for r in parsed(BARS).iter(f"{SVG}rect") if r.get("class") == "bar"]
    assert widths == [charts.WIDTH - 70, (charts.WIDTH - 70) / 4, 0.0]
    texts = [t.text for t in parsed(BARS).iter(f"{SVG}text") if t.get("class") == "value"]
    assert texts == ["2.00", "0.500", "–"]


def test_a_heat_map_shows_sign_and_size():
    cells = [(r.get("class"), float(r.get("fill-opacity"))) for r in parsed(HEAT).iter(f"{SVG}rect") if r.get("fill-opacity")]
    assert cells == [("along", 0.6), ("against", 0.3), ("against", 0.3), ("along", 0.0)]
    assert [t.text for t in parsed(HEAT).iter(f"{SVG}text") if t.get("class") == "cell"] == ["1.00", "-0.50", "-0.50", "–"]


def test_dots_lie_where_their_numbers_are_and_tenth_series_repeats_a_colour():
    (group,) = (g for g in parsed(DOTS).iter(f"{SVG}g") if (g.get("class") or "").startswith("dots"))
    assert group.get("class") == "dots c1 dashed s9"
    (a, b) = ((float(c.get("cx")), float(c.get("cy"))) for c in group)
    # x from 58 to 412; y: 8 % of air above 1 and below -1 of 188, that is 6 % of 2 on either side
    assert (a[0], b[0]) == (58.0, 412.0)
    assert a[1] == pytest.approx(8 + 188 * 0.12 / 2.24, abs=0.1) and b[1] == pytest.approx(8 + 188 * 2.12 / 2.24, abs=0.1)


def test_lines_that_may_coincide_are_drawn_one_inside_the_other():
    lines = [Line.plain(i, str(i), [0.0, 1.0], [0.0, 1.0]) for i in range(3)]
    groups = [parsed(Chart("n", "n", "", lines, nested=nested)).iter(f"{SVG}g") for nested in (True, False)]
    classes = [[g.get("class") for g in group if "loss" in g.get("class", "")] for group in groups]
    assert classes == [["loss c0 s0 t2", "loss c1 s1 t1", "loss c2 s2"], ["loss c0 s0", "loss c1 s1", "loss c2 s2"]]


def test_csv_holds_numbers_unrounded():
    table = Table("t", "title", ["", "a"], [["x,1", "0.33"]], records=[{"loss": 'x,"1', "v": 1 / 3}, {"loss": "y", "w": None}])
    assert list(csv.reader(io.StringIO(csv_of(table)))) == [["loss", "v", "w"], ['x,"1', repr(1 / 3), ""], ["y", "", ""]]
    cells = Table("t", "title", ["", "a"], [["x,1", "0.33"]])
    assert list(csv.reader(io.StringIO(csv_of(cells)))) == [["", "a"], ["x,1", "0.33"]]


def test_a_page_escapes_what_it_is_given():
    text = page.render('{% extends "page.html" %}{% block main %}{{ words }}{% endblock %}', words=EVIL)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert text.count("<script>") == 1 and 'default-src &#39;none&#39;' in text


def test_every_format_of_matplotlib_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    for figure in (LINES, DOTS, BARS, HEAT):
        plots.write(figure, tmp_path / figure.name)
        png, pdf = ((tmp_path / figure.name).with_suffix(f".{kind}").read_bytes() for kind in plots.FORMATS)
        assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")


def test_the_palette_is_the_page_s():
    """Figures of either kind have one colour for one series."""
    css = (charts.resources.files("jaxreason.report") / "page.css").read_text().partition("@media")[0]
    assert re.findall(r"\.c\d { --c: (#\w+)", css) == list(plots._PALETTE)


def test_titles_and_explanations():
    assert explain.title("reward") == "Reward" and explain.title("mine") == "mine"
    assert "no meaning" in explain.explain("mine") and "before its weight" in explain.explain("reward_accuracy")
    assert all(text.endswith(".") and text[0].isupper() for _, text in explain.METRICS.values())


def test_origin_names_command_commit_and_versions():
    found = origin.origin(origin.command("compare", ["--out", "a b", "x=1"]))
    assert found["command"] == "python scripts/compare.py --out 'a b' x=1"
    assert re.fullmatch(r"[0-9a-f]{40}( with changes)?|not a git checkout", found["commit"])
    assert set(found["versions"]) == {"python", "jaxreason", "jax", "jaxlib", "flax"}
    assert found["versions"]["python"] == sys.version.split()[0] and "cpu" in found["hardware"]


def test_a_copy_in_another_checkout_is_no_commit_of_ours(tmp_path, monkeypatch):
    """Site-packages below somebody's repository: its HEAD says nothing about this package."""
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "origin.py"))
    (tmp_path / "origin.py").write_text("")
    assert origin.commit() == "not a git checkout"
    subprocess.run(["git", "-C", str(tmp_path), "add", "origin.py"], check=True)
    assert origin.commit().endswith(" with changes")
