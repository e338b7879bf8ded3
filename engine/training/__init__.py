"""What an epoch is made of, beside the loop itself, which is in train.py. Nothing here writes a file."""
