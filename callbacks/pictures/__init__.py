"""Pictures that a run leaves in its folder."""
