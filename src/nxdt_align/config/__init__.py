"""The configuration: NxDT's YAML, read with Hydra and OmegaConf into frozen dataclasses, and checked."""
