"""A user's own reward: a function in a Python file, named as FILE.py:FUNCTION."""

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rlvid.faults import OF_A_REWARD, describe, one_line


class CustomReward(nn.Module):
    """Calls ``function(frames_BSCHW, prompts)``, whose scores are one a frame (B, S) or one a video (B,).

    The function's attributes say what it is: ``differentiable`` (default true) and ``whole_video`` (default false). One
    that is not differentiable gets detached frames without autograd, and may answer with numbers, lists or arrays.

    Args:
        function: the user's.
    """

    def __init__(self, function: Callable[[Tensor, list[str]], Any]) -> None:
        super().__init__()
        self.function = function
        self.differentiable = bool(getattr(function, "differentiable", True))
        self.whole_video = bool(getattr(function, "whole_video", False))
        self.label = _label(function)

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS or scores_B, float32, on the device of the frames."""
        if self.differentiable:
            scores = self.function(frames_BSCHW, prompts)
        else:
            with torch.no_grad():
                scores = self.function(frames_BSCHW.detach(), prompts)
        try:
            values = torch.as_tensor(scores)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{self.label} returned {type(scores).__name__}, not numbers ({one_line(error)})") from None
        if values.is_complex():
            raise TypeError(f"{self.label} returned complex numbers")
        return values.to(frames_BSCHW.device, torch.float32)


def _label(function: Callable[[Tensor, list[str]], Any]) -> str:
    """FILE.py:FUNCTION, without folders."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__name__", type(function).__name__)
    return f"{Path(code.co_filename).name}:{name}" if code else name


def find_function(path: str, where: str) -> None:
    """Checks that FILE.py:FUNCTION is there without running the file, whose packages may be elsewhere.

    A file that this Python cannot parse passes: it may be written for a newer one.

    Raises:
        ValueError: no such file or name.
    """
    source, name = _split(path, where)
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError):
        return
    names = {name for node in ast.walk(tree) for name in _names(node)}
    if not names & {name, "*"}:
        raise ValueError(f"{where}: {source.name} has no function {name!r}")


def _split(path: str, where: str) -> tuple[Path, str]:
    """Returns the file and the name of FILE.py:FUNCTION; raises ValueError where there is no such file."""
    file, _, name = path.rpartition(":")
    source = Path(file).expanduser()
    if not source.is_file():
        raise ValueError(f"{where}: there is no file {file}; expected FILE.py:FUNCTION")
    return source, name


def _names(node: ast.AST) -> Iterator[str]:
    """The names that a statement defines; ``*`` where it imports all of a module."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (each.asname or each.name for each in node.names)


def load_function(path: str, where: str) -> Callable[[Tensor, list[str]], Any]:
    """Returns the function of FILE.py:FUNCTION; the file is run, as importing it would.

    Args:
        path: the file, a colon and a name in it.
        where: what errors begin with.

    Raises:
        ValueError: no such file or function, the file cannot be imported, or the function takes other arguments.
    """
    source, name = _split(path, where)
    function = getattr(_module(source.resolve(), where), name, None)
    if not callable(function):
        raise ValueError(f"{where}: {source.name} has no function {name!r}")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"{where}: {name} must take (frames, prompts), where frames are (B, S, 3, H, W) in [0, 1] ({error})"
        ) from None
    return function


def _module(source: Path, where: str) -> ModuleType:
    name = f"{OF_A_REWARD}{hashlib.sha256(str(source).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # anybody's code may raise anything; the user is to learn what and where
        del sys.modules[name]
        raise ValueError(f"{where}: {source.name} cannot be imported ({describe(error)})") from error
    return module
