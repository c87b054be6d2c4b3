"""What a training writes down: a record an epoch, and where asked one for every few steps; as JSON lines on disk."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoints import write_whole
from .checks import one_of


@dataclass
class History:
    """records: one an epoch, with

        epoch, lr (at its end), train_loss, grad_norm (mean over steps, before clipping), test_loss,
        test_accuracy, test_top5 (shares of right answers, in one and in five guesses), average_accuracy (of the
        averaged weights, where the recipe has them), images_per_second (training, with what is logged and
        saved on the way), seconds (with the test), peak_memory (bytes: of the process, or of the GPU)

    steps: where asked for, one for every few steps, with step, lr, loss, grad_norm.
    """

    records: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One quantity over all epochs, or over all steps that were written down for a name that only those have."""
        rows = self.records
        if self.steps and name in self.steps[0] and not (rows and name in rows[0]):
            rows = self.steps
        if rows:
            one_of("history column", name, rows[0])
        return [row[name] for row in rows]

    def save(self, path: str | Path) -> None:
        """Write as JSON lines, steps first, whole or not at all."""
        text = "".join(json.dumps(row) + "\n" for row in (*self.steps, *self.records))
        write_whole(Path(path), lambda temporary: temporary.write_text(text))

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what `save` wrote. Raises `ValueError` that names the file where it is none."""
        try:
            rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
            if odd := [row for row in rows if not isinstance(row, dict)]:
                raise ValueError(f"a line holds {odd[0]!r}")
        except ValueError as error:
            raise ValueError(f"{path} is no history of a training, or damaged ({error}).") from error
        steps = [row for row in rows if "step" in row]
        return cls([row for row in rows if "epoch" in row and "step" not in row], steps)
