"""The report page: what stands in it, that it trusts nothing, and how it looks in a browser."""

import copy
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import InputError
from secateur.report.frontier_table import compare
from secateur.report.html import write_page
from secateur.report.html.charts import Scale, number
from secateur.report.html.content import samples, standalone
from secateur.report.html.steps import part_of, place
from secateur.report.model_card import card
from secateur.report.report import Report, lines
from secateur.report.run_records import UnitRow, read_run
from tests.support.made_runs import UNITS, first_version, made_run, report

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;{{ 7*7 }}"
TAGS = set(
    re.findall(
        r"\w+",
        "html head meta title style body svg defs pattern line main header p h1 h2 h3 dl dt dd div "
        "section table thead tbody tr th td figure figcaption small g rect circle path polygon "
        "polyline text b span details summary pre",
    )
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
CHROMIUM = CHROMIUM or shutil.which("google-chrome")


class Seen(HTMLParser):
    """All tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    def written(content=None, siblings=(), name="out", **options):
        folder = made_run(tmp_path / name, content, **options)
        return write_page(folder, siblings).read_text()

    return written


def test_a_page_has_all_of_a_report(page):
    seen = Seen(page(report()))
    for line in lines(Report(report())):
        for cell in line:
            assert cell in seen.text
    for word in (
        "some/model",
        "secateur compress some/model out --keep 0.8",
        "method: auto",
        "torch 2.9",
        "Once upon",
        "a time there was a",
        "Block influence",
        "Query and key width",
        "MLP channels",
        "layers.2.mlp: 64 → 32 (50%)",
        "0.18 nats",  # what all units cost alone
        "hold 90%",
        "corpus.txt",
        "knapsack",
    ):
        assert word in seen.text, word
    assert re.findall(r"Perplexity against", seen.text) == []


def test_tasks_stand_on_the_page_and_in_the_card(page, tmp_path):
    scores = {"items": 100, "chance": 0.25, "acc_norm": 0.5, "acc_norm_stderr": 0.05}
    content = report(
        dense={"task_scores": {"arc<b>": scores}},
        compressed={
            "task_scores": {"arc<b>": scores | {"acc_norm": 0.4}},
            "task_changes": {"arc<b>": {"difference": -0.1, "stderr": 0.02, "flipped": 0.2}},
        },
    )
    text = Seen(page(content)).text
    for word in ("arc<b>", "-10.0 ± 2.0 points", "20.0%"):
        assert word in text, word
    assert "-10.0 ± 2.0 points" in card(Report(read_run(tmp_path / "out").report.content))
    content["compressed"]["task_changes"] = {}
    with pytest.raises(InputError, match="damaged"):
        page(content, name="broken")


SCORES = {"items": 9, "chance": 0.5, "acc": 0.5, "acc_stderr": 0.1}
TIMED = {"prefill_tokens_per_second": 0.0, "decode_tokens_per_second": 9.0}


@pytest.mark.parametrize(
    "content",
    [
        *(
            report(
                dense={"task_scores": {"t": scores}},
                compressed={"task_scores": {"t": scores}, "task_changes": {"t": {}}},
            )
            for scores in ({}, [], "x", SCORES | {"acc": "x"}, SCORES | {"acc": 1e308}, SCORES)
        ),
        *(report(**{side: {"speed": TIMED}}) for side in ("dense", "compressed")),
        *(report(**{side: {"bytes": 0}}) for side in ("dense", "compressed")),
        *(report(dense={"perplexity": {"held.txt": value}}) for value in (0.0, 1e308, 1e-320)),
        report(dense={"damage": {"recall": "x"}}),
        report(dense={"parameters": 10**400}),
        report(dense={"perplexity": {}}, compressed={"perplexity": {}, "agreement": {"kl": 0.1}}),
        report(steps=[{"budget": {}}, {}]),
        report(observed=[{"curves": {"layers.0.mlp": {"kept": [0.5], "errors": [1e308]}}}]),
        report(observed=[{"influence": [1e308, -1e308]}]),
    ],
    ids=lambda content: str(content)[-60:],
)
def test_damaged_figures_are_refused(tmp_path, content):
    """The mistake: what divides by them, or draws them, breaks off somewhere else."""
    folder = made_run(tmp_path / "out", content)
    with pytest.raises(InputError, match=r"report\.json"):
        read_run(folder)


def test_a_wrecked_model_has_a_page_a_card_and_a_picture(page, tmp_path):
    """Perplexity is capped at exp(700), beyond what may be multiplied."""
    content = report(compressed={"perplexity": {"held.txt": math.exp(700)}})
    content["observed"][0]["curves"]["layers.0.mlp"]["errors"] = [1e300, 1e150, 0.0]
    other = made_run(tmp_path / "other", content)
    seen = Seen(page(content, siblings=[other]))
    assert "Perplexity against" in seen.text
    assert "1e+304" in seen.text
    assert "0" * 20 not in seen.text
    assert card(Report(read_run(other).report.content))
    root = ElementTree.fromstring(standalone(compare([other])))
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_a_page_says_where_what_both_write_parts():
    found = samples("a b c d", "a b x")
    assert found == {"dense": ("a b", "c d"), "compressed": ("a b", "x")}
    assert samples("a b", "a b")["dense"] == ("a b", "")
    assert samples("", "") == {}


def test_predicted_and_measured_errors_of_a_part_are_side_by_side(page):
    """Attention's prediction is the sum over its units, of which here is one a layer."""
    text = Seen(page(report())).text
    assert "layer 2, predicted: 2%" in text
    assert "layer 2, measured: 20%" in text
    assert "layer 2, measured: 40%" in text


def test_nothing_in_a_report_becomes_markup(page, tmp_path):
    """The mistake: text that is not escaped, in the page or in its pictures."""
    content = report(
        command=HOSTILE,
        model={"source": HOSTILE, "model_type": HOSTILE, "fingerprint": HOSTILE},
        method={"name": HOSTILE, "options": {HOSTILE: HOSTILE}},
        allocator={"name": HOSTILE, "options": {HOSTILE: HOSTILE}},
        tier=HOSTILE,
        libraries=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        calibration={"source": HOSTILE, "samples": HOSTILE, "length": 2, "seed": HOSTILE},
    )
    for side in ("dense", "compressed"):
        content[side] |= {"prompt": HOSTILE, "sample": f"{side} {HOSTILE}", "counts": HOSTILE}
        for key in ("perplexity", "tokens", "tasks"):
            content[side][key] = {HOSTILE: 1}
    content["budget"]["of"] = HOSTILE
    units = [row | {"unit": f"layers.{i // 2}.{HOSTILE}"} for i, row in enumerate(UNITS)]
    units = [row | {"kind": HOSTILE, "becomes": HOSTILE} for row in units]
    sibling = copy.deepcopy(content)
    folder = made_run(tmp_path / "<b>x", sibling)
    text = page(content, [folder], units=units)
    seen = Seen(text)
    assert set(seen.tags) <= TAGS, set(seen.tags) - TAGS
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in seen.text  # as text
    assert "{{ 7*7 }}" in seen.text
    assert "<b>x" in seen.text
    assert text.count("<b>") == 1  # the template's own
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)


