"""Prompts are read from files of every format; what cannot be one is named with its line."""

import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from rlvid.data.prompts import check_prompt, read_prompts, resolve_prompts
from rlvid.data.videos import read_video


def test_prompts_are_read_from_every_format(tmp_path: Path) -> None:
    prompts = ["a red star, moving left", 'ein "blauer" Mond', "a red star, moving left"]
    (tmp_path / "p.txt").write_bytes("\ufeff a red star, moving left \r\n\n".encode() + "\n".join(prompts[1:]).encode())
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"id": 1, "prompt": p}) for p in prompts) + "\n")
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "p.parquet")
    pa.csv.write_csv(pa.table({"n": [1, 2, 3], "prompt": prompts}), tmp_path / "p.csv")
    options = pa.csv.WriteOptions(delimiter="\t")
    pa.csv.write_csv(pa.table({"n": [1, 2, 3], "prompt": prompts}), tmp_path / "p.tsv", options)
    for suffix in ("txt", "jsonl", "parquet", "csv", "tsv"):
        assert read_prompts(tmp_path / f"p.{suffix}") == prompts


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.txt", None, "no such file"),
        ("p.txt", b"", "no prompts"),
        ("p.txt", b"\n  \n", "no prompts"),
        ("p.txt", b"fine\nbad \xff\n", r"p\.txt:2: is not UTF-8"),
        ("p.txt", b"fine\na \x00 star\n", r"p\.txt:2: the prompt has the control character U\+0000"),
        ("p.txt", b"fine\na \x1b[31mred\x1b[0m star\n", r"p\.txt:2: .*U\+001B"),
        ("p.txt", "fine\na \x9b31m star\n".encode(), r"p\.txt:2: .*U\+009B"),
        ("p.txt", "fine\na \u202erats\n".encode(), r"p\.txt:2: .*U\+202E"),
        ("p.txt", "\u200b\n".encode(), r"p\.txt:1: the prompt is empty"),
        ("p.txt", b"a star\ra wall\r", r"p\.txt:1: has a lone carriage return"),
        ("p.txt", "a star\na wall\n".encode("utf-16"), r"p\.txt:1: is not UTF-8"),
        ("p.txt", "a star\na wall\n".encode("utf-16-be"), r"p\.txt:1: is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a star \\ud83d"}\n', r"p\.jsonl:2: the prompt has U\+D83D"),
        ("p.jsonl", b'{"prompt": "a\\rb"}\n', r"p\.jsonl:1: .*U\+000D"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', r"p\.jsonl:1: has 'prompt' twice"),
        ("p.jsonl", b'{"prompt": ' + b"[" * 99999 + b"]" * 99999 + b"}\n", r"p\.jsonl:1: is not JSON"),
        ("p.jsonl", b'{"prompt": ' + b"7" * 9999 + b"}\n", r"p\.jsonl:1: is not JSON"),
        ("p.csv", b"prompt\na wall\na red star, moving left\n", r"p\.csv:3: has 2 cells under 1 column"),
        ("p.csv", b"prompt,n,m\na,1,2\nb,1\n", r"p\.csv:3: has 2 cells under 3 columns"),
        ("p.csv", b"prompt,prompt\na,b\n", r"p\.csv:1: has 'prompt' twice"),
        ("p.csv", b'n,prompt\n1,a\n2,"b\n3,c\n', r"p\.csv:3: has a quotation mark that nothing closes"),
        ("p.csv", b'n,prompt\n1,a\n2, "b, c"\n', r"p\.csv:3: has a quotation mark within a cell"),
        ("p.csv", b'n,prompt\n1,"a\nb"\n2,"b"c\n', r"p\.csv:4: has a quotation mark within a cell"),
        ("p.csv", b"n;prompt\n1;a\n", r"p\.csv:1: its cells are separated by ';'"),
        ("p.tsv", b"n,prompt\n1,a\n", r"p\.tsv:1: its cells are separated by ','"),
        ("p.tsv", b"n\tprompt\n1\ta\tb\n", r"p\.tsv:2: has 3 cells under 2 columns"),
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


def test_a_prompt_is_one_line_and_a_long_one_is_kept(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a\twall,\r\nbright\u2028and wide "},
        {"prompt": "star " * 9999},
        {"prompt": "\U0001f469\u200d\U0001f680"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line, long, emoji = read_prompts(tmp_path / "p.jsonl")
    assert line == "a wall, bright and wide"
    assert len(long) > 1000
    assert ("star " * 9999).startswith(long)
    assert emoji == rows[2]["prompt"]
    (tmp_path / "p.csv").write_text(f'prompt\n"{"x" * 140_000}"\n')  # longer than the csv module takes
    assert set(read_prompts(tmp_path / "p.csv")[0]) == {"x"}


def test_an_argument_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 1: the prompt has the byte 0xE9"):
        check_prompt(os.fsdecode(b"a caf\xe9"), "prompt 1")


def test_a_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "p.parquet"
    (folder / "day=2").mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["a", "b"]}), folder / "part-0.parquet")
    pq.write_table(pa.table({"prompt": pa.array(["c"]).dictionary_encode()}), folder / "day=2" / "part-0.parquet")
    (folder / "_SUCCESS").touch()
    (folder / "_metadata.parquet").write_bytes(b"no Parquet")
    assert sorted(read_prompts(folder)) == ["a", "b", "c"]
    assert resolve_prompts(str(folder), 2) == read_prompts(folder)[:2]
    (folder / "part-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"p\.parquet/part-1\.parquet: is not a Parquet file"):
        read_prompts(folder)
    (tmp_path / "none.parquet").mkdir()
    with pytest.raises(ValueError, match=r"none\.parquet: is a folder without \.parquet files"):
        read_prompts(tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (pa.table({"prompt": [1, 2]}), "column 'prompt' is of type int64"),
        (pa.table({"prompt": [["a"], ["b"]]}), "column 'prompt' is of type list"),
        (pa.table({"prompt": [b"a"]}), "column 'prompt' is of type binary"),
        (pa.table({"row": [{"prompt": "a"}]}), "lacks 'prompt'; columns found: row"),
        (pa.Table.from_arrays([pa.array(["a"])] * 2, ["prompt"] * 2), "has 'prompt' twice"),
        (pa.table({"prompt": pa.array([b"a", b"caf\xe9"]).view(pa.string())}), "row 2: is not UTF-8"),
        (pa.table({"prompt": ["a", None]}), "row 2: the prompt is missing"),
        (pa.table({"prompt": ["a", "b\0"]}), r"row 2: .*U\+0000"),
    ],
)
def test_parquet_of_other_types_is_refused(tmp_path: Path, table: pa.Table, complaint: str) -> None:
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=rf"p\.parquet: {complaint}"):
        read_prompts(tmp_path / "p.parquet")


