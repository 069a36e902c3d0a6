"""The length of prompts that a run's rewards read, from tokenizers and configurations, without weights.

Tokenizers' libraries take seconds to import, so each is imported where a reward needs it. The built-in rewards need
transformers alone.
"""

import json
from functools import partial
from pathlib import Path

from rlvid.config.reward import RewardConfig
from rlvid.models.text_limit import TextLimit, token_counts
from rlvid.reward.builtin import BUILTIN, builtin_folder

_CLIP_LENGTH = 77


def reward_text_limits(config: RewardConfig) -> list[TextLimit]:
    """Returns the limits of a run's rewards, the held-out one among them, each once.

    Raises:
        ValueError: a reward's files are not what they should be.
    """
    parts = [*config.parts, *([(config.held_out, config.held_out_path)] if config.held_out else [])]
    return [limit for name, path in dict.fromkeys(parts) if (limit := reward_text_limit(name, path))]


def reward_text_limit(name: str, path: str | None = None) -> TextLimit | None:
    """Returns the limit of a reward; None of one that reads no prompt, is the user's own, or has random weights.

    Raises:
        ValueError: its files are not what they should be.
    """
    reader, where = f"the reward {name!r}", f"the reward {name!r} from {path!r}"
    if name in BUILTIN:
        from transformers import CLIPTokenizer

        words = CLIPTokenizer.from_pretrained(builtin_folder(name), local_files_only=True)
        return TextLimit(reader, _context_length(builtin_folder(name)), partial(token_counts, words))
    if path is None or name in ("aesthetic", "custom"):
        return None
    from rlvid.reward import imagereward, published

    if name == "imagereward" and (source := imagereward.find_files(path, where)):
        from transformers import BertTokenizer

        bert = BertTokenizer.from_pretrained(source, local_files_only=True)
        return TextLimit(reader, imagereward.LENGTH, partial(token_counts, bert))
    if name == "fitted":
        folder = Path(path).expanduser()
        return TextLimit(reader, _context_length(folder), partial(_clip_counts, folder, where))
    if name in published.STRUCTURES and (source := published.find_files(name, path, where)):
        return TextLimit(reader, _context_length(source), partial(_clip_counts, source, where))
    return None


def _context_length(source: Path) -> int:
    """Returns the context length of a published CLIP: the folder's own, else OpenAI's."""
    for file, keys in {
        "open_clip_config.json": ("model_cfg", "text_cfg", "context_length"),
        "config.json": ("text_config", "max_position_embeddings"),
    }.items():
        if (source / file).is_file():
            found = json.loads((source / file).read_text(encoding="utf-8"))
            for key in keys:
                found = found.get(key) or {}
            return found or _CLIP_LENGTH
    return _CLIP_LENGTH


def _clip_counts(source: Path, where: str, prompts: list[str]) -> list[int]:
    """Returns each prompt's number of tokens, by the folder's own tokenizer or else OpenAI's."""
    from rlvid.reward.clip import own_tokenizer

    if (own := own_tokenizer(source, where)) is not None:
        return token_counts(own, prompts)
    from open_clip.tokenizer import SimpleTokenizer

    words = SimpleTokenizer()
    return [len(words.encode(prompt)) + 2 for prompt in prompts]
