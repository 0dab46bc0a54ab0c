"""Preference alignment of Llama-family models on AWS Trainium, CPU and CUDA."""

__version__ = "0.1.0"
PYTHON = ((3, 10), (3, 13))
"""The oldest and the newest Python that the tests were run on."""
TORCH = ((2, 9), (2, 13))
"""The same of torch: 2.9 is the last one of PyTorch/XLA, to which trn1 is bound."""
