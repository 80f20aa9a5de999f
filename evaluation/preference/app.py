"""The voting page: two clips side by side, one question, answered by arrow keys; results at `/results`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Body, Cookie, FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from jinja2 import Environment, PackageLoader, select_autoescape

from evaluation.preference.pairs import QUESTIONS, Question
from evaluation.preference.store import VoteStore
from evaluation.preference.study import Study, load_study, open_store, results
from svd.core.errors import UserError
from svd.core.hosts import refuse_foreign_hosts

_RATER = re.compile(r"[A-Za-z0-9_-]{6,64}")


def clip_path(study: Study, folder: Path, question: Question, side: Literal["left", "right"]) -> Path:
    """Return the file behind one side of a question; in an attention check the wrong side is the spoiled clip."""
    model = study.models.index(question.left if side == "left" else question.right)
    spoiled = question.check and question.check != side
    return folder / "clips" / question.prompt / f"{model}{'-spoiled' if spoiled else ''}.mp4"


def build_app(folder: Path, database: str | None = None, names: Sequence[str] = ()) -> FastAPI:
    """Make the application for the study in `folder`; raises UserError when there is none.

    names: under which it is reached besides this machine's name and addresses.

    A rater is known by a random cookie, or by the parameter `rater` of the page's address (crowd platforms pass the
    worker's id). Addresses of clips hold question and side, never the name of a model.
    """
    study, store = load_study(folder), open_store(folder, database)
    questions = {question.number: question for question in store.questions()}
    pages = Environment(loader=PackageLoader("evaluation", "pages"), autoescape=select_autoescape(default=True))
    app = FastAPI(title="Video preference study", docs_url=None, redoc_url=None, openapi_url=None)
    refuse_foreign_hosts(app, names)

    @app.get("/", response_class=HTMLResponse)
    def page(rater: str | None = None, known: Annotated[str | None, Cookie(alias="rater")] = None) -> Response:
        name = _valid(rater) or _valid(known) or secrets.token_urlsafe(12)
        response = HTMLResponse(pages.get_template("vote.html.j2").render(study=study))
        response.set_cookie("rater", name, max_age=30 * 86400, httponly=True, samesite="lax")
        return response

    @app.get("/api/next")
    def next_question(known: Annotated[str | None, Cookie(alias="rater")] = None) -> JSONResponse:
        rater = _required(known)
        _unchanged(study, folder)
        return JSONResponse(_shown(study, store, store.next_question(rater), rater))

    @app.post("/api/vote")
    def vote(
        question: Annotated[int, Body()],
        side: Annotated[Literal["left", "right"], Body()],
        milliseconds: Annotated[int, Body(ge=0)] = 0,
        known: Annotated[str | None, Cookie(alias="rater")] = None,
    ) -> JSONResponse:
        rater = _required(known)
        try:
            stored = store.answer(question, rater, side, milliseconds)
        except UserError as error:
            raise HTTPException(404, str(error)) from None
        return JSONResponse({"stored": stored}, status_code=201 if stored else 200)

    @app.get("/clips/{number}/{side}.mp4")
    def clip(number: int, side: Literal["left", "right"]) -> FileResponse:
        if number not in questions:
            raise HTTPException(404, f"question {number} is not in this study")
        path = clip_path(study, folder, questions[number], side)
        if not path.is_file():
            raise HTTPException(404, "the clip is missing; prepare the study again")
        return FileResponse(path, media_type="video/mp4", headers={"Cache-Control": "private, max-age=3600"})

    _add_results(app, pages, study, store)
    return app


def _add_results(app: FastAPI, pages: Environment, study: Study, store: VoteStore) -> None:
    @app.get("/results", response_class=HTMLResponse)
    def table() -> str:
        found = results(study, store, shuffles=200, resamples=200)
        return pages.get_template("ratings.html.j2").render(study=study, found=found, questions=QUESTIONS)

    @app.get("/export/votes.csv", response_class=PlainTextResponse)
    def votes_csv() -> PlainTextResponse:
        return PlainTextResponse(store.export_csv(), media_type="text/csv")

    @app.get("/export/votes.json")
    def votes_json() -> Response:
        return Response(store.export_json(), media_type="application/json")


def _unchanged(study: Study, folder: Path) -> None:
    """Refuse to go on when the folder holds another study by now, whose clips would be taken for this one's."""
    try:
        current = load_study(folder)
    except UserError:
        raise HTTPException(503, "the study is being replaced") from None
    if current != study:
        raise HTTPException(409, "the study was made anew; start its page again")


def _valid(name: str | None) -> str | None:
    return name if name and _RATER.fullmatch(name) else None


def _required(name: str | None) -> str:
    found = _valid(name)
    if found is None:
        raise HTTPException(403, "no rater: open the study's page first")
    return found


def _shown(study: Study, store: VoteStore, question: Question | None, rater: str) -> dict[str, Any]:
    """Return what the page gets: no model names, and nothing that gives an attention check away."""
    mine, _ = store.progress(rater)
    if question is None:
        return {"done": True, "answered": mine}
    text = study.prompts[question.prompt]
    return {
        "done": False,
        "answered": mine,
        "question": question.number,
        "text": QUESTIONS[question.axis],
        # Without texts, prompts are names of files: shown only when the question is about the prompt.
        "prompt": text if question.axis == "prompt" or text != question.prompt else "",
        "left": f"/clips/{question.number}/left.mp4",
        "right": f"/clips/{question.number}/right.mp4",
    }


def serve(
    folder: Path, host: str = "127.0.0.1", port: int = 8123, database: str | None = None, names: Sequence[str] = ()
) -> None:
    """Serve the study until interrupted, under `names` too; raises UserError when there is no study in `folder`."""
    uvicorn.run(build_app(folder, database, names), host=host, port=port, log_level="warning")
