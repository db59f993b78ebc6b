"""What the method is used for from the command line: train, compare, look, export."""
