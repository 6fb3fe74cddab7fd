"""The HTTP interface: OpenAI's addresses for images, a page, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from bifrost_cli import __version__
from bifrost_cli.errors import BifrostError
from bifrost_cli.generation.requests import read_prompts
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.serve.answers import Limits, Refusal, body_of, status_of
from bifrost_cli.serve.bodies import EditBody, ImageBody, PromptBody, no_model, read_body
from bifrost_cli.serve.engine import Engine, Made
from bifrost_cli.serve.guard import Guard
from bifrost_cli.serve.jobs import Cancelled, Job, Work, Worker
from bifrost_cli.serve.metrics import Metrics

PAGE = (files("bifrost_cli.serve") / "page.html").read_text(encoding="utf-8")
_log = logging.getLogger(__name__)


def _hashes(tag: str) -> str:
    inner = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in inner)


POLICY = (
    f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(engine: Engine, limits: Limits, token: str | None = None) -> FastAPI:
    """The application; `app.state.worker.close()` ends its thread.

    Args:
        engine: the loaded pipeline.
        limits: of requests.
        token: that requests have to show as `Authorization: Bearer TOKEN`; None where only this machine reaches it.
    """
    app = FastAPI(title="bifrost", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    worker = Worker(limits.waiting, lambda seconds, error: _ended(metrics, seconds, error))
    metrics = Metrics(worker.__len__)
    app.state.worker = worker

    decoding = asyncio.Semaphore(2)  # uploads that are decoded at once: each may be `limits.pixels` large

    @app.exception_handler(BifrostError)
    async def refused(request: Request, error: BifrostError) -> JSONResponse:
        if status_of(error) == 500:
            _log.error("%s", error)
        return JSONResponse(body_of(error), status_of(error), getattr(error, "headers", None))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        what = f"{request.method} {request.url.path[:100]}: {error.detail}"
        fix = "POST /v1/images/generations" if error.status_code in (404, 405) else None
        return await refused(request, Refusal(error.status_code, what, code="BF-SERVE-006", fix=fix))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body_of(error), 500)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"content-security-policy": POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": engine.name, "waiting": len(worker)}

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(engine)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name != engine.name:
            raise no_model(name, engine.name)
        return _model(engine)

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        body = read_body(ImageBody, _json(await request.body()), limits, engine.name)
        engine.check(body)
        return await _answer(request, body, worker, metrics, partial(engine.generate, body))

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        fields, images = await _form(request)
        body = read_body(EditBody, fields, limits, engine.name)
        if ("mask" in images) == (body.region is not None):
            what = "what is to change is not marked, or twice"
            raise Refusal(400, what, fix="give a mask, or a region", param="mask")
        engine.check(body)
        worker.require_room()
        async with decoding:
            read = partial(engine.read_images, images["image"], images.get("mask"))
            rgb, mask = await run_in_threadpool(read)
        digest = hashlib.sha256(images["image"]).hexdigest()
        del images, fields
        return await _answer(request, body, worker, metrics, partial(engine.edit, body, rgb, mask, digest))

    @app.post("/v1/plans")
    async def plans(request: Request) -> Response:
        body = read_body(PromptBody, _json(await request.body()), limits, engine.name)
        read_prompts([body.prompt], Ui())
        (plan,) = await _results(request, Job(partial(engine.write_plan, body.prompt)), worker)
        return JSONResponse({"plan": plan})

    @app.exception_handler(Cancelled)
    async def gone(request: Request, error: Cancelled) -> Response:
        return Response(status_code=499)

    app.add_middleware(Guard, limits=limits, token=token, on_answer=metrics.answered)
    return app


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON", fix='{"prompt": "a star"}') from None


async def _form(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """The fields of a form, and its files `image` and `mask`. Their names are not read, and nothing is opened by one.
    Refusal: no form, no image, several, or an image that is no file."""
    fields, images = dict[str, str](), dict[str, bytes]()
    try:
        async with request.form(max_files=4, max_fields=50, max_part_size=100_000) as form:
            for name, value in form.multi_items():
                name = name.removesuffix("[]") if isinstance(value, UploadFile) else name
                if name in fields or name in images:
                    raise Refusal(400, f"{name[:64]} is given twice", fix="give one", param=name[:64])
                if isinstance(value, UploadFile):
                    images[name] = await value.read()
                else:
                    fields[name] = value
    except HTTPException as error:  # a form that is not whole
        raise Refusal(400, f"the form cannot be read: {error.detail}", fix="multipart/form-data") from None
    if "image" not in images or images.keys() - {"image", "mask"} or {"image", "mask"} & fields.keys():
        raise Refusal(
            400,
            "one file `image`, and at most one `mask`, are read from the request's own form",
            fix="send them as multipart/form-data",
            param="image",
        )
    return fields, images


def _model(engine: Engine) -> dict[str, Any]:
    return {"id": engine.name, "object": "model", "created": 0, "owned_by": "bifrost", "bifrost": engine.describe()}


def _ended(metrics: Metrics, seconds: float, error: BaseException | None) -> None:
    how = "whole" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
    metrics.jobs.labels(how).observe(seconds)
    if error is not None and how == "failed" and not (isinstance(error, BifrostError) and status_of(error) < 500):
        _log.error("a request failed", exc_info=error)


async def _answer(request: Request, body: ImageBody, worker: Worker, metrics: Metrics, work: Work) -> Response:
    """The images that `work` yields, when all are there or, with `stream`, one after the other with every step."""
    job = Job(work)
    if body.stream:
        kind = "image_edit" if isinstance(body, EditBody) else "image_generation"
        events = _events(job, worker, metrics, worker.submit(job), kind)
        left = BackgroundTask(worker.cancel, job)  # a client can go before the first event is asked for
        return StreamingResponse(events, media_type="text/event-stream", background=left)
    made = await _results(request, job, worker)
    metrics.images.inc(len(made))
    return JSONResponse({"created": int(time.time()), "data": [_image(one) for one in made]})


async def _results(request: Request, job: Job, worker: Worker) -> list[Any]:
    """All that a job yields; it is cancelled when the client goes."""
    worker.submit(job)
    collecting = asyncio.ensure_future(_collect(job))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise Cancelled
        return collecting.result()
    finally:
        worker.cancel(job)
        for task in (collecting, leaving):
            task.cancel()


async def _left(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(job: Job) -> list[Any]:
    return [value async for what, value in job.follow() if what == "result"]


def _image(made: Made) -> dict[str, Any]:
    """An image as OpenAI's clients read it, with what is ours beside it."""
    own = {"seed": made.seed, "size": made.size, "masked": made.masked or None}
    return {"b64_json": base64.b64encode(made.png).decode(), "revised_prompt": made.plan, **own}


