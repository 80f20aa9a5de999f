"""The store of votes: an SQLite file, or Postgres by URL, through SQLAlchemy. A vote is never changed."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, ForeignKey, UniqueConstraint, create_engine, event, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from evaluation.preference.pairs import Question
from evaluation.preference.ratings import Vote
from svd.core.errors import UserError
from svd.core.files import atomic_file


class _Base(DeclarativeBase):
    pass


class _Question(_Base):
    __tablename__ = "question"
    number: Mapped[int] = mapped_column(primary_key=True)
    prompt: Mapped[str]
    axis: Mapped[str]
    left: Mapped[str]
    right: Mapped[str]
    check: Mapped[str]


class _Answer(_Base):
    __tablename__ = "answer"
    __table_args__ = (UniqueConstraint("question", "rater"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    question: Mapped[int] = mapped_column(ForeignKey("question.number"), index=True)
    rater: Mapped[str] = mapped_column(index=True)
    side: Mapped[str]
    milliseconds: Mapped[int]
    at: Mapped[datetime]


class VoteStore:
    """Questions and answers of one study at an SQLAlchemy URL. Raises UserError when the database can't be reached."""

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
            self._engine = create_engine(parsed)
            if parsed.get_backend_name() == "sqlite":
                event.listen(self._engine, "connect", _wait_for_writers)
            _Base.metadata.create_all(self._engine)
        except (ArgumentError, OperationalError, ModuleNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"vote database '{_hidden(url)}' can't be opened: {reason}; give sqlite:///FILE") from None

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine."""
        return self._engine

    def plan(self, questions: Sequence[Question]) -> None:
        """Store the questions of the study; the same ones again change nothing. Raises UserError for other ones."""
        with Session(self._engine) as session:
            stored = self.questions()
            if not stored:
                session.add_all(_Question(**vars(question)) for question in questions)
                session.commit()
            elif stored != list(questions):
                raise UserError("the vote database holds another study; give another file or the same models and seed")

    def questions(self) -> list[Question]:
        """Return all questions in order."""
        with Session(self._engine) as session:
            rows = session.scalars(select(_Question).order_by(_Question.number))
            return [Question(r.number, r.prompt, r.axis, r.left, r.right, r.check) for r in rows]

    def next_question(self, rater: str) -> Question | None:
        """Return the first of the least answered questions that `rater` hasn't answered; None when none is left.

        So all questions are answered once before any is answered twice. A question that is planned three times (three
        votes) counts as three; a rater sees one of them.
        """
        with Session(self._engine) as session:
            counts = dict(
                session.execute(select(_Answer.question, func.count()).group_by(_Answer.question)).tuples().all()
            )
            mine = set(session.scalars(select(_Answer.question).where(_Answer.rater == rater)))
        questions = self.questions()
        seen = {_content(q) for q in questions if q.number in mine and not q.check}
        left = [q for q in questions if q.number not in mine and (q.check or _content(q) not in seen)]
        return min(left, key=lambda q: (counts.get(q.number, 0), q.number), default=None)

    def answer(self, question: int, rater: str, side: str, milliseconds: int) -> bool:
        """Store an answer ("left" or "right"); False, and no change, when this rater has answered the question.

        Raises UserError for an unknown question or side.
        """
        if side not in ("left", "right"):
            raise UserError(f"side '{side}' is neither left nor right")
        with Session(self._engine) as session:
            if session.get(_Question, question) is None:
                raise UserError(f"question {question} is not in this study")
            now = datetime.now(UTC).replace(tzinfo=None)
            session.add(_Answer(question=question, rater=rater, side=side, milliseconds=milliseconds, at=now))
            try:
                session.commit()
            except IntegrityError:
                return False
        return True

    def progress(self, rater: str) -> tuple[int, int]:
        """Return (answers of this rater, answers of all)."""
        with Session(self._engine) as session:
            total = session.scalar(select(func.count(_Answer.id))) or 0
            mine = session.scalar(select(func.count(_Answer.id)).where(_Answer.rater == rater)) or 0
        return mine, total

    def inattentive(self, allowed: float = 0.2) -> set[str]:
        """Return the raters who failed more than the share `allowed` of their attention checks."""
        failed: dict[str, list[bool]] = {}
        for question, row in self._answers():
            if question.check:
                failed.setdefault(row.rater, []).append(row.side != question.check)
        return {rater for rater, wrong in failed.items() if sum(wrong) > allowed * len(wrong)}

    def votes(self, axis: str | None = None, *, checked: bool = True) -> list[Vote]:
        """Return all votes without attention checks; if `checked`, without those of inattentive raters."""
        excluded = self.inattentive() if checked else set()
        found = []
        for question, row in self._answers():
            if question.check or row.rater in excluded or (axis and question.axis != axis):
                continue
            winner, loser = (question.left, question.right) if row.side == "left" else (question.right, question.left)
            found.append(Vote(question.prompt, winner, loser, row.side == "left", row.rater, question.axis))
        return found

    def _answers(self) -> list[tuple[Question, _Answer]]:
        by_number = {question.number: question for question in self.questions()}
        with Session(self._engine, expire_on_commit=False) as session:
            rows = session.scalars(select(_Answer).order_by(_Answer.id)).all()
        return [(by_number[row.question], row) for row in rows]

    def export(self) -> list[dict[str, Any]]:
        """Return every answer with its question as flat values; attention checks are included and marked."""
        excluded = self.inattentive()
        return [
            {
                "question": q.number,
                "prompt": q.prompt,
                "axis": q.axis,
                "left": q.left,
                "right": q.right,
                "check": q.check,
                "side": row.side,
                "rater": row.rater,
                "milliseconds": row.milliseconds,
                "at": row.at.isoformat(timespec="seconds") + "Z",
                "rater_failed_checks": row.rater in excluded,
            }
            for q, row in self._answers()
        ]

    def export_csv(self) -> str:
        """Return `export` as CSV."""
        rows = self.export()
        names = ("question", "prompt", "axis", "left", "right", "check", "side", "rater", "milliseconds", "at")
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [*names, "rater_failed_checks"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def export_json(self) -> str:
        """Return `export` as JSON."""
        return json.dumps(self.export(), indent=2) + "\n"


def copy_votes(source: Path, target: Path) -> None:
    """Copy the votes in an SQLite file, though its server may be running, unless the target exists.

    Does nothing when `source` is missing. Raises UserError when the target can't be written.
    """
    try:
        if target.exists() or not source.is_file():
            return
        with (
            atomic_file(target) as temporary,
            closing(sqlite3.connect(source)) as old,
            closing(sqlite3.connect(temporary)) as new,
        ):
            old.backup(new)
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{target}: votes can't be kept there ({error}); give a --database") from None


def _content(question: Question) -> tuple[str, ...]:
    return question.prompt, question.axis, *sorted((question.left, question.right))


def _wait_for_writers(connection: Any, _record: Any) -> None:
    """Make SQLite wait for other writers and survive a crash of the machine."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=10000")
    connection.execute("PRAGMA foreign_keys=ON")


def _hidden(url: str) -> str:
    """Return a URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
