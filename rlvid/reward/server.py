"""Serves a reward function over HTTP, in any Python environment: it needs NumPy, and nothing of rlvid.

    python server.py my_reward.py:score --port 8000

``GET /`` answers {"function": NAME, "whole_video": BOOL}. ``POST /`` takes a NumPy ``.npz`` with ``frames``, uint8
(B, S, 3, H, W), and ``prompts``, B strings; it answers {"scores": [...]}, B numbers or B lists of S numbers, null where
there is no score. The function gets ``frames`` in [0, 1], float32: a tensor where torch is installed, else an array.

The server listens on this machine alone unless --host says otherwise; it asks for no password.
"""

import argparse
import importlib.util
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

LARGEST = 2**31
"""Most bytes of a request: 64 videos of 81 frames at 480 x 832 are 6 times as many; ask for fewer at once."""


def load(path: str) -> Any:
    """Returns the function of FILE.py:FUNCTION."""
    file, _, name = path.rpartition(":")
    spec = importlib.util.spec_from_file_location("served_reward", Path(file).resolve())
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise SystemExit(f"{path}: there is no file {file}; expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(file).resolve().parent))
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise SystemExit(f"{path}: {file} has no function {name!r}")
    return function


def call(function: Any, frames: np.ndarray, prompts: list[str]) -> list[Any]:
    """Returns the function's scores as lists of numbers, None for those that are not finite."""
    pixels: Any = frames.astype(np.float32) / 255
    try:
        import torch
    except ImportError:
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

    function: ClassVar[Any]
    name: ClassVar[str]

    def do_GET(self) -> None:  # http.server's name
        """Says what is served."""
        self._answer(200, {"function": self.name, "whole_video": bool(getattr(self.function, "whole_video", False))})

    def do_POST(self) -> None:
        """Scores videos."""
        size = int(self.headers.get("Content-Length", 0))
        if not 0 < size <= LARGEST:
            self._answer(413, {"error": f"a request of {size} bytes; allowed: 1 to {LARGEST}"})
            return
        body = self.rfile.read(size)
        try:
            with np.load(io.BytesIO(body), allow_pickle=False) as archive:
                frames, prompts = archive["frames"], [str(prompt) for prompt in archive["prompts"]]
            self._answer(200, {"scores": call(type(self).function, frames, prompts)})
        except Exception as error:  # whatever a user's code raises is an answer, and the server goes on
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing: a line for each batch would fill the log."""


def end_with_input(server: HTTPServer) -> None:
    """Ends the server when standard input ends: the process that started it is gone."""
    sys.stdin.read()
    server.shutdown()


def main() -> None:
    """Serves until the process is ended, or until standard input ends where ``--with-parent`` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="FILE.py:FUNCTION")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input ends")
    options = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what the function prints must not stand before the address
    Handler.function, Handler.name = staticmethod(load(options.function)), options.function
    server = HTTPServer((options.host, options.port), Handler)
    print(f"http://{server.server_address[0]!s}:{server.server_port}", file=answers, flush=True)
    if options.with_parent:
        threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