def test_a_page_needs_nothing_else(page, tmp_path):
    text = page(report(), [made_run(tmp_path / "b", report())])
    assert not re.search(r"(src|href|srcset|action)=|@import|<script|<link|https?:", text)
    assert set(re.findall(r"url\([^)]*\)", text)) == {"url(#hatch)"}
    assert "default-src 'none'" in text


def test_every_picture_has_a_name(page):
    text = page(report())
    pictures = re.findall(r"<figure>.*?</figure>", text, re.S)
    assert len(pictures) >= 8
    for picture in pictures:
        assert 'role="img"' in picture
        assert re.search(r"<svg[^>]*><title>[^<]{5,}</title>", picture)


def test_siblings_bring_the_frontier(page, tmp_path):
    other = made_run(tmp_path / "smaller", report(compressed={"bytes": 3000, "speed": {}}))
    text = Seen(page(report(), [other])).text
    assert "Perplexity against bytes on disk" in text
    assert "smaller" in text
    assert "out (this run)" in text
    assert "B smaller: perplexity 12.00 at 3kB" in text


def test_siblings_of_another_model_are_refused(page, tmp_path):
    model = {"source": "x", "model_type": "llama", "fingerprint": "e"}
    with pytest.raises(InputError, match="different dense models"):
        page(report(), [made_run(tmp_path / "b", report(model=model))])


