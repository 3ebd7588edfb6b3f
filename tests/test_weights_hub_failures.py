"""What can go wrong between the hub and the cache: nothing unfinished or damaged is ever used."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import run_python
from tests.hub_server import EXPIRED_TOKEN, TOKEN, Fault, Hub
from tfimm_lora.weights.safetensors_file import write_safetensors

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs links, limits and signals")

NAME = "model.safetensors"

# Downloads one file per case, in one process, and says its SHA-256 or the error.
CLIENT = """
import hashlib, json, os, sys, time
from huggingface_hub import constants
from tfimm_lora.weights.download import download
constants.DOWNLOAD_CHUNK_SIZE = 1000  # of small files; 10 MB chunks are written and resumed
if sys.argv[2] == "impatient":  # the client waits longer and longer between its tries
    time.sleep = lambda seconds: None
answers = []
for case in json.loads(sys.argv[1]):
    constants.HF_HUB_OFFLINE = case.get("offline", False)
    if "limit" in case:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], resource.RLIM_INFINITY))
    try:
        path = download(case.get("repo", "org/open"), case.get("file", "model.safetensors"), None)
        answers.append(hashlib.sha256(path.read_bytes()).hexdigest())
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
    finally:
        if "limit" in case:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print("ANSWERS" + json.dumps(answers), flush=True)
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    values = np.random.default_rng(0).standard_normal(100_000).astype("float32")
    for repo in ("open", "private"):
        (folder / f"org/{repo}@main").mkdir(parents=True)
        write_safetensors(folder / f"org/{repo}@main" / NAME, {"a": values}, {})
    server = Hub(folder)
    yield server
    server.server.shutdown()


@pytest.fixture
def hub(running: Hub) -> Hub:
    """The server, without what the test before left."""
    running.forget()
    return running


def content(hub: Hub) -> bytes:
    return (hub.folder / "org/open@main" / NAME).read_bytes()


def right(hub: Hub) -> str:
    return hashlib.sha256(content(hub)).hexdigest()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return {**settings, "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5", **more}


def ask(
    hub: Hub, home: Path, *cases: dict[str, Any], patient: bool = False, **more: str
) -> list[str]:
    """SHA-256 or error of each case's download, from a fresh process."""
    process = run_python(
        CLIENT,
        json.dumps(cases),
        "patient" if patient else "impatient",
        **environment(hub, home, **more),
    )
    line = next(li for li in process.stdout.splitlines() if li.startswith("ANSWERS"))
    return json.loads(line.removeprefix("ANSWERS"))


def blobs(home: Path) -> list[Path]:
    """Content in the cache, finished or not."""
    return sorted(home.glob("hub/models--*/blobs/*"))


def test_environment_variables(hub: Hub, tmp_path):
    """The token is sent, the cache lies where HF_HOME says, and no network is used offline."""
    cases = [{"repo": "org/private"}, {"repo": "org/private", "offline": True}, {"offline": True}]
    private, cached, missing = ask(hub, tmp_path, *cases, HF_TOKEN=TOKEN)
    assert private == cached == right(hub)
    assert missing.startswith("OSError: model.safetensors of hub repository org/open could not be")
    assert f"HF_HUB_OFFLINE is set, and offline it has to be in the hub's cache already ({tmp_path}"
    assert [b.name for b in blobs(tmp_path)] == [right(hub)]
    assert [(m, ok) for m, _, ok in hub.requests] == [("HEAD", True), ("GET", False)]


