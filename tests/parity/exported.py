"""An exported model read by older and newer libraries, by hand: it fetches 100 MB of packages and takes minutes.

    python tests/parity/exported.py                         # the built-in model with a random adapter
    python tests/parity/exported.py --run runs/toy          # a run
    python tests/parity/exported.py --only oldest installed

Makes an environment for each set of versions, on the torch that is installed here; reads the export there as the model
card says, merged and as an adapter on its base; samples one video from the same noise as rlvid; and prints the largest
difference of pixels in [0, 1]. Exits with 1 where one is above 1e-4.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlvid import randomness
from rlvid.algorithms.base import Context, Stopwatch
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig
from rlvid.config.model import SamplingConfig
from rlvid.diffusion.generate import generate
from rlvid.export.export import export_run
from rlvid.models.folders import model_folder
from rlvid.models.lora import lora_parameters
from rlvid.models.trained import load_trainable
from rlvid.models.unet3d import load_model
from rlvid.runs.checkpoints import checkpoint_name
from rlvid.runs.find import find_run
from rlvid.train.checkpoint import save_checkpoint
from rlvid.train.engine import TorchEngine

PROMPT = "a red star moving left on a navy background"
ENVIRONMENTS = {
    # the oldest that the card promises (rlvid.models.stored.OLDEST)
    "oldest": [
        "transformers==4.44.2", "tokenizers==0.19.1", "huggingface_hub==0.24.7", "diffusers==0.30.3", "peft==0.12.0",
        "accelerate==0.34.2",
    ],
    "last of 4": [
        "transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0", "diffusers==0.35.2", "peft==0.17.1",
    ],
    # the first and the last of those that name a text encoder's weights as transformers 4 does
    "first of 5": [
        "transformers==5.0.0", "tokenizers==0.22.1", "huggingface_hub==1.5.0", "httpx==0.28.1", "httpcore==1.0.9",
        "diffusers==0.36.0", "peft==0.18.0",
    ],
    "5.5": [
        "transformers==5.5.4", "tokenizers==0.22.1", "huggingface_hub==1.5.0", "httpx==0.28.1", "httpcore==1.0.9",
        "diffusers==0.37.1", "peft==0.18.1",
    ],
    "installed": [],
    "newest": ["transformers", "diffusers", "peft"],
}  # fmt: skip
LARGEST = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder or name of a run; default: the built-in model with a random adapter")
    parser.add_argument("--work", type=Path, help="folder for environments, kept for the next time; default: none")
    parser.add_argument("--only", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run = options.run or random_run(work / "run")
        folder = export_run(run, work / "export")
        config, _ = find_run(run)
        model = load_model(str(folder), frames=config.model.frames, size=config.model.size)
        sampling = config.sampling
        how = {"steps": sampling.steps, "guidance": sampling.guidance, "final": sampling.final_level}
        expected = generate(model, [PROMPT], seed=0, **how)[0]
        save_file({"latents": randomness.normal(model.latent_shape, 0, "generate", [(0,)])}, work / "noise.safetensors")
        task = {
            "folder": str(folder), "base": str(model_folder(config.model.path)),
            "noise": str(work / "noise.safetensors"),
            "prompt": PROMPT, "frames": model.frames, "size": model.height, "steps": sampling.steps,
            "guidance": sampling.guidance, "adapter": (folder / "adapter").is_dir(),
        }  # fmt: skip
        apart = [read_with(each, task, expected, (options.work or work) / each) for each in options.only]
    sys.exit(any(not each <= LARGEST for each in apart))


def random_run(folder: Path) -> Path:
    """A run's folder of the built-in model, with an adapter of random weights."""
    config = RunConfig(name=folder.name, sampling=SamplingConfig(steps=20, guidance=3.0))
    model = load_trainable(config.model, config.seed, config.model.path)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model.denoiser):
        parameter.data += torch.randn(parameter.shape, generator=generator) / 16
    method = ALGORITHMS[config.method.name](Context(config, model, nn.Identity(), None, Stopwatch(torch.device("cpu"))))
    train_state = {"step": 1, "workers": 1, "skipped": 0, "seconds": 0.0, "videos": 8}
    engine = TorchEngine(model.denoiser, config.optimizer)
    save_checkpoint(folder / checkpoint_name(1), 0, train_state, config, engine, method, model.denoiser)
    (folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))  # JSON is YAML
    return folder


def read_with(name: str, task: dict[str, object], expected: torch.Tensor, place: Path) -> float:
    """Reads the export in an environment of its own; the largest difference of pixels, NaN where it cannot be read."""
    python = environment(ENVIRONMENTS[name], place)
    frames = place.parent / f"{name}.safetensors"
    command = [python, Path(__file__).with_name("read_exported.py"), json.dumps(task), frames]
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # it would bring rlvid's packages
    done = subprocess.run(command, env=own | quiet, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: cannot be read\n{done.stderr[-2000:]}")  # noqa: T201
        return float("nan")
    apart = {way: float((video - expected).abs().max()) for way, video in load_file(frames).items()}
    shown = ", ".join(f"{way} {value:.1e}" for way, value in apart.items())
    print(f"{name}: {done.stdout.strip()}: largest difference of pixels: {shown}", flush=True)  # noqa: T201
    return max(apart.values())


def environment(packages: list[str], place: Path) -> Path:
    """The Python of an environment with these packages, and for all others those that are installed here."""
    if not packages:
        return Path(sys.executable)
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        (site,) = (place / "lib").glob("python*/site-packages")
        (site / "zz-shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # after the environment's own
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
    return python


if __name__ == "__main__":
    main()
