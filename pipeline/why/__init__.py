"""Why a run spiked: the run is forked before the spike, and one thing is changed at a time."""
