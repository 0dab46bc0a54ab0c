"""Preference alignment of Llama-family models on AWS Trainium, CPU and CUDA."""

__version__ = "0.1.0"
