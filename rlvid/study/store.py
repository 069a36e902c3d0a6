"""A study in one SQLite file: its pairs, and one row per answer, which is on disk before the page confirms it."""

import hashlib
import json
import os
import secrets
import sqlite3
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from uuid import uuid4

from rlvid.evaluate.results.about import Case
from rlvid.study.pairs import AXES, Pair, second_on_left

Side = Literal["left", "right", "tie"]
SIDES: tuple[Side, ...] = ("left", "tie", "right")
FORMAT = "2"
_PRIVATE = 0o600
_SCHEMA = """
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pairs (
    pair INTEGER PRIMARY KEY, "set" TEXT NOT NULL, steps INTEGER NOT NULL, "index" INTEGER NOT NULL,
    copy INTEGER NOT NULL, prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL, is_check INTEGER NOT NULL,
    digest TEXT NOT NULL
);
CREATE TABLE answers (
    annotator TEXT NOT NULL, pair INTEGER NOT NULL REFERENCES pairs, axis TEXT NOT NULL,
    answer TEXT NOT NULL CHECK (answer IN ('left', 'tie', 'right')),
    chosen TEXT NOT NULL CHECK (chosen IN ('first', 'tie', 'second')), saved_at TEXT NOT NULL,
    invited INTEGER NOT NULL, PRIMARY KEY (annotator, pair, axis)
) WITHOUT ROWID;
CREATE TABLE invitations (person TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT UNIQUE) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Study:
    """A study: ``evaluation`` is the folder of its videos, ``key`` identifies it."""

    key: str
    evaluation: Path
    seed: int
    models: Mapping[str, str]
    pairs: Sequence[Pair]

    @property
    def settings(self) -> str:
        """What its evaluation was made with, as far as the pairs tell."""
        cases = [pair.case for pair in self.pairs]
        sets, steps = sorted({case.set for case in cases}), sorted({case.steps for case in cases})
        return f"models {', '.join(self.models)}; sets {', '.join(sets)}; D = {', '.join(map(str, steps))}"

    @property
    def outline(self) -> str:
        """The study's size, seed and settings, which tell two studies of one evaluation apart."""
        checks = sum(pair.check for pair in self.pairs)
        return f"{len(self.pairs) - checks} pairs and {checks} checks, seed {self.seed}, {self.settings}"


@dataclass(frozen=True)
class Answer:
    """One saved answer: the side that was clicked, which of the pair's videos that was, and by whose link it came.

    ``invited``: by the annotator's own link; else by the one that all share.
    """

    annotator: str
    pair: int
    axis: str
    answer: Side
    chosen: Literal["first", "tie", "second"]
    saved_at: str
    invited: bool = False


class AnsweredOtherwiseError(Exception):
    """The pair has another answer of the same annotator already, which stands."""


