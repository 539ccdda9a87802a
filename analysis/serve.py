"""How do a browser and other programs ask for scores? By a page and an address on this machine.

    pip install starlette uvicorn python-multipart pebble
    python -m analysis.serve --adapter out/                   # then open http://127.0.0.1:8000/
    curl -F sound=@my.wav -F text="WE CALL IT BEAR" http://127.0.0.1:8000/assess

POST /assess answers what `analysis.listen --json` prints of a recording; GET / is a page with a microphone. It has no
TLS and no login, so it is for one machine. Nothing is stored, and no log has what was sent.

    request ─> sound and text ─> decoded in another process ─> waits ─> one model answers a batch ─> JSON

A sound file of 1.4 MB can take 0.8 GB to decode, and no thread can be stopped in libsndfile. So processes with little
time and memory decode, and the model gets the samples.
"""

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
import hashlib
import io
import json
import multiprocessing
from pathlib import Path
import re
import resource
import signal
import socket
import sys
from typing import Annotated

from pydantic import Field

from analysis import assessor, doubts, pronunciations
import evaluate
from support import cli, sound

try:
    import pebble
    import python_multipart  # noqa: F401  starlette's forms need it
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route
    import uvicorn
except ImportError as error:
    print(f"analysis.serve: error: {error}: pip install starlette uvicorn python-multipart pebble", file=sys.stderr)
    sys.exit(2)

LARGEST = 9_000_000  # bytes of a request; 30 s of 48 kHz stereo with 24 bits are 8.6 MB
CHARACTERS = 500  # of a text; three words a second are 90 words in 30 s
WAITING = 2 * assessor.BATCH  # requests between their first byte and their answer
AGAIN = "5"  # s until one that found no room should be tried again
ARRIVING = 30  # s that a request may take to arrive
DECODERS = 2  # processes
DECODING = 15  # s; 30 s of speech take 0.5, the slowest file that was found 2, or 7 beside much other work
DECODED = 2**28  # bytes that decoding may take; 29 s of FLAC with 96 kHz in stereo fit
SLOW = ["analysis.assessor", "scipy.signal", "silero_vad", "soundfile", "starlette.applications", "uvicorn"]  # imports
GOODBYE = 5  # s that open requests have when the service ends
STATUS = {cli.InputError: 422, ClientDisconnect: 400, Exception: 500}

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("LONGEST", str(assessor.LONGEST))
POLICY = "default-src 'none'; connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'"
for tag in ("style", "script"):  # the page's own, no other
    digest = hashlib.sha256(re.search(f"<{tag}>(.*)</{tag}>", PAGE, re.DOTALL)[1].encode()).digest()
    POLICY += f"; {tag}-src 'sha256-{base64.b64encode(digest).decode()}'"


@dataclass(kw_only=True)
class Settings(evaluate.ModelSettings):
    host: str = "127.0.0.1"  # address to listen at; the default is reached from this machine alone
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000  # 0: any free one
    pronunciations: tuple[Path, ...] = ()  # of words, before the CMU dictionary's: files of analysis.pronunciations


def start_decoder():
    """Load what `decode` needs, then limit the process' memory (on Linux; macOS has no such limit)."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the service ends this one
    torch.set_num_threads(1)
    doubts.speech_seconds(torch.zeros(sound.SAMPLE_RATE))
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + DECODED, held + DECODED))


def decode(content, text, lexicon):
    """The Question of assessor.ask with samples for a recording, so that the sound file is decoded here alone."""
    import soundfile

    question, wave = assessor.ask(content, text, [lexicon]), io.BytesIO()
    samples = sound.read_audio(question.utterance.recording)  # (S,)
    soundfile.write(wave, samples, sound.SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return replace(question, utterance=replace(question.utterance, recording=partial(bytes, wave.getvalue())))


class Service:
    """Answers the questions of many requests with one model, in batches. assess: an assessor.Assessor."""

    def __init__(self, assess):  # decoders are forks of a process that has imported what takes seconds
        self.assess, self.requests, self.asked = assess, 0, asyncio.Queue()
        self.model_thread = ThreadPoolExecutor(1)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(SLOW)
        self.decoders = pebble.ProcessPool(DECODERS, initializer=start_decoder, context=context)
        self.decoders.schedule(int)  # so that they start now

    async def result(self, content, text):
        """What the Assessor says of a sound file's bytes. Raises InputError."""
        words = pronunciations.of_text(text, self.assess.lexicons) if text is not None else ()
        try:
            decoding = self.decoders.schedule(decode, (content, text, dict(words)), timeout=DECODING)
            question = await asyncio.wrap_future(decoding)
        except (TimeoutError, MemoryError, pebble.ProcessExpired) as error:
            limits = f"{DECODING} s and {DECODED >> 20} MB"
            raise cli.InputError(f"recording: decoding it takes more than {limits}: convert it to WAV") from error
        answer = asyncio.get_running_loop().create_future()
        self.asked.put_nowait((question, answer))
        return await answer

    async def run(self):
        """Answer what is waiting, until cancelled."""
        while True:
            batch = [await self.asked.get()]
            while len(batch) < assessor.BATCH and not self.asked.empty():
                batch.append(self.asked.get_nowait())
            await self._answer(batch)

    async def _answer(self, batch):
        questions, answers = zip(*batch)
        try:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self.model_thread, self.assess.answer, questions)
        except Exception as error:
            if len(batch) > 1:  # one that the model fails on loses no other
                for one in batch:
                    await self._answer([one])
                return
            results = [error]
        for answer, result in zip(answers, results):
            if not answer.done():  # its request was given up when the service ended
                (answer.set_exception if isinstance(result, Exception) else answer.set_result)(result)


