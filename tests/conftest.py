"""What all tests share."""

import torch

# as in training, where each worker has one: on a busy machine more wait for each other
torch.set_num_threads(1)
