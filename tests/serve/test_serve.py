"""The server: OpenAI's own client against it, bad requests of every kind, the queue, and who may ask."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import select
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from fixtures_flux import save_system
from fixtures_serve import StandIn, command, health, live, say, wait_for
from PIL import Image

from bifrost_cli import BifrostPipeline
from bifrost_cli.data.png import XMP_CHUNK, png_text
from bifrost_cli.data.xmp import EDITED
from bifrost_cli.errors import EnvironmentProblem, UsageError
from bifrost_cli.generation.generate import generate
from bifrost_cli.serve.access import read_token
from bifrost_cli.serve.answers import Limits
from bifrost_cli.serve.connections import listen
from bifrost_cli.serve.engine import Engine

GENERATIONS = "/v1/images/generations"
TOKEN = "a-token-of-thirty-two-characters"


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def png(item) -> bytes:
    return base64.b64decode(item.b64_json)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return save_system(tmp_path_factory.mktemp("system"), decode_steps=4, branch_guidance=2.0)


@pytest.fixture(scope="module")
def pipe(system):
    return BifrostPipeline(system.recipe, system.branch, system.controlnet, device="cpu")


@pytest.fixture(scope="module")
def real(pipe):
    """A server with a whole random system."""
    limits = Limits()
    with live(Engine(pipe, "bifrost", limits), limits) as url:
        yield url


@pytest.fixture
def engine():
    return StandIn()


@pytest.fixture
def url(engine):
    with live(engine, Limits(body_bytes=20_000, waiting=2, seconds=1.0, connections=20)) as url:
        yield url
        engine.gate.set()


def post(url: str, /, **body) -> httpx.Response:
    return httpx.post(url + GENERATIONS, json=body, timeout=30)


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return answer.status_code, error["code"], error["param"]


# ---- OpenAI's client -------------------------------------------------------------------------------------------------


def test_the_client_gets_the_bytes_of_the_command(real, system, tmp_path):
    made = client(real).images.generate(
        model="bifrost", prompt="a star", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 5}
    )
    assert [image.seed for image in made.data] == [5, 6]
    parts = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu"}
    folder = generate(system.recipe, "a star", output=tmp_path / "two", n=2, seed=5, **parts).path
    for index, image in enumerate(made.data):
        assert png(image) == (folder / f"{index:05d}.png").read_bytes()


def test_settings_of_a_request_are_those_of_the_image_and_stand_in_it(real):
    ask = client(real).images.generate
    plain = png(ask(prompt="a star", extra_body={"seed": 1}).data[0])
    other = png(ask(prompt="a star", extra_body={"seed": 1, "num_inference_steps": 3, "branch_guidance": 1}).data[0])
    assert Image.open(io.BytesIO(plain)).tobytes() != Image.open(io.BytesIO(other)).tobytes()
    settings = json.loads(png_text(other)["settings"])
    assert (settings["steps"], settings["guidance"]) == (3, 1.0)
    assert json.loads(png_text(plain)["settings"])["steps"] == 2


def test_a_plan_is_told(real):
    made = client(real).images.generate(prompt="a star", extra_body={"plan": True})
    assert isinstance(made.data[0].revised_prompt, str) and made.data[0].seed >= 0
    assert client(real).images.generate(prompt="a star").data[0].revised_prompt is None


def test_a_stream_shows_each_patch_as_it_is_known_and_ends_with_the_image(real):
    events = list(client(real).images.generate(prompt="a star", n=2, stream=True, extra_body={"seed": 5}))
    kinds = [event.type for event in events]
    assert kinds[0] == "bifrost.queued" and kinds[-1] == "image_generation.completed"
    done = [event for event in events if event.type == "image_generation.completed"]
    assert [event.seed for event in done] == [5, 6]
    assert Image.open(io.BytesIO(base64.b64decode(done[0].b64_json))).size == (64, 64)
    known = [16 - event.patches.count(None) for event in events if getattr(event, "stage", "") == "decode"]
    assert known and set(known) <= {1, 5, 10, 16} | set(range(17)) and max(known) == 16
    assert any(getattr(event, "stage", "") == "diffusion" for event in events)


def test_models_can_be_listed(real):
    assert [model.id for model in client(real).models.list()] == ["bifrost"]
    assert client(real).models.retrieve("bifrost").bifrost["grid"] == [4, 4]
    with pytest.raises(openai.NotFoundError, match="BF-SERVE-005"):
        client(real).models.retrieve("dall-e-2")


# ---- edits -----------------------------------------------------------------------------------------------------------


def picture(size=(64, 64), colour=(200, 40, 40), **options) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, options.pop("format", "PNG"), **options)
    return stream.getvalue()


def half_mask(size=(64, 64), transparent=False) -> bytes:
    """Its left half is to change."""
    mask = Image.new("RGBA", size, (255, 255, 255, 255) if transparent else (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0) if transparent else (255, 255, 255, 255), (0, 0, size[0] // 2, size[1]))
    stream = io.BytesIO()
    (mask if transparent else mask.convert("L")).save(stream, "PNG")
    return stream.getvalue()


LEFT = [True, True, False, False] * 4


def test_the_client_edits_as_the_pipeline_does(real, pipe):
    edit = client(real).images.edit
    image, mask = picture(), half_mask()
    made = edit(image=("a.png", image), mask=("m.png", mask), prompt="a star", n=2, size="auto", extra_body={"seed": 4})
    assert [one.seed for one in made.data] == [4, 5] and made.data[0].masked == LEFT
    direct = pipe.edit(np.asarray(Image.open(io.BytesIO(image))), "a star", box=(0, 0, 32, 64), seed=4).images[0]
    assert Image.open(io.BytesIO(png(made.data[0]))).tobytes() == direct.tobytes()
    facts = json.loads(png_text(png(made.data[0]))["settings"])
    assert EDITED in png_text(png(made.data[0]))[XMP_CHUNK]
    assert facts["masked"] == "1100" * 4 and facts["edit_of"] == hashlib.sha256(image).hexdigest()
    clear = edit(image=("a.png", image), mask=half_mask(transparent=True), prompt="a star", extra_body={"seed": 4})
    assert png(clear.data[0]) == png(made.data[0])


def test_a_large_photograph_is_cut_as_everywhere(real):
    image, mask = picture((300, 200), format="JPEG"), half_mask((300, 200))
    assert client(real).images.edit(image=image, mask=mask, prompt="a").data[0].masked == LEFT


def test_an_edit_streams_with_what_is_known_from_the_start(real):
    options = {"image": picture(), "mask": half_mask(), "prompt": "a star", "stream": True}
    events = list(client(real).images.edit(**options, extra_body={"keep_pixels": "true", "plan": "true"}))
    assert events[-1].type == "image_edit.completed" and events[-1].revised_prompt is not None
    known = [[patch is not None for patch in one.patches] for one in events if getattr(one, "stage", "") == "decode"]
    assert known and all(row[2:4] == [True, True] for row in known)


@pytest.mark.parametrize(
    ("files", "fields", "param", "code"),
    [
        ({}, {}, "image", "BF-USE-001"),
        ({"image": picture()}, {}, "mask", "BF-USE-001"),
        ({"mask": half_mask()}, {"image": "/etc/passwd"}, "image", "BF-USE-001"),
        ({"image": picture()}, {"mask": "http://127.0.0.1/mask.png"}, "image", "BF-USE-001"),
        ({"image": picture(), "mask": half_mask(), "other": picture()}, {}, "image", "BF-USE-001"),
        ({"image": picture(), "mask": half_mask()}, {"region": "left"}, "mask", "BF-USE-001"),
        ({"image": picture(), "mask": half_mask()}, {"strength": "0"}, "strength", "BF-USE-001"),
        ({"image": picture(), "mask": half_mask()}, {"path": "/etc"}, "path", "BF-USE-001"),
        ({"image": picture(), "mask": half_mask((32, 32))}, {}, None, "BF-USE-001"),
        ({"image": picture(), "mask": picture(colour=(0, 0, 0))}, {}, None, "BF-USE-001"),
        ({"image": picture(), "mask": picture(colour=(255, 255, 255))}, {}, None, "BF-USE-001"),
        ({"image": b"GIF89a", "mask": half_mask()}, {}, None, "BF-DATA-003"),
        ({"image": b"", "mask": half_mask()}, {}, None, "BF-DATA-003"),
        ({"image": picture()[:90], "mask": half_mask()}, {}, None, "BF-DATA-003"),
        ({"image": picture(), "mask": b"<svg/>"}, {}, None, "BF-DATA-003"),
        ({"image": picture((8000, 4000)), "mask": half_mask()}, {}, None, "BF-DATA-003"),
    ],
)
def test_a_bad_edit_is_refused(real, files, fields, param, code):
    answer = httpx.post(f"{real}/v1/images/edits", data={"prompt": "a", **fields}, files=files or {"no": b""})
    assert refusal(answer) == (400, code, param)


def test_two_images_or_no_form_are_refused(real):
    address = f"{real}/v1/images/edits"
    with pytest.raises(openai.BadRequestError, match="twice"):
        client(real).images.edit(image=[picture(), picture()], mask=half_mask(), prompt="a")
    assert refusal(httpx.post(address, json={"prompt": "a", "image": "/etc/passwd"}))[2] == "image"
    assert refusal(httpx.post(address, content=b"--x", headers={"Content-Type": "multipart/form-data"}))[0] == 400
    cut = httpx.Request("POST", address, data={"prompt": "a"}, files={"image": picture()}).read()[:150]
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data; boundary="):
        assert refusal(httpx.post(address, content=cut, headers={"Content-Type": kind}))[0] == 400


def test_a_plan_is_written_and_one_that_is_given_is_read(real, pipe):
    plan = httpx.post(f"{real}/v1/plans", json={"prompt": "a star"}).json()["plan"]
    assert plan == pipe("a star", plan=True).plans[0]
    own = post(real, prompt="a star", plan="something else", seed=0).json()["data"][0]
    assert own["revised_prompt"] == png_text(base64.b64decode(own["b64_json"]))["plan"] == "something else"
    assert refusal(post(real, prompt="a star", plan=" "))[0] == 400


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({}, 400, "prompt"),
        ({"prompt": ["a"]}, 400, "prompt"),
        ({"prompt": "a" * 8001}, 400, "prompt"),
        ({"prompt": "a", "n": 1000}, 400, "n"),
        ({"prompt": "a", "n": 0}, 400, "n"),
        ({"prompt": "a", "size": "64"}, 400, "size"),
        ({"prompt": "a", "size": "64x32"}, 400, "size"),
        ({"prompt": "a", "size": "4096x4096"}, 400, "size"),
        ({"prompt": "a", "num_inference_steps": 10**9}, 400, "num_inference_steps"),
        ({"prompt": "a", "decode_steps": 101}, 400, "decode_steps"),
        ({"prompt": "a", "guidance_scale": "much"}, 400, "guidance_scale"),
        ({"prompt": "a", "seed": -1}, 400, "seed"),
        ({"prompt": "a", "seed": 2**60}, 400, "seed"),
        ({"prompt": "a", "response_format": "url"}, 400, "response_format"),
        ({"prompt": "a", "model": "dall-e-3"}, 404, "model"),
        ({"prompt": "a", "image": "file:///etc/passwd"}, 400, "image"),
        ({"prompt": "a", "url": "http://127.0.0.1/"}, 400, "url"),
    ],
)
def test_a_bad_field_is_named(url, engine, given, status, param):
    answer = post(url, **given)
    assert refusal(answer)[0] == status and refusal(answer)[2] == param
    assert not engine.asked


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"[" * 9000, b'{"prompt": NaN}', b"\xff\xfe"])
def test_what_is_no_object_is_refused(url, body):
    assert refusal(httpx.post(url + GENERATIONS, content=body))[0] == 400


def test_what_only_the_pipeline_knows_is_refused_before_the_queue(real):
    for given in ({"size": "128x128"}, {"temperature": -1.0}, {"prompt": "a\0"}, {"prompt": "\ud800"}, {"steps": 3}):
        status, code, _ = refusal(httpx.post(real + GENERATIONS, content=json.dumps({"prompt": "a", **given})))
        assert (status, code) == (400, "BF-USE-001"), given


def test_a_path_as_a_prompt_is_text(url, engine):
    assert post(url, prompt="/etc/passwd").status_code == 200
    assert engine.asked[0].prompt == "/etc/passwd"


def test_a_failure_says_nothing_of_this_machine_and_the_next_request_works(url, caplog):
    for prompt in ("fail", "fail at once"):
        answer = post(url, prompt=prompt)
        assert refusal(answer)[:2] == (500, "BF-BUG-001") and "secret" not in answer.text
    assert post(url, prompt="a").status_code == 200
    events = httpx.post(url + GENERATIONS, json={"prompt": "fail", "stream": True}).text
    assert '"code": "BF-BUG-001"' in events and "secret" not in events


@pytest.mark.parametrize(("path", "status"), [("/v2", 404), (GENERATIONS, 405), ("/../etc/passwd", 404)])
def test_other_addresses_are_none(url, path, status):
    assert refusal(httpx.get(url + path))[:2] == (status, "BF-SERVE-006")


# ---- too much, too slowly --------------------------------------------------------------------------------------------


def test_a_body_of_100_megabytes_is_refused_and_not_kept():
    def chunks():
        for _ in range(100):
            yield b"x" * 1_000_000

    with live(StandIn()) as url:
        assert refusal(httpx.post(url + GENERATIONS, content=b"x" * 100_000_000))[:2] == (413, "BF-SERVE-003")
        assert refusal(httpx.post(url + GENERATIONS, content=chunks()))[:2] == (413, "BF-SERVE-003")
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n"
        assert b" 413 " in say(url, head.encode())
        assert post(url, prompt="a").status_code == 200


def test_what_is_on_its_way_together_is_bounded():
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n".encode()
    with live(StandIn(), Limits(body_bytes=10_000)) as url:
        host, port = url.removeprefix("http://").split(":")
        halves = [socket.create_connection((host, int(port))) for _ in range(17)]
        for half in halves:
            half.sendall(head + b"x" * 9_900)
        (refused,) = select.select(halves, [], [], 20)[0]
        assert b" 429 " in refused.recv(100) and health(url)["status"] == "ok"
        for half in halves:
            half.close()
        wait_for(lambda: post(url, prompt="a").status_code == 200)


def test_half_a_request_is_told_that_it_is_late(url):
    half = f'POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{"prompt"'
    answer = say(url, half.encode())
    assert answer.startswith(b"HTTP/1.1 408 ") and b"BF-SERVE-004" in answer
    assert say(url, b"POST /v1/images/gen") == b""  # half a head: only closed
    assert b" 200 " in (twice := say(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"))
    assert twice.count(b"HTTP/1.1") == 1


def test_many_that_say_nothing_do_not_keep_others_out(url):
    host, port = url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(100)]
    try:
        assert health(url)["status"] == "ok"
        assert silent[0].recv(1) == b""
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0" * 100_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
    ],
)
def test_what_is_no_http_ends(url, data):
    assert say(url, data)[:11] in (b"HTTP/1.1 40", b"")
    assert health(url)["status"] == "ok"


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again_and_loses_nothing(url, engine):
    engine.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post, url, prompt=f"prompt {index}", seed=index) for index in range(3)]
        wait_for(lambda: health(url)["waiting"] == 3)
        answer = post(url, prompt="one more")
        assert refusal(answer)[:2] == (429, "BF-SERVE-002") and int(answer.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client(url).images.generate(prompt="one more")
        engine.gate.set()
        for index, future in enumerate(waiting):
            image = base64.b64decode(future.result().json()["data"][0]["b64_json"])
            assert png_text(image) == {"prompt": f"prompt {index}"}
            assert Image.open(io.BytesIO(image)).getpixel((0, 0)) == (index,) * 3
    assert health(url)["waiting"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_cancelled_waiting_or_running(url, engine, stream):
    engine.gate.clear()
    running, waiting = (json.dumps({"prompt": name, "stream": stream}).encode() for name in ("running", "waiting"))
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(running)}\r\n\r\n".encode()
    first, second = (socket.create_connection((host, int(port))) for _ in range(2))
    first.sendall(head + running)
    wait_for(lambda: engine.steps)
    second.sendall(head + waiting)
    wait_for(lambda: health(url)["waiting"] == 2)
    second.close()
    wait_for(lambda: health(url)["waiting"] == 1)
    first.close()
    wait_for(lambda: health(url)["waiting"] == 0)
    assert [body.prompt for body in engine.asked] == ["running"]
    assert 'bifrost_job_seconds_count{ended="cancelled"} 1.0' in httpx.get(f"{url}/metrics").text


def test_an_end_answers_what_waits(engine):
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        with live(engine) as url:
            answers = [pool.submit(post, url, prompt="running")]
            wait_for(lambda: engine.asked)
            answers.append(pool.submit(post, url, prompt="waiting"))
            wait_for(lambda: health(url)["waiting"] == 2)
            threading.Timer(0.5, engine.gate.set).start()
        assert answers[0].result().status_code == 200
        assert refusal(answers[1].result())[:2] == (503, "BF-SERVE-009")


def test_metrics_count(url):
    post(url, prompt="a", n=3)
    post(url)
    text = httpx.get(f"{url}/metrics").text
    assert "bifrost_images_total 3.0" in text and "bifrost_queue 0.0" in text
    assert f'bifrost_answers_total{{route="{GENERATIONS}",status="400"}} 1.0' in text


# ---- who may ask -----------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_where_there_is_one():
    with live(StandIn(), token=TOKEN) as url:
        assert client(url, TOKEN).images.generate(prompt="a").data
        for key in ("wrong", TOKEN[:-1], TOKEN + "a", "\u00e9"):
            shown = {"Authorization": f"Bearer {key}".encode()}
            answer = httpx.post(url + GENERATIONS, json={"prompt": "a"}, headers=shown)
            assert refusal(answer)[:2] == (401, "BF-SERVE-001") and answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            client(url, "wrong").images.generate(prompt="a")
        for path in ("/metrics", "/v1/models", "/anything"):
            assert refusal(httpx.get(url + path))[0] == 401
        assert httpx.get(url + "/").status_code == httpx.get(url + "/health").status_code == 200


def test_pages_of_other_sites_are_kept_out(url, engine):
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}, {"Host": ""}):
        answer = httpx.post(url + GENERATIONS, json={"prompt": "a"}, headers=headers)
        assert refusal(answer)[:2] == (403, "BF-SERVE-007")
    assert not engine.asked
    assert httpx.post(url + GENERATIONS, json={"prompt": "a"}, headers={"Origin": url}).status_code == 200


def test_a_server_that_others_reach_needs_a_token(tmp_path):
    assert read_token(None, "127.0.0.1") is read_token(None, "localhost") is read_token(None, "::1") is None
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(UsageError, match="token"):
            read_token(None, host)
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert read_token(file, "0.0.0.0") == TOKEN
    for text in ("", "short", "two words of a token", TOKEN + "\n" + TOKEN):
        file.write_text(text)
        with pytest.raises(UsageError, match="token"):
            read_token(file, "0.0.0.0")


def test_a_taken_port_is_said(capsys):
    with listen("127.0.0.1", 0) as sock, pytest.raises(EnvironmentProblem, match="BF-SERVE-008"):
        listen("127.0.0.1", sock.getsockname()[1])


def test_a_signal_ends_the_command_quietly(tmp_path):
    with command(tmp_path, "--json") as (process, url):
        wait_for(lambda: health(url)["status"] == "ok")
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(out)["requests"] == 1 and not said


# ---- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, pytest.param(120, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_fifty_clients_lose_nothing_and_memory_stays(seconds, capsys):
    engine = StandIn()
    many = httpx.Limits(max_connections=50)
    with live(engine, Limits(waiting=64)) as url, httpx.Client(limits=many, timeout=60) as web:

        def ask(number: int) -> int:
            done, end = 0, time.monotonic() + seconds
            while not done or time.monotonic() < end:
                prompt = f"client {number} request {done}"
                stream = bool(number % 2)
                answer = web.post(url + GENERATIONS, json={"prompt": prompt, "stream": stream})
                assert answer.status_code == 200
                last = answer.text.split("data: ")[-2] if stream else answer.text
                image = json.loads(last) if stream else json.loads(last)["data"][0]
                assert png_text(base64.b64decode(image["b64_json"])) == {"prompt": prompt}
                done += 1
            return done

        def memory() -> float:
            lines = web.get(f"{url}/metrics").text.splitlines()
            return float(next(line.split()[1] for line in lines if line.startswith("process_resident_memory_bytes")))

        with ThreadPoolExecutor(50) as pool:
            list(pool.map(lambda number: post(url, prompt="warm").status_code, range(20)))
            before = memory()
            total = sum(pool.map(ask, range(50)))
        grown = memory() - before
        with capsys.disabled():
            print(f"\n{total} requests of 50 clients, memory {grown / 2**20:+.1f} MB")
        assert total >= 50 and engine.answered == total + 20
        assert grown < 32 * 2**20