@pytest.mark.parametrize("cut", [0, 999, 1000, 150_500])
def test_an_interrupted_download_is_resumed(cut: int, hub: Hub, tmp_path):
    """From the last whole chunk on, which here has 1000 bytes."""
    hub.faults = [Fault(NAME, cut=cut), Fault(NAME, cut=cut)]
    assert ask(hub, tmp_path, {}) == [right(hub)]
    assert hub.downloads(NAME) == 3
    whole = cut // 1000 * 1000
    assert hub.ranges == [f"bytes={n}-" for n in (whole, 2 * whole) if n]


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_keeps_breaking(reset: bool, hub: Hub, tmp_path):
    hub.faults = [Fault(NAME, cut=1000, times=1), Fault(NAME, cut=0, times=99, reset=reset)]
    [error] = ask(hub, tmp_path, {})
    assert error.startswith(f"OSError: {NAME} of hub repository org/open could not be fetched. ")
    assert "Nothing unfinished is used; try again" in error
    assert blobs(tmp_path) == []
    hub.forget()
    assert ask(hub, tmp_path, {}) == [right(hub)]


@posix
def test_damaged_content_is_fetched_once_more(hub: Hub, tmp_path):
    hub.faults = [Fault(NAME, damage=True)]
    assert ask(hub, tmp_path, {}, {}) == [right(hub), right(hub)]
    assert hub.downloads(NAME) == 2
    assert [b.name for b in blobs(tmp_path)] == [right(hub)]


@posix
def test_content_that_stays_damaged_is_not_kept(hub: Hub, tmp_path):
    hub.faults = [Fault(NAME, damage=True, times=2)]
    error, then = ask(hub, tmp_path, {}, {})
    assert error.startswith(f"OSError: {NAME} of hub repository org/open is damaged: its SHA-256 ")
    assert f"the hub announced {right(hub)}. It was fetched twice and deleted again." in error
    assert then == right(hub)


@posix
def test_a_file_that_spoils_in_the_cache(hub: Hub, tmp_path):
    """A blob is read again when its size or time has changed since it was checked."""
    assert ask(hub, tmp_path, {}) == [right(hub)]
    [blob] = blobs(tmp_path)
    blob.write_bytes(content(hub)[:-1] + b"?")
    error, fetched, then = ask(hub, tmp_path, {"offline": True}, {}, {"offline": True})
    assert error.startswith(f"OSError: {NAME} of hub repository org/open is damaged")
    assert f"Delete {blob} and " in error
    assert fetched == then == right(hub)


@posix
def test_an_unchanged_blob_is_not_read_again(hub: Hub, tmp_path):
    """Same size and time: the check is known to be done, so the change is not seen."""
    assert ask(hub, tmp_path, {}) == [right(hub)]
    [blob] = blobs(tmp_path)
    state = blob.stat()
    blob.write_bytes(content(hub)[:-1] + b"?")
    os.utime(blob, ns=(state.st_atime_ns, state.st_mtime_ns))
    [found] = ask(hub, tmp_path, {})
    assert found == hashlib.sha256(blob.read_bytes()).hexdigest() != right(hub)


def test_a_body_of_another_size(hub: Hub, tmp_path):
    hub.faults = [Fault(NAME, drop=10)]
    error, then = ask(hub, tmp_path, {}, {})
    assert error.startswith("OSError") and "Consistency check failed" in error
    assert then == right(hub)


def test_a_wrong_or_expired_token(hub: Hub, tmp_path):
    [error] = ask(hub, tmp_path, {}, HF_TOKEN=EXPIRED_TOKEN)
    assert "The hub refused the token: it is wrong or has expired; set another HF_TOKEN" in error
    assert ask(hub, tmp_path, {}, HF_TOKEN=TOKEN) == [right(hub)]
    # What is in the cache needs no token.
    assert ask(hub, tmp_path, {}, HF_TOKEN=EXPIRED_TOKEN) == [right(hub)]


def test_a_server_that_does_not_answer(hub: Hub, tmp_path):
    [error] = ask(hub, tmp_path, {}, HF_ENDPOINT="http://127.0.0.1:9")
    assert error.startswith(f"OSError: {NAME} of hub repository org/open could not be found. The ")
    assert "hub (http://127.0.0.1:9) does not answer (ConnectError: " in error
    assert "check network and proxy, or download the file elsewhere and pass model_path" in error