@pytest.mark.parametrize(
    "content",
    [
        first_version(),
        report(observed=[]),
        report(observed=[{}]),
        report(command=None, seconds={}, versions={}, calibration={}, allocator=None),
        report(dense={"sample": "", "prompt": ""}, compressed={"sample": "", "prompt": ""}),
        report(dense={"speed": {}, "peak_memory_bytes": 0}, compressed={"speed": {}}),
        report(dense={"perplexity": {}}, compressed={"perplexity": {}, "agreement": {}}),
        report(later_key={"a": 1}),
    ],
    ids=str,
)
def test_what_a_report_has_not_is_left_out(page, content):
    seen = Seen(page(content))
    assert "Dense and compressed model" in seen.text
    for word in ("None", "nan", "Undefined"):
        assert word not in seen.text


def test_a_run_without_a_plan_has_no_pictures_of_units(page, tmp_path):
    page(report(), name="out")
    (tmp_path / "out" / "secateur" / "plan.json").unlink()
    text = write_page(tmp_path / "out").read_text()
    assert "What was removed" not in text
    assert "Block influence" in text


def test_each_step_of_a_recipe_has_its_part(tmp_path):
    steps = [
        {"method": {"name": name, "options": {}}, "allocator": {"name": "uniform", "options": {}}}
        for name in ("auto", "gptq")
    ]
    steps = [step | {"budget": report()["budget"]} for step in steps]
    method = {"name": "auto + gptq", "options": {}}
    observed = report()["observed"] * 2
    folder = made_run(tmp_path / "out", report(steps=steps, method=method, observed=observed))
    plan = folder / "secateur" / "plan.json"
    (folder / "secateur" / "plan-1.json").write_text(plan.read_text())
    plan.rename(folder / "secateur" / "plan-2.json")
    text = Seen(write_page(folder).read_text()).text
    assert "What was removed – step 1, auto" in text
    assert "What was removed – step 2, gptq" in text


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("layers.3.mlp", ("3", "mlp")),
        ("layers.12.self_attn.q_proj", ("12", "self_attn.q_proj")),
        ("residual", ("", "residual")),
    ],
)
def test_units_are_placed_by_their_names(unit, expected):
    assert place(unit) == expected


@pytest.mark.parametrize(
    ("unit", "kind", "part"),
    [
        ("layers.3.mlp", "mlp", "mlp"),
        ("layers.3.query_key", "query_key", "attention"),
        ("layers.3.heads", "heads", "attention"),
        ("layers.3.self_attn.o_proj", "matrix", "attention"),
        ("layers.3.mlp.gate_proj", "matrix", "mlp"),
    ],
)
def test_units_are_of_attention_or_of_the_mlp(unit, kind, part):
    assert part_of(UnitRow(unit=unit, kind=kind, before=2, after=1)) == part


@given(
    st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20),
    st.booleans(),
)
def test_scales_hold_their_values_and_have_ticks_inside(values, log):
    scale = Scale.of(values, 10.0, 200.0, log)
    for value in values:
        assert 10.0 <= scale(value) <= 200.0
    assert 1 <= len(scale.ticks) <= 12
    for tick in scale.ticks:
        assert math.isfinite(tick)
        assert scale.low * (1 - 1e-6) - 1e-9 <= tick <= scale.high * (1 + 1e-6) + 1e-9


def test_a_larger_value_is_further_along():
    scale = Scale.of([1.0, 100.0], 0.0, 100.0, log=True, room=0.0)
    assert scale(10.0) == pytest.approx(50.0)
    assert Scale.of([0.0, 4.0], 0.0, 100.0, room=0.0)(1.0) == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("value", "told"),
    [(1234.0, "1.23k"), (2.5e6, "2.5M"), (0.0, "0"), (0.00004, "4e-5"), (3.14159, "3.14")],
)
def test_numbers_beside_axes_are_short(value, told):
    assert number(value) == told


