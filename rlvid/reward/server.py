"""Serves a reward function over HTTP, in any Python environment: it needs NumPy, and nothing of rlvid.

    python server.py my_reward.py:score --port 8000

``GET /`` answers {"function": NAME, "whole_video": BOOL}. ``POST /`` takes a NumPy ``.npz`` with ``frames``, uint8
(B, S, 3, H, W), and ``prompts``, B strings; it answers {"scores": [...]}, B numbers or B lists of S numbers, null where
there is no score. The function gets ``frames`` in [0, 1], float32: a tensor where torch is installed, else an array. It
is called once at a time.

The server listens on this machine alone unless --host says otherwise, and asks for no password. Where the environment
variable REWARD_TOKEN holds one, it asks for it: rlvid sets it for processes that it starts, and sends it to no other.
"""

import argparse
import importlib.util
import io
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

torch: Any
try:
    import torch
except ImportError:
    torch = None

LARGEST = 2**31
"""Most bytes of a request: 22 videos of 81 frames at 480 x 832."""


def load(path: str) -> Any:
    """Returns the function of FILE.py:FUNCTION.

    Raises:
        ValueError: no such file or function.
    """
    file, _, name = path.rpartition(":")
    spec = importlib.util.spec_from_file_location("served_reward", Path(file).resolve())
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ValueError(f"{path}: there is no file {file}; expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(file).resolve().parent))
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path}: {file} has no function {name!r}")
    return function


def call(function: Any, frames: np.ndarray, prompts: list[str]) -> list[Any]:
    """Returns the function's scores as lists of numbers, None for those that are not finite."""
    pixels: Any = frames.astype(np.float32) / 255
    if torch is None:
        scores = function(pixels, prompts)
    else:
        with torch.no_grad():
            scores = function(torch.from_numpy(pixels), prompts)
        if isinstance(scores, torch.Tensor):
            scores = scores.float().cpu().numpy()
    values = np.asarray(scores, dtype=np.float64)  # None becomes NaN
    answer: list[Any] = json.loads(json.dumps(values.tolist()), parse_constant=lambda _: None)
    return answer


class Handler(BaseHTTPRequestHandler):
    """Answers with JSON; an error of the function is an answer, too."""

    timeout = 60  # seconds of silence after which a client is given up
    function: ClassVar[Any]
    name: ClassVar[str]
    token: ClassVar[str | None] = None
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:  # http.server's name
        """Says what is served."""
        self._answer(200, {"function": self.name, "whole_video": bool(getattr(self.function, "whole_video", False))})

    def do_POST(self) -> None:
        """Scores videos."""
        size = int(self.headers.get("Content-Length", 0))
        if self.token is not None and self.headers.get("Authorization") != f"Bearer {self.token}":
            self._answer(403, {"error": "this server asks for a password"})
            return
        if not 0 < size <= LARGEST:
            self._answer(413, {"error": f"a request of {size} bytes; allowed: 1 to {LARGEST}"})
            return
        body = self.rfile.read(size)
        try:
            with np.load(io.BytesIO(body), allow_pickle=False) as archive:
                frames, prompts = archive["frames"], [str(prompt) for prompt in archive["prompts"]]
            with self.lock:
                scores = call(type(self).function, frames, prompts)
        except (Exception, SystemExit) as error:  # whatever a user's code raises is an answer, and the server goes on
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._answer(200, {"scores": scores})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing: a line for each batch would fill the log."""


class Server(ThreadingHTTPServer):
    """Talks to several clients at once; the function is called by one of them at a time."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], function: Any, name: str, token: str | None = None) -> None:
        own = {"function": staticmethod(function), "name": name, "token": token, "lock": threading.Lock()}
        super().__init__(address, type("OwnHandler", (Handler,), own))


def end_with_input() -> None:
    """Ends this process when standard input ends: the process that started it is gone."""
    while os.read(0, 2**16):  # unbuffered: a lock of sys.stdin would abort an exit for another reason
        pass
    os._exit(0)  # also where the function hangs


def main() -> None:
    """Serves until the process is ended, or until standard input ends where ``--with-parent`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="FILE.py:FUNCTION")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input ends")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent  # its modules must not stand in the way of a package of the same name
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != here]
    if options.with_parent:
        threading.Thread(target=end_with_input, daemon=True).start()
    # What the function prints, in C too, must not stand before the address, nor fill a pipe that nobody reads.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        function = load(options.function)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    server = Server((options.host, options.port), function, options.function, os.environ.get("REWARD_TOKEN"))
    print(f"http://{server.server_address[0]!s}:{server.server_port}", file=answers, flush=True)
    answers.close()
    server.serve_forever()


if __name__ == "__main__":
    main()
