"""The three-stage trainer: `torchrun train/stage1.py`, `stage2.py`, `stage3.py`."""
