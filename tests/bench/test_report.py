"""What the HTML report says and draws, without a browser: numbers, comparisons, missing fields, hostile text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from report_rows import CALIBRATION, ENGINES, MODELS, scenario_rows, throughput_rows, write_rows

from dlrm_deploy.bench.report.axes import Scale, log_scale, short
from dlrm_deploy.bench.report.breakdown_chart import shares_of
from dlrm_deploy.bench.report.compare import best_of_ours, panels_of, speed_ups
from dlrm_deploy.bench.report.looks import is_ours, is_peer, looks_of
from dlrm_deploy.bench.report.markup import join, table, tag
from dlrm_deploy.bench.report.roofline_chart import ceilings_of
from dlrm_deploy.bench.report.rows import Row, read_rows
from dlrm_deploy.bench.report.summary import sentence, verdicts_of, warnings
from dlrm_deploy.bench.report_html import write_pictures, write_report
from dlrm_deploy.errors import DataError, OutputError


class Parsed(HTMLParser):
    """Tags of a page, what stands in charts, and the text between tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.charts: Counter[str] = Counter()
        self.marks: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.text = ""
        self._chart = ""
        self._silent = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags[tag] += 1
        self.attributes |= set(named)
        classes = (named.get("class") or "").split()
        if "chart" in classes:
            self._chart = classes[1]
            self.charts[self._chart] += 1
        if "mark" in classes and "data-e" in named and self._chart:
            self.marks[self._chart] += 1
        self._silent = tag in ("style", "script")

    def handle_endtag(self, tag):
        if tag == "svg":
            self._chart = ""
        self._silent = False

    def handle_data(self, data):
        self.text += "" if self._silent else data + "\n"


