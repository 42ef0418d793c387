"""The report: says what was measured, keeps its structure whatever names are in it, and reaches for nothing outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blto.analysis import record_figures, residual_grid, svg_text
from blto.analysis.style import CLEAN, GRID, INK, MUTED
from blto.errors import ConfigError, InputRefused
from blto.files.text import show
from blto.records import RunRecord
from blto.report import build_report, render_report
from blto.report.svg import inline_svg

MakeRecord = Callable[..., RunRecord]

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NAUGHTY = [
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "' style='x",
    "</style><img src=x onerror=y>",
    "{{ 7*7 }}{% raw %}",
    "<!--",
    "]]>",
    "javascript:x",
    "\x00\x1b]8;;http://x\x07",
    "\u202egpj.exe",
    "&lt;&#60;",
    "</pre></code>",
    "a: b\n- c",
    "\ud800",
    "",
]
nasty = st.one_of(st.text(), st.binary().map(os.fsdecode), st.sampled_from(NAUGHTY))


class Structure(HTMLParser):
    """Tags in order with the names of their attributes; the text; every attribute's value."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.words: list[str] = []
        self.values: list[tuple[str, str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.values += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def figures() -> dict[str, str]:
    rows = [
        {"epoch": e, "trigger": 0.5, "clean": 0.0, "target": 0.9, "alignment": 1.0, "uniformity": -2.0} for e in (0, 9)
    ]
    record = RunRecord(run_id="r", spec={}, took=False, metrics={}, trajectory=rows)
    pictures = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    drawn = {name: svg_text(figure) for name, (figure, _) in record_figures(record).items()}
    return {**drawn, "residual_grid": svg_text(residual_grid(pictures, pictures // 2))}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=nasty)
def test_no_text_changes_the_structure(make_record: MakeRecord, text: str) -> None:
    plain = Structure(render_report([make_record()], {}))
    page = render_report([make_record(text=text)], {})
    found = Structure(page)
    assert found.tags == plain.tags
    assert [value for value in found.values if value not in plain.values] == []
    assert show(text, 60) in "".join(found.words)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b-\u200f]", page)
    page.encode()


def test_the_page_has_no_script_no_link_outside_and_the_policy(
    make_record: MakeRecord, figures: dict[str, str]
) -> None:
    page = Structure(render_report([make_record()], {"r": figures}))
    assert ("meta", "content", CSP) in page.values
    assert not {tag for tag, *_ in page.tags} & {"script", "link", "iframe", "object", "embed", "foreignobject", "base"}
    assert not [name for _, name, _ in page.values if name.startswith("on")]
    links = [value for _, name, value in page.values if name in {"href", "src", "xlink:href", "action", "srcset"}]
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not [word for word in page.words if "http" in word or "@import" in word or "url(" in word]


def test_ids_are_unique_and_every_reference_finds_its_id(make_record: MakeRecord, figures: dict[str, str]) -> None:
    records = [make_record("a"), make_record("b")]
    page = Structure(render_report(records, {"a": figures, "b": figures}))
    ids = [value for _, name, value in page.values if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    references = [value for _, name, value in page.values if name == "href" and value.startswith("#")]
    references += [value[4:-1] for _, name, value in page.values if name == "clip-path"]
    assert len(references) > 10
    assert {reference.removeprefix("#") for reference in references} <= set(ids)


def test_tags_are_closed_in_order(make_record: MakeRecord, figures: dict[str, str]) -> None:
    records = [make_record(f"r{index}") for index in range(4)]
    stack: list[str] = []
    for tag, *_ in Structure(render_report(records, {"r0": figures})).tags:
        if tag.startswith("/"):
            assert stack.pop() == tag[1:]
        elif tag != "meta":
            stack.append(tag)
    assert stack == []


def test_the_same_records_give_the_same_bytes(make_record: MakeRecord, figures: dict[str, str], tmp_path: Path) -> None:
    first = build_report([make_record()], {"r": figures}, tmp_path / "deep" / "a.html")
    second = build_report([make_record()], {"r": figures}, tmp_path / "b.html")
    assert first == tmp_path / "deep" / "a.html"
    assert first.read_bytes() == second.read_bytes()


def text_of(page: str) -> str:
    return " ".join("".join(Structure(page).words).replace("\u00a0", " ").split())


def test_it_says_whether_the_attack_took_with_the_numbers(make_record: MakeRecord) -> None:
    took = text_of(render_report([make_record()], {}))
    assert (
        "The attack took. The trigger sends 91.0% [90.0, 92.0] of the images of other classes to the target class, "
        "against 6.0% [5.0, 7.0] on the clean twin and 2.1% [1.1, 3.1] without the trigger: a lift of +85.0 points "
        "[84.0, 86.0]." in took
    )
    held = text_of(render_report([make_record(lift=0.499)], {}))
    assert "The attack did not take." in held
    assert "At least 50 points count as taken." in held
    unknown = text_of(render_report([make_record(lift=None)], {}))
    assert "Not measured." in unknown
    clean = make_record(lift=0.0, spec={"attack": {"name": "clean"}})
    assert "Nothing was poisoned." in text_of(render_report([clean], {}))
    several = text_of(render_report([make_record("a"), make_record("b", lift=0.1), clean], {}))
    assert "1 of 2 attacks took." in several
    assert "control" not in several[: several.index("Results")]


def test_the_headline_counts_controls_apart(make_record: MakeRecord) -> None:
    def named(name: str, lift: float = 0.0) -> RunRecord:
        return make_record(name.replace("_", "-"), lift=lift, spec={"attack": {"name": name}})

    def headline(*records: RunRecord) -> str:
        page = render_report(records, {})
        return page[page.index("<h1>") + 4 : page.index("</h1>")]

    attack, clean, untrained = named("blto"), named("clean"), named("untrained_generator")
    assert headline(clean, untrained, attack) == "The attack did not take. 0 of 1 control took."
    assert headline(named("blto", 0.6), untrained, named("frozen_surrogate", 0.7)) == (
        "The attack took. 1 of 2 controls took."
    )
    assert headline(attack, named("sig", 0.6), named("universal_delta")) == "1 of 2 attacks took. 0 of 1 control took."
    assert headline(clean, untrained) == "0 of 1 control took."
    assert headline(untrained) == "The control did not take."
    assert headline(clean, attack) == "The attack did not take."
    assert headline(clean) == "Clean run."
    assert headline(clean, named("clean")) == "Clean runs only."


def test_several_seeds_have_a_row_that_leads_to_no_single_run(make_record: MakeRecord) -> None:
    runs = [make_record(f"r{seed}", spec={**make_record().spec, "seed": seed}) for seed in range(3)]
    page = Structure(render_report(runs, {}))
    links = [value for _, name, value in page.values if name == "href" and value.startswith("#run-")]
    assert links == [f"#run-{number}" for _ in ("linear", "knn") for number in (1, 2, 3)]
    text = text_of(render_report(runs, {}))
    assert text.count("simclr, mean of 3 seeds") == 2
    assert "blto 3 of 3 85.0%[85.0, 85.0]" in text


def test_the_command_that_runs_it_again_names_what_it_needs(make_record: MakeRecord) -> None:
    assert "blto run r/spec.yaml --data-root DIR " in text_of(render_report([make_record()], {}))
    embedded = make_record(spec={**make_record().spec, "data": {"name": "synthetic"}})
    assert "--data-root" not in text_of(render_report([embedded], {}))


def test_it_shows_stealth_spec_command_and_provenance(make_record: MakeRecord) -> None:
    text = text_of(render_report([make_record()], {}))
    for expected in (
        "L-inf 8.0 / 255",
        "PSNR 33.4 dB",
        "SSIM 0.950",
        "Images changed 100.0%",
        "lpips 0.01235",
        "blto run r/spec.yaml",
        "poison_rate: 0.01",
        "data.note cat",
        "normalised 0.800",
        f"cat sha256 {'ab' * 32}",
    ):
        assert expected in text
    bare = make_record(provenance={}, stealth={}, similarity={}, artefacts={}, metrics={}, took=False)
    assert "blto run r/spec.yaml" in text_of(render_report([bare], {}))


def test_figures_have_their_captions_and_stand_in_order(make_record: MakeRecord, figures: dict[str, str]) -> None:
    page = render_report([make_record()], {"r": {"zz<b>": figures["residual_grid"], **figures}})
    titles = ["Similarity over training", "Original, triggered, residual", "Alignment and uniformity", "zz&lt;b&gt;"]
    places = [page.index(f"<h3>{title}</h3>") for title in titles]
    assert places == sorted(places)
    assert page.count("<figure>") == 4
    assert page.count("<figcaption>") == 4


def test_every_metric_in_the_table_is_defined(make_record: MakeRecord) -> None:
    text = text_of(render_report([make_record()], {}))
    assert "Images that belong to the target class are left out" in text
    for term in ("Lift", "Untriggered rate", "Clean accuracy", "Poison rate", "Epsilon", "PSNR", "SSIM", "Alignment"):
        assert f"{term} " in text[text.index("Definitions") :]


def test_dark_figures_follow_the_palette() -> None:
    css = (Path(sys.modules[render_report.__module__].__file__ or "").parent / "report.css").read_text()
    assert all(color in css for color in (f"fill: {INK}", f"stroke: {INK}", f"stroke: {GRID}", f"fill: {MUTED}", CLEAN))


def test_a_report_of_nothing_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no runs"):
        build_report([], {}, tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9">'


@pytest.mark.parametrize(
    "body",
    [
        "<script>x</script>",
        '<g onclick="x"/>',
        "<foreignObject/>",
        '<a xlink:href="https://x"/>',
        '<image xlink:href="https://x/y.png"/>',
        '<image xlink:href="data:image/svg+xml;base64,PHN2Zz4="/>',
        '<use xlink:href="other.svg#a"/>',
        '<g style="fill: url(https://x)"/>',
        '<g style="fill: URL(x)"/>',
        '<g style="background: u\\72l(x)"/>',
        '<g clip-path="url(https://x#a)"/>',
        '<g class="scroll"/>',
        '<g id="a"',
    ],
)
def test_figures_that_hold_more_than_drawing_are_refused(body: str) -> None:
    with pytest.raises(InputRefused, match="figure"):
        inline_svg(f"{HEAD}{body}</svg>", "p-", "a figure")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html/>",
        "<svg/>",
        '<svg viewBox="0 0 1 1&quot;"/>',
        '<!DOCTYPE svg [<!ENTITY a "b">]><svg viewBox="0 0 1 1">&a;</svg>',
    ],
)
def test_what_is_no_plain_svg_is_refused(text: str) -> None:
    with pytest.raises(InputRefused, match="figure"):
        inline_svg(text, "p-", "a figure")


def test_inlined_figures_keep_text_and_drop_what_is_not_drawing() -> None:
    body = '<metadata>m</metadata><defs><style>*{x}</style></defs><text id="t" x="1">a &lt;b&gt; &amp; c</text>'
    found = str(inline_svg(f'<?xml version="1.0"?>{HEAD}{body}</svg>', "p-", 'say "x"'))
    assert found == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="say &#34;x&#34;" stroke-linejoin="round" stroke-linecap="butt">'
        '<defs></defs><text id="p-t" x="1">a &lt;b&gt; &amp; c</text></svg>'
    )


def test_the_report_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, blto.report; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
