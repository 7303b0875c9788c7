"""Parts of the commands: the command line, loading a run, Kaggle, studies."""
