"""What torchrun starts in test_ranks.py: continues runs, one after the other, on all ranks together.

Arguments: for each run, the frames to train for and its folder, as in 384:runs/a.
"""

import json
import sys
from pathlib import Path

import torch

from mtrl_vec.torchrun import join
from mtrl_vec.train import Trainer


def main(runs: list[str]) -> None:
    ranks = join("cpu")
    torch.set_num_threads(1)
    for frames, _, folder in (run.partition(":") for run in runs):
        halves = json.loads((Path(folder) / "config.json").read_text())["runtime"]["double_buffer"]
        Trainer.resume(folder, ranks=ranks, total_frames=int(frames), num_workers=2 if halves else 1).train()
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1:])
