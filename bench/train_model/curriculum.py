"""What to train on next: a ladder of difficulty per task, climbed on held-out first-asking accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from amem.bench.scene import Level
from amem.bench.world import CROSS_CHUNK_TASKS, GATE, TASKS

LADDER = (
    Level(1, (2, 4), (1, 2), 1, real=0.0, fillers=(0, 0), mixed=0, turns=6, variants=False, system=0.0),
    Level(2, (2, 4), (1, 2), 1, 0.2, 0.7, 0.4, (0, 0), 0, 6, False, 0.0),
    Level(2, (2, 4), (1, 3), 1, 0.3, 0.3, 0.3, (0, 1), 0, 6, False, 0.0),
    Level(2, (2, 5), (1, 4), 2, 0.4, 0.1, 0.25, (0, 2), 1, 7, True, 0.05, later=0.15),
    replace(GATE, turns=8, spelled=0.25, later=0.15),
    replace(GATE, people=(2, 10), attributes=(1, 5), spelled=0.25, fillers=(0, 8), mixed=4, turns=8, later=0.15),
)
PASS = 0.8
TRAINED = tuple(t for t in TASKS if t != "unknown")
"""At this size refusing costs answers: with the task, one known fact in five was answered "I do not know."."""


def needs(task: str) -> dict[str, int]:
    """Levels of other tasks that must be reached before this one is trained."""
    if task in ("fact", "cut", "speaker"):
        return {}
    if task == "update":
        return {"fact": 1, "cut": 1}
    return {"fact": 1}


@dataclass
class Curriculum:
    """Level and latest accuracy per task. Plain data: saved in checkpoints."""

    levels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TASKS, 0))
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 0.0))

    def active(self) -> list[str]:
        return [t for t in TRAINED if all(self.levels[o] >= n for o, n in needs(t).items())]

    def weights(self) -> dict[str, float]:
        """Share of each active task: more for those that do not pass, and for those that bind across chunks."""
        out = {}
        for task in self.active():
            done = self.levels[task] == len(LADDER) - 1 and self.accuracy[task] > 0.85
            out[task] = (0.5 if done else 1.0) * (1.5 if task in CROSS_CHUNK_TASKS else 1.0)
            if self.accuracy[task] < 0.7:
                out[task] *= 2
        return out

    def update(self, accuracy: dict[str, float]) -> None:
        """Take new accuracies; a task that passes climbs one level."""
        for task, value in accuracy.items():
            self.accuracy[task] = value
            if value >= PASS and self.levels[task] < len(LADDER) - 1:
                self.levels[task] += 1
