"""The line that says what each rank did."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moesaic.training.ranks import RankRecord, rank_line

DOCUMENT = (Path(__file__).parent.parent / "docs" / "run-folder.md").read_text(encoding="utf-8")


def record(rank: int, *, compute_seconds: float = 0.5) -> RankRecord:
    return RankRecord(
        rank=rank,
        pp=rank,
        dp=0,
        tp=0,
        stages=(rank, 3 - rank),
        peak_memory_bytes=1_000 + rank,
        compute_seconds=compute_seconds,
        tokens_received=7,
    )


def test_a_line_has_what_the_document_lists() -> None:
    section = DOCUMENT.split("## ranks.jsonl")[1].split("## ")[0]
    listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, re.MULTILINE)
    names = [name for names in listed for name in re.findall(r"`(\w+)`", names)]
    line = rank_line(20, 0.75, [record(0)])
    assert sorted(names) == sorted([*line, *line["ranks"][0]])


def test_ranks_stand_in_order_and_wait_for_the_rest_of_the_step() -> None:
    line = json.loads(json.dumps(rank_line(20, 0.75, [record(1, compute_seconds=0.25), record(0)])))
    assert (line["step"], line["seconds"]) == (20, 0.75)
    assert [item["rank"] for item in line["ranks"]] == [0, 1]
    assert [item["wait_seconds"] for item in line["ranks"]] == [0.25, 0.5]
    assert line["ranks"][1]["stages"] == [1, 2]


def test_a_rank_whose_clock_runs_ahead_waits_no_time() -> None:
    (item,) = rank_line(1, 0.5, [record(0, compute_seconds=0.5000001)])["ranks"]
    assert item["wait_seconds"] == 0


def test_a_rank_that_is_missing_is_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="ranks="):
        rank_line(1, 0.5, [record(1)])
