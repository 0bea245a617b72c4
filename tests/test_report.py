"""The page of a run: what it says, what it may miss, and how a browser shows it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.errors import FolderError
from moesaic.planning.plan import TrainPlan
from moesaic.reporting import charts, words
from moesaic.reporting.config import ReportConfig
from moesaic.reporting.report import report
from moesaic.reporting.runfolder import read_run
from moesaic.training.train import train
from tests.browser import chromium, requests_of
from tests.fake_run import ranks_of_step, write_lines, write_run
from tests.tiny import TINY, tiny_folder
from tests.tiny_run import tiny_config, tiny_tokens

SMALL: dict[str, Any] = {"steps": 30, "layers": 3, "experts": 4}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of an ordinary small run."""
    return page_of(write_run(tmp_path_factory.mktemp("ordinary") / "run", **SMALL))


def page_of(run: Path) -> str:
    return Path(report(ReportConfig(run=run))["report"]).read_text(encoding="utf-8")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Page(html.parser.HTMLParser):
    """Ids, links, addresses and headings of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.addresses.append(value or "")


def test_the_page_says_what_happened_in_words_with_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first", **SMALL)
    losses = [line["loss"] for line in lines_of(run / "metrics.jsonl")]
    first, last = np.mean(losses[:3]), np.mean(losses[-3:])
    result = report(ReportConfig(run=run))
    text = Path(result["report"]).read_text()
    assert f"The training loss fell from {first:.3f} to {last:.3f} nats a token" in text
    assert all(sentence.replace("'", "&#39;") in text for sentence in result["summary"])
    assert "for 30 steps, 61,440 tokens, and finished" in result["summary"][0]
    drops = lines_of(run / "routing" / "routing.jsonl")[-1]
    assert np.argmax(drops["drop_rate"]) == 0
    assert "highest in layer 0" in " ".join(result["summary"])


def test_the_page_asks_nothing_of_the_network(page: str) -> None:
    parts = Page(page)
    assert all(address.startswith(("#", "data:")) for address in parts.addresses)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(parts.tags)
    assert "default-src 'none'" in page
    assert "@import" not in page
    outside = re.findall(r"url\((?!#)", page)
    assert outside == []


def test_every_id_is_there_once_and_every_link_has_a_target(page: str) -> None:
    parts = Page(page)
    assert len(parts.ids) == len(set(parts.ids))
    inside = {address[1:] for address in parts.addresses if address.startswith("#")}
    assert inside <= set(parts.ids)
    assert {"loss-section", "drops-section", "load-section", "heldout-section"} <= inside


def test_every_figure_has_a_title_and_a_description(page: str) -> None:
    figures = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 7
    for figure in figures:
        assert re.match(
            r'<svg role="img" aria-labelledby="[^"]+".*?><title id=[^>]+>[^<]+</title>'
            r"<desc id=[^>]+>[^<]+</desc>",
            figure,
        )
        # Stand-in colours would show as black on a dark page.
        assert not re.search(r"#(0101|04)[0-9a-f]{2,4}\b", figure)
    assert "<title>layer 2</title>" in page


def test_text_of_models_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a<i>b", steps=3, layers=0)
    samples = [
        {"prompt": "<script>alert(1)</script>", "model": "<b>x", "text": "</div><img src=x>"}
    ]
    (run / "samples.json").write_text(json.dumps(samples))
    page = Page(page_of(run))
    assert not {"script", "b", "img", "i"} & set(page.tags)


def test_a_dense_run_has_no_section_on_experts(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", steps=30, layers=0))
    assert "a dense model" in text
    assert len(re.findall("<svg ", text)) == 2
    for word in ("drops-section", "load-section", "similarity", "routing.jsonl"):
        assert word not in text


def test_a_run_of_one_step_is_shown(tmp_path: Path) -> None:
    result = report(ReportConfig(run=write_run(tmp_path / "run", steps=1, layers=2, experts=2)))
    assert result["summary"][1].startswith("Its training loss was ")
    assert "went from" not in result["summary"][2]


def test_a_run_that_is_going_on_is_shown_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", planned=100, **SMALL)
    for name in ("metrics.jsonl", "routing/routing.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 31, "loss": 1.')
    result = report(ReportConfig(run=run))
    assert "100 steps were planned, so it is still going or was stopped" in result["summary"][0]
    assert "The last line of metrics.jsonl was half written; left out." in result["notes"]
    assert "30 of 100" in Path(result["report"]).read_text()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", extras=False, **SMALL)
    (run / "config.toml").unlink()
    shutil.rmtree(run / "routing")
    result = report(ReportConfig(run=run))
    notes = " ".join(result["notes"])
    for name in ("config.toml", "machine.json", "evaluation.json", "samples.json"):
        assert f"no {name}" in notes
    text = Path(result["report"]).read_text()
    assert all(note in text for note in result["notes"])


def test_a_missing_similarity_file_is_said_of_a_mixture_of_experts_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **SMALL)
    (run / "routing" / "similarity.jsonl").unlink()
    assert "no routing/similarity.jsonl" in " ".join(report(ReportConfig(run=run))["notes"])
    dense = write_run(tmp_path / "dense", steps=3, layers=0)
    assert report(ReportConfig(run=dense))["notes"] == []


def test_the_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, layers=0)
    out = tmp_path / "page.html"
    assert report(ReportConfig(run=run, out=out))["report"] == str(out)
    assert out.read_text().startswith("<!doctype html>")
    assert not (run / "report.html").exists()


def test_the_same_run_makes_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, layers=1, experts=2)
    assert page_of(run) == page_of(run)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run), "There is no run folder"),
        (lambda run: (run / "metrics.jsonl").unlink(), "holds no finished training step"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "holds no finished training step"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n'),
            r"Line 2 of .*metrics.jsonl is damaged",
        ),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "Line 1 of .* is damaged"),
        (
            lambda run: (run / "routing" / "routing.jsonl").write_text('{"step": 1}\n'),
            "routing.jsonl is damaged",
        ),
        (
            lambda run: (run / "routing" / "routing.jsonl").write_text(
                '{"step": 1, "layers": [0, 1], "load": [[1.0]], "drop_rate": [0.1]}\n'
            ),
            "routing.jsonl is damaged",
        ),
        (
            lambda run: (run / "routing" / "similarity.jsonl").write_text(
                '{"step": 1, "layers": [0], "similarity": [1, 2]}\n'
            ),
            "similarity.jsonl is damaged",
        ),
        (lambda run: (run / "config.toml").write_text("steps = = 3"), "config.toml is damaged"),
        (lambda run: (run / "samples.json").write_text("[1]"), "samples.json is not a list"),
        (lambda run: (run / "evaluation.json").write_text("[]"), "evaluation.json holds a list"),
        (lambda run: (run / "evaluation.json").write_text("{"), "evaluation.json is damaged"),
    ],
)
def test_a_damaged_run_is_one_line_and_leaves_the_old_page(
    break_it: Any, message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", **SMALL)
    out = tmp_path / "page.html"
    out.write_text("old")
    break_it(run)
    with pytest.raises(FolderError, match=message) as error:
        report(ReportConfig(run=run, out=out))
    assert "\n" not in str(error.value)
    assert out.read_text() == "old"


def test_a_real_run_is_shown_from_the_files_that_training_wrote(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", TINY["skywork moe"], tokenizer=False)
    tokens = tiny_tokens(tmp_path / "tokens")
    train(tiny_config(model, tokens, tmp_path / "run"))
    result = report(ReportConfig(run=tmp_path / "run"))
    assert "4 experts, top-2" in result["summary"][0]
    assert result["summary"][0].endswith("and finished.")
    assert [note.split(",")[0] for note in result["notes"]] == [
        "The run folder has no evaluation.json",
        "The run folder has no samples.json",
    ]
    text = Path(result["report"]).read_text()
    assert "torch" in text
    for name in ("loss", "speed", "drops", "load", "gates", "similarity", "layers", "config"):
        assert f'id="{name}-section"' in text


PLANS = {
    "2 stages of 4 ranks": TrainPlan(pp=2, dp=2, tp=2),
    "a V of 4 ranks": TrainPlan(pp=2, tp=2, schedule="zbv"),
    "one stage": TrainPlan(tp=3),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_fullest_rank_and_the_slowest_stage_are_named_and_marked(
    plan: TrainPlan, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", plan=plan, **SMALL)
    result = report(ReportConfig(run=run))
    lines = lines_of(run / "ranks.jsonl")
    last = lines[-1]["ranks"]
    memory = [item["peak_memory_bytes"] for item in last]
    tokens = [
        np.mean([line["ranks"][r]["tokens_received"] for line in lines]) for r in range(len(last))
    ]
    full, busy = int(np.argmax(memory)), int(np.argmax(tokens))
    (sentence,) = (s for s in result["summary"] if s.startswith("It ran on "))
    assert f"It ran on {plan.world_size} ranks" in sentence
    assert f"is the fullest with {words.byte_count(memory[full])} at most" in sentence or (
        plan.pp == 1 and "All are equally full" in sentence
    )
    # The fake's last stage is the slowest; with a V, the last stages are in the middle.
    slow = {1: "Rank 2 is", 2: "Stages 1 and 2 are" if plan.schedule == "zbv" else "Stage 1 is"}
    assert f"{slow[plan.pp]} the slowest" in sentence
    text = Path(result["report"]).read_text()
    assert f"The experts of rank {busy} get the most rows, {tokens[busy]:,.0f} a step" in text
    for number, rank in enumerate((full, busy)):
        bar = re.search(rf'id="ranks-tip-{number}-{rank}".*?</g>', text, re.DOTALL)
        assert bar is not None
        assert "var(--second)" in bar[0]
        assert len(re.findall(rf'id="ranks-tip-{number}-', text)) == plan.world_size


def test_compute_and_wait_of_a_stage_are_the_means_of_its_ranks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", plan=TrainPlan(pp=2, tp=2), **SMALL)
    lines = lines_of(run / "ranks.jsonl")
    ranks = read_run(run).ranks
    assert ranks is not None
    for stage in (0, 1):
        medians = [
            np.median([line["ranks"][rank]["compute_seconds"] for line in lines])
            for rank in (2 * stage, 2 * stage + 1)
        ]
        assert words.pace(ranks)[stage] == pytest.approx(np.mean(medians))
    assert [line["seconds"] for line in lines] == ranks.seconds_P.tolist()
    assert ranks.seconds == np.median(ranks.seconds_P)


@pytest.mark.parametrize("plan", [None, TrainPlan()], ids=["no file", "one rank"])
def test_a_run_of_one_rank_has_no_section_on_ranks(plan: TrainPlan | None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", plan=plan, **SMALL)
    result = report(ReportConfig(run=run))
    text = Path(result["report"]).read_text()
    assert "ranks-section" not in text
    assert "It ran on" not in " ".join(result["summary"])
    assert "ranks.jsonl" not in " ".join(result["notes"])


def test_ranks_of_a_dense_model_have_no_load(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "run", steps=10, layers=0, plan=TrainPlan(dp=2)))
    assert 'id="ranks-section"' in text
    assert "Rows to the rank" not in text
    assert "The experts of rank" not in text


def test_a_run_resumed_under_another_layout_shows_the_last_one_and_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", plan=TrainPlan(pp=2, tp=2), **SMALL)
    later = TrainPlan(dp=2)
    before = lines_of(run / "ranks.jsonl")
    write_lines(run / "ranks.jsonl", [*before, *(ranks_of_step(later, s) for s in (40, 50))])
    ranks = read_run(run).ranks
    assert ranks is not None
    assert ranks.steps_P.tolist() == [40, 50]
    assert len(ranks.places) == 2
    assert any("resumed under another layout" in note for note in read_run(run).notes)


def test_a_step_that_was_done_again_counts_as_told_last(tmp_path: Path) -> None:
    plan = TrainPlan(tp=2)
    run = write_run(tmp_path / "run", plan=plan, **SMALL)
    again = ranks_of_step(plan, 20)
    write_lines(run / "ranks.jsonl", [*lines_of(run / "ranks.jsonl"), again])
    ranks = read_run(run).ranks
    assert ranks is not None
    assert ranks.steps_P.tolist() == [1, 10, 20]


def test_a_thousand_ranks_fit_on_the_page(tmp_path: Path) -> None:
    plan = TrainPlan(pp=8, dp=64, tp=2)
    run = write_run(tmp_path / "run", steps=1, layers=2, experts=2, plan=plan)
    memory = [item["peak_memory_bytes"] for item in lines_of(run / "ranks.jsonl")[0]["ranks"]]
    text = page_of(run)
    section = text[text.index('id="ranks-section"') :]
    section = section[: section.index("</section>")]
    # One outline a panel, and not a shape for every rank.
    assert section.count("<path") < 200
    assert len(section) < 250_000
    assert f'-{int(np.argmax(memory))}"><title>rank ' in section


@pytest.mark.parametrize(
    "change",
    [
        lambda ranks: ranks[0].pop("tp"),
        lambda ranks: ranks[1].update(rank=0),
        lambda ranks: ranks.clear(),
        lambda ranks: ranks[0].update(stages=[]),
        lambda ranks: ranks[0].update(stages=3),
        lambda ranks: ranks[0].update(compute_seconds=None),
        lambda ranks: ranks.insert(0, 5),
    ],
)
def test_damaged_ranks_are_one_line(change: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", plan=TrainPlan(tp=2), **SMALL)
    lines = lines_of(run / "ranks.jsonl")
    change(lines[1]["ranks"])
    write_lines(run / "ranks.jsonl", lines)
    with pytest.raises(FolderError, match=r"ranks\.jsonl is damaged") as error:
        report(ReportConfig(run=run))
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, layers=0)
    with pytest.raises(FolderError, match="cannot be written"):
        report(ReportConfig(run=run, out=tmp_path / "nowhere" / "page.html"))


def test_long_runs_are_gathered_into_means_of_equal_intervals(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1000, layers=2, experts=2)
    lines = lines_of(run / "routing" / "routing.jsonl")
    routing = read_run(run).routing
    assert routing is not None
    assert routing.width == 3
    assert len(routing.steps_P) == 334
    expected = np.mean([line["drop_rate"] for line in lines[3:6]], axis=0)
    assert routing.numbers["drop_rate"][1] == pytest.approx(expected)
    assert routing.steps_P[1] == 5
    assert routing.load_PLE.sum(axis=2) == pytest.approx(np.ones((334, 2)))


def test_a_step_written_twice_counts_as_written_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **SMALL)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 29, "loss": 9.0}\n')
    metrics = read_run(run).metrics
    assert metrics["step"].tolist() == list(range(1, 31))
    assert metrics["loss"][28] == 9


def test_numbers_that_were_not_measured_leave_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20, layers=2, experts=2)
    routing = read_run(run).routing
    assert routing is not None
    assert np.isnan(routing.numbers["max2_over_max3"]).all()
    assert "Max2 / Max3" not in page_of(run)


def test_the_running_mean_is_that_of_a_plain_loop() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 8.0])
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]
    assert charts.running_mean(values, 3) == pytest.approx(np.array(expected))


def test_thinning_keeps_the_mean_and_bounds_the_number_of_points() -> None:
    values = np.arange(10_000.0)
    thin = charts.thinned(values)
    assert len(thin) == 1000
    assert thin[0] == pytest.approx(4.5)
    assert thin.mean() == pytest.approx(values.mean())
    assert charts.thinned(values[:999]) is not None
    assert len(charts.thinned(values[:999])) == 999


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (words.count(692_000_000), "692 M"),
        (words.count(999), "999"),
        (words.count(146.36e9), "146.4 B"),
        (words.byte_count(269 * 2**20), "269.00 MiB"),
        (words.percent(0.0082), "0.82 %"),
        (words.percent(0.25), "25 %"),
        (words.seconds(0.70512), "0.705 s"),
        (words.seconds(99.96), "100 s"),
        (words.seconds(1234.5), "1234 s"),
        (words.duration(59.4), "59.4 s"),
        (words.duration(3 * 60), "3 min"),
        (words.duration(3 * 3600 + 120), "3 h 2 min"),
        (" ".join(words.cosines(1.0, 0.5)), "1.000 0.500"),
        (" ".join(words.cosines(1 - 1e-15)), "1.000"),
        (" ".join(words.cosines(0.99995, 0.98)), "0.999950 0.980000"),
    ],
)
def test_numbers_are_written_for_people(found: str, expected: str) -> None:
    assert found == expected


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_every_figure_and_asks_for_nothing_else(
    browser: Any, scheme: str, width: int, tmp_path: Path
) -> None:
    plan = TrainPlan(pp=2, dp=2, tp=2)
    run = write_run(tmp_path / "run", steps=60, layers=12, experts=8, plan=plan)
    result = report(ReportConfig(run=run))
    page = Path(result["report"]).as_uri()
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.set_window_size(width, 900)
    browser.get("about:blank")
    requests_of(browser)
    browser.get(page)
    outside = [url for url in requests_of(browser) if not url.startswith("data:")]
    assert outside == [page]
    assert browser.get_log("browser") == []
    body = browser.find_element("tag name", "body").text
    assert all(sentence in body for sentence in result["summary"])
    figures = browser.find_elements("css selector", "figure svg")
    assert len(figures) == 9
    for figure in figures:
        assert figure.is_displayed()
        assert figure.size["height"] > 100
    # Nothing sticks out sideways, on a telephone either; wide things scroll in their own box.
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    colours = browser.execute_script(
        "const parts = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);"
        "const style = name => getComputedStyle(document.querySelector(name));"
        "return [style('figure').backgroundColor, style('svg text').fill,"
        " style('#drops-tip-0-0 path').stroke, style('#drops-tip-0-11 path').stroke,"
        " style('#ranks-tip-0-0 path').fill, style('#ranks-tip-0-3 path').fill].map(parts)"
    )
    card, text, *lines = (luminance(colour) for colour in colours)
    assert ratio(text, card) >= 4.5
    assert min(ratio(line, card) for line in lines) >= 2


def luminance(colour: list[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2)."""
    parts = [value / 255 for value in colour]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ratio(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