ANSWERS = {
    403: "The hub denies access: the token lacks the right to read this",
    429: "The hub's rate limit is reached; try again in some minutes, set HF_TOKEN for a higher",
    500: "The hub has an error of its own (status 500); try again later",
    503: "The hub has an error of its own (status 503); try again later",
}


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", ANSWERS)
def test_a_hub_in_trouble(status: int, method: str, hub: Hub, tmp_path):
    hub.faults = [Fault(NAME, method=method, status=status, times=99)]
    [error] = ask(hub, tmp_path, {})
    assert error.startswith(f"OSError: {NAME} of hub repository org/open could not be ")
    assert ANSWERS[status] in error
    assert blobs(tmp_path) == []
    hub.faults[0].times = 1 if status in (429, 503) and method == "HEAD" else 0
    assert ask(hub, tmp_path, {}) == [right(hub)]
    hub.faults[0].times = 99
    assert ask(hub, tmp_path, {}) == [right(hub)], "what is in the cache is used meanwhile"


@posix
@pytest.mark.parametrize("limit", [0, 1000, 300_000])
def test_a_full_disk(limit: int, hub: Hub, tmp_path):
    """Files cannot grow beyond a limit, as on a full disk (EFBIG for ENOSPC)."""
    error, then = ask(hub, tmp_path, {"limit": limit}, {}, patient=True)
    assert error.startswith(f"OSError: {NAME} of hub repository org/open could not be fetched. ")
    assert "The disk of the hub's cache is full" in error
    assert f"Make room in {tmp_path / 'hub'}, or move the cache with HF_HOME" in error
    assert then == right(hub)
    assert [b.name for b in blobs(tmp_path)] == [right(hub)]


@posix
def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path):
    """A file where the cache should be; permissions do not stop the superuser."""
    (tmp_path / "hub").write_text("in the way")
    [error] = ask(hub, tmp_path, {})
    assert error.startswith(f"OSError: {NAME} of hub repository org/open could not be fetched. ")
    assert str(tmp_path / "hub") in error


@posix
def test_killed_while_downloading(hub: Hub, tmp_path):
    hub.faults = [Fault(NAME, cut=200_000), Fault(NAME, cut=0, times=99)]
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps([{}]), "patient"],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, **environment(hub, tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any(b.stat().st_size for b in blobs(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [unfinished] = blobs(tmp_path)
    assert unfinished.name.endswith(".incomplete") and unfinished.stat().st_size < len(content(hub))
    hub.forget()
    [offline, then] = ask(hub, tmp_path, {"offline": True}, {})
    assert offline.startswith("OSError")
    assert then == right(hub)


def test_two_processes_at_once(hub: Hub, tmp_path):
    """One downloads, the other waits for it; both have the whole file."""
    hub.faults = [Fault(NAME, delay=2)]
    arguments = [sys.executable, "-c", CLIENT, json.dumps([{}]), "patient"]
    processes = [
        subprocess.Popen(
            arguments,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, **environment(hub, tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert answers == [f'ANSWERS["{right(hub)}"]\n'] * 2
    assert hub.downloads(NAME) == 1


@pytest.mark.parametrize("token", [True, False])
def test_a_storage_service_that_is_out_of_reach(token: bool, hub: Hub, tmp_path):
    """A mirror passes the hub's Xet headers on, and the service or the token to it is missing."""
    pytest.importorskip("hf_xet", reason="comes with huggingface_hub on most machines")
    hub.headers = {
        "X-Xet-Hash": "c" * 64,
        "X-Xet-Refresh-Route": f"{hub.endpoint}/api/models/org/open/xet-read-token/{'a' * 40}",
    }
    hub.storage = "http://127.0.0.1:9" if token else ""
    [error] = ask(hub, tmp_path, {}, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")
    assert error.startswith(f"OSError: {NAME} of hub repository org/open could not be fetched. ")
    assert "The hub's storage service failed" in error and "HF_HUB_DISABLE_XET=1" in error
    assert ask(hub, tmp_path, {}, HF_HUB_DISABLE_XET="1") == [right(hub)]
