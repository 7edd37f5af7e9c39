"""The best pages of each row under its own budget."""
