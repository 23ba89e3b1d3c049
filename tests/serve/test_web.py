"""Questions over HTTP: streamed, one at a time, from no one who should not ask."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from kempnerforge.serve import desk as desks
from kempnerforge.serve import web
from kempnerforge.serve.request import MAX_BODY
from kempnerforge.serve.web import Server, bind
from kempnerforge.util.errors import InputError
from tests.serve.fake import FACTS, Fake, Said, connection, post, serving

BOX = "<loc0256><loc0128><loc0768><loc0512> cat"


def rule(prompt: str) -> Said:
    if prompt == "detect":
        return Said(["<loc0256>", "<loc0128>", "<loc0768>", "<loc0512>", " cat"])
    if prompt == "refuse":
        raise InputError("not <that>")
    if prompt == "break":
        raise RuntimeError("no memory")
    return Said([f"{word} " for word in prompt.split()])


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, Fake]]:
    model = Fake(rule)
    with serving(model) as server:
        yield server, model


@pytest.fixture
def server(served: tuple[Server, Fake]) -> Server:
    return served[0]


@pytest.fixture
def model(served: tuple[Server, Fake]) -> Fake:
    served[1].asked.clear()
    return served[1]


def wait_for(happens: Callable[[], object], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.005)


# ---- answers ------------------------------------------------------------------------------------------------------------


def test_an_answer_is_streamed(server: Server, model: Fake) -> None:
    image = b"not looked at here"
    body = {"prompt": "a b", "images": [base64.b64encode(image).decode()], "max_new_tokens": 7, "temperature": 0.5, "seed": 3,
            "history": [["who?", "me"]]}  # fmt: skip
    status, lines = post(server, body)
    assert status == 200
    assert lines[:-1] == [{"waiting": 0}, {"started": True}, {"text": "a "}, {"text": "b "}]
    done = lines[-1]["done"]
    assert (done["answer"], done["tokens"], done["marks"]) == ("a b ", 2, {"boxes": [], "points": []}) and done["seconds"] >= 0
    ((prompt, images, wanted, sampling, history),) = model.asked
    assert (prompt, images, wanted, history) == ("a b", (image,), 7, (("who?", "me"),))
    assert sampling is not None and (sampling.temperature, sampling.seed) == (0.5, 3)


def test_pieces_arrive_before_the_answer_ends() -> None:
    goes_on = threading.Event()
    with serving(Fake(lambda prompt: Said(["first", "second"], lambda k: k == 1 and goes_on.wait(10)))) as server:
        line = connection(server)
        line.request("POST", "/api/answers", "{}", {"Content-Type": "application/json"})
        response = line.getresponse()
        heard = [json.loads(response.readline()) for _ in range(3)]
        assert heard[-1] == {"text": "first"} and not goes_on.is_set()
        goes_on.set()
        assert json.loads(response.read().splitlines()[-1])["done"]["answer"] == "firstsecond"
        line.close()


def test_marks_come_as_soon_as_they_are_there(server: Server) -> None:
    _, lines = post(server, {"prompt": "detect"})
    marks = [line["marks"]["boxes"] for line in lines if "marks" in line]
    assert [[box["label"] for box in boxes] for boxes in marks] == [[""], ["cat"]], "the box before its label"
    assert marks[-1] == lines[-1]["done"]["marks"]["boxes"] == [{"label": "cat", "x0": 0.125, "y0": 0.25, "x1": 0.5, "y1": 0.75}]


def test_faults_of_one_question_leave_the_next_alone(server: Server) -> None:
    assert post(server, {"prompt": "refuse"})[1][-1] == {"error": "not <that>"}
    assert post(server, {"prompt": "break"})[1][-1] == {"error": "the model failed: RuntimeError: no memory"}
    assert post(server, {"prompt": "on"})[1][-1]["done"]["answer"] == "on "


# ---- one at a time ------------------------------------------------------------------------------------------------------


def test_questions_wait_in_line() -> None:
    goes_on, at_once, most = threading.Event(), [0], [0]

    def pause(k: int) -> None:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        goes_on.wait(10)
        at_once[0] -= 1

    model = Fake(lambda prompt: Said([prompt], pause))
    with serving(model) as server:
        found: dict[str, list[dict[str, object]]] = {}

        def ask(name: str) -> None:
            found[name] = post(server, {"prompt": name})[1]

        threads = []
        for number in range(4):
            threads.append(threading.Thread(target=ask, args=(str(number),)))
            threads[-1].start()
            wait_for(lambda: len(model.asked) == 1 and len(server.desk._waiting) == len(threads) - 1)
        goes_on.set()
        for thread in threads:
            thread.join()
    assert most == [1] and [asked[0] for asked in model.asked] == ["0", "1", "2", "3"]
    assert found["3"][0] == {"waiting": 2} and found["3"][-1]["done"]["answer"] == "3"  # type: ignore[index]


def test_a_client_that_leaves_ends_its_answer() -> None:
    model = Fake(lambda prompt: Said(["x"] * 10_000, lambda k: time.sleep(0.002)))
    with serving(model) as server:
        first, second = connection(server), connection(server)
        first.request("POST", "/api/answers", "{}", {"Content-Type": "application/json"})
        wait_for(lambda: model.asked)
        second.request("POST", "/api/answers", "{}", {"Content-Type": "application/json"})
        wait_for(lambda: server.desk._waiting)
        second.close()
        wait_for(lambda: all(ticket.cancelled for ticket in server.desk._waiting))
        assert len(model.asked) == 1 and model.answers[0].num_tokens < 5000, "the first is still being answered"
        first.close()
        made = -1

        def stands_still() -> bool:
            nonlocal made
            before, made = made, model.answers[0].num_tokens
            time.sleep(0.05)
            return before == made

        wait_for(stands_still)
        assert made < 5000 and len(model.asked) == 1, "the one that left while it waited was never asked"


def test_the_end_of_the_server_ends_answers(caplog: pytest.LogCaptureFixture) -> None:
    model = Fake(lambda prompt: Said(["x"] * 10_000, lambda k: time.sleep(0.002)))
    with serving(model) as server:
        line = connection(server)
        line.request("POST", "/api/answers", "{}", {"Content-Type": "application/json"})
        assert line.getresponse().readline()
        server.should_exit = True
        wait_for(lambda: not server.server_state.connections and not server.server_state.tasks)
        line.close()
    assert model.answers[0].num_tokens < 5000 and not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_a_full_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "MAX_WAITING", 1)
    goes_on = threading.Event()
    model = Fake(lambda prompt: Said(["x"], lambda k: goes_on.wait(10)))
    with serving(model) as server:
        threads = [threading.Thread(target=post, args=(server, {})) for _ in range(2)]
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lambda number=number: len(model.asked) == 1 and len(server.desk._waiting) == number)
        status, lines = post(server, {})
        goes_on.set()
        for thread in threads:
            thread.join()
    assert status == 503 and "ask again later" in lines[0]["error"]


# ---- who may ask, and what ----------------------------------------------------------------------------------------------


def get(server: Server, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    line = connection(server)
    line.request("GET", path, headers=headers)
    response = line.getresponse()
    found = response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
    line.close()
    return found


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]", "192.168.0.5:9000", "localhost.:80"])
def test_hosts_that_mean_this_machine(server: Server, host: str) -> None:
    assert get(server, "/api/model", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", ":8000", "127.0.0.1.evil.example", "localhost.evil.example", "[evil]", "a]b[", "["]
)
def test_other_hosts_are_refused(server: Server, host: str, model: Fake) -> None:
    """A stranger's name that was made to point here."""
    for path in ("/", "/api/model"):
        status, headers, body = get(server, path, Host=host)
        assert status == 403 and headers["content-type"] == "application/json" and b"host" in body
    assert post(server, {"prompt": "a"}, Host=host)[0] == 403
    assert model.asked == []


