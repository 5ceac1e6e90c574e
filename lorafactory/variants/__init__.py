"""One registered part a file: paper, equation in our letters, where we differ and why."""