async def received(request, room):
    """The chunks of a request's body. Raises HTTPException where it is too large, or has no room, after dropping it.

    A client that is still sending would not read why it is refused.
    """
    size, most = 0, LARGEST if room else 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            yield chunk
    if size > most and not room:
        raise HTTPException(503, "too many requests are waiting: try again soon", {"Retry-After": AGAIN})
    if size > most:
        raise HTTPException(413, f"the request has {size:,} bytes, more than {most:,}: send mono, or FLAC")


async def read_form(request, room):
    """(the sound file's bytes, the text or None) of a request. Raises HTTPException for anything else."""
    chunks, most = received(request, room), 4 * CHARACTERS  # bytes
    try:
        parser = MultiPartParser(request.headers, chunks, max_files=1, max_fields=1, max_part_size=most)
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
    if text and len(text) > CHARACTERS:
        raise HTTPException(413, f"the text has {len(text):,} characters, more than {CHARACTERS}: cut it")
    return await file.read(), text


def application(service, origins):
    """The service as a web server calls it. origins: those of its own page; no other page may ask."""

    async def page(request):
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'"})

    async def assess(request):
        if request.headers.get("origin", origins[0]) not in origins:  # programs send none
            raise HTTPException(403, f"only a page of {' or '.join(origins)} may ask: --host adds one")
        room = service.requests < WAITING
        service.requests += room
        try:
            return reply(await service.result(*await read_form(request, room)))
        finally:
            service.requests -= room

    def reply(content, status=200, headers=None):  # in ASCII: a model may write half of a surrogate pair
        return Response(json.dumps(content), status, headers, "application/json")

    async def refuse(request, error):
        status = getattr(error, "status_code", STATUS.get(type(error), 500))
        text = getattr(error, "detail", str(error)) if status != 500 else "the service failed: its log says why"
        return reply({"version": assessor.VERSION, "error": text}, status, getattr(error, "headers", None))

    @asynccontextmanager
    async def lifespan(app):
        answering = asyncio.create_task(service.run())
        yield
        answering.cancel()
        service.decoders.stop()

    routes = [Route("/", page), Route("/assess", assess, methods=["POST"])]
    refused = dict.fromkeys([HTTPException, *STATUS], refuse)
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=refused)


def main():
    settings = cli.parse(Settings, __doc__)
    host, model = settings.host, {f.name: getattr(settings, f.name) for f in fields(evaluate.ModelSettings)}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before the model, which may take minutes
        listener = socket.create_server((host, settings.port), family=family)
    except OSError as error:
        raise cli.InputError(f"--host {host} --port {settings.port}: {error.strerror}: choose another") from error
    port = listener.getsockname()[1]
    names = dict.fromkeys([f"[{host}]" if ":" in host else host, "localhost", "127.0.0.1", "[::1]"])
    origins = [f"http://{name}" + f":{port}" * (port != 80) for name in names]
    how = {"http": "h11", "ws": "none", "lifespan": "on", "log_level": "warning", "access_log": False}
    try:
        service = Service(assessor.Assessor(pronunciations=settings.pronunciations, **model))
        config = uvicorn.Config(application(service, origins), timeout_graceful_shutdown=GOODBYE, **how)
        print(f"{origins[0]}/  (Ctrl-C ends it)", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli.run_script("analysis.serve", main)
