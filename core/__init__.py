"""Common ground: errors, files, run folders, provenance, the form of a submission."""