def test_the_picture_of_a_frontier_is_a_file_of_its_own(tmp_path):
    folders = [
        made_run(tmp_path / f"r<{i}>", report(compressed={"bytes": 3000 - i})) for i in range(3)
    ]
    root = ElementTree.fromstring(standalone(compare(folders)))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "r<2>" in "".join(root.itertext())


# In a browser


FRAME = """<body style="margin:0">{frames}<pre id="said"></pre><script>
onload = () => {{
  const said = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const inside = frame.contentDocument, width = frame.clientWidth;
    const wide = [...inside.querySelectorAll("main *")].filter(
      e => !e.closest(".wide, svg") && e.getBoundingClientRect().right > width + 0.5);
    const labels = [...inside.querySelectorAll("figure svg")].map(
      svg => 10.5 * svg.getBoundingClientRect().width / 340);
    const style = element => inside.defaultView.getComputedStyle(element);
    said[width] = {{
      width: inside.documentElement.scrollWidth, out: wide.map(e => e.outerHTML.slice(0, 80)),
      label: Math.min(...labels), hatch: style(inside.querySelector(".was")).fill,
      paper: style(inside.body).backgroundColor}};
  }}
  document.getElementById("said").textContent = JSON.stringify(said);
}};
</script>"""
IFRAME = '<iframe style="width:{}px;height:700px;border:0" srcdoc="{}"></iframe>'
WIDTHS = (360, 1200)


def browsed(tmp_path, page, *flags):
    """What a browser says of a page at some widths; a message on its console fails."""
    frames = "".join(IFRAME.format(width, html.escape(page)) for width in WIDTHS)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(frames=frames))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *flags]
    command += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=3000"]
    command += ["--enable-logging=stderr", f"file://{frame}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, re.findall(r".*CONSOLE.*", done.stderr)
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    return [json.loads(html.unescape(said))[str(width)] for width in WIDTHS]


def deep(layers):
    """A run of many layers, with long names everywhere."""
    long = "a_very_long_name_of_a_text_without_any_space_in_it_" * 2 + ".txt"
    content = report(command="secateur compress " + "/a/long/path" * 12)
    for side in ("dense", "compressed"):
        for key in ("perplexity", "tokens"):
            content[side][key] = {long: 12}
        content[side]["sample"] = "x" * 300
    units = [
        row | {"unit": f"layers.{i}.{row['kind']}"} for i in range(layers) for row in UNITS[2:4]
    ]
    seen = {"influence": [0.1] * layers, "errors": [{"attention": 0.1, "mlp": None}] * layers}
    return {"content": content | {"observed": [seen]}, "units": units}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(
    ("flags", "bright"), [((), True), (("--blink-settings=preferredColorScheme=0",), False)]
)
def test_a_browser_shows_no_overflow_and_reports_nothing(page, tmp_path, flags, bright):
    """The mistakes: a table or a word wider than a phone, or paper that is white at night."""
    sibling = made_run(tmp_path / "other", deep(4)["content"])
    text = page(**deep(80), siblings=[sibling])
    for width, said in zip(WIDTHS, browsed(tmp_path, text, *flags), strict=True):
        assert said["width"] <= width
        assert said["out"] == []
        assert said["label"] >= 9  # pixels of the smallest label
        assert "hatch" in said["hatch"]
        light = sum(map(int, re.findall(r"\d+", said["paper"])[:3]))
        assert light > 600 if bright else light < 150


@pytest.mark.parametrize(
    ("share", "told"),
    [(0, "0%"), (1, "100%"), (0.999, "99.9%"), (0.00125, "0.12%"), (5e-6, "5e-4%"), (12, "1e3%")],
)
def test_shares_beside_an_axis_fit_there(share, told):
    """The mistake: a label of a tiny share whose beginning is cut off."""
    from secateur.report.html.charts import percent

    assert percent(share) == told
