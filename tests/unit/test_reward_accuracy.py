"""Pairs of the built-in world with the oracle's votes, and the accuracy of rewards on them."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import save_run
from pyarrow import parquet

from jobs.benchmark import reward_accuracy
from rlvid.fitting import votes
from rlvid.fitting.read import read_pairs
from rlvid.world.pairs import KINDS


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("votes") / "pairs.parquet"
    given = [
        "votes",
        str(out),
        "--rendered",
        "6",
        "--noise",
        "0",
        "--prompts",
        "2",
        "--per-prompt",
        "3",
        "--steps",
        "2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", given)
        votes.main()
    return out


def test_votes_are_an_export_of_every_kind_with_the_truth_on_either_side(pairs: Path) -> None:
    rows = parquet.read_table(pairs).to_pylist()
    assert [row["kind"] for row in rows] == [*(kind for kind in KINDS for _ in range(6)), *["model-made"] * 6]
    for row in rows[: 6 * len(KINDS)]:
        assert row["a_model" if row["preference"] == 1 else "b_model"] == "rendered"
    assert {row["preference"] for row in rows[:6]} == {0.0, 1.0}
    found, skipped = read_pairs(pairs)
    assert (len(found), skipped) == (len(rows), [])
    assert {each.kind for each in found} == {*KINDS, "model-made"}
    base = {"base", "base, guidance 1", "base, guidance 6"}
    assert all(set(each.models) <= base for each in found if each.kind == "model-made")


def test_kinds_have_numbers_of_their_own() -> None:
    none = dict.fromkeys([*KINDS, "unseen", "alike"], 0)
    assert votes.counts_of(["time=7", "5"]) == none | {"photometry": 5, "mismatch": 5, "structure": 5, "time": 7}
    assert votes.counts_of(["time=7"]) == none | {"time": 7}
    assert votes.counts_of(["unseen=2"])["unseen"] == 2
    pairs = votes.rendered(votes.counts_of(["1", "time=3", "structure=0"]), 0, 0.0, [])
    assert [each.kind for each in pairs] == ["photometry", "mismatch", "time", "time", "time"]
    for word in ("few", "colour=3", "time=", "-1", "=3"):
        with pytest.raises(ValueError, match=f"--rendered {word}: expected N or KIND=N; the kinds are photometry"):
            votes.counts_of([word])


def test_earlier_votes_come_first_as_they_are(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, gone = tmp_path / "v.parquet", tmp_path / "gone.parquet"
    given = ["votes", str(out), "--rendered", "mismatch=2", "--noise", "1", "--add"]
    monkeypatch.setattr(sys, "argv", [*given, str(pairs)])
    votes.main()
    before, after = (parquet.read_table(file).to_pylist() for file in (pairs, out))
    count = len(before)
    assert after[:count] == before
    assert [(row["kind"], row["index"]) for row in after[count:]] == [("mismatch", count), ("mismatch", count + 1)]
    assert len(read_pairs(out)[0]) == len(after)
    more = tmp_path / "more.parquet"
    monkeypatch.setattr(sys, "argv", ["votes", str(more), *given[2:], str(pairs), str(out)])
    votes.main()
    found, skipped = read_pairs(more)
    assert (len(found), skipped) == (count + len(after) + 2, []), "the same pairs in two files are two pairs"
    parquet.write_table(parquet.read_table(pairs).drop_columns("kind"), tmp_path / "study.parquet")
    monkeypatch.setattr(sys, "argv", [*given, str(tmp_path / "study.parquet")])
    with pytest.raises(ValueError, match=r"study\.parquet: lacks kind"):
        votes.main()
    monkeypatch.setattr(sys, "argv", [*given, str(gone)])
    with pytest.raises(ValueError, match=r"gone\.parquet: no such file"):
        votes.main()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--noise", "7"], "--noise 7: is a share; allowed: 0 to 1"),
        (["--footage", "-3"], "--footage -3: is a share; allowed: 0 to 1"),
        (["--noise", "nan"], "--noise nan"),
        (["--prompts", "-1"], "--prompts -1: allowed: 0 or more"),
        (["--per-prompt", "0"], "--per-prompt 0: allowed: 1 or more"),
        (["--steps", "0"], "--steps 0: allowed: 1 or more"),
        (["--runs", "nowhere@3"], "run 'nowhere': no such folder"),
        (["--prompts", "2", "--model", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_voted_on_is_refused_before_anything_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], words: str
) -> None:
    monkeypatch.setattr(votes, "rendered", lambda *arguments: pytest.fail("it renders"))
    monkeypatch.setattr(sys, "argv", ["votes", str(tmp_path / "v.parquet"), *given])
    with pytest.raises(ValueError, match=words):
        votes.main()
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = save_run(tmp_path, 2)
    monkeypatch.setattr(votes, "rendered", lambda *arguments: pytest.fail("it renders"))
    monkeypatch.setattr(sys, "argv", ["votes", str(tmp_path / "v.parquet"), "--runs", f"{folder}@3"])
    with pytest.raises(ValueError, match="no checkpoint of step 3; it has: 2"):
        votes.main()


def test_a_run_of_another_base_is_refused_before_anything_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = save_run(tmp_path, 2)
    monkeypatch.setattr(votes, "rendered", lambda *arguments: pytest.fail("it renders"))
    given = ["votes", str(tmp_path / "v.parquet"), "--prompts", "1", "--model", "builtin-wan", "--runs", str(folder)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(ValueError, match="makes 4 frames of 16 x 16 pixels, and --model builtin-wan makes 9 of 32 x"):
        votes.main()


def test_votes_on_a_model_of_the_other_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "v.parquet"
    given = ["--rendered", "0", "--model", "builtin-wan", "--prompts", "1", "--per-prompt", "1", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["votes", str(out), *given])
    votes.main()
    (row,) = parquet.read_table(out).to_pylist()
    assert [len(row[side]) for side in ("a", "b")] == [9, 9]


def test_a_share_of_votes_is_turned_around(tmp_path: Path) -> None:
    counts = votes.write_votes(tmp_path / "v.parquet", votes.rendered(dict.fromkeys(KINDS, 10), 0, 0.0, []), 0.3, 1)
    rows = parquet.read_table(tmp_path / "v.parquet").to_pylist()
    assert counts == (40, 0)
    wrong = sum(row["a_model" if row["preference"] == 1 else "b_model"] != "rendered" for row in rows)
    assert 4 <= wrong <= 22
    alike = votes.rendered({"alike": 5}, 0, 0.0, [])
    assert votes.write_votes(tmp_path / "alike.parquet", alike, 0.9, 1) == (5, 5), "neither of two that are alike"


def test_accuracy_by_kind(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def first_of_two(frames_BFCHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts))

    found = reward_accuracy.measure(pairs, {"none": first_of_two, **reward_accuracy._rewards(["oracle"])})
    assert all(share.share == 0.5 for share in found["none"].values())
    assert found["oracle"]["photometry"].share == 1
    assert found["oracle"]["all"].pairs == sum(found["oracle"][kind].pairs for kind in (*KINDS, "model-made"))
    reward_accuracy.main([str(pairs), "--rewards", "builtin", "--out", str(tmp_path / "out.json")])
    assert "| photometry | 6 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--rewards beauty: no such reward"):
        reward_accuracy.main([str(pairs), "--rewards", "beauty"])
