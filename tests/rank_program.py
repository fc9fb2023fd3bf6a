"""What torchrun starts in test_ranks.py: continues runs, one after the other, on all ranks together.

Arguments: for each run, the frames to train for and its folder, as in 384:runs/a.
"""

import sys

import torch

from mtrl_vec.torchrun import join
from mtrl_vec.train import Trainer


def main(runs: list[str]) -> None:
    ranks = join("cpu")
    torch.set_num_threads(1)
    for frames, _, folder in (run.partition(":") for run in runs):
        Trainer.resume(folder, ranks=ranks, total_frames=int(frames), num_workers=1).train()
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1:])