class Store:
    """The file of a study; each call opens it anew, so it may be used from any thread and by several processes."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def begin(
        cls, path: Path, evaluation: Path, seed: int, models: Mapping[str, str], pairs: Sequence[Pair],
        private: bool = False,
    ) -> "Store":  # fmt: skip
        """Makes the file, ``private`` to its owner if it is to hold a token, or takes up the one that is there.

        Raises ValueError if it is another study's, or no study's at all, or cannot be written.
        """
        store, wanted = cls(path), Study(uuid4().hex[:12], evaluation, seed, models, pairs)
        if not path.parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}")
        with _named(path):
            if private and not path.exists():
                path.touch(_PRIVATE)
        with _named(path), closing(store._connect()) as database:
            if _is_empty(database):
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("BEGIN IMMEDIATE")
                if _is_empty(database):  # still, now that nobody else can write
                    store._fill(database, wanted)
                database.execute("COMMIT")
        found = store.study()
        if (found.seed, [*found.models], [*found.pairs]) != (seed, [*models], [*pairs]):
            raise ValueError(
                f"{path} belongs to another study ({found.outline}; now {wanted.outline}, or other videos); name a new "
                "file with --out, or evaluate and ask as then"
            )
        return store

    @staticmethod
    def _fill(database: sqlite3.Connection, study: Study) -> None:
        for statement in filter(None, map(str.strip, _SCHEMA.split(";\n"))):
            database.execute(statement)
        home = Path(database.execute("PRAGMA database_list").fetchone()[2]).parent
        facts = {
            "format": FORMAT, "key": study.key, "evaluation": os.path.relpath(study.evaluation.resolve(), home),
            "seed": str(study.seed), "models": json.dumps(dict(study.models)),
        }  # fmt: skip
        database.executemany("INSERT INTO study VALUES (?, ?)", facts.items())
        for pair in study.pairs:
            row = (pair.number, *pair.case, pair.prompt, pair.first, pair.second, pair.check, pair.digest)
            database.execute("INSERT INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def study(self) -> Study:
        """Returns the study; raises ValueError if the file is missing, or not a study's."""
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such study; rlvid study serve makes one")
        with _named(self.path), closing(self._connect()) as database:
            if {"study", "pairs", "answers"} - {name for (name,) in database.execute("SELECT name FROM sqlite_master")}:
                raise ValueError(f"{self.path} is a database, but not of a study; name another file")
            facts = dict(database.execute("SELECT key, value FROM study"))
            rows = database.execute("SELECT * FROM pairs ORDER BY pair").fetchall()
        if facts.get("format") != FORMAT:
            raise ValueError(f"{self.path}: a study of format {facts.get('format')}; this rlvid reads {FORMAT}")
        pairs = [
            Pair(number, Case(*case), prompt, first, second, bool(check), digest)
            for number, *case, prompt, first, second, check, digest in rows
        ]
        folder = Path(os.path.normpath(self.path.resolve().parent / facts["evaluation"]))
        return Study(facts["key"], folder, int(facts["seed"]), json.loads(facts["models"]), pairs)

    def token(self) -> str:
        """Returns the token of the study's address, for other machines; drawn once, so that links survive a restart.

        The file becomes its owner's alone. Raises ValueError if it is somebody else's, or cannot be written.
        """
        with _named(self.path):
            for path in (self.path, *(self.path.with_name(f"{self.path.name}{end}") for end in ("-wal", "-shm"))):
                with suppress(FileNotFoundError):
                    path.chmod(_PRIVATE)
        with _named(self.path), closing(self._connect()) as database:
            database.execute("INSERT OR IGNORE INTO study VALUES ('token', ?)", (secrets.token_urlsafe(24),))
            return str(database.execute("SELECT value FROM study WHERE key = 'token'").fetchone()[0])

    def invite(self, names: Sequence[str]) -> dict[str, str]:
        """Draws a token for each name, instead of an earlier one of the same person; the file keeps digests alone.

        Raises:
            ValueError: a name cannot be one, or is there twice; or the file cannot be written.
        """
        people = {name.casefold(): name for name in map(name_of, names)}
        if len(people) < len(names):
            raise ValueError(f"{', '.join(names)}: a name is there twice, in whatever capitals; give each once")
        tokens = {person: secrets.token_urlsafe(24) for person in people}
        with _named(self.path), closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            for person, token in tokens.items():
                row = (person, people[person], _digest(token))
                database.execute("INSERT OR REPLACE INTO invitations VALUES (?, ?, ?)", row)
            database.execute("COMMIT")
        return {people[person]: token for person, token in tokens.items()}

    def revoke(self, names: Sequence[str]) -> None:
        """Makes the links of these people worthless; their answers stay, and their names stay theirs.

        Raises ValueError if somebody has no link.
        """
        with _named(self.path), closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            for name in names:
                sql = "UPDATE invitations SET digest = NULL WHERE person = ? AND digest IS NOT NULL"
                if not database.execute(sql, (name_of(name).casefold(),)).rowcount:
                    raise ValueError(f"--revoke {name!r}: has no link; there: {', '.join(self.invited()) or 'nobody'}")
            database.execute("COMMIT")

    def invited(self, revoked: bool = False) -> list[str]:
        """Returns the people with their own link; with ``revoked`` also those who had one."""
        with closing(self._connect()) as database:
            sql = "SELECT name FROM invitations WHERE ? OR digest IS NOT NULL ORDER BY 1"
            return [name for (name,) in database.execute(sql, (revoked,))]

    def person_of(self, token: str) -> str | None:
        """Returns the person whose link has this token."""
        with closing(self._connect()) as database:
            row = database.execute("SELECT name FROM invitations WHERE digest = ?", (_digest(token),)).fetchone()
        return row and str(row[0])

    def served_at(self, address: str | None = None) -> str | None:
        """Returns the last address of the study, without its token; saves a new ``address``."""
        with _named(self.path), closing(self._connect()) as database:
            if address is not None:
                database.execute("INSERT OR REPLACE INTO study VALUES ('address', ?)", (address,))
            row = database.execute("SELECT value FROM study WHERE key = 'address'").fetchone()
        return row and str(row[0])

    def save(
        self, seed: int, annotator: str, pair: int, sides: Mapping[str, Side], invited: bool = False
    ) -> None:  # fmt: skip
        """Saves somebody's answers about a pair, all or none; the same ones again change nothing.

        Somebody whose name is there in other capitals is the same person, and keeps the name as it was first written.

        Raises:
            AnsweredOtherwiseError: there are others already, for example from a second window; they stand.
            sqlite3.OperationalError: they could not be written, for example because the disk is full.
        """
        names = ("second", "first") if second_on_left(seed, annotator, pair) else ("first", "second")
        chosen = dict(zip(("left", "right"), names, strict=True)) | {"tie": "tie"}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with closing(self._connect()) as database:
            database.execute("BEGIN IMMEDIATE")
            names_there = [name for (name,) in database.execute("SELECT DISTINCT annotator FROM answers")]
            annotator = next((name for name in names_there if name.casefold() == annotator.casefold()), annotator)
            sql = "SELECT axis, answer FROM answers WHERE annotator = ? AND pair = ?"
            before = dict(database.execute(sql, (annotator, pair)))
            if before and before != dict(sides):
                raise AnsweredOtherwiseError
            if not before:
                rows = [(annotator, pair, axis, sides[axis], chosen[sides[axis]], now, invited) for axis in AXES]
                database.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            database.execute("COMMIT")

    def answered(self, annotator: str) -> set[int]:
        """Numbers of the pairs that somebody has answered."""
        with closing(self._connect()) as database:
            sql = "SELECT DISTINCT pair FROM answers WHERE annotator = ?"
            return {pair for (pair,) in database.execute(sql, (annotator,))}

    def answers(self) -> list[Answer]:
        """Returns all answers in the order of their saving."""
        with _named(self.path), closing(self._connect()) as database:
            columns = "annotator, pair, axis, answer, chosen, saved_at, invited"
            sql = f"SELECT {columns} FROM answers ORDER BY saved_at, annotator, pair"
            return [
                Answer(annotator, pair, axis, answer, chosen, saved_at, bool(invited))
                for annotator, pair, axis, answer, chosen, saved_at, invited in database.execute(sql)
            ]

    def annotators(self) -> list[str]:
        """Returns the people who have answered."""
        with closing(self._connect()) as database:
            return [name for (name,) in database.execute("SELECT DISTINCT annotator FROM answers ORDER BY 1")]

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=20, isolation_level=None)
        database.execute("PRAGMA synchronous=FULL")  # an answer is on the disk when COMMIT returns
        return database


def name_of(given: str) -> str:
    """Returns a person's name as it is kept; raises ValueError unless it is 1 to 60 characters that can be shown."""
    name = " ".join(unicodedata.normalize("NFC", given).split())
    if not 1 <= len(name) <= 60 or not name.isprintable():
        raise ValueError(f"{given[:60]!r} is no name; give one of 1 to 60 characters")
    return name


def _digest(token: str) -> str:
    """Returns the digest of a token, from which nobody can derive the link."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _is_empty(database: sqlite3.Connection) -> bool:
    return not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of SQLite and of the file system as one line that names the file."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        raise ValueError(f"{path}: {error}; name another file") from error
