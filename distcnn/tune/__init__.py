"""Measured before a run: which learning rate, which tile size. Real steps of the trainer, of which nothing stays."""
