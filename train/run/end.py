"""The end of a run, kept in its folder: the same command, given again, has nothing to do and says what came out."""

import json
from pathlib import Path

from train.side_files import write_whole

END = "end.json"


def write_end(folder: Path, step: int, scores: dict[str, float], grid: Path | None) -> None:
    """Keep what the final evaluation after `step` steps found.

    Args:
        folder: of the run.
        step: the last one.
        scores: of the evaluation.
        grid: its picture, below the folder.
    """
    kept = {"step": step, "scores": scores, "grid": None if grid is None else str(grid.relative_to(folder))}
    write_whole(folder / END, json.dumps(kept, indent=1) + "\n")


def read_end(folder: Path, step: int) -> tuple[dict[str, float], Path | None] | None:
    """Scores and grid of a run that ended at `step`; None where it ended elsewhere, or what was kept is damaged."""
    try:
        kept = json.loads((folder / END).read_text())
        scores = {str(name): float(value) for name, value in kept["scores"].items()}
        grid = None if kept["grid"] is None else folder / kept["grid"]
        ended = kept["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (scores, grid) if ended == step and (grid is None or grid.is_file()) else None
