"""What lies between the base and what was trained: a checkpoint, or the mean of several, with strengths by block.

Each is a point in weight space: towards the base, block by block (WiSE-FT, Wortsman et al. 2022,
https://arxiv.org/abs/2109.01903), and between checkpoints (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482).
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..jobs import RunFolder
from ..painting.orders import Cell, WallOrder, checkpoint_trace, saved_base
from ..strengths import Strengths


@dataclass(frozen=True)
class Mixture:
    steps: tuple[int, ...]
    """The checkpoint, or those whose mean it is."""
    strengths: Strengths

    @property
    def is_mean(self) -> bool:
        return len(self.steps) > 1

    @property
    def title(self) -> str:
        steps = ", ".join(map(str, self.steps))
        return f"{f'the mean of steps {steps}' if self.is_mean else f'step {steps}'} at strength {self.strengths}"

    def files(self, order: WallOrder, cells: Iterable[Cell], rank: int = 0) -> dict[Cell, Path]:
        """Where its pictures are, or will be: under names made of all that makes each, so that none shows another.

        Where a wall draws the same, it is the wall's. Of `cells`, prompt and seed count; `rank` is that of a mean, 0 if
        it is the runs' own.

        Raises:
            UserError: if a checkpoint is not there.
        """
        if not self.is_mean and not self.strengths.blocks:
            step, at = self.steps[0], self.strengths.everywhere
            own = {cell: Cell(step, at, cell.prompt, cell.seed) for cell in cells}
            files = order.files(own.values())
            return {cell: files[mine] for cell, mine in own.items()}
        run = RunFolder(Path(order.run))
        made = {
            "base": saved_base(run, self.steps[-1]),
            "run": run.name,
            "checkpoints": [[step, *checkpoint_trace(run, step)] for step in self.steps],
            "rank": rank if self.is_mean else 0,
            "strengths": [float(self.strengths.everywhere), *self.strengths.blocks],
            "look": {**asdict(order.look), "guidance": float(order.look.guidance)},
        }
        return {
            cell: run.path / "compare" / f"mixed-{name_of({**made, 'prompt': cell.prompt, 'seed': cell.seed})}.png"
            for cell in cells
        }

    def command(self, run: Path, rank: int = 0) -> str:
        """What writes it into files, verified."""
        words = ["lorasmith", "interpolate" if self.is_mean else "export", str(run)]
        words += ["--steps", ",".join(map(str, self.steps))] if self.is_mean else ["--step", str(self.steps[0])]
        if rank:
            words += ["--rank" if self.is_mean else "--bake", str(rank)]
        words += ["--strength", f"{self.strengths.everywhere:.15g}"]
        for block, at in self.strengths.blocks:
            words += ["--block", f"{block}={at:.15g}"]
        return shlex.join(words)


def name_of(made: object) -> str:
    """A name for what is made of all this."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