def test_damaged_tables_end_in_one_line(tmp_path: Path) -> None:
    """Bytes cut, changed and spliced at random: a reader gives rows or says in one line what is wrong."""
    prompts = ["a red star, moving left", 'a "blue" wall\nthat is bright', "caf\u00e9 \U0001f680", "x" * 300]
    pa.csv.write_csv(pa.table({"n": range(4), "prompt": prompts}), tmp_path / "p.csv")
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps({'n': 1, 'prompt': text})}\n" for text in prompts))
    pq.write_table(pa.table({"n": range(4), "prompt": prompts}), tmp_path / "p.parquet", compression="none")
    pq.write_table(pa.table({"n": range(4), "prompt": prompts}), tmp_path / "p.zip.parquet")
    wholes = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    wholes[tmp_path / "p.tsv"] = wholes[tmp_path / "p.csv"].replace(b",", b"\t")
    wholes[tmp_path / "p.txt"] = "\n".join(prompts).encode()
    draw = random.Random(0)
    for path, whole in wholes.items():
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                start, length = draw.randrange(len(data) + 1), draw.randint(0, 12)
                other = draw.choice(list(wholes.values()))
                at = draw.randrange(len(other))
                data[start : start + draw.choice([0, length])] = draw.choice(
                    [draw.randbytes(length), other[at : at + length], b'"', b"\0", b"\r"]
                )
            path.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data) + 1)])])
            said = ""
            try:
                read = read_prompts(path)
            except ValueError as error:
                said, read = str(error), [str(error)]
            assert said.startswith(str(path) if said else "")
            assert all(text.encode().strip() and text.isprintable() for text in read)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>404</title>", "is a web page"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.parquet", "a.mp4"])
def test_what_a_download_left_in_place_of_a_file_is_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: {words}.*"):
        read_video(path, frames=2, size=16, fps=8.0) if name == "a.mp4" else read_prompts(path)
