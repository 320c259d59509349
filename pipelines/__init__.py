"""What people run, end to end, and the command line."""
