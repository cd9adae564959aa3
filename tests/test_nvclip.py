"""NVCLIP's service, through a stand-in on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import cv2
import numpy as np
import pytest

import models.encoders as encoders
from contracts.errors import CxrayError
from models.encoders.base import unit


class NvClip(BaseHTTPRequestHandler):
    """A stand-in that answers as documented: the mean of a picture, or the length of a text, in the first place."""

    seen: set[tuple[str, str, str]] = set()
    status, answer = 200, b""
    log_message = lambda *_: None  # noqa: E731

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.add((self.path, body["model"], self.headers.get("Authorization", "")))
        rows = []
        for index, item in enumerate(body["input"]):
            png = np.frombuffer(base64.b64decode(item.partition("data:image/png;base64,")[2]), np.uint8)
            value = cv2.imdecode(png, 0).mean() if len(png) else len(item)
            rows.insert(0, {"object": "embedding", "index": index, "embedding": [float(value), 100.0, 0, 0]})
        reply = self.answer or json.dumps({"object": "list", "data": rows}).encode()
        self.send_response(self.status)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()
        self.wfile.write(reply)


def test_nvclip_speaks_the_documented_api_and_never_shows_the_key(monkeypatch):
    monkeypatch.setenv("NVCLIP_API_KEY", "sesame")
    server = HTTPServer(("127.0.0.1", 0), NvClip)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    name = f"nvclip:http://127.0.0.1:{server.server_port}"
    image, text = encoders.load_image(name), encoders.load_text(f"{name}/v1/")
    assert image.joint and text.joint and (image.grid, image.dim, text.dim) == (0, 4, 4)
    assert image.fingerprint == text.fingerprint and "127.0.0.1" not in image.fingerprint
    levels = np.arange(0, 200, 5, np.uint8)  # 40 pictures are two requests
    output = image(np.tile(levels[:, None, None], (1, 518, 518)))
    np.testing.assert_allclose(output.embedding, unit([[level, 100, 0, 0] for level in levels]), atol=1e-4)
    words = text(["clear", "effusion", "clear"])
    np.testing.assert_allclose(words.embedding, unit([[n, 100, 0, 0] for n in (5, 8, 5)]), atol=1e-5)
    assert output.tokens is None and not words.truncated.any()
    with pytest.raises(CxrayError, match="no token states"):
        text.states(["clear"])
    for encoder in (image, text):
        with pytest.raises(CxrayError, match="has no weights here that could be trained"):
            _ = encoder.module
    assert NvClip.seen == {("/v1/embeddings", "nvidia/nvclip", "Bearer sesame")}
    for NvClip.status, NvClip.answer, words in (
        (401, b"sesame", "HTTP 401: is NVCLIP_API_KEY right?"),
        (307, b"gone", "HTTP 307"),  # a redirect would take the key along
        (200, b"<html>", "did not answer"),
        (200, b'{"data": []}', "one embedding for each of 1 inputs"),
    ):
        with pytest.raises(CxrayError) as error:
            encoders.load_image(name)
        assert words in str(error.value) and "sesame" not in str(error.value) and "\n" not in str(error.value)
    server.shutdown()
    server.server_close()
