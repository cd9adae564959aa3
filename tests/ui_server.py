"""For the page's tests: canned models behind the real gateway, and the page's own server, both on free ports of this machine."""

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import cv2
import httpx2
import numpy as np
import uvicorn
from fake_backends import Fake, quick
from fastapi import FastAPI

from contracts.chart import STATES
from contracts.errors import RowError
from contracts.findings import FINDINGS
from serve.gateway import create
from serve.messages import (
    Classified,
    Encoded,
    Evidence,
    Example,
    ExampleHead,
    Finding,
    Loaded,
    Match,
    PassageRead,
    Question,
    SegmentRead,
)
from serve.settings import GatewaySettings
from trainers.overlay import overlay

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = {"value": 0.883, "low": 0.831, "high": 0.929, "dropped": 0}
PASSAGE = "Bilateral basal haze with blunted angles is most often pleural effusion; heart failure is a common cause."
CARD = "# Fusion\n\nA card.\n\n## Data\n\n| split | rows |\n|---|---|\n| train | 386 |\n\n![far](http://127.0.0.1:9/far.png)"
REPORT = "FINDINGS: The heart is enlarged.\nIMPRESSION: Mild pulmonary edema; no pneumothorax."


def xray(seed: int = 0, side: int = 518) -> np.ndarray:
    """uint8 [side, side]: two dark lungs in a lighter chest, enough of a chest to look at."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    chest = 150 * np.exp(-(((columns - 0.5) / 0.42) ** 4) - (rows - 0.55) ** 2)
    lungs = sum(np.exp(-(((columns - c) / 0.13) ** 2) - ((rows - 0.45) / 0.26) ** 2) for c in (0.3, 0.7 + 0.01 * seed))
    grain = np.random.default_rng(seed).normal(0, 3, (side, side))
    return np.clip(chest - 110 * lungs + 60 * np.exp(-(((columns - 0.5) / 0.05) ** 2)) + grain + 15, 0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", picture)[1].tobytes()


def base64ed(data: bytes) -> str:
    return base64.b64encode(data).decode()


def encode(data: bytes) -> Encoded | RowError:
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    return RowError("not_an_image") if picture is None else Encoded({}, jpeg(cv2.resize(picture, (518, 518))))


def classify(images: list[Encoded], chart: dict | None, evidence: bool, overlay: bool, knowledge: bool) -> Classified:
    """The chart makes edema likelier, and a passage makes it positive."""
    edema = 0.2 + 0.3 * bool(chart) + 0.2 * bool(chart and knowledge)
    odds = {name: 0.05 + 0.06 * n for n, name in enumerate(FINDINGS)} | {"Edema": edema, "Fracture": 0.02}
    findings = [Finding(name=name, probability=p, threshold=0.6, positive=p >= 0.6) for name, p in odds.items()]
    read: list[Any] = ["image"] * bool(images) + ["chart"] * bool(chart)
    said: dict[str, Any] = {"model": "fusion", "calibrated": True, "findings": findings, "images": len(images), "read": read}
    if evidence and chart:
        said["evidence"] = _evidence(chart, knowledge)
    if overlay and images:
        said |= {"overlays": [_overlay(one.stored) for one in images], "pictures": [base64ed(one.stored) for one in images]}
    return Classified(**said)


def _evidence(chart: dict, knowledge: bool) -> Evidence:
    said = f"A patient of {chart.get('age', 'unknown')} years; complains of {chart.get('chief_complaint', 'nothing')}."
    note = [SegmentRead(name=n, text=t, share=s) for n, t, s in (("patient", said, 0.25), ("vitals", "SpO2 91 %.", 0.4))]
    passage = PassageRead(id="p1", topic="Edema", text=PASSAGE, source="our own", score=0.71, asked_by="vitals", share=0.35)
    return Evidence(note=note, passages=[passage] if knowledge else [])


def _overlay(stored: bytes) -> str:
    picture = np.asarray(cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_GRAYSCALE))
    patches = np.outer([0, 0, 1, 3, 8, 5, 1], [0, 4, 7, 2, 1, 3, 0]).astype(np.float32)
    return base64ed(overlay(picture, patches / patches.sum()))


def search(question: Question) -> list[Match]:
    """Six studies, of which none is of the validate split."""
    if question.where and "validate" in question.where:
        return []
    return [
        Match(
            study_id=f"s{n}",
            split="test",
            view="PA" if n % 2 else "AP",
            score=0.9 - 0.05 * n,
            labels={"Pleural Effusion": 1, "Pneumothorax": 0} if n else {},
            impression="Small left effusion, no pneumothorax." if n else None,
            picture=base64ed(jpeg(xray(n, 256))) if question.pictures and n != 2 else None,
        )
        for n in range(min(question.k, 6))
    ]


HEADS = [ExampleHead(id="1", title="PA: M, 72, Dyspnea"), ExampleHead(id="2", title="AP: no chart")]


def example(name: str) -> Example | None:
    """The first has one image, the second two and no chart."""
    if name not in ("1", "2"):
        return None
    triage = {"temperature": 98.6, "heartrate": 101.0, "o2sat": 91.0, "sbp": 150.0, "dbp": 66.0, "hours": -3.5}
    labs = [{"name": "NTproBNP", "value": 2608.0, "unit": "pg/mL", "hours": -1.7}]
    medicines = [{"name": "furosemide", "kind": "reconciled", "hours": -3.3}]
    chart: dict[str, Any] = {"age": 72.0, "sex": "M", "chief_complaint": "Dyspnea", "acuity": 2.0, "height_cm": 162.6}
    chart |= {"triage": triage, "labs": labs, "medicines": medicines}
    images = [base64ed(jpeg(xray(n))) for n in range(int(name))]
    labels = {"Edema": 1, "Pneumothorax": 0, "Cardiomegaly": -1}
    head = HEADS[int(name) - 1]
    return Example(id=name, title=head.title, images=images, chart=chart if name == "1" else None, report=REPORT, labels=labels)


def _about(name: str, route: str, **more: Any) -> Any:
    data = {"inputs": {"features": {"name": "hog", "version": "b4e3c45d"}}, "trained": "2026-11-22"}
    return lambda: Loaded(
        **{"name": name, "task": name, "route": route, "fingerprint": "1a5eaa57745ee1b0", "data": data, "metrics": {}} | more
    )


def fakes() -> dict[str, Fake]:
    """Canned models, with pictures to look at."""
    per = {name: {"auroc": INTERVAL, "n_pos": 9, "n_neg": 99} for name in FINDINGS[:3]}
    per["Pleural Other"] = {"auroc": dict.fromkeys(INTERVAL), "n_pos": 0, "n_neg": 108}
    metrics = {"split": "test", "studies": 108, "patients": 59, "warnings": ["The notes may give the answer away for Consolidation."]}
    metrics |= {"macro": {"auroc": INTERVAL, "auprc": INTERVAL, "ece": INTERVAL}, "findings": per}
    return {
        "image": Fake(encode=encode, about=lambda: {"name": "hog:", "fingerprint": "hog/1", "dim": 1764}),
        "fusion": Fake(classify=classify, about=_about("fusion", "/v1/classify", metrics=metrics, card=CARD)),
        "search": Fake(search=search, about=_about("search", "/v1/search")),
        "examples": Fake(list=lambda: HEADS, one=example, about=lambda: {"name": "examples"}),
    }


def chart_of(asked: tuple) -> dict[str, Any] | None:
    """The chart that a call of `classify` was made with, less what the gateway notes on every chart."""
    return {name: of for name, of in asked[1].items() if of or name not in STATES} if asked[1] is not None else None


@contextmanager
def service(keys: Path, **others: Fake | None) -> Iterator[str]:
    """The gateway over canned models, with `others` in their place or None for one that is not there -> its address."""
    with serving(create(quick(**(fakes() | others)), GatewaySettings(keys=str(keys)))) as address:
        yield address


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port, in a thread of this process -> its address."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.config.port}"
    try:
        _answers(f"{address}/healthz", thread.is_alive)
        yield address
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def page(api: str, log: IO[bytes], key: str | None = None) -> Iterator[str]:
    """`cxray ui` as a user starts it, in a process of its own that writes to `log` -> its address."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CXRAY_", "STREAMLIT_"))}
    environment |= {"CXRAY_API": api} | ({"CXRAY_API_KEY": key} if key else {})
    command = [sys.executable, "-m", "cxray", "ui", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _answers(f"{address}/_stcore/health", lambda: process.poll() is None)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str, alive: Any) -> None:
    """Waits until something answers there."""
    until = time.monotonic() + 90
    with httpx2.Client(trust_env=False) as client:
        while time.monotonic() < until and alive():
            try:
                if client.get(url).is_success:
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.05)  # between two looks
    raise AssertionError(f"nothing answers at {url}")
