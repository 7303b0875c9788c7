"""What the commands are made of: the command line, loading a run, Kaggle, studies."""
