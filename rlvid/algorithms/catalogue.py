"""The methods by name."""

from rlvid.algorithms.alignprop import AlignProp
from rlvid.algorithms.base import Algorithm
from rlvid.algorithms.ddpo import Ddpo
from rlvid.algorithms.dpok import Dpok
from rlvid.algorithms.draft import Draft, DraftLV
from rlvid.algorithms.grpo import Grpo
from rlvid.algorithms.instructvideo import InstructVideo
from rlvid.algorithms.raft import Raft
from rlvid.algorithms.rwr import Rwr

ALGORITHMS: dict[str, type[Algorithm]] = {
    "instructvideo": InstructVideo,
    "draft": Draft,
    "draft-lv": DraftLV,
    "alignprop": AlignProp,
    "ddpo": Ddpo,
    "dpok": Dpok,
    "grpo": Grpo,
    "rwr": Rwr,
    "raft": Raft,
}
