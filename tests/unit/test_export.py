"""What is exported loads where others load it, and is the model that was trained."""

import hashlib
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from helpers import save_run, vouch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlvid import randomness
from rlvid.actions import evaluate_and_show
from rlvid.cli import main
from rlvid.config import parse_config
from rlvid.diffusion.chain import denoise
from rlvid.evaluate.load import load_run
from rlvid.evaluate.results.read import read_results
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.results.summary import compare, summarise
from rlvid.evaluate.tables import pages
from rlvid.export.card import _usage
from rlvid.export.export import export_run, sampler
from rlvid.models.folders import builtin_folder
from rlvid.models.lora import merge_lora, read_lora
from rlvid.models.stored import oldest_transformers
from rlvid.models.unet3d import UNet3DModel, load_model
from rlvid.models.video_shape import VideoShape, resolved_shape
from rlvid.toy.tiny import save_tiny_model, tiny_model

log = logging.getLogger(__name__)
PROMPT = "a red circle moving left"
PARTS = ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]


def latents_of(model: UNet3DModel, start: Tensor, final: str = "exact") -> Tensor:
    """rlvid's own sampler."""
    with torch.no_grad():
        return denoise(
            model,
            start,
            model.encode_prompts([PROMPT]),
            model.path.grid(4),
            guidance=2.0,
            gradient_steps=0,
            final=final,
        )


