"""Prompts are read from files of every format; what cannot be one is named with its line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from rlvid.data.prompts import read_prompts, resolve_prompts


def test_prompts_are_read_from_every_format(tmp_path: Path) -> None:
    prompts = ["a red star, moving left", 'ein "blauer" Mond', "a red star, moving left"]
    (tmp_path / "p.txt").write_bytes("\ufeff a red star, moving left \r\n\n".encode() + "\n".join(prompts[1:]).encode())
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"id": 1, "prompt": p}) for p in prompts) + "\n")
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "p.parquet")
    pa.csv.write_csv(pa.table({"n": [1, 2, 3], "prompt": prompts}), tmp_path / "p.csv")
    for suffix in ("txt", "jsonl", "parquet", "csv"):
        assert read_prompts(tmp_path / f"p.{suffix}") == prompts


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", None, "no such file"),
        ("p.txt", b"", "no prompts"),
        ("p.txt", b"\n  \n", "no prompts"),
        ("p.txt", b"fine\nbad \xff\n", r"p\.txt:2: is not UTF-8"),
        ("p.txt", b"fine\n" + b"x" * 1001, r"p\.txt:2: the prompt has 1,001 characters; allowed: up to 1,000"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', r"p\.jsonl:2: the prompt is empty"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": 7}\n', r"p\.jsonl:3: the prompt is 7; it must be a text"),
        ("p.jsonl", b'{"text": "a"}\n', r"p\.jsonl:1: lacks 'prompt'; columns found: text"),
        ("p.jsonl", b"[1]\n", r"p\.jsonl:1: must be a JSON object"),
        ("p.jsonl", b"{\n", r"p\.jsonl:1: is not JSON"),
        ("p.csv", b"text,n\na,1\n", "lacks 'prompt'; columns found: text, n"),
        ("p.csv", b"n,prompt\n1,a\n2,\n", r"p\.csv:3: the prompt is empty"),
        ("p.parquet", b"PAR1", "is not a Parquet file"),
        ("p.pdf", b"a", "prompts are read from .txt"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_prompts_resolve_to_a_set_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\n")
    assert resolve_prompts("new_shapes", 5, seed=1) == resolve_prompts("new_shapes", 5, seed=1)
    assert resolve_prompts("new_shapes", 5, seed=1) != resolve_prompts("new_shapes", 5, seed=2)
    assert resolve_prompts(str(path)) == ["a", "b", "c"]
    assert resolve_prompts(str(path), 2) == ["a", "b"]
    for spec, count, complaint in [
        (str(path), 4, "has 3 prompts; asked for 4"),
        ("new_shape", 4, "neither a built-in set .in_domain, new_shapes, scenes, animals.* nor a file"),
        ("scenes", None, "say how many"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            resolve_prompts(spec, count)