def test_a_name_that_was_bound_is_known() -> None:
    with serving(Fake(rule), host="localhost") as server:
        assert server.url == f"http://localhost:{server.server_port}/" and server.knows("localhost:1")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_all_addresses_are_those_of_both_families() -> None:
    with serving(Fake(rule), host="::") as server:
        assert server.url == f"http://[::]:{server.server_port}/" and get(server, "/api/model")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1"])
def test_pages_of_other_sites_are_refused(server: Server, origin: str, model: Fake) -> None:
    assert post(server, {"prompt": "a"}, Origin=origin)[0] == 403
    assert model.asked == []


def test_its_own_page_may_ask(server: Server) -> None:
    assert post(server, {"prompt": "a"}, Origin=server.url.rstrip("/"))[0] == 200


def test_a_form_cannot_ask(server: Server, model: Fake) -> None:
    """Without this a page of another site could send plain text without being asked for leave."""
    assert post(server, {"prompt": "a"}, Content_Type="text/plain")[0] == 415
    assert model.asked == []


BAD = [
    (b"{", "not JSON"),
    (b"\xff", "not UTF-8"),
    (b"[" * 100_000, "nested more than 64 levels"),
    (b'{"seed": 1' + b"0" * 100_000 + b"}", "digits"),
    (b"[]", "not a JSON object"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": "x" * 100_001}, "at most 100000 characters"),
    ({"path": "/etc/passwd"}, "'path' is not a key"),
    ({"images": "/etc/passwd"}, "list"),
    ({"images": ["/etc/passwd"]}, "image 1: is not base64"),
    ({"images": ["aGk=", 3]}, "image 2: is not base64"),
    ({"images": ["aGk="] * 17}, "at most 16"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature"),
    (b'{"temperature": NaN}', "temperature"),
    (b'{"temperature": 1e999}', "temperature"),
    (b'{"seed": 1' + b"0" * 400 + b"}", "seed"),
    ({"max_new_tokens": 1.5}, "whole number"),
    ({"top_p": 0}, "top_p"),
    ({"history": "x"}, "history"),
    ({"history": [["a"]]}, "history"),
    ({"history": [["a", 1]]}, "history"),
]


@pytest.mark.parametrize(("body", "why"), BAD, ids=[why + str(k) for k, (_, why) in enumerate(BAD)])
def test_bad_questions(server: Server, body: object, why: str, model: Fake) -> None:
    status, (line,) = post(server, body)
    assert status == 400 and why in line["error"] and model.asked == []


def test_too_big(server: Server, model: Fake) -> None:
    status, (line,) = post(server, b"x" * (MAX_BODY + 1))
    assert status == 413 and str(MAX_BODY) in line["error"] and model.asked == []


def raw(server: Server, request: bytes, *, close: bool = True) -> bytes:
    """What comes back for bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
        line.sendall(request)
        if close:
            line.shutdown(socket.SHUT_WR)
        found = b""
        while piece := line.recv(65536):
            found += piece
        return found


HEAD = b"POST /api/answers HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (b"", b"411"), (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", b"411"),
        (b"Content-Length: -1\r\n", b"400"), (b"Content-Length: x\r\n", b"400"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be(server: Server, length: bytes, status: bytes) -> None:
    assert raw(server, HEAD + length + b"\r\n{}").startswith(b"HTTP/1.1 " + status)


def test_a_question_that_breaks_off(server: Server, model: Fake) -> None:
    assert raw(server, HEAD + b"Content-Length: 100\r\n\r\n{}") == b""
    assert b"400 Bad Request" in raw(server, b"\x16\x03\x01 not HTTP at all\r\n\r\n")
    assert post(server, {"prompt": "a"})[0] == 200


def test_a_client_that_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(web, "REQUEST_S", 0.1)
    assert raw(server, HEAD + b"Content-Length: 100\r\n\r\n{}", close=False) == b""


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 9999\r\n\r\n"], ids=["line", "head", "body"])
def test_a_client_that_trickles_is_let_go(start: bytes, monkeypatch: pytest.MonkeyPatch, server: Server, model: Fake) -> None:
    """Each byte comes soon, and the request never does."""
    monkeypatch.setattr(web, "REQUEST_S", 0.5)
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=0.02) as line, suppress(ConnectionError):
        line.sendall(start)
        while time.monotonic() - begun < 10:
            line.sendall(b"x")
            with suppress(TimeoutError):
                if line.recv(1) == b"":
                    break
    assert 0.4 < time.monotonic() - begun < 5 and model.asked == []
    assert post(server, {"prompt": "a"})[0] == 200


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "SEND_S", 0.2)
    with serving(Fake(lambda prompt: Said(["x" * 2**20] * 1000, lambda k: time.sleep(0.001)))) as server:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
            line.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
            wait_for(lambda: server.server_state.connections)
            wait_for(lambda: not server.server_state.connections)
        wait_for(lambda: not server.server_state.tasks)


@pytest.mark.parametrize("wait_s", [0.0, 0.3], ids=["at once", "one after the other"])
def test_requests_of_one_connection_are_answered_in_order(wait_s: float, server: Server) -> None:
    asked = [b"GET /api/model HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
        for request in asked:
            line.sendall(request)
            time.sleep(wait_s)
        found = b"".join(iter(lambda: line.recv(65536), b""))
    assert found.count(b"HTTP/1.1 200") == 2 and b"<html" not in found


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS"])
def test_methods_that_are_not_there(server: Server, method: str) -> None:
    line = connection(server)
    line.request(method, "/api/answers")
    assert line.getresponse().status == 501
    line.close()


def test_the_next_request_of_a_connection_has_its_own_time(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(web, "REQUEST_S", 0.6)
    line = connection(server)
    for _ in range(3):
        line.request("GET", "/api/model")
        assert line.getresponse().read()
        time.sleep(0.3)
    line.close()


def test_connections_of_one_client_are_bounded(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(web, "MAX_OF_CLIENT", 2)
    place = ("127.0.0.1", server.server_port)
    idle = [socket.create_connection(place, source_address=("127.0.0.2", 0)) for _ in range(5)]
    wait_for(lambda: sum(is_closed(line) for line in idle) == 3)
    assert post(server, {"prompt": "a"})[0] == 200, "another client"
    for line in idle:
        line.close()
    wait_for(lambda: not server.server_state.connections)


def is_closed(line: socket.socket) -> bool:
    line.settimeout(0.01)
    try:
        return line.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 2)
    with serving(Fake(rule)) as server:
        idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(2)]
        time.sleep(0.1)
        with pytest.raises((ConnectionError, OSError)):
            post(server, {})
        for line in idle:
            line.close()

        def answers() -> bool:
            try:
                return post(server, {"prompt": "a"})[0] == 200
            except OSError:
                return False

        wait_for(answers)


@pytest.mark.parametrize("path", ["/etc/passwd", "/../../etc/passwd", "/page/script.js", "/api", "/%2e%2e/"])
def test_nothing_else_is_there(server: Server, path: str) -> None:
    status, headers, body = get(server, path)
    assert status == 404 and headers["content-type"] == "application/json" and "error" in json.loads(body)


def test_a_port_that_is_taken(server: Server) -> None:
    for port in (server.server_port, 70000, -1):
        with pytest.raises(ValueError, match=f"--port {port}: cannot listen"):
            bind("127.0.0.1", port, server.desk, FACTS)


@pytest.mark.parametrize("host", ["", "a\0b", "no.such.host.invalid"])
def test_hosts_that_cannot_be(server: Server, host: str) -> None:
    with pytest.raises(ValueError, match="--host"):
        bind(host, 0, server.desk, FACTS)