def piped(folder: Path, start: Tensor) -> Tensor:
    """diffusers' sampler, with everything loaded from the folder."""
    pipeline = TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT, num_frames=4, height=16, width=16, num_inference_steps=4, guidance_scale=2.0, latents=start,
        output_type="latent",
    ).frames  # fmt: skip


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest latent."""
    return float((found - expected).abs().max() / expected.abs().max())


def start_of(model: UNet3DModel) -> Tensor:
    return randomness.normal(model.latent_shape, 1, "start", [(0,)])


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_diffusers_samples_from_an_exported_model_what_rlvid_does(tmp_path: Path, train: str) -> None:
    run, _ = save_run(tmp_path, finetune=train)
    before = digests(tmp_path)
    out = export_run(run, tmp_path / "out")
    assert {path: digests(tmp_path)[path] for path in before} == before
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*PARTS, "README.md", "model_index.json", *["adapter"] * (train == "lora")]
    )
    weights = {p.suffix for p in out.rglob("*") if p.is_file()}
    assert weights <= {".safetensors", ".json", ".txt", ".md"}
    tuned = load_run(run)
    start = start_of(tuned.model)
    expected = latents_of(tuned.model, start)
    assert (latents_of(tuned.use(0.0), start) - expected).abs().max() > 1e-2
    for name, found in (("diffusers", piped(out, start)), ("rlvid", latents_of(load_model(str(out), frames=4), start))):
        log.info("%s, folder in %s: %.1e", train, name, apart(found, expected))
        assert apart(found, expected) <= 1e-5


@pytest.mark.parametrize("train", ["lora", "full"])
def test_what_nobody_trained_is_the_bases_byte_for_byte(tmp_path: Path, train: str) -> None:
    run, _ = save_run(tmp_path, finetune=train)
    base, out = tmp_path / "tiny", export_run(run, tmp_path / "out")
    for part in ("vae", "text_encoder", "tokenizer"):
        found = {file.name: file.read_bytes() for file in (out / part).iterdir()}
        assert found == {file.name: file.read_bytes() for file in (base / part).iterdir()}
    assert (out / "unet" / "config.json").read_bytes() == (base / "unet" / "config.json").read_bytes()


@pytest.mark.parametrize("built_in", [True, False])
def test_models_are_in_the_layout_that_older_and_newer_libraries_read(tmp_path: Path, built_in: bool) -> None:
    """tests/parity/exported.py reads it with the oldest and the newest of them."""
    folder = builtin_folder() if built_in else tmp_path
    if not built_in:
        save_tiny_model(tmp_path)
    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert len(names) == 36
    assert all(name.startswith("text_model.") for name in names)
    assert {file.name for file in (folder / "tokenizer").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"
    }  # fmt: skip
    whole = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8")) == whole["vocab"]
    first, *merges = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("#version")
    assert merges == [" ".join(pair) for pair in whole["merges"]]
    assert oldest_transformers(folder) == "4.44"


def test_an_adapters_settings_are_those_that_every_peft_knows(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, lora={"rank": 3, "targets": ["attention+ff"]})
    written = json.loads((export_run(run, tmp_path / "out", scale=0.5) / "adapter" / "adapter_config.json").read_text())
    of_peft_0_12 = {
        "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "init_lora_weights"
    }  # fmt: skip
    assert written.keys() == of_peft_0_12
    assert (written["r"], written["lora_alpha"]) == (3, 1.5)


def test_a_base_of_another_layout_is_copied_and_the_card_says_what_reads_it(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    base = tmp_path / "tiny"
    for name in ("vocab.json", "merges.txt"):
        (base / "tokenizer" / name).unlink()
    assert "With transformers 5.0 or later" in card_of(run, tmp_path / "five")
    encoder = base / "text_encoder" / "model.safetensors"
    weights = {name.removeprefix("text_model."): each for name, each in load_file(encoder).items()}
    encoder.unlink()
    names = [f"model.fp16-0000{place}-of-00002.safetensors" for place in (1, 2)]
    places = {key: names[place % 2] for place, key in enumerate(weights)}
    for name in names:
        save_file({key: each.half() for key, each in weights.items() if places[key] == name}, encoder.with_name(name))
    vae = base / "vae" / "diffusion_pytorch_model.safetensors"
    data = vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors")).read_bytes()
    assert "With transformers 5.6 or later" in card_of(run, tmp_path / "out")
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == data
    start = start_of(load_model(str(base), frames=4))
    assert apart(piped(tmp_path / "out", start), latents_of(load_model(str(tmp_path / "out"), frames=4), start)) <= 1e-5


@pytest.mark.parametrize("train", ["lora", "full"])
def test_less_of_what_was_learned_can_be_exported(tmp_path: Path, train: str) -> None:
    run, _ = save_run(tmp_path, finetune=train)
    tuned = load_run(run)
    start = start_of(tuned.model)
    half = latents_of(tuned.use(0.5), start)
    out = export_run(run, tmp_path / "half", scale=0.5)
    assert apart(latents_of(load_model(str(out), frames=4), start), half) <= 1e-5
    assert "0.5 of what was learned" in (out / "README.md").read_text(encoding="utf-8")
    nothing = export_run(run, tmp_path / "nothing", scale=0.0)
    base = load_file(tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors")
    same = load_file(nothing / "unet" / "diffusion_pytorch_model.safetensors")
    assert base.keys() == same.keys()
    assert all(torch.equal(base[name], same[name]) for name in base)


@pytest.mark.parametrize(
    ("targets", "scale"), [(["to_q", "to_k", "to_v", "to_out.0"], 1.0), (["temporal", "ff.net.2"], 0.5)]
)
def test_the_adapter_loads_into_peft_and_the_merge_is_w_plus_ba(
    tmp_path: Path, targets: list[str], scale: float
) -> None:
    run, _ = save_run(tmp_path, lora={"rank": 3, "targets": targets})
    out = export_run(run, tmp_path / "out", scale=scale)
    base = load_file(tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors")
    merged = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    adapter = {
        n.removeprefix("base_model.model."): t for n, t in load_file(out / "adapter/adapter_model.safetensors").items()
    }
    adapted = {name.partition(".lora_")[0] + ".weight" for name in adapter}
    assert len(adapted) == len(adapter) / 2 > 10
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        expected = base[name].double()
        if name in adapted:
            up, down = (adapter[name.replace(".weight", f".lora_{side}.weight")].double() for side in "BA")
            added = sum(torch.outer(up[:, r], down[r]) for r in range(3))
            assert added.abs().max() > 1e-2
            expected = expected + scale * added
        assert (tensor - expected).abs().max() <= 1e-6, name
    unet = PeftModel.from_pretrained(UNet3DConditionModel.from_pretrained(tmp_path / "tiny" / "unet"), out / "adapter")
    whole = UNet3DConditionModel.from_pretrained(out / "unet")
    inputs = (torch.randn(1, 4, 4, 8, 8), 301, tiny_model().encode_prompts([PROMPT]))
    with torch.no_grad():
        torch.testing.assert_close(unet.eval()(*inputs).sample, whole.eval()(*inputs).sample, atol=1e-5, rtol=0)


def test_a_merge_is_rounded_once_to_the_weights_precision() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)).bfloat16()
    before = layer[0].weight.detach().clone()
    state = {"0.lora_A.weight": torch.randn(2, 6), "0.lora_B.weight": torch.randn(5, 2) * 0.01}
    merge_lora(layer, state)
    exact = before.float() + state["0.lora_B.weight"] @ state["0.lora_A.weight"]
    assert torch.equal(layer[0].weight, exact.bfloat16())


def test_an_adapter_of_another_model_is_not_merged() -> None:
    state = {"0.lora_A.weight": torch.randn(2, 6), "0.lora_B.weight": torch.randn(5, 2)}
    for odd in ("0.lora_magnitude_vector", "0.weight", "1.lora_B.weight"):
        with pytest.raises(ValueError, match=rf"1 keys are foreign \({odd}\)"):
            merge_lora(torch.nn.Sequential(torch.nn.Linear(6, 5)), state | {odd: torch.randn(5, 2)})
    state = {"1.lora_A.weight": torch.randn(2, 6), "1.lora_B.weight": torch.randn(5, 2)}
    with pytest.raises(ValueError, match=r"there is no linear layer 1 of its shape"):
        merge_lora(torch.nn.Sequential(torch.nn.Linear(6, 5)), state)
    with pytest.raises(ValueError, match=r"there is no linear layer 0 of its shape"):
        merge_lora(torch.nn.Sequential(torch.nn.Linear(7, 5)), {n.replace("1.", "0.", 1): t for n, t in state.items()})


@pytest.mark.parametrize("final", ["exact", "paper"])
def test_the_exported_scheduler_ends_where_the_runs_chains_end(tmp_path: Path, final: str) -> None:
    _, config = save_run(tmp_path)
    config = parse_config(config.model_dump() | {"sampling": {"steps": 4, "guidance": 2.0, "final_level": final}})
    model = load_model(config.model.path, frames=4)
    ddim, latents = DDIMScheduler.from_config(sampler(config).config), start_of(model)
    expected, text = latents_of(model, latents, final), model.encode_prompts(["", PROMPT])
    ddim.set_timesteps(4)
    with torch.no_grad():
        for t in ddim.timesteps:
            uncond, cond = model.denoiser(latents.repeat(2, 1, 1, 1, 1), t, encoder_hidden_states=text).sample.chunk(2)
            latents = ddim.step(uncond + 2.0 * (cond - uncond), t, latents).prev_sample
    assert apart(latents, expected) <= 1e-5


def test_an_export_is_whole_or_not_at_all(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--out .*taken exists already"):
        export_run(run, taken)
    with pytest.raises(ValueError, match=r"--lora-scale nan: expected a finite number"):
        export_run(run, tmp_path / "out", scale=math.nan)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; it has: 3"):
        export_run(run, tmp_path / "out", step=7)
    path = run / "step-000003" / "adapter" / "adapter_model.safetensors"
    adapter = {name: each.clone() for name, each in load_file(path).items()}  # the file is written anew
    name = next(iter(adapter))
    for spoilt, words in (
        ({key.replace("to_q", "to_x"): each for key, each in adapter.items()}, r"36 keys missing .*to_q.*to_x"),
        (adapter | {name: torch.full_like(adapter[name], math.nan)}, "1 weights are NaN or infinite"),
    ):
        save_file(spoilt, path)
        vouch(path.parents[1])
        with pytest.raises(ValueError, match=words):
            export_run(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "taken", "tiny"]
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]


def rows(model: str, reward: float) -> list[Row]:
    values = dict.fromkeys(METRICS, math.nan) | {"reward": reward, "motion": 0.125}
    return [Row(model, "in_domain", 20, i, "p", **values | {"reward": reward + i / 10}) for i in range(3)]


def test_the_card_tells_what_the_hub_and_a_reader_need(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    text = (export_run(run, tmp_path / "bare") / "README.md").read_text(encoding="utf-8")
    assert "None was made in the run's folder." in text
    pages.write_results(run, rows("base", 0.2) + rows("instructvideo", 0.4), base="base", facts={"step": 2})
    text = (export_run(run, tmp_path / "mine") / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-video", None)
    assert {"rlvid", "instructvideo", "lora"} <= set(data.tags)
    assert data.base_model is None  # a folder of this machine is no repository of the hub
    assert str(tmp_path) not in text
    for words in (
        "# mine\n", "# license:", "| Base | `tiny` |", "InstructVideo, D = 4, g = 2", "rank 4 on `to_q`",
        "| `builtin` |", "`builtin-heldout` was measured and never trained on", "512 clips of the built-in renderer",
        "| 3 of 8 videos, of which 1 were skipped |", "| 24 |", "| 76 |", "2 workers, each on CPU (", "torch 2.",
        "With transformers 4.44 or later and diffusers 0.30 or later",
        "with PEFT 0.12 or later", "Seeds are rlvid's own",
        'from_pretrained("BASE", scheduler=scheduler, torch', "`load_lora_weights` does not",
        "num_frames=4, height=16, width=16,\n    num_inference_steps=4, guidance_scale=2,",
        "## Evaluation", "### 20 sampling steps",
        "| in domain | base | 3 | 0.300 ± 0.100 | 0.125 |", "| **0.500 ± 0.100** | 0.125 |",
        "instructvideo over base: reward +0.200",
        "This may not be of the exported model: it has no evaluation.yaml", "evaluate it (rlvid evaluate run@3)",
        "## Intended use and limits", "**Over-optimisation.**", "gradient_steps: 1",
        "## Signs of over-optimisation", "guard.every", "## Prompts that got worse",
        "Not known: the evaluation is not of the exported model.",
    ):  # fmt: skip
        assert words in text, words


def card_of(run: Path, out: Path, **how: Any) -> str:
    return (export_run(run, out, **how) / "README.md").read_text(encoding="utf-8")


def test_the_use_on_the_card_has_the_negative_prompt(tmp_path: Path) -> None:
    _, config = save_run(tmp_path)
    assert "negative_prompt=" not in _usage(config, resolved_shape(config.model), "5.6")
    sampling = config.sampling.model_copy(update={"negative_prompt": 'a "blur"'})
    text = _usage(config.model_copy(update={"sampling": sampling}), resolved_shape(config.model), "5.6")
    assert """    "a prompt", negative_prompt='a "blur"', num_frames=4, height=16, width=16,\n""" in text


@pytest.mark.slow
def test_the_card_has_the_exported_model_of_an_evaluation_of_all_checkpoints(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    save_run(tmp_path, step=6)
    sets = tmp_path / "own.txt"
    sets.write_text("a dog\na cat\n")
    evaluate_and_show([f"{run}@all"], steps=[2], sets=[str(sets)])
    for step, other in ((3, 6), (6, 3)):
        card = card_of(run, tmp_path / f"of{step}", step=step)
        name = f"instructvideo@{step}"
        assert re.findall(r"^\| own \| (\S+) \| 2 \|", card, re.MULTILINE) == ["base", name]
        assert f"The exported model is {name} here." in card
        assert f"- {name}: run run, step {step}" in card
        assert re.search(rf"^{name}: \d of 2 prompts have a lower held-out reward", card, re.MULTILINE)
        assert f"@{other}" not in card
    half = card_of(run, tmp_path / "half", step=6, scale=0.5)
    missing = r"the exported model, run@6\*0.5, is not in it, but instructvideo@3 (step 3), instructvideo@6 (step 6)"
    again = r"evaluate it (rlvid evaluate 'run@6\*0.5')"
    assert f"This may not be of the exported model: {missing}; {again}" in half
    assert "Not known: the evaluation is not of the exported model." in half
    assert "The exported model is base here." in card_of(run, tmp_path / "nothing", step=6, scale=0.0)
    moved = run.rename(tmp_path / "elsewhere") / "nothing"
    assert "is not in it" in card_of(moved.parent, tmp_path / "moved", step=6)  # a folder of another name
    (tmp_path / "old").mkdir()
    moved = moved.parent.rename(tmp_path / "old" / "run")
    assert "The exported model is instructvideo@6 here." in card_of(moved, tmp_path / "again", step=6)
    about = yaml.safe_load((moved / "evaluation.yaml").read_text())
    (moved / "evaluation.yaml").write_text(yaml.safe_dump(about | {"complete": False}))
    assert "This may not be of the exported model: it is not finished" in card_of(
        moved, tmp_path / "unfinished", step=6
    )
    (moved / "evaluation.yaml").write_text("models: 3")
    with pytest.raises(ValueError, match=r"evaluation\.yaml is damaged"):
        export_run(moved, tmp_path / "damaged")


def test_the_card_can_be_of_an_evaluation_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = save_run(tmp_path)
    sets = tmp_path / "own.txt"
    sets.write_text("a dog\na cat\n")
    folder = tmp_path / "evaluation"
    further = tmp_path / "mine.py"
    further.write_text("def score(frames, prompts): return frames.mean((2, 3, 4))\n")
    evaluate_and_show(
        [f"half={run}*0.5", str(run)], steps=[2], sets=[str(sets)], out=folder, rewards=f"warm={further}:score"
    )
    assert "None was made in the run's folder." in card_of(run, tmp_path / "without")
    options = ["--lora-scale", "0.5", "--evaluation", str(folder)]
    monkeypatch.setattr("sys.argv", ["rlvid", "export", str(run), "--out", str(tmp_path / "mine"), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    card = (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    assert "The exported model is half here." in card
    assert "- reward warm: mine.py:score" in card
    assert str(tmp_path) not in card
    assert "| instructvideo |" not in card
    with pytest.raises(ValueError, match=r"--evaluation .*: the exported model, run@3\*0.25, is not in it, but half"):
        export_run(run, tmp_path / "quarter", scale=0.25, evaluation=folder)
    with pytest.raises(ValueError, match=r"--evaluation .*: no evaluation there \(no evaluation.yaml\); name a folder"):
        export_run(run, tmp_path / "nowhere", evaluation=tmp_path)
    assert not any((tmp_path / name).exists() for name in ("quarter", "nowhere"))


def test_a_hub_id_is_the_cards_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlvid.export.card import model_card
    from rlvid.runs.find import find_run

    monkeypatch.chdir(tmp_path)
    run, config = save_run(tmp_path)
    config = parse_config(config.model_dump() | {"model": {"path": "damo-vilab/text-to-video-ms-1.7b"}})
    card = model_card(config, find_run(run)[1], run, "mine", 1.0, VideoShape(16, 256, 256, 8))
    assert ModelCard(card).data.base_model == "damo-vilab/text-to-video-ms-1.7b"
    assert "| Base | `damo-vilab/text-to-video-ms-1.7b` |" in card


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (
            {"mixture": [{"name": "brightness", "weight": 0.5}, {"path": "/a/b.py:warm"}]},
            "0.5 x `brightness` + 1 x `warm`",
        ),
        ({"path": "/home/me/my.py:score"}, "a function of the author's own, `my.py:score`"),
        ({"name": "hpsv2.1", "path": "random"}, "`hpsv2.1` with random weights"),
    ],
)
def test_the_card_names_what_was_trained_on(tmp_path: Path, reward: dict[str, Any], told: str) -> None:
    from rlvid.export.card import model_card
    from rlvid.runs.find import find_run

    run, config = save_run(tmp_path)
    config = parse_config(config.model_dump() | {"reward": reward})
    card = model_card(config, find_run(run)[1], run, "mine", 1.0, VideoShape(16, 256, 256, 8))
    assert f"| Trained on the reward | {told} |" in card


def test_results_survive_the_disk_and_older_ones_lack_what_is_newer(tmp_path: Path) -> None:
    base, tuned = rows("base", 0.2), rows("tuned", 0.4)
    pages.write_results(tmp_path, base + tuned, facts={"step": 2})
    summaries, comparisons, facts = read_results(tmp_path / "evaluation.json")
    assert repr(summaries) == repr(summarise(base + tuned))  # NaN is not equal to itself
    assert repr(comparisons) == repr(compare(base, tuned))
    assert facts == {"step": "2"}
    content = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    del content["summaries"][0]["mean"]["flickering"], content["summaries"][0]["used"]["flickering"]
    (tmp_path / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    older = read_results(tmp_path / "evaluation.json")[0][0]
    assert math.isnan(older.mean["flickering"])
    assert older.used["flickering"] == 0


def test_an_adapter_is_read_as_it_was_written(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    out = export_run(run, tmp_path / "out")
    before, after = read_lora(run / "step-000003" / "adapter"), read_lora(out / "adapter")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
