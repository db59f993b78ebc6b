"""What the method is compared with: other ways to choose where to look, and a network that sees the whole image."""
