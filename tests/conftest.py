"""What all tests share: no windows, and one thread. Tests seed themselves."""

import os

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import torch

# The tensors of the tests are tiny: more threads gain nothing, and where other programs want the cores too, threads
# that wait for one another make some tests fifty times slower.
torch.set_num_threads(1)
