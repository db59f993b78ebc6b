"""What all tests share: no windows, and no more threads than the machine of CI has. Tests seed themselves."""

import os

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
