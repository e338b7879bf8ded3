"""A run's folder and all that is kept in it: names, locks, checkpoints, trackers; and what of it may be trusted."""
