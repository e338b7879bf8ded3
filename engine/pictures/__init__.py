"""PNGs for people: curves, confusion, mistakes, sweeps, samples. Nothing here computes a number that a file keeps."""
