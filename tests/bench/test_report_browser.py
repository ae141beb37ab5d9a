"""The HTML report in a real headless browser: what a reader sees, on a desk and on a phone, with and without script."""

from __future__ import annotations

from collections import Counter

import pytest
from browser import chromium
from report_rows import ENGINES, MODELS, scenario_rows, throughput_rows, write_rows

from dlrm_deploy.bench.report_html import write_report

DESKTOP, PHONE = (1280, 900), (390, 844)

ROWS = [row for model in MODELS for row in throughput_rows(model)]
DRAWN = [row for row in ROWS if "not_run" not in row]


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report([write_rows([*ROWS, *scenario_rows()], folder / "rows.jsonl")], folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def open_page(browser, report):
    """Opens the report in a window of its own; `page.complaints` holds what the console and the network saw."""
    contexts = []

    def _open(size=DESKTOP, source=report, **options):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: request.url != source.as_uri() and page.complaints.append(request.url))
        page.goto(source.as_uri())
        return page

    yield _open
    for context in contexts:
        context.close()


def shown_marks(page, chart):
    """Engine of every mark that is drawn in charts of one kind."""
    script = f"""[...document.querySelectorAll('.chart.{chart} .mark')]
        .filter((mark) => mark.getBoundingClientRect().width > 0).map((mark) => mark.dataset.says.split(' · ')[0])"""
    return Counter(page.evaluate(script))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_page_fits_its_window_asks_nobody_and_the_console_stays_silent(open_page, size, scheme):
    page = open_page(size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "with all tables unfolded"
    assert page.complaints == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("chart", ["throughput", "floor", "roofline"])
def test_every_row_has_a_mark_in_each_chart_of_its_model(open_page, chart, size):
    assert shown_marks(open_page(size), chart) == Counter(row["engine"] for row in DRAWN)


def test_every_load_of_the_server_curve_has_a_mark_hollow_where_it_is_not_valid(open_page):
    page = open_page()
    loads = [(row["engine"], point["valid"]) for row in scenario_rows() for point in row.get("load_curve", [])]
    assert shown_marks(page, "load") == Counter(engine for engine, _ in loads)
    assert page.locator(".chart.load .mark.hollow").count() == sum(not valid for _, valid in loads)


def test_a_bar_has_the_width_of_its_share(open_page):
    page = open_page()
    script = """[...document.querySelectorAll('.chart.breakdown')].slice(0, 4).flatMap((chart) => {
        const pieces = [...chart.querySelectorAll('.piece')];
        const first = pieces[0].dataset.says.split(' ').at(-1);
        const of = pieces[0].dataset.says.split(' · ').slice(0, 2).join();
        const bar = pieces.filter((piece) => piece.dataset.says.split(' · ').slice(0, 2).join() === of);
        const widths = bar.map((piece) => piece.querySelector('rect').getBoundingClientRect().width);
        return [[parseFloat(first) / 100, widths[0] / widths.reduce((a, b) => a + b)]];
    })"""
    measured = page.evaluate(script)
    assert len(measured) == 4
    for share, width in measured:
        assert width == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_no_mark_or_label_leaves_its_card_and_axis_labels_do_not_touch(open_page, size):
    page = open_page(size)
    outside = """[...document.querySelectorAll('figure .chart')].flatMap((chart) => {
        const card = chart.closest('figure').getBoundingClientRect();
        return [...chart.querySelectorAll('text, .mark')].filter((part) => {
            const box = part.getBoundingClientRect();
            return box.width && (box.left < card.left || box.right > card.right + 0.5
                || box.top < card.top || box.bottom > card.bottom);
        }).map((part) => `${chart.getAttribute('class')}: ${part.textContent || part.dataset.says}`);
    })"""
    assert page.evaluate(outside) == []
    touching = """[...document.querySelectorAll('.chart')].flatMap((chart) => {
        const boxes = [...chart.querySelectorAll('text.tick')].map((t) => [t.textContent, t.getBoundingClientRect()]);
        return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([, other]) => one.left < other.right
            && other.left < one.right && one.top + 2 < other.bottom - 2 && other.top + 2 < one.bottom - 2)
            .map(([b]) => `${chart.getAttribute('class')}: ${a} on ${b}`));
    })"""
    assert page.evaluate(touching) == []


@pytest.mark.parametrize("script", [True, False])
def test_a_switch_hides_its_engine_in_every_chart_also_without_script(open_page, script):
    page = open_page(java_script_enabled=script)
    engine = "torch-compile"
    key = list(dict.fromkeys(page.locator(".switches label").all_inner_texts())).index(engine)
    drawn = page.locator(f'.chart [data-e="e{key}"]')
    assert drawn.count() >= len(MODELS) * 3
    visible = page.locator(f'.chart [data-e="e{key}"]:visible')
    before = visible.count()
    assert before >= drawn.count() - len(MODELS)  # a level line has no height, which counts as not visible
    others = page.locator('.chart [data-e="e0"]:visible').count()
    page.get_by_text(engine, exact=True).first.click()
    assert visible.count() == 0
    assert page.locator('.chart [data-e="e0"]:visible').count() == others
    page.get_by_text(engine, exact=True).first.click()
    assert visible.count() == before


def test_switches_work_from_the_keyboard(open_page):
    page = open_page()
    page.get_by_label("torch", exact=True).focus()
    page.keyboard.press("Space")
    assert "torch" not in shown_marks(page, "throughput")


def test_one_button_leaves_ours_and_the_fastest_peers_and_another_brings_all_back(open_page):
    page = open_page()
    page.get_by_role("button", name="ours and the fastest peers").click()
    left = set(shown_marks(page, "throughput"))
    assert {engine for engine in ENGINES if engine.startswith("onnxruntime")} <= left
    assert "openvino-fp32" not in left  # the fastest nowhere
    assert "fbgemm-int8-bf16" in left
    page.get_by_role("button", name="all", exact=True).click()
    assert set(shown_marks(page, "throughput")) == set(ENGINES)


def test_pointing_at_a_mark_tells_its_values_and_leaving_puts_them_away(open_page):
    page = open_page()
    chart = page.locator("section").nth(1).locator(".chart.throughput")
    chart.scroll_into_view_if_needed()
    row = next(r for r in DRAWN if r["model"] == "paper-32" and r["engine"] == "torch" and r["batch"] == 1)
    mark = chart.locator('.mark[data-says^="torch · batch 1 "]')
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert f"batch 1 · {row['samples_per_s'] / 1000:.2f}k samples/s · {row['median_ms']:.3f} ms" in tip.inner_text()
    page.mouse.move(5, 5)
    assert not tip.is_visible()


def test_without_script_marks_still_say_their_values(open_page):
    page = open_page(java_script_enabled=False)
    first = page.locator(".chart.throughput .mark title").first
    assert "samples/s" in first.text_content()
    assert page.locator(".switches button").count() == 0


def test_paper_shows_every_table_and_the_screen_folds_them_again(open_page):
    page = open_page()
    assert page.locator("details[open]").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_paper_is_white_also_for_readers_of_dark_screens_and_narrow_enough(open_page):
    page = open_page((740, 1000), color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 740


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_stand_out_from_their_ground(open_page, scheme):
    """WCAG asks for a contrast of 3 for graphics, and of 4.5 for text."""
    page = open_page(color_scheme=scheme)
    ground = luminance(page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor"))
    for label in page.locator(".switches label").all():
        colour = label.evaluate("(l) => getComputedStyle(l.querySelector('.line')).color")
        assert contrast(luminance(colour), ground) >= 3, label.inner_text()
    for quiet in ("figcaption p", ".chart .tick", ".chart .value"):
        colour = page.locator(quiet).first.evaluate(
            "(e) => e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color"
        )
        assert contrast(luminance(colour), ground) >= 4.5, quiet
    for cell in page.locator(".strip li").all():
        colour, under = cell.evaluate("(e) => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]")
        assert contrast(luminance(colour), luminance(under)) >= 4.5, cell.get_attribute("class")


def luminance(rgb: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG defines it."""
    channels = [int(part) / 255 for part in rgb[rgb.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_markup_in_rows_is_shown_and_never_run(open_page, tmp_path):
    attack = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"
    rows = [
        {**row, "model": attack, "engine": row["engine"] + attack, "command": attack, "cpu": attack}
        for row in throughput_rows("kaggle")
    ]
    source = tmp_path / "attack.html"
    write_report([write_rows(rows, tmp_path / "rows.jsonl")], source, title=attack)
    page = open_page(source=source)
    assert page.title() == attack
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert attack in page.locator("h1").inner_text()
    assert page.complaints == []
