"""Training: what `training/train.py` puts together. Every file is one part; the loop stands in the program."""