def made(rows, tmp_path, **options):
    write_report([write_rows(rows, tmp_path / "rows.jsonl")], tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text()


def row(engine, median_ms, batch=8, **facts):
    return {
        "model": "m",
        "engine": engine,
        "batch": batch,
        "median_ms": median_ms,
        "cpu": "Quick 9000",
        "threads": 2,
    } | facts


def test_every_measurement_is_a_mark_in_every_chart_of_its_model(tmp_path):
    rows = [r for model in MODELS for r in throughput_rows(model)]
    page = Parsed(made(rows + scenario_rows(), tmp_path))
    measured = sum("not_run" not in r for r in rows)
    ours = sum(is_ours(r["engine"]) for r in rows if "not_run" not in r)
    loads = sum(len(r.get("load_curve", [])) for r in scenario_rows())
    expected = {"throughput": measured, "floor": measured, "roofline": measured, "speedup": ours, "load": loads}
    assert {name: page.marks[name] for name in expected} == expected
    assert page.charts["throughput"] == len(MODELS)
    with_breakdown = {(r["model"], r["engine"]) for r in rows if r.get("breakdown")}
    assert page.charts["breakdown"] == len(with_breakdown)


def test_the_head_answers_what_where_and_how_much_faster(tmp_path):
    rows = [row("torch", 6.0), row("openvino-bf16", 4.0), row("onnxruntime", 2.0), row("onnxruntime[int8,bf16]", 1.0)]
    rows += [
        row("torch", 30.0, batch=64),
        row("onnxruntime", 16.0, batch=64),
        row("onnxruntime[int8,bf16]", 12.0, batch=64),
    ]
    text = Parsed(made(rows, tmp_path)).text
    claim = "dlrm-deploy scores m 2.5 to 4.0 times as fast as the fastest of 2 peers at the same batch size."
    assert f"On Quick 9000, with 2 threads for every engine, {claim}" in text
    assert "onnxruntime[int8,bf16] against the fastest of 2 peers" in text


def test_slower_than_the_peers_is_said_too():
    rows = [Row(row("torch", 1.0)), Row(row("onnxruntime", 2.0))]
    panels = panels_of(rows)
    assert "scores m 0.5 times as fast as the fastest of 1 peer " in sentence(rows, panels, verdicts_of(panels))


def test_without_a_peer_nothing_is_compared(tmp_path):
    page = Parsed(made([row("onnxruntime", 2.0, samples_per_s=4000.0)], tmp_path))
    assert "nothing is compared" in page.text
    assert page.charts == {"throughput": 1}


def test_only_rows_of_one_run_are_compared():
    rows = [
        row("torch", 1.0, time="yesterday"),
        row("torch", 8.0, time="today"),
        row("onnxruntime", 2.0, time="today"),
    ]
    (found,) = speed_ups(panels_of(map(Row, rows))[0])
    assert (found.factor, found.peer, found.peers) == (4.0, "torch", 1)


def test_ratios_to_one_baseline_count_more_than_medians():
    rows = [
        row("torch", 8.0, ratio=1.0, baseline="torch"),
        row("onnxruntime", 2.0, ratio=3.0, baseline="torch"),
    ]
    assert speed_ups(panels_of(map(Row, rows))[0])[0].factor == 3.0
    rows[1]["baseline"] = "onnxruntime"
    assert speed_ups(panels_of(map(Row, rows))[0])[0].factor == 4.0


def test_the_peer_is_the_fastest_of_each_batch_and_never_one_of_ours_or_a_gpu_engine():
    rows = [
        row("torch", 9.0), row("openvino-bf16", 6.0), row("tensorrt", 0.1), row("onnxruntime", 3.0),
        row("onnxruntime[int8,bf16]", 2.0), row("torch", 50.0, 64), row("openvino-bf16", 80.0, 64),
        row("onnxruntime", 25.0, 64),
    ]  # fmt: skip
    found = speed_ups(panels_of(map(Row, rows))[0])
    assert [(s.engine, s.batch, s.factor, s.peer) for s in found] == [
        ("onnxruntime", 8, 2.0, "openvino-bf16"),
        ("onnxruntime[int8,bf16]", 8, 3.0, "openvino-bf16"),
        ("onnxruntime", 64, 2.0, "torch"),
    ]
    assert best_of_ours(found) == "onnxruntime"  # the other was measured at one batch size only


def test_models_threads_and_distributions_have_sections_of_their_own():
    rows = [row("torch", 1.0), row("torch", 1.0, threads=1), row("torch", 1.0, distribution="zipf")]
    rows.append({"engine": "tensorrt", "batch": None, "not_run": "no GPU", "command": "c"})
    rows.append(row("torch", 1.0, model="other", command="c"))
    panels = panels_of(map(Row, rows))
    assert [panel.title for panel in panels] == [
        "m, 2 threads",
        "m, 1 thread",
        "m, 2 threads, zipf ids",
        "other, 2 threads",
    ]
    assert [len(panel.not_run) for panel in panels] == [0, 0, 0, 1]  # it goes to the section of its run


FEW = [
    r
    for r in (*throughput_rows("kaggle"), *scenario_rows())
    if r["engine"] in ("tensorrt", "onnxruntime-stock", "onnxruntime[int8,bf16]") and r.get("batch", 1) in (1, 32, None)
]
NEEDED = {
    "samples_per_s": {"throughput", "roofline"},
    "times_floor": {"floor"},
    "flops_per_sample": {"roofline"},
    "bytes_per_sample": {"roofline"},
    "calibration": {"roofline"},
    "load_curve": {"load"},
    "batch": {"throughput", "floor", "roofline"},
    "kind": {"throughput", "floor", "roofline", "load"},
    "not_run": {"throughput", "floor", "roofline"},
}  # fmt: skip
"""Charts that cannot be drawn without a field, or with another value of it."""


@pytest.mark.parametrize(
    "odd", ["missing", "text", -1, math.nan, 1e300, 1e-300, 10**400, [{"target_qps": "x"}], {"a": None}]
)
@pytest.mark.parametrize("name", sorted({name for r in FEW for name in r}))
def test_a_field_that_is_missing_or_odd_hides_what_needs_it_and_breaks_nothing(tmp_path, name, odd):
    rows = [{**r, name: odd} if odd != "missing" else {k: v for k, v in r.items() if k != name} for r in FEW]
    page = Parsed(made(rows, tmp_path))
    for chart in {"throughput", "floor", "roofline", "load"} - NEEDED.get(name, set()):
        assert chart in page.charts
    if name not in ("kind", "not_run"):
        assert not NEEDED.get(name, set()) & set(page.charts)
    assert "nan" not in re.findall(r"\w+", page.text.lower())


def test_rows_without_any_known_field_still_make_a_page(tmp_path):
    assert "an unnamed machine" in Parsed(made([{}, {"kind": "scenario"}, {"kind": "of the future"}], tmp_path)).text


def test_text_of_rows_never_becomes_markup(tmp_path):
    attack = "</style></title><script>alert(1)</script><img src=x onerror='a'>\" onload=\"b"
    rows = [
        {name: attack if isinstance(value, str) and name != "kind" else value for name, value in r.items()}
        for r in (*throughput_rows("kaggle"), *scenario_rows())
    ]
    for r in rows:
        if r.get("breakdown"):
            r["breakdown"] = {attack: 1.0}
    page = Parsed(made(rows, tmp_path, title=attack))
    assert (page.tags["script"], page.tags["style"], page.tags["title"] > 0, page.tags["img"]) == (1, 1, True, 0)
    assert not {name for name in page.attributes if name.startswith("on")}
    assert attack in page.text


def test_the_page_names_no_other_file_and_allows_its_own_script_alone(tmp_path):
    page = made(throughput_rows("kaggle"), tmp_path)
    assert not {"src", "href", "srcset", "xlink:href"} & Parsed(page).attributes
    assert "@import" not in page
    assert "url(" not in page
    script = re.search(r"<script>(.*)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;; script-src &#x27;sha256-{digest}" in page
    )


def test_charts_have_text_alternatives_and_tables_behind_them(tmp_path):
    page = made(throughput_rows("paper-32") + scenario_rows(), tmp_path)
    alternatives = re.findall(r'<svg viewBox="[^"]*" role="img" aria-label="([^"]*)"', page)
    assert len(alternatives) == sum(Parsed(page).charts.values())
    assert all(len(words) > 40 for words in alternatives)
    best = next(
        r for r in throughput_rows("paper-32") if r["engine"] == "onnxruntime[int8,bf16]" and r["batch"] == 8192
    )
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", page)
    assert short(best["samples_per_s"]) in cells
    assert short(best["times_floor"]) in cells
    assert "EmbeddingBagDotInteraction" in cells


def test_each_section_shows_the_command_that_repeats_it_and_what_did_not_run(tmp_path):
    rows = [*throughput_rows("kaggle"), *scenario_rows()]
    text = Parsed(made(rows, tmp_path)).text
    for command in {r["command"] for r in rows}:
        assert command in text
    assert "tensorrt\n: no NVIDIA GPU" in text


def test_a_busy_or_uncalibrated_machine_and_mixed_sources_are_pointed_out():
    quiet = row("torch", 1.0, other_load=0.05, commit="a")
    assert warnings([Row(quiet)]) == []
    rows = [
        quiet,
        row("torch", 1.0, other_load=0.4, commit="b", cpu="Slow 1"),
        row("torch", 1.0, omp_wait_policy="ACTIVE"),
    ]
    rows.append(row("torch", 1.0, calibration_missing="no library"))
    told = "\n".join(warnings(list(map(Row, rows))))
    assert "up to 40% of the machine during 1 of 2 measurements" in told
    for part in (
        "several states of the source: a and b",
        "several machines",
        "OMP_WAIT_POLICY",
        "not calibrated: no library",
    ):
        assert part in told


def test_a_server_s_figures_stand_in_a_column_of_their_engine(tmp_path):
    text = Parsed(made(scenario_rows(), tmp_path)).text
    assert re.search(r"Server, valid queries/s\n846\n216\n", text)
    assert re.search(r"Offline, pairs/s\n360k\n92k\n", text)
    assert "bound 60 ms" in text


def test_rows_are_read_from_lines_or_from_one_array(tmp_path):
    lines = write_rows([row("torch", 1.0), row("torch", 2.0)], tmp_path / "lines.jsonl")
    array = tmp_path / "array.json"
    array.write_text(json.dumps([row("torch", 3.0)]))
    assert [r.number("median_ms") for r in read_rows([lines, array])] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}\n{oops\n", r"rows.jsonl is not JSON in line 2"),
        ("{}\n7\n", r"rows.jsonl holds int in line 2, expected JSON objects"),
        ("\n", r"no rows in .*rows.jsonl. Measure first"),
        ("[" * 100_000, r"is not JSON"),
        ("\udcff", r"cannot read .*rows.jsonl"),
    ],
)
def test_a_file_that_holds_no_rows_is_named(tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=said):
        write_report([path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_missing_file_and_an_unwritable_place_are_errors_of_ours(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        write_report([tmp_path / "none.jsonl"], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html"):
        write_report([write_rows([row("torch", 1.0)], tmp_path / "r.jsonl")], tmp_path / "file" / "report.html")


def test_a_report_replaces_the_one_before_and_leaves_nothing_beside_it(tmp_path):
    for engine in ("torch", "onnxruntime-stock"):
        page = made([row(engine, 1.0, samples_per_s=1.0)], tmp_path)
    assert "onnxruntime-stock" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "rows.jsonl"]


def test_engines_differ_in_colour_marker_or_line_and_keep_their_looks():
    looks = looks_of(ENGINES, first="onnxruntime[int8,bf16]")
    appearances = {(look.family, look.marker, look.dash) for look in looks.values()}
    assert len(appearances) == len(looks) == len(ENGINES)
    first = next(iter(looks.values()))
    assert (first.engine, first.dash, first.hollow, first.ours) == ("onnxruntime[int8,bf16]", "", False, True)
    assert looks["torch-compile-bf16"].family == looks["torch-compile"].family != looks["torch-bf16"].family
    assert [is_peer(e) for e in ("onnxruntime-stock", "onnxruntime", "tensorrt-rtx", "fbgemm-int8")] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 5.6, False, [0, 2, 4]),
        (0.0, 950.0, False, [0, 200, 400, 600, 800]),
        (0.8, 1500.0, True, [1, 10, 100, 1000]),
        (4.0, 130.0, True, [5, 10, 20, 50, 100]),
        (1.0, 3.5, True, [1, 2, 3]),
    ],
)
def test_ticks_are_round_values_within_the_scale(low, high, log, expected):
    assert Scale(low, high, 0, 1, log=log).ticks == pytest.approx(expected)


