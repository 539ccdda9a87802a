"""How do a browser and other programs ask for scores? By a page and an address on this machine.

    pip install starlette uvicorn python-multipart
    python -m analysis.serve --adapter out/                   # then open http://127.0.0.1:8000/
    curl -F sound=@my.wav -F text="WE CALL IT BEAR" http://127.0.0.1:8000/assess

POST /assess answers what `analysis.listen --json` prints of a recording; GET / is a page with a microphone, /health
says that it lives, /openapi.json describes it for programs. It has no TLS and no login, so it is for one machine, or
for one behind a proxy that has them. Nothing is stored, and no log has what was sent.

    request ─> sound and text ─> decoded by FFmpeg ─> waits ─> one model answers a batch ─> JSON
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
import hashlib
import html
import json
from pathlib import Path
from queue import SimpleQueue
import re
import socket
import sys
from threading import Thread
from typing import Annotated

from pydantic import Field, TypeAdapter
from tyro.conf import UseAppendAction

from analysis import assessor
import data
import evaluate
from support import cli
import tiny

try:
    import h11
    import python_multipart  # noqa: F401  starlette's forms need it
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    print(f"analysis.serve: error: {error}: pip install starlette uvicorn python-multipart", file=sys.stderr)
    sys.exit(2)

LARGEST = 9_000_000  # bytes of a request; 30 s of 48 kHz stereo with 24 bits are 8.6 MB
TEXT = 2_000  # bytes; three words a second are 90 words in 30 s
WAITING = 2 * assessor.BATCH  # requests between their first byte and their answer
DECODERS = 4  # threads, each with a process of FFmpeg; one that needs its full time leaves three
CONNECTIONS, BACKLOG = 100, 32  # accepted and kept, accepted at once; with the model's files below 256
HEAD = 10  # s until a connection has sent the head of its next request
ARRIVING = 30  # s that a request may take to arrive
GOODBYE = 5  # s that open requests have when the service ends
AGAIN = {"Retry-After": "5"}  # s
STATUS = {cli.InputError: 422, ClientDisconnect: 400, Exception: 500}

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("LONGEST", str(assessor.LONGEST))
OPENAPI = json.loads(Path(__file__).with_name("openapi.json").read_text(encoding="utf-8"))
_, KINDS = TypeAdapter.json_schemas(
    [(kind, "validation", TypeAdapter(kind)) for kind in (assessor.Result, assessor.Refusal)],
    ref_template="#/components/schemas/{model}",
)
OPENAPI["components"] = {"schemas": KINDS["$defs"]}
POLICY = "default-src 'none'; connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'"
for tag in ("style", "script"):  # the page's own, no other
    digest = hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", PAGE, re.DOTALL)[1].encode()).digest()
    POLICY += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
HEADERS = {"Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'"}


@dataclass(kw_only=True)
class Settings(evaluate.ModelSettings):
    host: str = "127.0.0.1"  # address to listen at; the default is reached from this machine alone
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000  # 0: any free one
    # of a proxy with TLS, whose page may ask: https://scores.example; may be given several times
    origin: UseAppendAction[tuple[Annotated[str, Field(pattern=r"^https?://[^/\s]+$")], ...]] = ()
    pronunciations: tuple[Path, ...] = ()  # of words, before the CMU dictionary's: files of analysis.pronunciations


class Connection(H11Protocol):
    """uvicorn's, but there are no more than CONNECTIONS, and one that sends no whole head in HEAD seconds ends."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > CONNECTIONS:
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n")
            transport.close()

    def _wait_for_head(self):
        self.waits = self.loop.call_later(HEAD, self._end_without_head)

    def _end_without_head(self):
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()

    def on_response_complete(self) -> None:
        self.waits.cancel()
        self._wait_for_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waits.cancel()
        super().connection_lost(exc)


class Service:
    """Answers the questions of many requests with one model, in batches."""

    def __init__(self, assess: assessor.Assessor) -> None:
        self.assess, self.requests, self.asked = assess, 0, SimpleQueue()
        self.decoders = ThreadPoolExecutor(DECODERS)
        Thread(target=self._run, daemon=True).start()

    async def result(self, content: bytes, text: str | None) -> assessor.Result:
        """What the Assessor says of a sound file's bytes. Raises InputError."""
        read = asyncio.get_running_loop().run_in_executor
        question = await read(self.decoders, assessor.ask, content, text, self.assess.lexicons)
        self.asked.put((question, answer := Future()))
        return await asyncio.shield(asyncio.wrap_future(answer))  # cancelled, it could not take its result

    def _run(self):
        while True:
            batch = [self.asked.get()]
            while len(batch) < assessor.BATCH and not self.asked.empty():
                batch.append(self.asked.get())
            self._answer(batch)

    def _answer(self, batch):
        questions, answers = zip(*batch)
        try:
            for answer, result in zip(answers, self.assess.answer(questions)):
                answer.set_result(result)
        except Exception as error:
            if len(batch) == 1:
                answers[0].set_exception(error)
            else:  # one that the model fails on loses no other
                for one in batch:
                    self._answer([one])


