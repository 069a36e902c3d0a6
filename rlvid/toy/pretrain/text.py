"""Stage 0: the tokenizer, CLIP's byte-pair encoding with the words of the captions as its merges."""

import re

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlvid.world.captions import Labels, write_caption
from rlvid.world.render import BACKGROUNDS, COLOURS, MOTIONS, SUBJECTS

CONTEXT_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def caption_words() -> set[str]:
    """Returns all words of the captions."""
    words: set[str] = set()
    for subject in SUBJECTS:
        for motion in MOTIONS:
            for template in range(4):
                for phrasing in range(3):
                    caption = write_caption(Labels(subject, "orange", "black", motion), template, phrasing)
                    words.update(re.findall(r"[a-z]+", caption))
    words.update(COLOURS, BACKGROUNDS)
    return words


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level, so that any text has tokens; each word of a caption is one token.

    The end token has the largest id.
    """
    words = caption_words()
    letters = [chr(c) for c in _byte_alphabet()]
    tokens = letters + [c + "</w>" for c in letters]
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT_LENGTH,
    )


def _byte_alphabet() -> list[int]:
    """Code points that stand for the 256 bytes in byte-level BPE: printable ones as they are, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + n for n in range(256 - len(printable))]


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModel:
    """Builds the text encoder: two layers of four heads, trained together with the denoiser."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
