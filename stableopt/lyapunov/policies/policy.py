"""What to do about an alarm: the choice, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stableopt.optim.settings import check_number

__all__ = ["ACTING", "Policy"]

ACTING = ("raise", "rollback", "shrink")
"""Actions that all processes take together, the strongest first."""


@dataclass(frozen=True)
class Policy:
    """State what is done about the alarms of each channel.

    ====================  ==========================================================================================
    ``observe``           record the alarm, nothing else
    ``warn``              and warn, once per cool-down
    ``raise``             and raise :class:`stableopt.errors.StabilityError`, after the step and its record are complete
    ``skip``              let a step with a loss or a gradient that is not finite change nothing; for ``nonfinite`` only
    ``shrink``            multiply all learning rates by ``factor``, until ``patience`` steps have passed without an alarm
    ``rollback``          go back to a snapshot from before the fault, and shrink
    ====================  ==========================================================================================

    All but ``observe`` and ``raise`` warn, too.

    Args:
        nonfinite: loss, gradient, parameter or buffer that is not finite.
        increase: the energy rises too often within a step, on its own batch.
        sublevel: the energy has left the level on which the run began.
        level: the energy stays above its best level.
        other: every other channel, one of your own.
        cooldown: steps after an alarm during which the same channel has no further effect. A rollback cools all channels down, but
            for one of parameters that are not finite again.
        factor: of a shrinking, in (0, 1); it multiplies what schedulers set, and never replaces it. All shrinkings together stop
            at 2**-10, the first one does not.
        patience: steps without an alarm after which one shrinking is undone; as many steps skipped in a row raise.
        snapshots: how many snapshots a rollback has to choose from; each takes the memory of the model and the optimizer's state.
        snapshot_every: steps between two snapshots.
        margin: steps before the beginning of a fault at which a snapshot is taken to be sound.
        retries: how many rollbacks there may be until the learning rates have recovered, or ``patience`` steps without an alarm
            have passed where they are not shrunk; the next one raises.

    Raises:
        ValueError: if an action is unknown or not for its channel, or a number is out of range.
        TypeError: if a number has the wrong type.

    Note:
        Nothing acts by default. An intervention is a change of the run on the evidence of a test that errs at times: let it be seen
        that the alarms are right first.

    Examples:
        >>> Policy().action("level"), Policy(level="rollback").action("level"), Policy(other="raise").action("mine")
        ('warn', 'rollback', 'raise')
        >>> Policy(level="skip")
        Traceback (most recent call last):
        ValueError: Policy can skip steps for nonfinite only, not for level: the alarm comes after the step; use shrink or rollback.
    """

    nonfinite: str = "warn"
    increase: str = "warn"
    sublevel: str = "warn"
    level: str = "warn"
    other: str = "warn"
    cooldown: int = 50
    factor: float = 0.5
    patience: int = 100
    snapshots: int = 2
    snapshot_every: int = 100
    margin: int = 20
    retries: int = 3

    channels: ClassVar[tuple[str, ...]] = ("nonfinite", "increase", "sublevel", "level", "other")
    """The channels that have an action of their own; ``other`` stands for all the rest."""
    actions: ClassVar[tuple[str, ...]] = ("observe", "warn", "raise", "skip", "shrink", "rollback")
    """What may be done."""

    def __post_init__(self) -> None:
        """Check every field."""
        for channel in self.channels:
            action = getattr(self, channel)
            if action not in self.actions:
                raise ValueError(f"Policy needs {channel} as one of {', '.join(self.actions)}, got {action!r}.")
            if action == "skip" and channel != "nonfinite":
                raise ValueError(
                    f"Policy can skip steps for nonfinite only, not for {channel}: the alarm comes after the step; "
                    "use shrink or rollback."
                )
        for name, least in (
            ("cooldown", 0), ("patience", 1), ("snapshots", 1), ("snapshot_every", 1), ("margin", 0), ("retries", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Policy needs {name} as an integer >= {least}, got {value!r}.")
            if value < least:
                raise ValueError(f"Policy needs {name} as an integer >= {least}, got {value!r}.")
        check_number("factor", self.factor, high=1.0)
        if self.factor == 0.0:
            raise ValueError("Policy needs a factor between 0 and 1, got 0.0: it would stop the training; use raise.")
        reach = (self.snapshots - 1) * self.snapshot_every
        if self.uses("rollback") and reach < self.margin:
            raise ValueError(
                f"the snapshots of a Policy reach back at least (snapshots - 1) * snapshot_every = {reach} steps, and margin asks "
                f"for {self.margin}: raise one of the former or lower the latter."
            )

    @classmethod
    def of(cls, choice: Policy | str) -> Policy:
        """Return a policy, or the one that has one action for all channels.

        Args:
            choice: a policy, or one of the actions.

        Raises:
            TypeError: if it is something else.
            ValueError: if the action is unknown or is not for all channels.

        Examples:
            >>> Policy.of("raise").level, Policy.of(Policy(level="raise")).increase
            ('raise', 'warn')
        """
        if isinstance(choice, Policy):
            return choice
        if not isinstance(choice, str):
            raise TypeError(f"a policy is a Policy or one of {', '.join(cls.actions)}, got {choice!r}.")
        if choice == "skip":
            raise ValueError('"skip" is for steps that are not finite only: use Policy(nonfinite="skip").')
        return cls(choice, choice, choice, choice, choice)

    @classmethod
    def observe(cls) -> Policy:
        """Return the policy that records alarms and does nothing else.

        Examples:
            >>> Policy.observe() == Policy.of("observe")
            True
        """
        return cls.of("observe")

    def slot(self, channel: str) -> str:
        """Return the channel whose action holds for a channel: itself, or ``other``.

        Examples:
            >>> Policy().slot("level"), Policy().slot("mine")
            ('level', 'other')
        """
        return channel if channel in self.channels else "other"

    def action(self, channel: str) -> str:
        """Return what is done about the alarms of a channel.

        Examples:
            >>> Policy(other="observe").action("mine")
            'observe'
        """
        return str(getattr(self, self.slot(channel)))

    def uses(self, *actions: str) -> bool:
        """Whether some channel has one of these actions.

        Examples:
            >>> Policy().uses("warn"), Policy().uses("shrink", "rollback")
            (True, False)
        """
        return any(getattr(self, channel) in actions for channel in self.channels)
