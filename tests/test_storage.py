"""One way to open a URI: whole files or none, no secret that travels, and a sentence for every way a store can refuse."""

import errno
import json
import pickle
import re
import socket
import threading
import types
from pathlib import Path

import pytest
from gcsfs.retry import HttpError

from contracts.errors import CxrayError, RowError
from contracts.storage import Place, StorageOptions, of_a_store, place, told, told_of_row

TOKEN = "planted-access-token"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """gcsfs asks a busy store six times and waits half a minute between: here it does not wait."""
    from gcsfs import retry

    async def at_once(_: float) -> None: ...

    monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=at_once))


@pytest.fixture
def object_there(answering) -> Place:
    return place("gs://mimic/files/p10/x.jpg", answering.options())


# -- on the disk ---------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_read_listed_and_removed(tmp_path):
    here = place(tmp_path)
    (here / "b/two.csv").write(b"22")
    (here / "a.txt").write("è".encode())
    assert (here / "a.txt").read_text() == "è" and (here / "b/two.csv").size() == 2
    assert [f.relative(here) for f in here.files()] == ["a.txt", "b/two.csv"]
    assert [f.name for f in here.files(".csv")] == ["two.csv"]
    assert (here / "b").exists() and not (here / "c").exists() and (here / "c").files() == []
    (here / "b").remove()
    (here / "b").remove()
    assert [f.relative(here) for f in here.files()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    file = place(tmp_path / "x.json")
    file.write(b"old")

    def full(self: Path, _: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CxrayError, match="no space left"):
        file.write(b"new, and longer")
    assert file.read() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_is_swapped_only_where_it_is_what_one_saw(tmp_path):
    file = place(tmp_path) / "deep/_lease"
    assert file.swap(None, b"mine") and not file.swap(None, b"yours") and not file.swap(b"yours", b"yours") and file.read() == b"mine"
    assert file.swap(b"mine", b"yours") and not file.swap(b"mine", None) and file.read() == b"yours"
    assert file.swap(b"yours", None) and not file.exists() and not file.swap(b"yours", b"mine")


def test_of_many_that_swap_at_once_one_does(tmp_path):
    file, seen = place(tmp_path / "_lease"), []
    for old in (None, b"a dead one's"):
        threads = [threading.Thread(target=lambda n=n, old=old: seen.append(file.swap(old, b"%d" % n))) for n in range(16)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert seen.count(True) == 1
        file.write(b"a dead one's"), seen.clear()


def test_a_place_knows_its_name_its_parts_and_what_lies_in_it():
    bucket = place("gs://mimic/", StorageOptions(anonymous=True))
    assert (bucket / "a" / "b.csv").uri == "gs://mimic/a/b.csv" and (bucket / "a/b.csv").path == "mimic/a/b.csv"
    assert (bucket / "a/b.csv").relative(bucket) == "a/b.csv" and bucket.name == "mimic" and bucket.local is None
    assert (bucket / "a").options == bucket.options


def test_a_scheme_that_nothing_opens_is_said():
    with pytest.raises(CxrayError, match=r"^nosuch://x: cannot be opened: .*nosuch"):
        place("nosuch://x/y").exists()


# -- what travels --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def service_account(answering, tmp_path, monkeypatch) -> list[str]:
    """Application-default credentials whose token the answering store gives out; returns what must not travel."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()).decode()
    uri = f"http://127.0.0.1:{answering.port}/token"
    account = {"type": "service_account", "client_email": "me@example.org", "private_key": pem, "token_uri": uri, "project_id": "theirs"}
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    answering.says(200, json.dumps({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}))
    return [TOKEN, "PRIVATE KEY", pem.splitlines()[1], "me@example.org"]


def test_a_place_and_its_file_system_carry_options_and_no_client_or_secret(answering, service_account):
    used = place("gs://mimic/x", answering.options(anonymous=False, billing_project="mine"))
    assert TOKEN in used.read().decode()
    assert answering.asked[-1][1]["authorization"] == f"Bearer {TOKEN}", "the credentials were not used"
    assert used.fs.session is not None and used.fs.credentials.credentials.token == TOKEN
    for carried in (used, used.arrow()[0]):
        data = pickle.dumps(carried)
        for secret in [*service_account, "Credentials", "ClientSession", "google.auth", "google.oauth2"]:
            assert secret.encode() not in data, f"{secret} travels with {carried}"
    assert pickle.loads(pickle.dumps(used)) == used


def test_the_one_who_pays_may_be_another_project_than_the_credentials_own_and_is_named_in_every_request(answering, service_account):
    paid = place("gs://mimic/a/b.txt", answering.options(anonymous=False, billing_project="mine"))
    paid.read()
    answering.says(200, json.dumps({"kind": "storage#objects", "items": [], "name": "a/b.txt", "size": "5", "bucket": "mimic"}))
    paid.exists(), paid.size(), paid.files(), paid.write(b"x")
    with paid.arrow()[0].open_input_file(paid.path) as file:
        file.read(1)
    asked = [(path, headers) for path, headers in answering.asked if path != "/token"]
    assert len(asked) >= 8
    assert all("userProject=mine" in path and headers["authorization"] == f"Bearer {TOKEN}" for path, headers in asked)


def test_without_a_billing_project_nobody_is_charged(answering, object_there):
    answering.says(200, "bytes")
    assert object_there.read() == b"bytes"
    assert all("userProject" not in path and "authorization" not in headers for path, headers in answering.asked)


def test_threads_share_one_client(object_there):
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(object_there.fs)) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len({id(fs) for fs in [*seen, object_there.fs]}) == 1


# -- what a store answers ------------------------------------------------------------------------------------------------------

SAYS = {
    "requester pays": ((400, "Bucket is a requester pays bucket but no user project provided.", "required"), "set storage.billing_project"),
    "unknown project": ((400, "Unknown project id: mine", "invalid"), "correct storage.billing_project"),
    "bad project": ((400, "User project specified in the request is invalid.", "invalid"), "correct storage.billing_project"),
    "bad request": ((400, "Invalid bucket name: 'x'", "invalid"), "is the bucket's name right"),
    "anonymous": ((401, "Anonymous caller does not have storage.objects.get access.", "required"), r"\(401\): run `gcloud"),
    "expired": ((401, "Invalid Credentials", "authError"), r"\(401\): run `gcloud"),
    "no access": ((403, "me@example.org does not have storage.objects.get access.", "forbidden"), r"no access .*\(403\)"),
    "may not charge": ((403, "me@example.org does not have serviceusage.services.use access.", "forbidden"), "may not charge"),
    "no object": ((404, "No such object: mimic/files/p10/x.jpg", ""), r"is not there \(404\)"),
    "no bucket": ((404, "The specified bucket does not exist.", "notFound"), r"is not there \(404\)"),
    "slow down": ((429, "The rate of requests is too high.", "rateLimitExceeded"), r"busy \(429\): run the same command again"),
    "away": ((503, "Service Unavailable", ""), r"busy \(503\): run the same command again"),
    "bad gateway": ((502, "<html>Bad Gateway</html>", ""), r"busy \(502\): run the same command again"),
}
WAYS = {
    "read": lambda p: p.read(),
    "write": lambda p: p.write(b"x"),
    "open": lambda p: _through_arrow(p),
}


def _through_arrow(p: Place) -> None:
    with told(p):
        p.arrow()[0].open_input_file(p.path)


def plain(error: pytest.ExceptionInfo[CxrayError], uri: str) -> str:
    """The sentence, once it is sure to be one: it begins with the URI, is short, and repeats nothing that the store said of a person."""
    text = str(error.value)
    assert text.startswith(f"{uri}: ") and len(text.splitlines()) == 1 and len(text) < 300
    assert "example.org" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SAYS)
def test_what_a_store_answers_is_a_sentence(answering, object_there, caplog, case, way):
    answer, sentence = SAYS[case]
    answering.says(*answer)
    with pytest.raises(CxrayError) as error:
        WAYS[way](object_there)
    assert re.search(sentence, plain(error, object_there.uri))
    assert not [r for r in caplog.records if r.name.startswith("gcsfs")], "gcsfs logs its traceback"


@pytest.mark.parametrize("case", [case for case in SAYS if case not in ("no object", "no bucket")])
def test_a_store_that_refuses_is_not_a_file_that_is_not_there(answering, object_there, case):
    answer, sentence = SAYS[case]
    answering.says(*answer)
    for ask in (object_there.exists, object_there.files, object_there.size):
        with pytest.raises(CxrayError, match=sentence):
            ask()


def test_what_is_not_there_does_not_exist_and_has_no_files(answering, object_there):
    answering.says(404, "The specified bucket does not exist.", "notFound")
    assert not object_there.exists() and object_there.files() == []


def test_in_a_bucket_google_itself_sees_to_it_that_one_of_two_swaps(answering, object_there):
    answering.says(200, seen := json.dumps({"kind": "storage#object", "name": "files/p10/x.jpg", "size": "5", "generation": "7"}))
    assert object_there.swap(None, b"mine") and "ifGenerationMatch=0" in answering.asked[-1][0]
    assert object_there.swap(seen.encode(), b"mine") and "ifGenerationMatch=7" in answering.asked[-1][0]
    assert "/upload/" in answering.asked[-1][0] and "generation=7" in answering.asked[-2][0]
    assert object_there.swap(seen.encode(), None) and "ifGenerationMatch=7" in answering.asked[-1][0]
    assert not object_there.swap(b"another", b"mine")
    answering.says(412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet")
    assert not object_there.swap(None, b"mine")
    answering.says(*SAYS["no object"][0])
    assert not object_there.swap(b"seen", b"mine")
    answering.says(*SAYS["no access"][0])
    with pytest.raises(CxrayError, match=r"\(403\)"):
        object_there.swap(None, b"mine")


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_nobody_there_is_a_sentence(object_there):
    away = place(object_there.uri, StorageOptions(anonymous=True, endpoint_url=f"http://127.0.0.1:{closed_port()}"))
    with pytest.raises(CxrayError) as error:
        away.read()
    assert "does not answer: check the network" in plain(error, away.uri)


def test_a_store_that_is_silent_is_given_up_after_a_time():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        silent = place("gs://mimic/x", StorageOptions(anonymous=True, endpoint_url=f"http://127.0.0.1:{port}", timeout_s=0.1))
        with pytest.raises(CxrayError) as error:
            silent.read()
        assert "does not answer" in plain(error, "gs://mimic/x")
        with pytest.raises(RowError, match="store_unreachable"), told_of_row(silent):
            silent.fs.cat_file(silent.path)


def test_no_credentials_are_a_sentence_and_not_an_anonymous_try(answering, tmp_path, monkeypatch):
    from google.auth.compute_engine import _metadata

    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", True)  # as NO_GCE_CHECK=true does
    nobody = place("gs://mimic/x", answering.options(anonymous=False))
    for way in (nobody.read, nobody.exists, nobody.arrow):
        with pytest.raises(CxrayError) as error:
            way()
        assert "no Google credentials here: run `gcloud auth" in plain(error, "gs://mimic")
    assert not answering.asked


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "may not be read or written by this user"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "is not there"),
    ],
)
def test_what_a_disk_says_is_a_sentence(raised, sentence):
    with pytest.raises(CxrayError) as error, told(place("/data/x")):
        raise raised
    assert sentence in plain(error, "/data/x")


def test_a_fault_of_the_program_is_no_sentence():
    with pytest.raises(ZeroDivisionError), told(place("/data/x")):
        raise ZeroDivisionError


def test_who_did_not_ask_a_store_is_not_told_that_it_failed():
    """A model's missing file, a Ray that does not answer: a worker meets them too."""
    assert not any(map(of_a_store, [FileNotFoundError(errno.ENOENT, "x"), ConnectionError("x"), TimeoutError("x"), ImportError("x")]))
    assert all(map(of_a_store, [OSError(errno.ENOSPC, "x"), OSError("Forbidden: x"), HttpError({"code": 503, "message": "x"})]))


# -- a row's own file ----------------------------------------------------------------------------------------------------------


REJECTS = [("no object", "missing_file", True), ("slow down", "store_429", False), ("away", "store_503", False)]


@pytest.mark.parametrize(("case", "reason", "lasting"), REJECTS)
def test_a_file_that_is_not_there_is_a_lasting_reject_and_a_busy_store_a_passing_one(answering, object_there, case, reason, lasting):
    answering.says(*SAYS[case][0])
    with pytest.raises(RowError) as error, told_of_row(object_there):
        object_there.fs.cat_file(object_there.path)
    assert (error.value.reason, error.value.lasting) == (reason, lasting)


@pytest.mark.parametrize("raised", [ConnectionResetError("reset by peer"), TimeoutError("timed out")])
def test_a_broken_connection_is_a_passing_reject(raised):
    with pytest.raises(RowError) as error, told_of_row(place("gs://mimic/x")):
        raise raised
    assert (error.value.reason, error.value.lasting) == ("store_unreachable", False)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTDIR])
def test_one_file_that_the_disk_cannot_read_is_a_passing_reject(number):
    with pytest.raises(RowError) as error, told_of_row(place("/data/files/p10/p10000032/x.jpg")):
        raise OSError(number, "as the disk says")
    assert (error.value.reason, error.value.lasting) == ("unreadable_file", False)


def test_a_refusal_by_the_disk_names_no_patient():
    with pytest.raises(CxrayError) as error, told_of_row(place("/data/files/p10/p10000032/x.jpg")):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert plain(error, "/data").startswith("/data: may not be read")


@pytest.mark.parametrize("case", ["requester pays", "bad project", "anonymous", "expired", "no access", "may not charge"])
def test_a_refusal_is_of_the_whole_job_and_survives_the_way_from_a_worker(answering, object_there, case):
    answer, sentence = SAYS[case]
    answering.says(*answer)
    with pytest.raises(CxrayError) as error, told_of_row(object_there):
        object_there.fs.cat_file(object_there.path)
    assert re.search(sentence, plain(error, "gs://mimic")), "a row's path names its patient"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
