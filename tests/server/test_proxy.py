"""The nginx configuration of docs/serve.md, run as it is but for its ports and paths."""

import re
import shutil
import socket
import subprocess
import time

import httpx
import pytest
from conftest import wait_until
from helpers import ROOT
from test_api import HELLO

from engine.generation import Engine

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(not shutil.which("nginx") or not shutil.which("openssl"), reason="needs nginx and openssl"),
]
NAME = "chat.example.com"


@pytest.fixture
def proxied(tmp_path):
    """proxied(port of the server, replacements …): an HTTP client of nginx before it, which asks for NAME."""
    started = []

    def start(port: int, *replacements: tuple[str, str]) -> httpx.Client:
        texts = [(ROOT / "docs" / page).read_text("utf-8") for page in ("serve.md", "serve_en.md")]
        configs = [re.search(r"```nginx\n(.*?)```", text, re.DOTALL).group(1) for text in texts]
        assert len({re.sub(" *#.*", "", config) for config in configs}) == 1, "the two languages differ"
        with socket.create_server(("127.0.0.1", 0)) as sock:
            mine = sock.getsockname()[1]
        key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
        words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={NAME}"]
        subprocess.run([*words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        config = (
            configs[0].replace("listen 443", f"listen 127.0.0.1:{mine}").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        )
        config = config.replace(f"/etc/ssl/{NAME}.pem", str(certificate)).replace(f"/etc/ssl/{NAME}.key", str(key))
        for old, new in replacements:
            assert old in config
            config = config.replace(old, new)
        paths = "".join(
            f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = (
            f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {paths} {config} }}"
        )
        (tmp_path / "nginx.conf").write_text(main)
        started.append(subprocess.Popen(["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf"]))
        client = httpx.Client(base_url=f"https://127.0.0.1:{mine}", headers={"Host": f"{NAME}:{mine}"}, verify=False)
        started.append(client)

        def is_up() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", mine)) == 0

        wait_until(is_up, "nginx does not listen")
        return client

    yield start
    for one in started:
        one.close() if isinstance(one, httpx.Client) else (one.terminate(), one.wait())


def test_the_page_and_a_stream_pass_nginx(serve, proxied, monkeypatch):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.02), step(engine))[1])
    live = serve(allowed_hosts=(NAME,), api_key="hush")
    client = proxied(live.port)
    page = client.get("/")
    assert "<title>" in page.text
    assert client.get("/v1/models").status_code == 401
    headers = {"Origin": f"https://{client.headers['Host']}", "Authorization": "Bearer hush"}
    body = {"messages": HELLO, "max_tokens": 50, "stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
        assert reply.status_code == 200
        pieces = reply.iter_raw()
        first = next(pieces)
        assert live.rows() == 1, "the stream was held back until its end"
        whole = first + b"".join(pieces)
    assert whole.endswith(b"data: [DONE]\n\n")
    assert (
        client.post("/v1/chat/completions", json=body, headers=headers | {"Origin": "https://evil.example"}).status_code
        == 403
    )


def test_without_the_line_for_the_host_the_page_is_refused(serve, proxied):
    live = serve(allowed_hosts=(NAME,))
    client = proxied(live.port, ("proxy_set_header Host $http_host;", ""))
    reply = client.post(
        "/v1/chat/completions", json={"messages": HELLO}, headers={"Origin": f"https://{client.headers['Host']}"}
    )
    assert reply.status_code == 403
