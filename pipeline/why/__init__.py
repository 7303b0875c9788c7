"""The cause of a spike: a run is forked before it, and one thing is changed at a time."""
