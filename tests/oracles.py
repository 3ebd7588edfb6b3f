"""Other implementations as long-lived processes whose answers are kept on disk.

An oracle (timm, PEFT, tfimm) lives in a Python environment of its own, and importing it takes
seconds. ``Oracle`` starts one process per pytest worker when the first case is asked for, hands it
requests as lines of JSON, and keeps every case in a cache folder whose name is a hash of the
request, of the oracle's source files and of the versions of its packages: a second run, or another
worker, reads what is there.

    oracle = Oracle("timm", python, script, sources, cache)
    folder = oracle.case("make", arch="test_vit", img_size=48)      # a folder with .npy files
    report = oracle.call("verify", case=..., adapter=...)           # a dictionary, not cached
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 600.0
"""How long a request may take before the oracle is given up."""


class OracleError(RuntimeError):
    """The oracle raised, died or did not answer; the message carries its traceback."""


class Oracle:
    """One other implementation, running in a process of its own.

    Args:
        name: Name for messages and folders.
        python: Its Python interpreter.
        script: Driver that answers requests (see ``parity/serve.py``).
        sources: Files whose content is part of a case's identity; the driver always is.
        cache: Folder for the cases; may be shared by several processes.
        arguments: Command-line arguments of the driver.
        env: Its environment. Defaults to this process's.
    """

    def __init__(
        self,
        name: str,
        python: str,
        script: Path,
        sources: Sequence[Path],
        cache: Path,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.cache = cache
        self._command = [python, str(script), *arguments]
        self._env = dict(os.environ if env is None else env)
        self._identity = hashlib.sha256(python.encode())
        for package in sorted(Path(python).parents[1].glob("lib/*/site-packages/*.dist-info")):
            self._identity.update(package.name.encode())  # name and version
        for path in (script, script.parent / "serve.py", *sources):
            self._identity.update(path.read_bytes())
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    # --- Requests -----------------------------------------------------------------------------

    def call(self, operation: str, **arguments: Any) -> Any:
        """Sends one request and returns the answer. Raises ``OracleError`` if it fails."""
        process = self._started()
        try:
            process.stdin.write(json.dumps({"operation": operation, "arguments": arguments}) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], ANSWER_SECONDS)
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            reason = self._last_words()
            self.close()
            raise OracleError(f"{self.name} gave no answer to {operation} {arguments}:\n{reason}")
        answer = json.loads(line)
        if "error" in answer:
            raise OracleError(f"{self.name}, {operation} {arguments}:\n{answer['error']}")
        return answer["result"]

    def case(self, operation: str, **arguments: Any) -> Path:
        """Returns the folder of a case, made now unless the cache has it."""
        folder = self.cache / self._folder_name(operation, arguments)
        if folder.is_dir():
            return folder
        self.cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another worker may have been faster
                unfinished = folder.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                self.call(operation, out=str(unfinished), **arguments)
                unfinished.rename(folder)
        return folder

    @contextlib.contextmanager
    def passing_case(self, operation: str, **arguments: Any) -> Iterator[Path]:
        """A case that is removed afterwards: for models of hundreds of megabytes."""
        with tempfile.TemporaryDirectory(prefix=f"{self.name}_case_") as folder:
            self.call(operation, out=str(Path(folder, "case")), **arguments)
            yield Path(folder, "case")

    def _folder_name(self, operation: str, arguments: Mapping[str, Any]) -> str:
        identity = self._identity.copy()
        identity.update(json.dumps([operation, arguments], sort_keys=True).encode())
        label = arguments.get("arch") or arguments.get("name") or operation
        return f"{self.name}-{label}-{identity.hexdigest()[:16]}"

    # --- The process --------------------------------------------------------------------------

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed by close()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                bufsize=1,
                env=self._env,
            )
        return self._process

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-4000:]

    def close(self) -> None:
        """Ends the process; the next request starts a new one."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
        self._process = None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system lets go of it if this process dies."""
    import fcntl  # POSIX only, as the oracles are

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
