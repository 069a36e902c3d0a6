"""A user's reward in a Ray actor of its own, with packages of its own."""

from typing import Any

import numpy as np

from rlvid.cluster.connect import start_ray
from rlvid.config.reward import RemoteConfig
from rlvid.reward.remote import START


class RewardActor:
    """Holds the function of FILE.py:FUNCTION, which its node must see."""

    def __init__(self, path: str) -> None:
        from rlvid.reward.server import load

        self._function = load(path)

    def score(self, frames: np.ndarray, prompts: list[str]) -> list[Any]:
        """Returns the scores of uint8 frames (B, S, 3, H, W), as a server answers them."""
        from rlvid.reward.server import call

        return call(self._function, frames, prompts)


class ActorCaller:
    """Calls the actor, which ends with this process; starts it anew after it was lost or late.

    Args:
        path: FILE.py:FUNCTION.
        settings: the actor's resources and packages, and the limit for one request.
    """

    def __init__(self, path: str, settings: RemoteConfig) -> None:
        self._path, self._settings = path, settings
        self._actor: Any = None

    def __call__(self, frames: np.ndarray, prompts: list[str]) -> list[Any]:
        """Returns the scores; raises what went wrong."""
        import ray

        limit = START
        try:
            if self._actor is None:
                self._actor = self._start()
                ray.get(self._actor.__ray_ready__.remote(), timeout=START)
            limit = self._settings.timeout
            scores: list[Any] = ray.get(self._actor.score.remote(frames, prompts), timeout=limit)
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from None  # the function failed, the actor is sound
        except ray.exceptions.GetTimeoutError:
            self._end()
            raise TimeoutError(f"no answer within {limit:g} s") from None
        except ray.exceptions.RayError:
            self._end()
            raise
        return scores

    def _start(self) -> Any:
        import ray

        if not ray.is_initialized():
            start_ray()
        settings = self._settings
        environment = {"pip": settings.packages} if settings.packages else {}
        return (
            ray.remote(RewardActor)
            # DEFAULT: not in the placement group of a worker or a trial, which has no room for it.
            .options(
                num_cpus=settings.cpus,
                num_gpus=settings.gpus,
                runtime_env=environment,
                scheduling_strategy="DEFAULT",
            )
            .remote(self._path)
        )

    def _end(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)
