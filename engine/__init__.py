"""What the entry points share, one concern a file."""
