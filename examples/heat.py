"""A heat equation that can move between hosts while it runs: `migfw run examples/heat.py:Heat`."""

import numpy as np
from corefw_machine_python import guest


class Heat(guest.Program):
    """A plate, cold at first, with one hot edge."""

    grid = guest.array("grid", shape=(1024, 1024), dtype="float64")
    step = guest.field("u64")

    def setup(self) -> None:
        self.grid[0, :] = 100.0

    def tick(self) -> None:
        inner = self.grid[1:-1, 1:-1]
        inner += 0.1 * (
            self.grid[:-2, 1:-1] + self.grid[2:, 1:-1] + self.grid[1:-1, :-2] + self.grid[1:-1, 2:] - 4 * inner
        )
        self.step += 1

    def verify(self) -> dict[str, float]:
        # The plate is symmetric and its edge stays hot, so a lost page shows.
        if (self.grid[0] != 100.0).any() or not np.allclose(self.grid, self.grid[:, ::-1]):
            raise AssertionError(f"the plate is damaged at step {self.step}")
        return {"step": self.step, "mean": float(self.grid.mean())}