@pytest.mark.parametrize("exponent", range(-9, 13, 3))
def test_a_scale_has_ticks_at_every_magnitude_also_around_a_single_value(exponent):
    scale = log_scale([3.0 * 10.0**exponent], 300.0, 20.0)
    assert len(scale.ticks) >= 2
    assert scale(3.0 * 10.0**exponent) == pytest.approx(160)


def test_a_logarithmic_scale_gives_equal_steps_to_equal_factors():
    scale = log_scale([1, 10_000], 0.0, 100.0, room=1.0)
    assert [scale(v) for v in (1, 10, 100, 1000, 10_000)] == pytest.approx([0, 25, 50, 75, 100])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.12345, "0.123"), (1.0, "1"), (9.996, "10"), (99.96, "100"), (999.9, "1k"), (977_123, "977k"),
     (1.084e6, "1.08M"), (2e9, "2G"), (2e-5, "2e-05"), (-3.456, "-3.46")],
)  # fmt: skip
def test_numbers_are_three_digits_and_a_suffix(value, text):
    assert short(value) == text


def test_ceilings_are_medians_of_both_forms_of_calibration():
    slow = {**CALIBRATION, "fma_gflops": 100.0, "amx_bf16_gflops": None, "gather": {"64": 1.0}}
    old = {"fma_gflops": 150.0, "stream_gb_per_s": 18.0, "row_bytes": 64, "gather_gb_per_s": 2.0}
    limits = ceilings_of([Row({"calibration": c}) for c in (CALIBRATION, slow, old, None)])
    assert limits.matrix == {"fp32 FMA": 150.0, "AMX bf16": 1750.0, "AMX int8": 2900.0}
    assert limits.stream == 18.0
    assert limits.gather == {20: 2.1, 64: 2.0, 68: 5.6, 256: 8.2}


