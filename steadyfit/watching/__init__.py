"""Judging the steps of a training, recording what spiked, and reacting to it."""
