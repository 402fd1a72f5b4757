"""What the doctor says about one configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Verdict:
    """Sentences about a configuration.

    Attributes:
        name: of the configuration's file.
        kind: what it starts, in a few words.
        obstacles: why this machine cannot run it; none if it can.
        notes: what its user should know.
    """

    name: str
    kind: str = "unknown"
    obstacles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.obstacles

    def refuse(self, sentence: str) -> None:
        """Add an obstacle."""
        self.obstacles.append(sentence)

    def note(self, sentence: str) -> None:
        """Add a note."""
        self.notes.append(sentence)
