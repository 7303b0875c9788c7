"""What everything stands on: errors, files, run folders, provenance, the form of a submission."""
