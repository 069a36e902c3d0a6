"""The settings that all methods share."""

from typing import ClassVar

from rlvid.config.section import Section


class Method(Section):
    """The settings of a method."""

    needs_gradient: ClassVar[bool]
    """Whether the method back-propagates the reward; other methods use only its value."""
    needs_clips: ClassVar[bool] = False
    """Whether the method starts from clips; other methods start from noise."""
    eta: ClassVar[float] = 0.0
    """DDIM's eta when sampling.eta does not say."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Settings that runs of earlier versions lack: they compute what their default says."""

    @property
    def needs_base(self) -> bool:
        """Whether predictions of the base model are compared with during training."""
        return False

    def kept_states(self, steps: int) -> int:
        """Returns the most latents of a video's chain that are kept to be trained on."""
        return 0

    def learning_steps(self, steps: int) -> range:
        """Returns the steps of the chain at which the denoiser may get gradient, 0 the noisiest."""
        return range(steps)

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """Raises ValueError where the method does not fit the chain of ``steps`` and ``eta``, or the batch."""
