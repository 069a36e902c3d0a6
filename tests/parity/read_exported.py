"""What others do with an exported model, in their environment: nothing of rlvid is there. Run by exported.py."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DDIMScheduler, TextToVideoSDPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file


def main() -> None:
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    found = {"merged": video(TextToVideoSDPipeline.from_pretrained(task["folder"], torch_dtype=torch.float32), task)}
    if task["adapter"]:
        scheduler = DDIMScheduler.from_pretrained(task["folder"], subfolder="scheduler")
        pipeline = TextToVideoSDPipeline.from_pretrained(task["base"], scheduler=scheduler, torch_dtype=torch.float32)
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, task["folder"] + "/adapter").merge_and_unload()
        found["adapter"] = video(pipeline, task)
    save_file(found, out)
    print(", ".join(f"{name} {version(name)}" for name in ("transformers", "diffusers", "peft", "torch")))  # noqa: T201


def video(pipeline: TextToVideoSDPipeline, task: dict) -> torch.Tensor:
    """The frames (F, C, H, W) of the pipeline's video, in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        task["prompt"], num_frames=task["frames"], height=task["size"], width=task["size"],
        num_inference_steps=task["steps"], guidance_scale=task["guidance"],
        latents=load_file(task["noise"])["latents"], output_type="pt",
    )  # fmt: skip
    return torch.as_tensor(made.frames)[0].contiguous()


if __name__ == "__main__":
    main()
