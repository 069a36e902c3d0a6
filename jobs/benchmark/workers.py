"""Runs a measurement in Ray Train workers, with what a training worker gets."""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console

from rlvid.config import RunConfig
from rlvid.interrupt import kept
from rlvid.terminal import short
from rlvid.train.job import Job


def measure_in_workers(
    measure: Callable[[Job, dict[str, Any]], None],
    config: RunConfig,
    steps: int,
    address: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Starts Ray and the workers of a run.

    Args:
        measure: runs in each worker; gets the job of a training worker, and ``steps``, the times ``asked``,
            ``connected`` and ``fitted``, the path ``result``, where worker 0 writes JSON, and ``more``.
        config: of the run.
        steps: to measure.
        address: of a Ray cluster; None starts Ray on this machine, unless RAY_ADDRESS names one.
        more: further entries for ``measure``.

    Returns:
        What worker 0 wrote.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from rlvid.cluster.connect import start_ray
    from rlvid.cluster.nodes import check_resources, needed
    from rlvid.data.embeddings import kept_embeddings
    from rlvid.data.sources import training_set
    from rlvid.runs.find import run_folder
    from rlvid.train.archivist import start_archivist
    from rlvid.train.feeding import RunFeed
    from rlvid.train.progress import ProgressActor

    asked = time.time()
    start_ray(address)
    connected = time.time()
    use_gpu = check_resources(config)
    steps_of_feed = max(config.train.steps, steps + 1)  # one more warms up
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps_of_feed})})
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(max(1, int(config.train.cpus_per_worker)))}
    with kept(f"the run folder {short(folder)} stays"):
        console, result = Console(), folder / "benchmark.json"
        clips = training_set(config, console)
        texts = kept_embeddings(config, clips, [], RunFeed(config, clips, folder).video_captions, console)
        further = {"encodes": "videos" in clips.kinds, "texts": texts}
        progress = ProgressActor.remote()  # type: ignore[attr-defined]  # ray.remote decorates the class
        archivist = start_archivist(config, folder, progress)
        job = Job.of(config, run=folder, use_gpu=use_gpu, progress=progress, archivist=archivist, **further)
        times = {"asked": asked, "connected": connected, "fitted": time.time()}
        TorchTrainer(
            partial(measure, job, {"steps": steps, "result": result, **times, **more}),
            **RunFeed.of(config, clips, folder, texts).trainer_arguments,
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.train.workers,
                use_gpu=use_gpu,
                resources_per_worker=needed(config, use_gpu),
            ),
            run_config=ray.train.RunConfig(
                name=f"benchmark-{time.time_ns()}",
                storage_path=str(folder),
                worker_runtime_env={"env_vars": environment | ({} if use_gpu else {"DS_ACCELERATOR": "cpu"})},
            ),
        ).fit()
    return dict(json.loads(result.read_text(encoding="utf-8")))