async def received(request: Request, room: bool) -> AsyncIterator[bytes]:
    """The chunks of a request's body. Raises HTTPException where it is too large, or has no room, after dropping it."""
    size, most = 0, LARGEST if room else 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            yield chunk
    if size > most and not room:
        raise HTTPException(503, "too many requests are waiting: try again soon", AGAIN)
    if size > most:
        raise HTTPException(413, f"the request has {size:,} bytes, more than {most:,}: send mono, or FLAC")


async def read_form(request: Request, room: bool) -> tuple[bytes, str | None]:
    """The sound file's bytes, and the text, of a request. Raises HTTPException for anything else."""
    most = {"max_files": 1, "max_fields": 1, "max_part_size": TEXT}  # of a part in memory that is no file
    try:
        parser = MultiPartParser(request.headers, received(request, room), **most)
        parser.spool_max_size = LARGEST  # so nothing of it goes to the disk
        async with asyncio.timeout(ARRIVING):
            form = dict((await parser.parse()).multi_items())
    except TimeoutError as error:
        raise HTTPException(408, f"the request took more than {ARRIVING} s to arrive") from error
    except (MultiPartException, KeyError) as error:
        raise HTTPException(400, f"the request is not a form (multipart/form-data): {error}") from error
    file, text = form.pop("sound", ""), form.pop("text", None)
    if form or isinstance(file, str) or not isinstance(text, str | None):
        raise HTTPException(400, "the form's fields are sound, a file, and text, which may be left out")
    return await file.read(), text


def learnt(evaluation: evaluate.Evaluation) -> tuple[str, data.Utterance | None]:
    """What a model knows, by the corpus it was trained on, and a recording to try where that is synthetic."""
    if not evaluation.adapter:
        return "It was not fine-tuned, so its scores mean nothing.", None
    corpus = evaluation.training.data
    if Path(corpus).is_dir() and not evaluation.training.data_reader:
        utterances = data.read_corpus(Path(corpus), "test", limit=100)
        words = {word for utterance in utterances for word in utterance.text.upper().split()}
        if words <= tiny.LEXICON.keys():
            listed = ", ".join(sorted(words)).lower()
            return f"It knows {len(words)} synthetic words, and no human voice: {listed}.", utterances[0]
    return f"It knows {'English read by Mandarin speakers' if corpus == data.HUB_CORPUS else corpus} alone.", None


def application(service: Service, origins: Sequence[str], knows: str, example: data.Utterance | None) -> Starlette:
    """The service as a web server calls it. origins: of its own page, no other may ask; knows, example: of `learnt`."""
    shown = PAGE.replace("KNOWS", html.escape(knows))
    if example:
        shown = shown.replace('id="try" hidden', f'id="try" data-text="{html.escape(example.text)}"')

    async def assess(request):
        if request.headers.get("origin", origins[0]) not in origins:  # programs send none
            raise HTTPException(403, f"only a page of {' or '.join(origins)} may ask: --origin adds one")
        room = service.requests < WAITING
        service.requests += room
        try:
            return reply(asdict(await service.result(*await read_form(request, room))))
        finally:
            service.requests -= room

    def reply(content, status=200, headers=None):  # in ASCII: a model may write half of a surrogate pair
        return Response(json.dumps(content), status, headers, "application/json")

    async def refuse(request, error):
        status = getattr(error, "status_code", STATUS.get(type(error), 500))
        text = getattr(error, "detail", str(error)) if status != 500 else "the service failed: its log says why"
        return reply(asdict(assessor.Refusal("recording", text)), status, getattr(error, "headers", None))

    routes = [
        Route("/", lambda _: HTMLResponse(shown, headers=HEADERS)),
        Route("/assess", assess, methods=["POST"]),
        Route("/health", lambda _: reply({"version": assessor.VERSION, "requests": service.requests})),
        Route("/openapi.json", lambda _: reply(OPENAPI)),
    ]
    if example:
        routes.append(Route("/example", lambda _: Response(example.recording(), media_type="audio/wav")))
    refused = dict.fromkeys([HTTPException, *STATUS], refuse)
    return Starlette(routes=routes, exception_handlers=refused)


def server(app: Starlette) -> uvicorn.Server:
    how = {"http": Connection, "ws": "none", "log_level": "warning", "access_log": False}
    return uvicorn.Server(uvicorn.Config(app, backlog=BACKLOG, timeout_graceful_shutdown=GOODBYE, **how))


def main() -> None:
    settings = cli.parse(Settings, __doc__)
    host = settings.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before the model, which may take minutes
        listener = socket.create_server((host, settings.port), family=family)
    except OSError as error:
        raise cli.InputError(f"--host {host} --port {settings.port}: {error.strerror}: choose another") from error
    port = listener.getsockname()[1]
    names = dict.fromkeys([f"[{host}]" if ":" in host else host, "localhost", "127.0.0.1", "[::1]"])
    origins = [f"http://{name}" + f":{port}" * (port != 80) for name in names]
    try:
        assess = assessor.Assessor(settings, settings.pronunciations)
        app = application(Service(assess), [*origins, *settings.origin], *learnt(assess.evaluation))
        _ = assess.model  # loaded before the first request
        print(f"{origins[0]}/  (Ctrl-C ends it)", flush=True)
        server(app).run(sockets=[listener])
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli.run_script("analysis.serve", main)
