"""What makes the same numbers faster on a CPU. Nothing in the story imports from here."""