def test_a_mark_stands_where_its_operations_and_rate_meet_on_the_roofline(tmp_path):
    facts = {"samples_per_s": 1e6, "flops_per_sample": 1e6, "bytes_per_sample": 1e4, "calibration": CALIBRATION}
    text = Parsed(made([row("torch", 1.0, **facts)], tmp_path)).text
    assert "1k GFLOP/s at 100 operations a byte · 122% of the highest roof there" in text  # 8.2 GB/s x 100 = 820


def test_shares_of_operators_add_up_to_one_without_those_that_are_no_share():
    shares = shares_of(Row({"breakdown": {"Mlp": 3.0, "Gather": 1, "Odd": "x", "Less": -1, "None": 0.0}}))
    assert shares == {"Mlp": 0.75, "Gather": 0.25}


def test_text_is_escaped_and_markup_is_not():
    assert tag("p", "a < b", tag("b", "&"), class_="x", data_e='"', hidden=True, width=None) == (
        '<p class="x" data-e="&quot;" hidden>a &lt; b<b>&amp;</b></p>'
    )
    assert join(["<", None, tag("br")]) == "&lt;<br>"
    assert 'class="word"' in table(["e", "f"], [["a", "words"], ["b", ""]], "c")
    assert 'class="word"' not in table(["e", "f"], [["1", "2"]], "c").replace("e", "")


def test_pictures_are_svg_files_with_every_mark_and_a_legend(tmp_path):
    rows = write_rows([*throughput_rows("kaggle"), *throughput_rows("paper-32")], tmp_path / "rows.jsonl")
    pictures = write_pictures([rows], tmp_path / "images")
    assert [path.name for path in pictures] == ["performance-kaggle.svg", "performance-paper-32.svg"]
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(pictures[0]).getroot()  # no entities, no tags of HTML: it has to be XML
    assert root.tag == f"{svg}svg"
    marks = [
        g for g in root.iter(f"{svg}g") if "mark" in g.get("class", "").split() and g.find(f"{svg}title") is not None
    ]
    ours = sum(is_ours(engine) for engine in ENGINES)
    assert len(marks) == (len(ENGINES) + ours) * len(MODELS["kaggle"][4])
    assert set(ENGINES) <= {text.text for text in root.iter(f"{svg}text")}


def test_models_of_one_name_get_pictures_of_their_own_and_names_are_safe(tmp_path):
    rows = [row("torch", 1.0, samples_per_s=1.0, model="../a b", distribution=ids) for ids in ("uniform", "zipf")]
    pictures = write_pictures([write_rows(rows, tmp_path / "rows.jsonl")], tmp_path)
    assert [path.name for path in pictures] == ["performance-a-b.svg", "performance-a-b-2-threads-zipf-ids.svg"]
