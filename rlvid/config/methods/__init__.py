"""The settings of each method; ``method.name`` chooses one. Defaults are those of the papers."""

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Discriminator, Tag

from rlvid.config.methods.policy_gradient import DdpoConfig, DpokConfig, GrpoConfig
from rlvid.config.methods.reward_gradient import AlignPropConfig, DraftConfig, DraftLVConfig, InstructVideoConfig
from rlvid.config.methods.supervised import RaftConfig, RwrConfig


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    return {"name": "instructvideo"} | value if isinstance(value, dict) else value


def _name_of(value: Any) -> Any:
    return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)


AnyMethod = Annotated[
    Annotated[InstructVideoConfig, Tag("instructvideo")]
    | Annotated[DraftConfig, Tag("draft")]
    | Annotated[DraftLVConfig, Tag("draft-lv")]
    | Annotated[AlignPropConfig, Tag("alignprop")]
    | Annotated[DdpoConfig, Tag("ddpo")]
    | Annotated[DpokConfig, Tag("dpok")]
    | Annotated[GrpoConfig, Tag("grpo")]
    | Annotated[RwrConfig, Tag("rwr")]
    | Annotated[RaftConfig, Tag("raft")],
    Discriminator(_name_of),
    BeforeValidator(_named),
]
METHODS: dict[str, Any] = {get_args(each)[1].tag: get_args(each)[0] for each in get_args(get_args(AnyMethod)[0])}
"""The settings of each method, by its name."""
VALUE_METHODS = ", ".join(name for name, kind in METHODS.items() if not kind.needs_gradient)
"""The methods that need a reward's value alone, as a message lists them."""
GRADIENT_METHODS = ", ".join(name for name, kind in METHODS.items() if kind.needs_gradient)
"""The methods that back-propagate the reward, as a message lists them."""