async def _events(job: Job, worker: Worker, metrics: Metrics, ahead: int, kind: str) -> AsyncIterator[str]:
    """Server-sent events: the place in the queue, each step, each image, and the end."""
    try:
        yield _event("bifrost.queued", {"ahead": ahead})
        async for what, value in job.follow():
            if what == "step":
                yield _event("bifrost.step", value)
            elif what == "result":
                metrics.images.inc()
                usage = {
                    "input_tokens": 0,
                    "output_tokens": 0,
                    "total_tokens": 0,
                    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
                }
                facts = {
                    "created_at": int(time.time()),
                    "background": "opaque",
                    "output_format": "png",
                    "quality": "auto",
                    "usage": usage,
                }
                yield _event(f"{kind}.completed", {**facts, **_image(value)})
            else:
                yield ": still there\n\n"  # so that a proxy keeps the connection
        yield "data: [DONE]\n\n"
    except BifrostError as error:
        yield _event("error", body_of(error))
    except Exception as error:  # the head of the answer is out: this is the only place to say it
        with suppress(Cancelled):
            yield _event("error", body_of(error))
    finally:
        worker.cancel(job)


def _event(name: str, data: dict[str, Any]) -> str:
    kind = {} if name == "error" else {"type": name}
    return f"event: {name}\ndata: {json.dumps({**kind, **data})}\n\n"
