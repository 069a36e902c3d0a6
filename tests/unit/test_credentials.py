"""Addresses with passwords, keys or signatures are refused wherever they come in, and never shown."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import submit
from rlvid import cli
from rlvid.config import load_config
from rlvid.credentials import refuse_credentials
from rlvid.doctor.examination import examination
from rlvid.evaluate.models import parse_spec
from rlvid.storage import Mirror, locate
from tuning.load import load_sweep

SECRET = "hunter2"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:hunter2@bucket/runs",
        "s3://hunter2@bucket/runs",
        "gs://name:hunter2@bucket/runs",
        "s3://AKIAEXAMPLE:se/hunter2@bucket/runs",
        "http://user:hunter2@host:8265",
        "https://bucket.test/run?X-Amz-Date=1&X-Amz-Signature=hunter2",
        "https://bucket.test/run?sv=2&sig=hunter2",
        "s3://bucket/runs?scheme=http&endpoint_override=user:hunter2@host:9000",
        "s3://bucket/runs?secret%5Fkey=hunter2",
        "a=S3://KEY:hunter2@bucket/run@20*0.5",
    ],
)
def test_credentials_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ValueError, match=r"output\.storage") as caught:
        refuse_credentials({"output": {"storage": [uri]}}, "")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/runs/toy@best*0.5",
        "s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9000",
        "s3://bucket/runs/mine?endpoint_override=host:9000@20*0.5",
        "gs://anonymous@bucket/runs",
        "http://[::1]:8265",
        "http://127.0.0.1:8265/a@b",
        "file:///mnt/runs/a@b",
        "me@example.org: a red star",
    ],
)
def test_other_addresses_pass(uri: str) -> None:
    refuse_credentials(uri, "output.storage")


@pytest.mark.parametrize(
    "enter",
    [
        lambda uri: load_config("toy", [f"output.storage={uri}"]),
        lambda uri: load_config({"data": {"source": uri}}),
        lambda uri: load_sweep("toy", [f"storage={uri}"]),
        lambda uri: load_sweep("toy", [f"data.source={uri}"]),
        lambda uri: Mirror(uri, "run"),
        lambda uri: locate(uri, "."),
        lambda uri: parse_spec(f"label={uri}/run"),
        lambda uri: list(examination(uri, None, None, True)),
        lambda uri: submit.job_name("evaluate", [f"{uri}/run"]),
        lambda uri: submit.job_name("encode", ["/mnt/videos", "/mnt/clips", "--config", uri]),
    ],
)
def test_every_way_in_refuses(enter: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="holds a name or password") as caught:
        enter("s3://AKIAEXAMPLE:hunter2@bucket/runs")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("arguments", [["train", "toy", "output.storage=URI"], ["doctor", "--storage", "URI"]])
def test_the_command_says_it_in_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [each.replace("URI", "s3://AKIAEXAMPLE:hunter2@bucket/runs") for each in arguments]
    monkeypatch.setattr(sys, "argv", ["rlvid", *given])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    out = capsys.readouterr()
    assert "storage" in out.err
    assert SECRET not in out.out + out.err
    assert list(tmp_path.iterdir()) == []
