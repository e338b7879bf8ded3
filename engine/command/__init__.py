"""From a typed command line to main(): help, completion, refusals, resuming, sweeps. Nothing here imports torch."""
