"""The format of preference pairs: what a study exports, and what a reward is fitted on."""

import pyarrow as pa

PAIRS = pa.schema(
    [
        ("prompt", pa.string()), ("a", pa.list_(pa.binary())), ("b", pa.list_(pa.binary())),
        ("preference", pa.float32()), ("axis", pa.string()), ("annotator", pa.string()), ("a_model", pa.string()),
        ("b_model", pa.string()), ("set", pa.string()), ("steps", pa.int32()), ("index", pa.int32()),
        ("copy", pa.int32()), ("fps", pa.float32()),
    ]
)  # fmt: skip
"""One row an answer. ``a`` and ``b`` are videos, a PNG file each frame. The preference is 1 for ``a``, 0 for ``b`` and
0.5 for a tie. All answers on a pair have the same ``a``."""
